"""`rollouts.jsonl` says all that was sampled, once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gymlink.align import build_segments
from gymlink.rollout import Recorder, recorded_segments, recorded_turns
from gymlink.types import ForkCause, Rollout, RolloutRequest, RolloutStatus, Turn
from whole_turns import WholeTurn, linked

ROW = {"responses_create_params": {"input": "go"}, "agent_ref": {"name": "agent"}}
RECORDER = Recorder(Path("unused"))
ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)


@st.composite
def trees(draw: st.DrawFn) -> list[WholeTurn]:
    turns: list[WholeTurn] = []
    for index in range(draw(st.integers(0, 6))):
        parent = draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None
        held = () if parent is None else turns[parent].prompt + turns[parent].said
        said = draw(ids)
        logprobs = draw(st.lists(st.floats(-30, 0), min_size=len(said), max_size=len(said)).map(tuple))
        cause = ForkCause.EDITED if index and parent is None else None
        versions = {
            "weight_version": draw(st.integers(0, 9)),
            "oldest_weight_version": draw(st.sampled_from([None, 0])),
        }
        turns.append(WholeTurn((*held, 1, *draw(ids)), said, logprobs, parent, {"cause": cause, **versions}))
    return turns


def rollout_of(turns: tuple[Turn, ...], policy: str = "fork", last: int | None = None) -> Rollout:
    segments, dropped = build_segments(turns, on_history_rewrite=policy, last_turn=last)
    return Rollout(
        RolloutRequest(ROW, 0),
        "0.r",
        RolloutStatus.COMPLETED,
        0.5,
        segments=segments,
        turns=turns,
        sampled_tokens=sum(len(turn.completion_ids) for turn in turns),
        dropped=dropped,
    )


@settings(deadline=None)
@given(trees(), st.sampled_from(["fork", "last", "mask"]), st.data())
def test_turns_and_segments_come_back_in_single_precision(
    told: list[WholeTurn], policy: str, data: st.DataObject
) -> None:
    turns = linked(told)
    last = data.draw(st.sampled_from([None, *range(len(turns))]))
    rollout = rollout_of(turns, policy, last)
    line = json.loads(RECORDER.line(rollout, batch=0))
    back = recorded_turns(line)
    for turn, again in zip(turns, back, strict=True):
        assert (again.prompt_ids, again.completion_ids) == (turn.prompt_ids, turn.completion_ids)
        assert [*again.logprobs] == [float(np.float32(one)) for one in turn.logprobs]
        for name in ("index", "parent", "cause", "finish_reason", "weight_version", "oldest_weight_version"):
            assert getattr(again, name) == getattr(turn, name)
    for segment, again in zip(rollout.segments, recorded_segments(line), strict=True):
        for name in ("prompt_ids", "response_ids", "response_mask", "turns", "trained_turns"):
            assert getattr(again, name) == getattr(segment, name)
        assert [*again.response_logprobs] == [float(np.float32(one)) for one in segment.response_logprobs]


def test_a_failed_rollouts_turns_are_written_too() -> None:
    failed = Rollout(
        RolloutRequest(ROW, 0), "0.r", RolloutStatus.FAILED, None, turns=(Turn((1,), (2,), (-1.0,), "stop"),)
    )
    line = json.loads(RECORDER.line(failed, batch=0))
    assert [turn.ids for turn in recorded_turns(line)] == [(1, 2)]
    assert recorded_segments(line) == []


def test_a_line_is_linear_in_its_rollout_whatever_branches_it_has() -> None:
    def size(branches: int) -> int:
        trunk = WholeTurn(tuple(range(2000)), (7,), (-0.5,))
        leaves = [WholeTurn((*trunk.prompt, 7, 8), (number,), (-0.5,), 0) for number in range(branches)]
        return len(RECORDER.line(rollout_of(linked([trunk, *leaves])), batch=0))

    assert size(20) < 1.5 * size(1)


def test_a_logprob_takes_no_more_digits_than_its_precision() -> None:
    logprob = float(np.float32(-0.1))
    line = RECORDER.line(rollout_of((Turn((1,), (2,), (logprob,), "stop"),)), batch=0)
    assert b'"logprobs":[-0.1]' in line
    assert math.isclose(recorded_turns(json.loads(line))[0].logprobs[0], logprob, rel_tol=0, abs_tol=0)


def test_text_holds_no_ids() -> None:
    line = json.loads(
        Recorder(Path("unused"), detail="text").line(rollout_of((Turn((1,), (2,), (-1.0,), "stop"),)), batch=0)
    )
    assert not {"trajectory", "segments"} & line.keys()
