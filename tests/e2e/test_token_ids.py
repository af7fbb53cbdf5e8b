"""Token ids that stay at the gateway, and ids that travel through Gym: the same batches, from the same real servers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from gymlink.config import parse_settings
from gymlink.demo import environments_root
from gymlink.engines import ScriptedEngine
from gymlink.gym import read_rows
from gymlink.session import Session
from gymlink.types import ForkCause, Rollout, RolloutRequest, RolloutStatus, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.gym]

CONCURRENCY = 8
HOLD_S = 0.2
OURS = Path(__file__).parents[1] / "environments"
SERVERS = {
    "resources_servers": {"keypad": environments_root(), "stockroom": environments_root(), "flaky": OURS},
    "responses_api_agents": {"forgetful": OURS, "nameless": OURS},
}


def reply(prompt: str) -> str:
    """Fetches what a stockroom's user asks for, thinking aloud; says something else to every other prompt."""
    task = re.search(r"Bring (.*)\.", prompt)
    if task is None:
        said = blake2b(prompt.encode(), digest_size=4).hexdigest()
        return f"<think>\n{said[:3]}\n</think>\n\n{said}" if said[0] > "7" else said
    wanted = re.findall(r"(\d+) (\w+?)s?(?: and|,|$)", task[1])
    done = prompt.count("<tool_response>")
    if done >= len(wanted):
        return "done"
    quantity, item = wanted[done]
    call = {"arguments": {"quantity": int(quantity), "item": item}, "name": "take"}
    return f"<think>\nnext is {item}\n</think>\n\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("environments")
    for kind, servers in SERVERS.items():
        (root / kind).mkdir()
        for name, where in servers.items():
            (root / kind / name).symlink_to(where / kind / name)
    return root


@pytest.fixture(scope="module")
def sessions(root: Path, make_policy: Any, tokenizer: Any, tmp_path_factory: Any) -> Iterator[dict[str, Session]]:
    """One session for each way of the ids, over the same environments and with the same policy."""
    configs = [f"{kind}/{name}/configs/{name}.yaml" for kind, servers in SERVERS.items() for name in servers]
    running = {}
    with ExitStack() as stack:
        for via in ("capture", "messages"):
            settings = {
                "gym": {"config_paths": configs, "root": str(root)},
                "rollout": {"deadline_s": 60, "concurrency": CONCURRENCY, "max_failed_fraction": 1},
                "gateway": {"token_ids": via, "pause_hold_s": HOLD_S},
            }
            policy = make_policy()
            policy.reply = reply
            session = Session(
                parse_settings(settings, folder=root),
                tokenizer=tokenizer,
                engine=policy.engine,
                sampling=Sampling(max_tokens=200),
                run_dir=tmp_path_factory.mktemp(via),
            )
            running[via] = stack.enter_context(session)
        yield running


def collect(session: Session, rows: Sequence[dict[str, Any]]) -> Sequence[Rollout]:
    return session.collect([RolloutRequest(row, index) for index, row in enumerate(rows)]).rollouts


