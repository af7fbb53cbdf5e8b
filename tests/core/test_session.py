"""A session whose Gym is a stand-in that calls the real policy service; real Gym is in tests/e2e."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from gymlink import session as module
from gymlink import worker
from gymlink.config import parse_settings
from gymlink.engines import ScriptedEngine
from gymlink.errors import RolloutError
from gymlink.gym import GymServers
from gymlink.rollout import outcome
from gymlink.session import Session
from gymlink.types import Rollout, RolloutRequest, Sampling
from policy_calls import chat

ROW = {"responses_create_params": {"input": [{"role": "user", "content": "hi"}]}, "agent_ref": {"name": "agent"}}
REQUESTS = [RolloutRequest(ROW, index) for index in range(2)]


class RunningGym(GymServers):
    """Always well."""

    def check(self) -> None: ...


@pytest.fixture
def session(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    class Client:
        """One call of the policy for each row."""

        def __init__(self, gym: GymServers, **_: object) -> None: ...

        async def run(self, agent: str, row: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
            params = row["responses_create_params"]
            body = {"messages": params["input"], **orjson.loads(params["metadata"]["extra_body"])}
            await chat(made.service, body)
            return {"reward": 1.0, "response": {"output": []}}

        async def close(self) -> None: ...

    monkeypatch.setattr(worker, "GymClient", Client)
    monkeypatch.setattr(module, "start_gym", lambda *_, **__: RunningGym("http://127.0.0.1:1", {}, {}))
    made = Session(
        parse_settings({"gym": {"config_paths": ["none.yaml"]}}),
        tokenizer=tokenizer,
        engine=ScriptedEngine(lambda _: (7, 8, 9)),
        sampling=Sampling(max_tokens=8),
        run_dir=tmp_path,
    )
    with made:
        yield made


def test_what_the_engine_sampled_is_what_the_rollouts_tell(session: Session) -> None:
    for _ in range(2):
        batch = session.collect(REQUESTS)
        assert [rollout.trained_tokens for rollout in batch.rollouts] == [3, 3]
    assert session.service.totals.attributed_tokens == 12


def test_tokens_that_no_rollout_tells_of_stop_the_run(session: Session) -> None:
    def lost(rollout: Rollout) -> None:
        session.service.totals.sampled_tokens += 1

    with pytest.raises(RolloutError, match=r"sampled 8 tokens; the rollouts tell of 6\. Of 6 in this batch 6 are"):
        session.collect(REQUESTS, on_rollout=lost)


def test_tokens_that_are_neither_trained_nor_counted_as_dropped_stop_the_run(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "build_segments", lambda *_, **__: ((), {}))
    with pytest.raises(RolloutError, match=r"sampled 6 tokens; the rollouts tell of 6\. Of 6 in this batch 0 are"):
        session.collect(REQUESTS)


def test_rollouts_wait_while_the_session_is_paused(session: Session) -> None:
    session.pause()
    assert session.drain(1) == 0
    with ThreadPoolExecutor(1) as trainer:
        collecting = trainer.submit(session.collect, REQUESTS)
        with pytest.raises(TimeoutError):
            collecting.result(0.3)
        engine = session.service.engine
        assert isinstance(engine, ScriptedEngine)
        engine.weight_version = 5
        session.resume()
        turns = [turn for rollout in collecting.result(10).rollouts for turn in rollout.turns]
    assert [turn.weight_version for turn in turns] == [5, 5]


def test_collections_may_overlap(session: Session) -> None:
    session.pause()  # so that all of them are under way at once
    futures = [session.submit(REQUESTS) for _ in range(4)]
    assert not any(future.done() for future in futures)
    session.resume()
    assert [[one.trained_tokens for one in future.result(10).rollouts] for future in futures] == [[3, 3]] * 4
    assert session.service.totals.attributed_tokens == 24


def test_a_token_that_is_lost_while_collections_overlap_is_noticed(session: Session) -> None:
    def lost(rollout: Rollout) -> None:
        session.service.totals.sampled_tokens += 1

    session.pause()
    futures = [session.submit(REQUESTS, on_rollout=lost), session.submit(REQUESTS)]
    session.resume()
    errors = [future.exception(10) for future in futures]
    assert [type(error) for error in errors if error] == [RolloutError]
    assert "sampled 14 tokens; the rollouts tell of 12" in str(next(filter(None, errors)))


def test_a_collection_that_is_cancelled_ends_its_own_rollouts(session: Session) -> None:
    session.pause()
    given_up, kept = session.submit(REQUESTS), session.submit(REQUESTS)
    assert given_up.cancel()
    while len(session.service.rollouts) > len(REQUESTS):
        session.drain(0.01)
    session.resume()
    assert [rollout.trained_tokens for rollout in kept.result(10).rollouts] == [3, 3]
    assert [rollout.trained_tokens for rollout in session.collect(REQUESTS).rollouts] == [3, 3]
