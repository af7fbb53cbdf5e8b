from gymlink.rollout import Figures, batch_metrics
from gymlink.types import ForkCause, Rollout, RolloutRequest, RolloutStatus, Segment, Turn

REQUEST = RolloutRequest({}, 0)


def rollout(status: RolloutStatus = RolloutStatus.COMPLETED, **fields: object) -> Figures:
    return Figures.of(Rollout(REQUEST, "0.a", status, **fields))  # type: ignore[arg-type]


def test_a_failed_rollout_is_in_no_mean_of_rewards() -> None:
    metrics = batch_metrics([rollout(reward=1.0), rollout(RolloutStatus.FAILED, reward=None, failure="timeout")])
    assert metrics["rollout/reward_mean"] == 1.0
    assert metrics["rollout/failed"] == metrics["rollout/failed/timeout"] == 1
    assert metrics["rollout/count"] == 2


def test_tokens_and_breaks_are_told_by_reason() -> None:
    turns = (
        Turn((1,), (2,), (-1.0,), "stop"),
        Turn((1,), (3,), (-1.0,), "stop", cause=ForkCause.EDITED),
    )
    kept = Segment((1,), (3,), (1,), (-1.0,))
    metrics = batch_metrics(
        [rollout(reward=0.0, turns=turns, segments=(kept,), sampled_tokens=2, dropped={"other_branch": 1})]
    )
    assert metrics["rollout/tokens_sampled"] == 2
    assert metrics["rollout/tokens_trained"] == metrics["rollout/tokens_dropped"] == 1
    assert metrics["rollout/tokens_dropped/other_branch"] == 1
    assert metrics["rollout/prefix_breaks"] == metrics["rollout/prefix_breaks/edited"] == 1


def test_the_parts_of_a_sum_are_always_told_and_add_up() -> None:
    failed = rollout(RolloutStatus.FAILED, reward=None, failure="gym_sandbox", sampled_tokens=3, dropped={"failed": 3})
    for rollouts in ([], [rollout(reward=1.0)], [failed, rollout(reward=0.0)]):
        metrics = batch_metrics(rollouts)
        for name in ("failed", "prefix_breaks", "tokens_dropped"):
            parts = [value for key, value in metrics.items() if key.startswith(f"rollout/{name}/")]
            assert len(parts) >= 5
            assert sum(parts) == metrics[f"rollout/{name}"]


def test_time_is_split_between_model_and_environment() -> None:
    metrics = batch_metrics([rollout(reward=0.0, seconds=3.0, seconds_in_model=1.0)])
    assert metrics["rollout/seconds_in_environment_mean"] == 2.0


def test_an_empty_or_wholly_failed_batch_has_no_reward() -> None:
    assert "rollout/reward_mean" not in batch_metrics([])
    assert "rollout/reward_mean" not in batch_metrics([rollout(RolloutStatus.FAILED, reward=None, failure="http")])
