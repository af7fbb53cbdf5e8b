"""The gateway without HTTP: what blocks others, and what does not."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gymlink.engines import ScriptedEngine
from gymlink.gateway import PolicyService, WireError
from gymlink.gateway.chat import ChatRequest
from gymlink.gateway.service import LONG_TEXT
from gymlink.types import Sampling

LONG = "a long page of text. " * (LONG_TEXT // 10)


class Watched:
    """A chat format that notes in which threads it renders."""

    def __init__(self, chat_format: Any, held: threading.Event | None = None) -> None:
        self._format = chat_format
        self._held = held
        self.threads: list[threading.Thread] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._format, name)

    def render(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(self._format.render, *args, **kwargs)

    def extend(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(self._format.extend, *args, **kwargs)

    def _noted(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        self.threads.append(threading.current_thread())
        if self._held is not None:
            assert self._held.wait(10)
        return work(*args, **kwargs)


def service_of(chat_format: Any) -> PolicyService:
    stop = chat_format.stop_token_ids[0]
    return PolicyService(chat_format, ScriptedEngine(lambda _: (72, 105, stop)), Sampling())


async def ask(service: PolicyService, *contents: str, rollout: str = "0.a") -> Any:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]

    async def connected() -> bool:
        return True

    return await service.ask(ChatRequest.read({"messages": messages}).call({}), rollout, connected)


async def test_only_a_long_text_leaves_the_event_loop(chat_format: Any) -> None:
    watched = Watched(chat_format)
    service = service_of(watched)
    service.open("0.a")
    said = (await ask(service, "short")).message["content"]
    long = (await ask(service, "short", said, LONG)).message["content"]
    await ask(service, "short", said, LONG, long, "short again")
    main = threading.main_thread()
    assert [thread is main for thread in watched.threads] == [True, False, True]
    rollout = service.close("0.a")
    assert [turn.parent for turn in rollout.record.turns] == [None, 0, 1]
    whole = [{"role": "user", "content": "short"}, {"role": "assistant", "content": said}]
    written = chat_format.render([*whole, {"role": "user", "content": LONG}])
    assert chat_format.decode(rollout.record.turns[1].prompt_ids) == chat_format.decode(written)


async def test_others_are_answered_while_a_long_text_is_encoded(chat_format: Any) -> None:
    held = threading.Event()
    service = service_of(Watched(chat_format, held))
    service.open("0.a")
    other = service_of(chat_format)
    other.open("0.a")
    long = asyncio.create_task(ask(service, LONG))
    try:
        await asyncio.sleep(0)
        await ask(other, "short")
        assert not long.done()
    finally:
        held.set()
    assert (await long).turn.finish_reason == "stop"


async def test_a_rollout_that_ends_meanwhile_samples_nothing(chat_format: Any) -> None:
    held = threading.Event()
    service = service_of(Watched(chat_format, held))
    rollout = service.open("0.a")
    long = asyncio.create_task(ask(service, LONG))
    await asyncio.sleep(0)
    service.close("0.a")
    held.set()
    with pytest.raises(WireError, match="is not open"):
        await long
    assert rollout.sampled_tokens == 0
    assert service.engine.calls == []


async def test_long_and_short_calls_of_one_rollout_may_overlap(chat_format: Any) -> None:
    service = service_of(chat_format)
    rollout = service.open("0.a")
    first = (await ask(service, LONG)).message["content"]
    calls = [ask(service, LONG, first, LONG if number % 2 else f"short {number}") for number in range(12)]
    await asyncio.gather(*calls)
    assert [turn.parent for turn in rollout.record.turns] == [None] + [0] * 12
