"""From the turns of a rollout to the sequences a trainer learns from.

Turns form a tree: a child's prompt starts with its parent's prompt and completion. Every path from a root to a leaf is
one training sequence, and each sampled token is trained in exactly one of them, or counted under the reason why not:

    sum(len(turn.completion_ids)) == sum(segment.trained_tokens) + sum(dropped.values())
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from gymlink.errors import AlignmentError
from gymlink.types import Segment, Turn

OTHER_BRANCH: Final = "other_branch"
"""Sampled on a branch that does not end in the final response, and only the final one is trained."""
HISTORY_REWRITTEN: Final = "history_rewritten"
"""Sampled in a rollout whose history was rewritten, and such rollouts are not trained."""


def build_segments(
    turns: Sequence[Turn],
    *,
    on_history_rewrite: Literal["fork", "last", "mask"],
    last_turn: int | None = None,
) -> tuple[tuple[Segment, ...], Mapping[str, int]]:
    """Training sequences of one rollout, and the sampled tokens that none of them trains, by reason.

    Args:
        turns: every call of the policy, in the order it was recorded; a parent precedes its children.
        on_history_rewrite: what is trained where the turns are not one chain: `fork` every branch, `last` the branch
            of the final response, `mask` none.
        last_turn: index of the turn that gave the final response; by default the last one.

    Returns:
        Segments, the final branch last; branches whose every token is trained elsewhere are left out. With `mask` and
        more than one branch, the final branch alone is returned with a mask of zeros. Time is linear in the turns'
        tokens.

    Raises:
        AlignmentError: a child's prompt does not start with its parent's prompt and completion.
    """
    if not turns:
        return (), {}
    final = len(turns) - 1 if last_turn is None else last_turn
    if not 0 <= final < len(turns):
        raise AlignmentError(f"The final turn is number {last_turn!r}, but the rollout has {len(turns)} turns.")
    parents = {turn.parent for turn in turns if turn.parent is not None}
    leaves = [index for index in range(len(turns)) if index not in parents and index != final]
    if not leaves:
        return (_segment(turns, _path(turns, final), trained=_path(turns, final)),), {}

    sampled = sum(len(turn.completion_ids) for turn in turns)
    path = _path(turns, final)
    if on_history_rewrite == "mask":
        return (_segment(turns, path, trained=()),), _counted(HISTORY_REWRITTEN, sampled)

    last = _segment(turns, path, trained=path)
    if on_history_rewrite == "last":
        return (last,), _counted(OTHER_BRANCH, sampled - last.trained_tokens)

    taken = set(path)
    branches: list[Segment] = []
    for leaf in leaves:
        path = _path(turns, leaf)
        fresh = [index for index in path if index not in taken]
        taken.update(fresh)
        if any(turns[index].completion_ids for index in fresh):
            branches.append(_segment(turns, path, trained=fresh))
    return (*branches, last), {}


def _counted(reason: str, tokens: int) -> Mapping[str, int]:
    return {reason: tokens} if tokens else {}


def _path(turns: Sequence[Turn], leaf: int) -> list[int]:
    """Indices from the root to `leaf`."""
    path = [leaf]
    while (parent := turns[path[-1]].parent) is not None:
        if not 0 <= parent < path[-1]:
            raise AlignmentError(f"Turn {path[-1]} names turn {parent} as its parent, which does not precede it.")
        path.append(parent)
    return path[::-1]


def _segment(turns: Sequence[Turn], path: Sequence[int], *, trained: Iterable[int]) -> Segment:
    train = set(trained)
    root = turns[path[0]]
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    start = len(root.prompt_ids)
    for position, index in enumerate(path):
        turn = turns[index]
        if position:
            parent = turns[path[position - 1]]
            held = len(parent.prompt_ids) + len(parent.completion_ids)
            if (
                turn.prompt_ids[: len(parent.prompt_ids)] != parent.prompt_ids
                or turn.prompt_ids[len(parent.prompt_ids) : held] != parent.completion_ids
            ):
                raise AlignmentError(
                    f"Turn {index} says that it extends turn {path[position - 1]}, but its prompt does not start with "
                    "that turn's prompt and completion. Please report this: it is a defect of gymlink."
                )
            environment = turn.prompt_ids[start + len(ids) :]
            ids += environment
            mask += [0] * len(environment)
            logprobs += [0.0] * len(environment)
        ids += turn.completion_ids
        mask += [int(index in train)] * len(turn.completion_ids)
        logprobs += turn.logprobs
    return Segment(root.prompt_ids, tuple(ids), tuple(mask), tuple(logprobs), tuple(path))
