"""The judging replay buffer over verl's own: what it adds to the log, and when it ends the run.

TransferQueue's store needs Ray, so verl's replay buffer reads a dictionary here; how it samples from it is its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from verl.trainer.ppo.v1 import replay_buffer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from gymlink.config import GymSettings, RolloutSettings, Settings
from gymlink.errors import ConfigError, GymError, GymlinkError, GymStartError, RolloutError
from gymlink.rollout import Figures
from gymlink.types import RolloutStatus
from gymlink_ray.job import Job
from gymlink_verl import sampler
from gymlink_verl.sampler import GymReplayBuffer, GymReplayBufferAsync, gym_sampler

# verl 0.9.1 loads a custom sampler by what it has itself marked as deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_extern_type:FutureWarning")

SCORED = Figures(RolloutStatus.COMPLETED, reward=1.0, tokens_sampled=4, tokens_trained=4)
FAILED = Figures(
    RolloutStatus.FAILED, failure="http", detail="the door is stuck", tokens_sampled=2, dropped={"failed": 2}
)
BATCH = 4
GYMLINK = {"gym_config": "gym.yaml", "run_dir": "gym"}


class Store:
    """The part of `transfer_queue` that verl's replay buffer calls."""

    def __init__(self) -> None:
        self.data: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)

    def kv_list(self) -> dict[str, dict[str, dict[str, Any]]]:
        return {partition: dict(items) for partition, items in self.data.items()}

    def kv_clear(self, *, partition_id: str, keys: Sequence[str]) -> None:
        for key in keys:
            self.data[partition_id].pop(key, None)

    def kv_batch_get(self, *, keys: Sequence[str], partition_id: str, select_fields: Sequence[str]) -> dict[str, Any]:
        return {name: [{"reward_extra_info": {"gym_turns": 1}} for _ in keys] for name in select_fields}

    def put(self, split: str, uid: str, rows: int, status: str = "finished") -> None:
        """A prompt that has ended, with so many rows."""
        self.data[split][uid] = {"is_prompt": True, "status": status, "global_steps": 1}
        for session in range(rows):
            self.data[split][f"{uid}_{session}_0"] = {"status": "success", "global_steps": 1}


class JobDouble:
    """Stands where the job's actor stands: what it was told of rollouts, and how Gym is."""

    def __init__(self) -> None:
        self.told: dict[str, list[Figures]] = {"train": [], "val": []}
        self.noted: list[GymlinkError] = []
        self.waited = 0
        self.start_error: GymlinkError | None = None
        self.dead: GymlinkError | None = None
        self.allowed = 0.5

    def settings(self) -> Settings:
        rollout = RolloutSettings(max_failed_fraction=self.allowed)
        return Settings(gym=GymSettings(config_paths=["a.yaml"]), rollout=rollout)

    def wait(self) -> None:
        self.waited += 1
        if self.start_error is not None:
            raise self.start_error

    def take(self, split: str) -> list[Figures]:
        if self.dead is not None:
            raise self.dead
        taken, self.told[split] = self.told[split], []
        return taken

    def note(self, error: GymlinkError) -> None:
        self.noted.append(error)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(replay_buffer, "tq", made)
    return made


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> JobDouble:
    made = JobDouble()
    monkeypatch.setattr(Job, "of", lambda *_: made)
    return made


class HalfATrainer(PPOTrainer):
    """verl's trainer as far as it makes its replay buffer; `refill` is told when it is asked for more prompts."""

    def __init__(self, config: Any, mode: str, refill: Callable[[int], Any]) -> None:
        self.config, self.trainer_mode, self._refill = config, mode, refill

    def _add_prompts_to_generate(self, num_prompts: int) -> Any:
        return self._refill(num_prompts)

    def on_sample_end(self) -> None: ...

    def on_step_end(self) -> None: ...


Trainer = Callable[..., HalfATrainer]


@pytest.fixture
def trainer(composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(sampler, "POLL_INTERVAL_S", 0.001)

    def make(mode: str = "sync", *overrides: str, refill: Callable[[int], Any] = lambda _: None) -> HalfATrainer:
        config = composed(f"trainer.v1.trainer_mode={mode}", f"data.train_batch_size={BATCH}", *overrides)
        return HalfATrainer(config, mode, refill)

    return make


def buffer(trainer: Trainer, mode: str = "sync", *overrides: str, **more: Any) -> Any:
    """The one that verl itself makes with `+gymlink=gym`."""
    return trainer(mode, *overrides, **more)._build_replay_buffer()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("sync", GymReplayBuffer), ("colocate_async", GymReplayBufferAsync), ("separate_async", GymReplayBufferAsync)],
)
def test_verl_makes_it_for_each_mode(trainer: Trainer, job: JobDouble, mode: str, kind: type) -> None:
    assert type(buffer(trainer, mode)) is kind


