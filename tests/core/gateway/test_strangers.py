from typing import Any

from gymlink.align import RolloutRecord
from gymlink.gateway import OpenRollout
from gymlink.gateway.strangers import Strangers
from gymlink.types import Sampling, Turn

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}


def strangers(chat_format: Any, **limits: int) -> Strangers:
    return Strangers(lambda name: OpenRollout(RolloutRecord(name, chat_format), Sampling(), stranger=True), **limits)


def asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_an_agent_without_a_rollout_is_exact_too(gateway) -> None:
    client = await gateway()
    answers = []
    for opening in ([USER], [SYSTEM, USER]):
        _, first = await client.chat(opening)
        said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
        _, second = await client.chat([*opening, said, USER])
        answers += [first, second]
    messages = [answer["choices"][0]["message"] for answer in answers]
    for first, second in (messages[:2], messages[2:]):
        held = first["prompt_token_ids"] + first["generation_token_ids"]
        assert second["prompt_token_ids"][: len(held)] == held
    totals = client.service.totals
    assert (totals.unattributed_calls, totals.unattributed_tokens, totals.attributed_tokens) == (4, 12, 0)
    assert len(client.service.rollouts) == 0


async def test_a_rollout_knows_nothing_of_strangers(gateway) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    _, first = await client.chat([USER])
    await client.chat([USER, first["choices"][0]["message"], USER], "0.a")
    assert [turn.parent for turn in rollout.record.turns] == [None]


def test_conversations_are_told_apart_by_how_they_begin(chat_format) -> None:
    memory = strangers(chat_format)
    first = memory.find([SYSTEM, USER])
    assert memory.find([{**SYSTEM, "role": "developer"}, USER, {"role": "assistant", "content": "x"}, USER]) is first
    assert memory.find([USER]) is not first
    assert memory.find([SYSTEM, *asks("ho")]) is not first
    assert memory.find([{"role": "system", "content": "other"}, USER]) is not first


def test_what_was_not_used_for_longest_is_forgotten_first(chat_format) -> None:
    memory = strangers(chat_format, conversations=2)
    first, _ = memory.find(asks("a")), memory.find(asks("b"))
    assert memory.find(asks("a")) is first
    memory.find(asks("c"))
    assert memory.find(asks("a")) is first


def test_the_ids_that_are_held_are_bounded(chat_format) -> None:
    memory = strangers(chat_format, ids=10)
    first, second = memory.find(asks("a")), memory.find(asks("b"))
    memory.grew(first, Turn((1, 2), (3,), (-1.0,), "stop"))
    memory.grew(second, Turn((1, 2, 3), (4, 5), (-1.0, -1.0), "stop"))
    assert memory.find(asks("a")) is first
    memory.grew(first, Turn((1, 2, 3), (4,), (-1.0,), "stop"))
    assert memory.find(asks("b")) is not second
    memory.grew(first, Turn((1,) * 11, (4,), (-1.0,), "stop"))
    assert memory.find(asks("a")) is not first, "one that is too large by itself is forgotten too"
    memory.grew(first, Turn((1,), (4,), (-1.0,), "stop"))
