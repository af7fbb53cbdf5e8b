"""Writes rollouts to a JSONL file as they end, a line each, so that a run can be looked at while it goes on.

A line's size is linear in the tokens of its rollout: turns are written with what they add, and segments name their
turns. `recorded_turns` and `recorded_segments` put them together again.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from gymlink.align import ID_FIELDS, segment_of
from gymlink.rollout.figures import Figures
from gymlink.rollout.response import output_items
from gymlink.types import ForkCause, Logprobs, Rollout, Segment, Turn

_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
Detail = Literal["full", "text", "off"]
Split = Literal["train", "val"]


class Recorder:
    """Appends to `path`; the file is made with the first rollout.

    `detail` "full" writes the turns (ids and logprobs, these in single precision) and which of them each segment trains
    too, "text" only what a person reads, "off" writes nothing.
    """

    def __init__(self, path: Path, *, detail: Detail = "full") -> None:
        self.path = path
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        """Tells the lines of one run from those of another in the same file."""
        self._detail = detail

    def write(self, rollout: Rollout, *, batch: int, split: Split = "train") -> None:
        """`batch` is the number of the collection that the rollout belongs to, from 0."""
        self.append(self.line(rollout, batch=batch, split=split))

    def line(self, rollout: Rollout, *, batch: int, split: Split = "train", figures: Figures | None = None) -> bytes:
        """What `write` appends; empty for the detail "off". `figures` are the rollout's, where more is known now."""
        if self._detail == "off":
            return b""
        line = self._line(rollout, batch, split, figures or Figures.of(rollout))
        return orjson.dumps(line, option=_OPTIONS)

    def append(self, line: bytes) -> None:
        """Append a line that this or another process made."""
        if line:
            with self.path.open("ab") as file:
                file.write(line)

    def _line(self, rollout: Rollout, batch: int, split: Split, figures: Figures) -> dict[str, Any]:
        agent = rollout.request.row.get("agent_ref", {}).get("name")
        line: dict[str, Any] = {
            "run": self.run,
            "split": split,
            "batch": batch,
            "index": rollout.request.index,
            "group": rollout.request.group,
            "rollout_id": rollout.rollout_id,
            "agent": agent,
            "status": rollout.status.value,
            "reward": rollout.reward,
            "failure": rollout.failure,
            "detail": rollout.detail,
            "attempts": rollout.attempts,
            "turns": len(rollout.turns),
            "prefix_breaks": {cause.value: count for cause, count in rollout.prefix_breaks.items()},
            "tokens_sampled": rollout.sampled_tokens,
            "tokens_trained": figures.tokens_trained,
            "tokens_dropped": figures.dropped,
            "seconds": round(rollout.seconds, 4),
            "seconds_in_model": round(rollout.seconds_in_model, 4),
            "weight_versions": sorted({turn.weight_version for turn in rollout.turns}),
            "input": rollout.request.row.get("responses_create_params", {}).get("input"),
            "output": _readable(rollout.response),
        }
        if self._detail == "full":
            line["trajectory"] = [_written(turn) for turn in rollout.turns]
            line["segments"] = [
                {"turns": segment.turns, "trained_turns": segment.trained_turns} for segment in rollout.segments
            ]
        return line


def _written(turn: Turn) -> dict[str, Any]:
    return {
        "parent": turn.parent,
        "cause": turn.cause,
        "added_ids": np.array(turn.added_ids.tolist(), np.int32),
        "completion_ids": np.array(turn.completion_ids.tolist(), np.int32),
        "logprobs": np.array(turn.logprobs.tolist(), np.float32),  # in as few digits as tell it from its neighbours
        "finish_reason": turn.finish_reason,
        "weight_version": turn.weight_version,
        "oldest_weight_version": turn.oldest_weight_version,
    }


def recorded_turns(line: Mapping[str, Any]) -> list[Turn]:
    """The turns of a rollout, from its line of `rollouts.jsonl` (detail "full"); logprobs in single precision.

    Raises:
        KeyError: the line was written with another detail.
    """
    turns: list[Turn] = []
    for index, told in enumerate(line["trajectory"]):
        extends = None if told["parent"] is None else turns[told["parent"]]
        values = {name: value for name, value in told.items() if name != "parent"}
        cause = None if told["cause"] is None else ForkCause(told["cause"])
        logprobs = Logprobs(np.array(told["logprobs"], np.float32).tolist())
        turns.append(Turn(**{**values, "cause": cause, "logprobs": logprobs}, extends=extends, index=index))
    return turns


def recorded_segments(line: Mapping[str, Any]) -> list[Segment]:
    """The segments of a rollout, as `recorded_turns`."""
    turns = recorded_turns(line)
    return [segment_of(turns, one["turns"][-1], trained=one["trained_turns"]) for one in line["segments"]]


def _readable(response: Mapping[str, Any] | None) -> list[Any]:
    """Gym's output items without the ids that Gym may hang on them: the segments hold those."""
    return [{k: v for k, v in item.items() if k not in ID_FIELDS} for item in output_items(response)]
