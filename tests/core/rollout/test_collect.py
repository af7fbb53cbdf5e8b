"""The collector against a fake Gym whose agent calls the real policy service; real Gym is in tests/e2e."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import pytest

from gymlink.align import ID_FIELDS
from gymlink.config import AlignmentSettings, RolloutSettings
from gymlink.engines import ScriptedEngine
from gymlink.errors import ConfigError, EngineError, GymRequestError, RolloutError
from gymlink.gateway import PolicyService
from gymlink.gateway.wire import WireError
from gymlink.rollout import Claims, Collector
from gymlink.types import Rollout, RolloutRequest, RolloutStatus, Sampling
from policy_calls import chat

Agent = Callable[["FakeGym", Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


class FakeGym:
    """Runs an agent, a coroutine function, in place of Gym's servers."""

    def __init__(self, service: PolicyService, agent: Agent) -> None:
        self.service, self.agent, self.running, self.most = service, agent, 0, 0

    async def run(self, agent: str, row: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.agent(self, row)
        except WireError as error:
            raise GymRequestError(str(error), kind="http", status=500) from error
        finally:
            self.running -= 1

    async def ask(
        self, row: Mapping[str, Any], messages: list[dict[str, Any]], *, read: bool = True, named: bool = True
    ) -> dict[str, Any]:
        """One call of the policy, as Gym's model server makes it when it wants ids.

        `read` is whether it waits for the answer, `named` whether the agent passed on the rollout's id.
        """
        extra = orjson.loads(row["responses_create_params"]["metadata"]["extra_body"]) if named else {}
        asked = {"messages": messages, "logprobs": True, "return_tokens_as_token_ids": True, **extra}
        return await chat(self.service, asked, read=read)


def answer(reward: object, **more: object) -> dict[str, object]:
    return {"reward": reward, "response": {"output": []}, **more}


async def two_turns(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
    messages = list(row["responses_create_params"]["input"])
    for reply in ("go on", None):
        messages.append(await gym.ask(row, messages))
        if reply:
            messages.append({"role": "user", "content": reply})
    return answer(1.0)


def requests(count: int) -> list[RolloutRequest]:
    def row(index: int) -> dict[str, Any]:
        params = {"input": [{"role": "user", "content": f"task {index}"}]}
        return {"responses_create_params": params, "agent_ref": {"name": "agent"}}

    return [RolloutRequest(row(index), index) for index in range(count)]


@pytest.fixture
def build(chat_format):
    def make(
        agent: Agent, script=None, latency_s: float = 0.0, claims: bool = False, **settings: Any
    ) -> tuple[Collector, FakeGym]:
        stop = chat_format.stop_token_ids[0]
        engine = ScriptedEngine(script or (lambda prompt: (7, 8, stop)), latency_s=latency_s)
        service = PolicyService(chat_format, engine, Sampling(max_tokens=16), claims=claims)
        gym = FakeGym(service, agent)
        taking = Claims(service) if claims else None
        return Collector(gym, service, RolloutSettings(**settings), AlignmentSettings(), claims=taking), gym

    return make


def conserved(rollout: Rollout) -> bool:
    return rollout.sampled_tokens == rollout.trained_tokens + sum(rollout.dropped.values())


async def test_rollouts_come_back_in_the_order_of_their_requests(build) -> None:
    async def slow_first(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        index = int(row["responses_create_params"]["input"][0]["content"].split()[1])
        await asyncio.sleep(0.05 if index == 0 else 0)
        await gym.ask(row, row["responses_create_params"]["input"])
        return answer(float(index))

    collector, _ = build(slow_first)
    ended: list[int] = []
    batch = await collector.collect(requests(4), lambda rollout: ended.append(rollout.request.index))
    assert [rollout.reward for rollout in batch.rollouts] == [0.0, 1.0, 2.0, 3.0]
    assert ended[-1] == 0
    assert batch.metrics["rollout/reward_mean"] == 1.5


async def test_two_turns_make_one_segment_that_trains_every_sampled_token(build) -> None:
    collector, _ = build(two_turns)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.status is RolloutStatus.COMPLETED
    assert [turn.parent for turn in rollout.turns] == [None, 0]
    assert len(rollout.segments) == 1
    assert rollout.trained_tokens == rollout.sampled_tokens == 6
    assert not rollout.dropped


async def test_concurrency_is_bounded(build) -> None:
    collector, gym = build(two_turns, latency_s=0.01, concurrency=3)
    await collector.collect(requests(9))
    assert gym.most == 3


async def test_the_deadline_ends_a_rollout_that_hangs_and_frees_its_generation(build) -> None:
    collector, gym = build(two_turns, latency_s=6, deadline_s=0.1, max_failed_fraction=1)
    started = time.perf_counter()
    batch = await collector.collect(requests(2))
    assert time.perf_counter() - started < 5
    assert {rollout.failure for rollout in batch.rollouts} == {"timeout"}
    assert batch.rollouts[0].reward is None
    assert batch.rollouts[0].segments == ()
    assert len(gym.service.rollouts) == 0
    assert batch.metrics["rollout/failed/timeout"] == 2


async def test_a_failed_rollout_is_data_and_its_tokens_are_counted(build) -> None:
    async def every_other(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        await gym.ask(row, row["responses_create_params"]["input"])
        if row["responses_create_params"]["input"][0]["content"] == "task 1":
            raise GymRequestError("the environment broke", kind="http", status=500)
        return answer(0.5)

    collector, gym = build(every_other)
    batch = await collector.collect(requests(2))
    assert [rollout.reward for rollout in batch.rollouts] == [0.5, None]
    broken = batch.rollouts[1]
    assert (broken.failure, broken.detail) == ("http", "the environment broke")
    assert broken.dropped == {"failed": 3}
    assert all(map(conserved, batch.rollouts))
    assert gym.service.totals.sampled_tokens == sum(rollout.sampled_tokens for rollout in batch.rollouts)


async def test_another_attempt_is_made_and_the_first_ones_tokens_stay_counted(build) -> None:
    tries: list[int] = []

    async def second_time_lucky(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        await gym.ask(row, row["responses_create_params"]["input"])
        tries.append(1)
        if len(tries) == 1:
            raise GymRequestError("once", kind="connection")
        return answer(1.0)

    collector, _ = build(second_time_lucky, attempts=3)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert (rollout.reward, rollout.attempts) == (1.0, 2)
    assert rollout.dropped == {"failed_attempt": 3}
    assert conserved(rollout)


async def test_an_engine_that_fails_is_the_kind_of_the_failure(build) -> None:
    def broken(_: object) -> tuple[int, ...]:
        raise EngineError("out of memory")

    collector, _ = build(two_turns, script=broken, max_failed_fraction=1)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert (rollout.failure, rollout.detail) == ("engine", "out of memory")


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (answer(None), "answer"),
        (answer(float("nan")), "answer"),
        (answer(True), "answer"),
        (answer(1.0, failure_kind="sandbox"), "gym_sandbox"),
        (answer(1.0, mask_sample=True), "gym_masked"),
    ],
)
async def test_an_answer_without_a_usable_score_is_a_failure(build, given: dict[str, object], kind: str) -> None:
    async def agent(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        await gym.ask(row, row["responses_create_params"]["input"])
        return given

    collector, _ = build(agent, max_failed_fraction=1)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.failure == kind
    assert conserved(rollout)


async def test_an_agent_that_never_called_the_policy_has_failed(build) -> None:
    async def idle(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        return answer(1.0)

    collector, _ = build(idle, max_failed_fraction=1)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.failure == "no_model_call"


async def test_a_turn_cut_by_length_is_truncated_and_still_scored(build) -> None:
    collector, _ = build(two_turns, script=lambda _: tuple(range(10, 40)))
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.status is RolloutStatus.TRUNCATED
    assert rollout.reward == 1.0
    assert rollout.trained_tokens == 32


async def test_all_attempts_share_one_deadline(build) -> None:
    async def slow_failure(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        await asyncio.sleep(0.15)
        raise GymRequestError("once more", kind="connection")

    collector, _ = build(slow_failure, attempts=20, deadline_s=0.2, max_failed_fraction=1)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.failure == "timeout"
    assert rollout.attempts < 5


@pytest.mark.parametrize("carried", [True, False], ids=["by its ids", "by its words"])
async def test_the_final_branch_is_the_one_that_gave_the_final_response(build, carried: bool) -> None:
    sampled = iter([(7,), (8, 9)])

    async def settles_for_the_first(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        first = await gym.ask(row, row["responses_create_params"]["input"])
        await gym.ask(row, [{"role": "user", "content": "a better answer?"}])
        return answer(1.0, response={"output": [item(first, "other words" if carried else first["content"], carried)]})

    collector, _ = build(settles_for_the_first, script=lambda _: next(sampled))
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert [segment.response_ids for segment in rollout.segments] == [(8, 9), (7,)]


async def test_where_the_policy_never_said_the_final_response_the_latest_turn_is_the_final_one(build) -> None:
    sampled = iter([(7,), (8, 9)])

    async def makes_it_up(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        await gym.ask(row, row["responses_create_params"]["input"])
        await gym.ask(row, [{"role": "user", "content": "a better answer?"}])
        return answer(1.0, response={"output": [item({}, "the agent's own words", carried=False)]})

    collector, _ = build(makes_it_up, script=lambda _: next(sampled))
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert [segment.response_ids for segment in rollout.segments] == [(7,), (8, 9)]


def item(message: Mapping[str, Any], text: object, carried: bool = True) -> dict[str, Any]:
    """An output item of Gym's for a message of the policy, with the ids of the call on it."""
    ids = {name: list(message[name]) for name in ID_FIELDS} if carried else {}
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], **ids}


async def nameless(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
    """Two turns whose calls do not name the rollout."""
    messages, output = list(row["responses_create_params"]["input"]), []
    for reply in ("go on", "enough"):
        messages.append(await gym.ask(row, messages, named=False))
        output.append(item(messages[-1], messages[-1]["content"]))
        messages.append({"role": "user", "content": reply})
    return answer(1.0, response={"output": output})


async def test_a_rollout_whose_calls_do_not_name_it_is_known_by_the_ids_on_gyms_items(build) -> None:
    collector, gym = build(nameless, claims=True)
    batch = await collector.collect(requests(3))
    for rollout in batch.rollouts:
        assert rollout.status is RolloutStatus.COMPLETED
        assert rollout.trained_tokens == rollout.sampled_tokens == 6
        assert [len(turn.completion_ids) for turn in rollout.turns] == [3, 3]
        assert rollout.turns[1].prompt_ids[: len(rollout.turns[0].prompt_ids)] == rollout.turns[0].prompt_ids
    totals = gym.service.totals
    assert (totals.unattributed_calls, totals.unattributed_tokens, totals.attributed_tokens) == (6, 0, 18)


async def test_where_no_ids_travel_such_a_rollout_fails_and_the_setting_is_named(build) -> None:
    collector, gym = build(nameless, max_failed_fraction=1)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.failure == "no_model_call"
    assert "2 came without an id while it ran" in str(rollout.detail)
    assert "gateway.token_ids: messages" in str(rollout.detail)
    assert rollout.sampled_tokens == 0
    assert gym.service.totals.unattributed_tokens == 6


async def test_without_ids_on_gyms_items_the_model_servers_setting_is_named(build) -> None:
    async def without_ids(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        await nameless(gym, row)
        return answer(1.0)

    collector, _ = build(without_ids, claims=True, max_failed_fraction=1)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert rollout.failure == "no_model_call"
    assert "return_token_id_information: true" in str(rollout.detail)


async def test_ids_that_are_anothers_are_not_trained_twice(build) -> None:
    taken: list[Mapping[str, object]] = []

    async def copies(gym: FakeGym, row: Mapping[str, Any]) -> Mapping[str, object]:
        taken.append(taken[0] if taken else await nameless(gym, row))
        return taken[0]

    collector, _ = build(copies, claims=True, concurrency=1, max_failed_fraction=1)
    honest, copied = (await collector.collect(requests(2))).rollouts
    assert honest.trained_tokens == 6
    assert (copied.failure, copied.sampled_tokens) == ("alignment", 0)
    assert "2 are not known to this process" in str(copied.detail)


async def test_an_answer_that_nobody_read_is_dropped_and_counted(build) -> None:
    async def asks_again(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        messages = row["responses_create_params"]["input"]
        with pytest.raises(WireError, match="closed the connection"):
            await gym.ask(row, messages, read=False)
        await gym.ask(row, messages)
        return answer(1.0)

    collector, _ = build(asks_again)
    (rollout,) = (await collector.collect(requests(1))).rollouts
    assert (rollout.sampled_tokens, rollout.trained_tokens) == (6, 3)
    assert rollout.dropped == {"undelivered": 3}


async def test_too_many_failures_stop_the_run_and_say_why(build) -> None:
    async def down(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        raise GymRequestError("connection refused", kind="connection")

    collector, _ = build(down)
    with pytest.raises(RolloutError, match=r"2 of 2 rollouts failed \(connection: 2\).*connection refused"):
        await collector.collect(requests(2))


async def test_what_a_row_already_sends_to_the_model_server_stays(build) -> None:
    seen: list[dict[str, Any]] = []

    async def look(gym: FakeGym, row: Mapping[str, Any]) -> dict[str, object]:
        seen.append(orjson.loads(row["responses_create_params"]["metadata"]["extra_body"]))
        await gym.ask(row, row["responses_create_params"]["input"])
        return answer(1.0)

    collector, _ = build(look)
    (request,) = requests(1)
    request.row["responses_create_params"]["metadata"] = {"extra_body": '{"user": "x"}'}
    await collector.collect([request])
    assert seen[0]["user"] == "x"
    request.row["responses_create_params"]["metadata"] = {"extra_body": "nonsense"}
    with pytest.raises(ConfigError, match="extra_body is not a JSON object"):
        await collector.collect([request])