GROUPS = "algorithm.filter_groups.enable=true"


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [GROUPS],
        [GROUPS, "algorithm.filter_groups.metric=gym_turns", "algorithm.filter_groups.max_inflight_gen_batches=3"],
        ["algorithm.filter_groups.max_inflight_gen_batches=3"],
        ["algorithm.filter_groups=null"],
        ["data.gen_batch_size=2"],
        ["trainer.v1.sampler.sync_refill_failed_groups=true", "data.gen_batch_size=2"],
        ["trainer.v1.sampler.max_off_policy_threshold=3", "trainer.v1.sampler.max_off_policy_strategy=wait"],
    ],
    ids=lambda overrides: " ".join(override.split(".", 2)[-1] for override in overrides) or "as it is",
)
def test_its_settings_are_those_of_verls_own(
    trainer: Trainer, job: JobDouble, monkeypatch: pytest.MonkeyPatch, mode: str, overrides: list[str]
) -> None:
    """verl 0.9.1 gives a custom sampler fewer settings than its own: both are made here, and compared."""
    given: list[dict[str, Any]] = []
    init = ReplayBuffer.__init__

    def recorded(self: ReplayBuffer, **settings: Any) -> None:
        given.append(settings)
        init(self, **settings)

    monkeypatch.setattr(ReplayBuffer, "__init__", recorded)
    ours = buffer(trainer, mode, *overrides)
    verls = buffer(trainer, mode, *overrides, "trainer.v1.sampler.custom_sampler.path=null")
    assert isinstance(ours, GymReplayBuffer | GymReplayBufferAsync)
    assert type(verls) is (ReplayBuffer if mode == "sync" else ReplayBufferAsync)
    mine, its = given
    assert callable(mine.pop("refill_fn"))
    assert callable(its.pop("refill_fn"))
    assert mine.pop("poll_interval") == sampler.POLL_INTERVAL_S
    assert mine == its


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_a_batch_brings_the_figures_of_its_rollouts(trainer: Trainer, job: JobDouble, store: Store, mode: str) -> None:
    replay = buffer(trainer, mode)
    for uid in "ab":
        store.put("train", uid, 2)
    job.told["train"] = [SCORED, SCORED, SCORED, FAILED]
    job.told["val"] = [FAILED]
    batch, metrics = replay.sample(global_steps=1, partition_id="train", batch_size=2)
    assert sorted(batch.keys) == ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    assert (metrics["rollout/count"], metrics["rollout/failed"], metrics["rollout/failed/http"]) == (4, 1, 1)
    assert metrics["rollout/tokens_sampled"] == metrics["rollout/tokens_trained"] + metrics["rollout/tokens_dropped"]
    assert job.told == {"train": [], "val": [FAILED]}, "validation is told with validation"
    assert job.waited == 1


def test_verls_own_figures_stay(trainer: Trainer, job: JobDouble, store: Store) -> None:
    def refill(prompts: int) -> None:
        store.put("train", f"new{prompts}", 2)

    replay = buffer(trainer, "colocate_async", refill=refill)
    store.put("train", "bad", 0, "failure")
    job.told["train"] = [SCORED, FAILED]
    _, metrics = replay.sample(global_steps=1, partition_id="train", batch_size=1)
    assert metrics["training/rollout_failure/evicted_samples"] == 1
    assert metrics["rollout/count"] == 2, "those told while groups were replaced count too"


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_an_empty_validation_says_why(trainer: Trainer, job: JobDouble, store: Store, mode: str) -> None:
    """verl itself would end on it with a ValueError of numpy's."""
    replay = buffer(trainer, mode)
    store.put("val", "a", 0)
    job.told["val"] = [FAILED, FAILED]
    with pytest.raises(
        RolloutError, match=r"No validation rollout.*2 of 2 rollouts failed \(http: 2\).*the door is stuck"
    ):
        replay.sample(global_steps=0, partition_id="val", batch_size=1)
    assert [type(error) for error in job.noted] == [RolloutError]


def test_an_empty_batch_says_why_and_not_what_verl_says(trainer: Trainer, job: JobDouble, store: Store) -> None:
    replay = buffer(trainer)
    store.put("train", "a", 0, "failure")
    job.told["train"] = [FAILED, SCORED]
    with pytest.raises(
        RolloutError, match=r"No training rollout of this batch could be used. 1 of 2.*the door is stuck"
    ):
        replay.sample(global_steps=1, partition_id="train", batch_size=1)


def test_an_empty_batch_of_which_the_job_knows_nothing_is_verls_error(
    trainer: Trainer, job: JobDouble, store: Store
) -> None:
    replay = buffer(trainer)
    store.put("train", "a", 0, "failure")
    with pytest.raises(RuntimeError, match="no materializable trajectories"):
        replay.sample(global_steps=1, partition_id="train", batch_size=1)


def test_an_error_about_something_else_is_verls_own(trainer: Trainer, job: JobDouble, store: Store) -> None:
    replay = buffer(trainer, "sync", GROUPS, "algorithm.filter_groups.metric=style")
    store.put("train", "a", 2)
    job.told["train"] = [SCORED, SCORED]
    with pytest.raises(RuntimeError, match="missing DAPO metric 'style'"):
        replay.sample(global_steps=1, partition_id="train", batch_size=1)


