"""Turns of tests, written with their whole prompts and with the number of the turn that each extends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gymlink.types import Turn


@dataclass(frozen=True)
class WholeTurn:
    """What one call saw and said. `more` are further fields of its `Turn`."""

    prompt: tuple[int, ...]
    said: tuple[int, ...]
    logprobs: tuple[float, ...]
    parent: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def linked(turns: Sequence[WholeTurn]) -> tuple[Turn, ...]:
    """The turns of one rollout, each with what it adds to its parent."""
    made: list[Turn] = []
    for index, one in enumerate(turns):
        extends = None if one.parent is None else made[one.parent]
        held = extends.ids if extends else ()
        assert one.prompt[: len(held)] == held, "its prompt does not start with what its parent held"
        added = one.prompt[len(held) :]
        made.append(Turn(added, one.said, one.logprobs, "stop", extends=extends, index=index, **one.more))
    return tuple(made)
