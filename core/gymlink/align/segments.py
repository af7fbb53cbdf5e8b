"""From the turns of a rollout to the sequences a trainer learns from.

Turns form a tree: a turn holds what it adds to the one that it extends. Every path from a root to a leaf, put together,
is one training sequence, and each sampled token is trained in exactly one of them, or counted under the reason why not:

    sum(len(turn.completion_ids)) == sum(segment.trained_tokens) + sum(dropped.values())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from gymlink.errors import AlignmentError
from gymlink.types import DropReason, Logprobs, Mask, Segment, TokenIds, Turn


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
        AlignmentError: `turns` are not the turns of one rollout in their order.
    """
    if not turns:
        return (), {}
    final = len(turns) - 1 if last_turn is None else last_turn
    if not 0 <= final < len(turns):
        raise AlignmentError(f"The final turn is number {last_turn!r}, but the rollout has {len(turns)} turns.")
    parents = {turn.parent for turn in turns if turn.parent is not None}
    leaves = [index for index in range(len(turns)) if index not in parents and index != final]
    if not leaves:
        return (segment_of(turns, final, trained=_path(turns, final)),), {}

    sampled = sum(len(turn.completion_ids) for turn in turns)
    path = _path(turns, final)
    if on_history_rewrite == "mask":
        return (segment_of(turns, final, trained=()),), _counted(DropReason.HISTORY_REWRITTEN, sampled)

    last = segment_of(turns, final, trained=path)
    if on_history_rewrite == "last":
        return (last,), _counted(DropReason.OTHER_BRANCH, sampled - last.trained_tokens)

    taken = set(path)
    branches: list[Segment] = []
    for leaf in leaves:
        path = _path(turns, leaf)
        fresh = [index for index in path if index not in taken]
        taken.update(fresh)
        if any(turns[index].completion_ids for index in fresh):
            branches.append(segment_of(turns, leaf, trained=fresh))
    return (*branches, last), {}


def _counted(reason: DropReason, tokens: int) -> Mapping[str, int]:
    return {reason: tokens} if tokens else {}


def _path(turns: Sequence[Turn], leaf: int) -> list[int]:
    """Indices from the root to `leaf`."""
    branch = turns[leaf].branch
    if branch[-1].index != leaf or any(turn.index >= len(turns) or turns[turn.index] is not turn for turn in branch):
        raise AlignmentError(
            f"The turns are not those of one rollout in their order: turn {leaf} is numbered {turns[leaf].index}, or "
            "extends one that is not among them. Please report this: it is a defect of gymlink."
        )
    return [turn.index for turn in branch]


def segment_of(turns: Sequence[Turn], leaf: int, *, trained: Sequence[int]) -> Segment:
    """The sequence of the branch that ends with turn `leaf`, whose turns `trained` are to be trained.

    Raises:
        AlignmentError: `turns` are not the turns of one rollout in their order.
    """
    path, train = _path(turns, leaf), set(trained)
    ids, mask, logprobs = [], [], []
    for turn in (turns[index] for index in path):
        if turn.extends is not None:
            ids.append(turn.added_ids)
            mask.append(Mask.filled(0, len(turn.added_ids)))
            logprobs.append(Logprobs.filled(0.0, len(turn.added_ids)))
        ids.append(turn.completion_ids)
        mask.append(Mask.filled(int(turn.index in train), len(turn.completion_ids)))
        logprobs.append(turn.logprobs)
    return Segment(
        turns[path[0]].added_ids,
        TokenIds.joined(ids),
        Mask.joined(mask),
        Logprobs.joined(logprobs),
        turns=tuple(path),
        trained_turns=tuple(trained),
    )
