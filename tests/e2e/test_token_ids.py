"""Token ids that stay at the gateway, and ids that travel through Gym: the same batches, from the same real servers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gym_batches import ScriptedPolicy, collect, reply, row, rows_of, told
from gymlink.session import Session
from gymlink.types import ForkCause, Rollout, RolloutRequest, RolloutStatus

pytestmark = [pytest.mark.slow, pytest.mark.gym]


@pytest.fixture
def sessions(session: Session, policy: ScriptedPolicy, session_with_ids: Session) -> Sequence[Session]:
    """One session for each way of the ids, over the same environments and with the same policy."""
    policy.reply = reply
    return session, session_with_ids


def both(sessions: Sequence[Session], rows: Sequence[dict[str, Any]], *, one_by_one: bool = False) -> list[Rollout]:
    """What capture collects, once it is seen to be what messages collects."""
    captured, carried = (
        [collect(session, [row])[0] for row in rows] if one_by_one else [*collect(session, rows)]
        for session in sessions
    )
    assert [told(rollout) for rollout in captured] == [told(rollout) for rollout in carried]
    return captured


def carries_ids(rollout: Rollout) -> bool:
    return "token_ids" in json.dumps(rollout.response)


@pytest.mark.parametrize("name", ["keypad", "stockroom"])
def test_both_ways_give_the_same_batches(sessions: Sequence[Session], name: str) -> None:
    rollouts = both(sessions, rows_of(name, 6))
    assert {rollout.status for rollout in rollouts} == {RolloutStatus.COMPLETED}
    assert all(len(rollout.turns) > 1 and len(rollout.segments) == 1 for rollout in rollouts)
    assert all(rollout.trained_tokens == rollout.sampled_tokens for rollout in rollouts)


def test_no_id_travels_through_gym_unless_asked_for(sessions: Sequence[Session]) -> None:
    (captured,), (carried,) = (collect(session, rows_of("keypad", 1)) for session in sessions)
    assert not carries_ids(captured)
    assert carries_ids(carried)


def test_a_rewritten_history(sessions: Sequence[Session]) -> None:
    rows = [row("forgetful", f"write {n}", forget_every=1 + n % 2) for n in range(4)]
    rollouts = both(sessions, rows, one_by_one=True)
    assert [len(rollout.segments) for rollout in rollouts] == [2, 1, 2, 2]
    assert set(rollouts[0].prefix_breaks) == {ForkCause.COMPACTED}


def test_rollouts_that_fail_and_that_are_cut(sessions: Sequence[Session]) -> None:
    rows = [row("flaky", f"write {n}", fail_every=2) for n in range(3)]
    rows.append(row("forgetful", "write", forget_every=1))
    rows[-1]["responses_create_params"]["max_output_tokens"] = 5
    rollouts = both(sessions, rows, one_by_one=True)
    assert [rollout.failure for rollout in rollouts] == [None, "http", None, None]
    assert [rollout.status.value for rollout in rollouts[2:]] == ["completed", "truncated"]


def test_an_agent_that_drops_the_rollouts_id(sessions: Sequence[Session]) -> None:
    rows = [row("nameless", f"write {n}") for n in range(6)]
    for rollout in collect(sessions[1], rows):
        assert rollout.status is RolloutStatus.COMPLETED, rollout.detail
        assert [turn.parent for turn in rollout.turns] == [None, 0]
        assert rollout.trained_tokens == rollout.sampled_tokens
    assert sessions[1].service.totals.unattributed_tokens == 0

    (lost,) = collect(sessions[0], rows[:1])
    assert (lost.failure, lost.sampled_tokens) == ("no_model_call", 0)
    assert "2 came without an id while it ran" in str(lost.detail)
    assert "gateway.token_ids: messages" in str(lost.detail)


def test_ids_that_the_policy_never_sampled_train_nothing(sessions: Sequence[Session]) -> None:
    (rollout,) = collect(sessions[1], [row("nameless", "write", invents=True)])
    assert (rollout.failure, rollout.trained_tokens) == ("alignment", 0)
    assert "Of the 2 whose token ids Gym told, 1 are not known" in str(rollout.detail)
    assert rollout.sampled_tokens == sum(rollout.dropped.values()) > 0


def test_a_pause_for_new_weights_loses_no_rollout(sessions: Sequence[Session], policy: ScriptedPolicy) -> None:
    session = sessions[0]
    engine, at_once = policy.engine, 16
    engine.latency_s, before = 0.3, len(engine.calls)
    with ThreadPoolExecutor(1) as trainer:
        requests = [RolloutRequest(row, index) for index, row in enumerate(rows_of("keypad", 2 * at_once))]
        collecting = trainer.submit(session.collect, requests)
        while len(engine.calls) < before + at_once:  # the first turns of the first rollouts are being sampled
            assert not collecting.done()
            time.sleep(0.01)
        session.pause()
        assert session.drain(10) == 0
        time.sleep(1)  # longer than gateway.pause_hold_s: Gym is told 429, and tries again
        assert len(engine.calls) == before + at_once
        engine.latency_s, engine.weight_version = 0.0, 1
        session.resume()
        rollouts = collecting.result(60).rollouts
    engine.weight_version = 0
    assert {(rollout.status, rollout.attempts) for rollout in rollouts} == {(RolloutStatus.COMPLETED, 1)}
    versions = [[turn.weight_version for turn in rollout.turns] for rollout in rollouts]
    assert sorted(versions) == [[0, 1]] * at_once + [[1, 1]] * at_once
