import asyncio
import time
from typing import Any

import anthropic
import openai
import pytest

from gymlink.gateway.pause import Gate
from gymlink.gateway.wire import WireError

USER = {"role": "user", "content": "hi"}


async def test_an_open_gate_lets_pass_at_once() -> None:
    gate = Gate(0)
    assert await gate.enter() is False
    assert (gate.inside, gate.closed) == (1, False)
    gate.leave()
    assert await gate.drain(0) == 0


async def test_a_closed_gate_holds_until_it_opens() -> None:
    gate = Gate(5)
    gate.close()
    calls = [asyncio.create_task(gate.enter()) for _ in range(3)]
    await asyncio.sleep(0.02)
    assert (gate.inside, [call.done() for call in calls]) == (0, [False] * 3)
    gate.open()
    assert await asyncio.gather(*calls) == [True] * 3
    assert gate.inside == 3


async def test_a_gate_that_closes_again_at_once_lets_nobody_slip_through() -> None:
    gate = Gate(5)
    gate.close()
    call = asyncio.create_task(gate.enter())
    await asyncio.sleep(0.01)
    gate.open()
    gate.close()
    await asyncio.sleep(0.01)
    assert not call.done()
    gate.open()
    assert await call is True


async def test_who_was_held_for_too_long_is_sent_away() -> None:
    gate = Gate(0.02)
    gate.close()
    with pytest.raises(WireError, match=r"held for 0\.02 s") as raised:
        await gate.enter()
    assert (raised.value.status, raised.value.retry_after_s, gate.inside) == (429, 1, 0)


async def test_draining_waits_for_those_inside_and_counts_who_stays() -> None:
    gate = Gate(1)
    await gate.enter()
    await gate.enter()
    gate.close()
    assert await gate.drain(0.02) == 2
    waiting = [asyncio.create_task(gate.drain(5)) for _ in range(2)]
    await asyncio.sleep(0.01)
    gate.leave()
    await asyncio.sleep(0.01)
    assert not any(one.done() for one in waiting)
    gate.leave()
    assert await asyncio.gather(*waiting) == [0, 0]


async def paused(client: Any) -> bool:
    _, body, _ = await client.send("/health", b"", {}, "GET")
    return bool(body["paused"])


async def test_around_a_weight_update_every_turn_says_what_sampled_it(gateway) -> None:
    client = await gateway(latency_s=0.2)
    service, engine = client.service, client.service.engine
    rollout = service.open("0.a")
    in_flight = asyncio.create_task(client.chat([USER], "0.a"))
    while not engine.calls:  # noqa: ASYNC110 - the engine has no event to wait for
        await asyncio.sleep(0.01)
    service.pause()
    held = asyncio.create_task(client.chat([USER, USER], "0.a"))
    assert await paused(client)
    assert (service.paused, service.in_flight) == (True, 1)
    assert await service.drain(5) == 0
    assert (await in_flight)[0] == 200
    await asyncio.sleep(0.05)
    assert len(engine.calls) == 1
    engine.weight_version = 1
    service.resume()
    assert (await held)[0] == 200
    assert not await paused(client)
    assert [turn.weight_version for turn in rollout.record.turns] == [0, 1]
    assert rollout.seconds_in_model < 0.5, "the time at the gate is not the model's"


async def test_the_new_version_is_told_to_an_engine_that_wants_it(gateway) -> None:
    client = await gateway()
    told: list[int] = []
    client.service.engine.set_weight_version = told.append
    client.service.pause()
    client.service.resume(7)
    client.service.pause()
    client.service.resume()
    assert told == [7]


async def test_a_call_that_is_held_for_too_long_is_told_when_to_try_again(gateway) -> None:
    client = await gateway(hold_s=0.05)
    rollout = client.service.open("0.a")
    client.service.pause()
    status, body, headers = await client.send(
        "/rollout/0.a/v1/chat/completions", {"messages": [USER]}, {"Authorization": f"Bearer {client.secret}"}
    )
    assert (status, body["error"]["type"], headers["Retry-After"]) == (429, "paused", "1")
    assert (rollout.record.turns, client.service.in_flight) == ((), 0)
    client.service.resume()
    assert (await client.chat([USER], "0.a"))[0] == 200


async def test_the_sdks_know_a_pause_and_try_again_by_themselves(gateway) -> None:
    client = await gateway(hold_s=0.05)
    url, key = client.server.url, client.secret
    client.service.pause()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as sdk:
        with pytest.raises(openai.RateLimitError, match="paused for a weight update"):
            await sdk.chat.completions.create(model="policy", messages=[USER])
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as sdk:
        with pytest.raises(anthropic.RateLimitError, match="paused for a weight update"):
            await sdk.messages.create(model="policy", messages=[USER], max_tokens=5)
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=3) as sdk:
        call = asyncio.create_task(sdk.messages.create(model="policy", messages=[USER], max_tokens=5))
        await asyncio.sleep(0.3)
        client.service.resume()
        assert (await call).content[0].type == "text"


async def test_a_rollout_that_is_closed_ends_its_calls_at_the_gate(gateway) -> None:
    client = await gateway()
    client.service.open("0.a")
    client.service.pause()
    call = asyncio.create_task(client.chat([USER], "0.a"))
    await asyncio.sleep(0.1)
    client.service.close("0.a")
    status, _ = await asyncio.wait_for(call, 5)
    assert status == 404
    client.service.resume()
    assert client.service.engine.calls == []


async def test_who_hung_up_at_the_gate_costs_no_generation(gateway) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    client.service.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.chat([USER], "0.a"), 0.1)
    client.service.resume()
    assert (await client.chat([USER], "0.a"))[0] == 200
    assert len(client.service.engine.calls) == len(rollout.record.turns) == 1
    assert (rollout.undelivered, client.service.in_flight) == ({}, 0)


async def test_nobody_waits_at_an_open_gate(gateway) -> None:
    client = await gateway()
    started = time.perf_counter()
    assert (await client.chat([USER]))[0] == 200
    assert time.perf_counter() - started < 1
