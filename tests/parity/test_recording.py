"""The recorded rollouts are what the core makes today, and cover what they are said to cover."""

from __future__ import annotations

import pytest

from expected_rows import expected_advantages
from record_rollouts import record
from recorded_rollouts import FILE, FORKED, RESPONSE_LIMIT, SIBLINGS, UNCOMPARABLE, read_rollouts, to_lines

GROUPS = read_rollouts()


def test_recording_again_makes_the_same_file() -> None:
    assert to_lines(record()).splitlines() == FILE.read_text().splitlines(), (
        "The core makes other rollouts than those recorded. When that is meant: python tests/parity/record_rollouts.py"
    )


def test_the_file_is_read_as_it_is_written() -> None:
    assert to_lines(GROUPS) == FILE.read_text()


def test_every_kind_of_rollout_is_there() -> None:
    every = [one for siblings in GROUPS.values() for one in siblings]
    assert {len(siblings) for siblings in GROUPS.values()} == {SIBLINGS}
    assert {one.status.value for one in every} == {"completed", "truncated", "failed"}
    lengths = {len(segment.response_ids) for one in every for segment in one.segments}
    assert {0, RESPONSE_LIMIT} < lengths
    assert max(lengths) > RESPONSE_LIMIT
    assert {len(one.segments) for one in GROUPS[FORKED]} == {0, 2}
    scored = {name: sum(one.reward is not None for one in siblings) for name, siblings in GROUPS.items()}
    assert {name for name, count in scored.items() if count < 2} == set(UNCOMPARABLE)
    assert scored["one_failed"] == 3
    assert scored["two_failed"] == 2


def test_no_two_sampled_tokens_of_a_rollout_have_one_logprob() -> None:
    """A shifted or exchanged value is then seen."""
    for siblings in GROUPS.values():
        for one in siblings:
            logprobs = [value for turn in one.turns for value in turn.logprobs]
            assert len(set(logprobs)) == len(logprobs)
            assert 0.0 not in logprobs


def test_the_expected_advantages_are_those_of_the_formula() -> None:
    first, failed, last = expected_advantages([1.0, None, 0.0], 0.5)
    assert (first, failed) == (pytest.approx(0.5 / (2**-0.5 + 0.5)), None)
    assert last == pytest.approx(-0.5 / (2**-0.5 + 0.5))
    assert expected_advantages([0.5, 0.5], 1e-4) == [0.0, 0.0]
    assert expected_advantages([None, 1.0], 1e-4) == [None, 0.0]