def test_groups_that_are_filtered_by_nothing_are_refused(trainer: Trainer, job: JobDouble) -> None:
    """verl says so when it makes its own replay buffer, and to a custom one it says nothing."""
    with pytest.raises(ConfigError, match=r"algorithm\.filter_groups\.metric"):
        buffer(trainer, "sync", GROUPS, "algorithm.filter_groups.metric=null")


def test_too_many_failures_end_the_run(trainer: Trainer, job: JobDouble, store: Store) -> None:
    replay = buffer(trainer)
    store.put("train", "a", 1)
    job.told["train"] = [SCORED, FAILED, FAILED, FAILED]
    with pytest.raises(RolloutError, match=r"max_failed_fraction = 0.5.*3 of 4") as caught:
        replay.sample(global_steps=1, partition_id="train", batch_size=1)
    assert job.noted == [caught.value]


def test_small_batches_are_judged_together(trainer: Trainer, job: JobDouble, store: Store) -> None:
    """Half of a batch of two may fail by chance: judged is when as many ended as a step trains."""
    replay = buffer(trainer, "separate_async")
    for told in ([FAILED, FAILED], [SCORED, SCORED], [FAILED, FAILED]):
        store.put("train", "a", 1)
        job.told["train"] = told
        replay.sample(global_steps=1, partition_id="train", batch_size=1)
    store.put("train", "a", 1)
    job.told["train"] = [FAILED, SCORED]
    with pytest.raises(RolloutError, match="3 of 4"):
        replay.sample(global_steps=1, partition_id="train", batch_size=1)


def test_failures_of_validation_stop_no_training(trainer: Trainer, job: JobDouble, store: Store) -> None:
    replay = buffer(trainer)
    store.put("val", "a", 1)
    job.told["val"] = [FAILED] * 9 + [SCORED]
    _, metrics = replay.sample(global_steps=0, partition_id="val", batch_size=1)
    assert metrics["rollout/failed"] == 9


@pytest.mark.parametrize("allowed", [(0.5, "Too many rollouts failed"), (1.0, "Nothing can be trained")])
@pytest.mark.parametrize(
    "mode",
    [("colocate_async", []), ("separate_async", []), ("sync", ["trainer.v1.sampler.sync_refill_failed_groups=true"])],
)
def test_groups_are_not_replaced_without_end(
    trainer: Trainer, job: JobDouble, store: Store, mode: tuple[str, list[str]], allowed: tuple[float, str]
) -> None:
    job.allowed, said = allowed
    asked: list[int] = []

    def refill(prompts: int) -> None:
        """As many groups as asked for, which fail again."""
        asked.append(prompts)
        assert len(asked) < 50, "this would never end"
        for at in range(prompts):
            store.put("train", f"{len(asked)}x{at}", 0, "failure")
            job.told["train"].append(FAILED)

    replay = buffer(trainer, mode[0], *mode[1], refill=refill)
    refill(1)
    with pytest.raises(RolloutError, match=rf"{said}.*4 of 4 rollouts failed.*the door is stuck") as caught:
        replay.sample(global_steps=1, partition_id="train", batch_size=1)
    assert caught.value in job.noted
    assert sum(asked) == BATCH


def test_failures_that_are_faster_than_the_rest_are_not_taken_for_all(
    trainer: Trainer, job: JobDouble, store: Store
) -> None:
    """Of an environment that is down, groups fail in no time; those of the others are under way."""
    refilled: list[int] = []
    replay = buffer(trainer, "colocate_async", refill=refilled.append)
    for at in range(BATCH):
        store.put("train", f"slow{at}", 0, "running")
    store.put("train", "down", 0, "failure")
    job.told["train"] = [FAILED] * BATCH
    replay._sync_metadata_from_transfer_queue()
    replay.refill_fn(1)
    assert refilled == [1]
    job.told["train"] = [FAILED] * 1000
    with pytest.raises(RolloutError, match="Too many rollouts failed"):
        replay.refill_fn(1)


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_gym_that_did_not_start_is_told_by_the_first_sample(
    trainer: Trainer, job: JobDouble, store: Store, mode: str
) -> None:
    replay = buffer(trainer, mode)
    job.start_error = GymStartError("the server 'door' ended")
    with pytest.raises(GymStartError, match="the server 'door' ended"):
        replay.sample(global_steps=0, partition_id="val", batch_size=1)


def test_gym_that_died_is_told_by_the_next_sample(trainer: Trainer, job: JobDouble, store: Store) -> None:
    replay = buffer(trainer)
    store.put("train", "a", 1)
    job.told["train"] = [SCORED]
    replay.sample(global_steps=1, partition_id="train", batch_size=1)
    store.put("train", "b", 1)
    job.dead = GymError("the server 'door' has died")
    with pytest.raises(GymError, match="has died"):
        replay.sample(global_steps=2, partition_id="train", batch_size=1)
    assert job.waited == 1, "that it started is asked once"


def test_it_is_made_by_keyword_as_verl_makes_it(job: JobDouble) -> None:
    made = gym_sampler(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs={"gymlink": GYMLINK, "train_batch_size": 2, "rollout_n": 4},
        refill_fn=None,
    )
    assert (made.train_batch_size, made.gen_batch_size, made.filter_groups_metric) == (2, 2, None)
