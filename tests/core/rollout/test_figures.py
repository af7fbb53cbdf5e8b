import pytest

from gymlink.errors import RolloutError
from gymlink.rollout import Figures, describe_failures, refuse_if_too_many_failed
from gymlink.rollout.figures import DETAIL_LENGTH
from gymlink.types import RolloutStatus

SCORED = Figures(RolloutStatus.COMPLETED, reward=1.0)
FAILED = Figures(RolloutStatus.FAILED, failure="http", detail="agent 'a'\n answered 500")


def test_failures_are_told_with_their_kinds_and_the_first_detail() -> None:
    late = Figures(RolloutStatus.FAILED, failure="timeout", detail="too late")
    told = describe_failures([SCORED, FAILED, late, FAILED])
    assert told == "3 of 4 rollouts failed (http: 2, timeout: 1); the first: agent 'a' answered 500"


def test_nothing_is_told_when_none_failed() -> None:
    assert describe_failures([SCORED]) is None
    assert describe_failures([]) is None


def test_a_long_detail_is_cut() -> None:
    told = describe_failures([Figures(RolloutStatus.FAILED, failure="http", detail="x" * 1000)])
    assert told is not None
    assert told.endswith("…")
    assert len(told) < DETAIL_LENGTH + 100


@pytest.mark.parametrize(("failed", "refused"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_more_failures_than_allowed_stop_the_run(failed: int, refused: bool) -> None:
    rollouts = [FAILED] * failed + [SCORED] * (4 - failed)
    if refused:
        with pytest.raises(RolloutError, match=rf"max_failed_fraction = 0\.5 allows\. {failed} of 4 .*answered 500"):
            refuse_if_too_many_failed(rollouts, 0.5)
    else:
        refuse_if_too_many_failed(rollouts, 0.5)


def test_no_rollouts_are_not_too_many_failures() -> None:
    refuse_if_too_many_failed([], 0.0)


def test_a_token_that_is_not_accounted_for_is_an_error() -> None:
    Figures(RolloutStatus.COMPLETED, tokens_sampled=5, tokens_trained=3, dropped={"failed": 2}).check_conservation()
    with pytest.raises(RolloutError, match="5 tokens were sampled, but 3 are trained and 1 counted"):
        Figures(RolloutStatus.COMPLETED, tokens_sampled=5, tokens_trained=3, dropped={"failed": 1}).check_conservation()