def told(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout that a trainer sees, and what it was made from; times and Gym's own answer are not part."""
    own = {"rollout_id", "seconds", "seconds_in_model", "response", "request"}
    return {name: value for name, value in asdict(rollout).items() if name not in own}


def task(agent: str, text: str, **more: Any) -> dict[str, Any]:
    params = {"input": [{"role": "user", "content": text}]}
    return {"responses_create_params": params, "agent_ref": {"name": f"{agent}_agent"}, **more}


def both(sessions: dict[str, Session], rows: Sequence[dict[str, Any]], *, one_by_one: bool = False) -> list[Rollout]:
    """What capture collects, once it is seen to be what messages collects."""
    batches = {
        via: [collect(session, [row])[0] for row in rows] if one_by_one else collect(session, rows)
        for via, session in sessions.items()
    }
    assert [told(one) | {"detail": None} for one in batches["capture"]] == [
        told(one) | {"detail": None} for one in batches["messages"]
    ]
    return list(batches["capture"])


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    return list(read_rows(environments_root() / f"resources_servers/{name}/data/train.jsonl"))[:count]


def carries_ids(rollout: Rollout) -> bool:
    return "token_ids" in json.dumps(rollout.response)


@pytest.mark.parametrize("name", ["keypad", "stockroom"])
def test_both_ways_give_the_same_batches(sessions: dict[str, Session], name: str) -> None:
    rollouts = both(sessions, rows_of(name, 6))
    assert {rollout.status for rollout in rollouts} == {RolloutStatus.COMPLETED}
    assert all(len(rollout.turns) > 1 and len(rollout.segments) == 1 for rollout in rollouts)
    assert all(rollout.trained_tokens == rollout.sampled_tokens for rollout in rollouts)


def test_no_id_travels_through_gym_unless_asked_for(sessions: dict[str, Session]) -> None:
    (captured,), (carried,) = (collect(session, rows_of("keypad", 1)) for session in sessions.values())
    assert not carries_ids(captured)
    assert carries_ids(carried)


def test_a_rewritten_history(sessions: dict[str, Session]) -> None:
    rows = [task("forgetful", f"write {n}", forget_every=1 + n % 2) for n in range(4)]
    rollouts = both(sessions, rows, one_by_one=True)
    assert [len(rollout.segments) for rollout in rollouts] == [2, 1, 2, 2]
    assert set(rollouts[0].prefix_breaks) == {ForkCause.COMPACTED}


def test_rollouts_that_fail_and_that_are_cut(sessions: dict[str, Session]) -> None:
    rows = [task("flaky", f"write {n}", fail_every=2) for n in range(3)]
    rows.append(task("forgetful", "write", forget_every=1))
    rows[-1]["responses_create_params"]["max_output_tokens"] = 5
    rollouts = both(sessions, rows, one_by_one=True)
    assert [rollout.failure for rollout in rollouts] == [None, "http", None, None]
    assert [rollout.status.value for rollout in rollouts[2:]] == ["completed", "truncated"]


def test_an_agent_that_drops_the_rollouts_id(sessions: dict[str, Session]) -> None:
    rows = [task("nameless", f"write {n}") for n in range(6)]
    for rollout in collect(sessions["messages"], rows):
        assert rollout.status is RolloutStatus.COMPLETED, rollout.detail
        assert [turn.parent for turn in rollout.turns] == [None, 0]
        assert rollout.trained_tokens == rollout.sampled_tokens
    assert sessions["messages"].service.totals.unattributed_tokens == 0

    (lost,) = collect(sessions["capture"], rows[:1])
    assert (lost.failure, lost.sampled_tokens) == ("no_model_call", 0)
    assert "2 came without an id while it ran" in str(lost.detail)
    assert "gateway.token_ids: messages" in str(lost.detail)


def test_ids_that_the_policy_never_sampled_train_nothing(sessions: dict[str, Session]) -> None:
    (rollout,) = collect(sessions["messages"], [task("nameless", "write", invents=True)])
    assert (rollout.failure, rollout.trained_tokens) == ("alignment", 0)
    assert "Of the 2 whose token ids are on Gym's output items, 1 are not known" in str(rollout.detail)
    assert rollout.sampled_tokens == sum(rollout.dropped.values()) > 0


def test_a_pause_for_new_weights_loses_no_rollout(sessions: dict[str, Session]) -> None:
    session = sessions["capture"]
    engine = session.service.engine
    assert isinstance(engine, ScriptedEngine)
    engine.latency_s, before = 0.3, len(engine.calls)
    with ThreadPoolExecutor(1) as trainer:
        requests = [RolloutRequest(row, index) for index, row in enumerate(rows_of("keypad", 2 * CONCURRENCY))]
        collecting = trainer.submit(session.collect, requests)
        while len(engine.calls) < before + CONCURRENCY:  # the first turns of the first rollouts are being sampled
            assert not collecting.done()
            time.sleep(0.01)
        session.pause()
        assert session.drain(10) == 0
        time.sleep(5 * HOLD_S)  # Gym is told 429, and tries again
        assert len(engine.calls) == before + CONCURRENCY
        engine.latency_s, engine.weight_version = 0.0, 1
        session.resume()
        rollouts = collecting.result(60).rollouts
    engine.weight_version = 0
    assert {(rollout.status, rollout.attempts) for rollout in rollouts} == {(RolloutStatus.COMPLETED, 1)}
    versions = [[turn.weight_version for turn in rollout.turns] for rollout in rollouts]
    assert sorted(versions) == [[0, 1]] * CONCURRENCY + [[1, 1]] * CONCURRENCY
