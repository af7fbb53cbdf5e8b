"""A rollout actor of OpenRLHF's in one process: its own way to run an agent, and the plugin's executor and job in it.

There is no Ray and no Gym, and rollouts come from a stand-in for `gymlink.worker.RolloutWorker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from gymlink.config import GatewaySettings, load_settings
from gymlink.host import GymHost, HostedGym
from gymlink.rollout import Figures
from gymlink.types import Rollout, RolloutRequest, Sampling
from gymlink_openrlhf import executor as module
from gymlink_openrlhf.executor import executor_for
from gymlink_ray.job import Job, JobActor

GYM = HostedGym("http://nowhere", "secret", {"agent": "http://nowhere/agent"}, "0.4.0")


class Worker:
    """The part of a `RolloutWorker` that the executor calls."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.joined: dict[str, Any] = {}

    def make(self, settings: Any, **made: Any) -> Worker:
        assert not self.made, "an actor has one worker"
        self.made = {"settings": settings, **made}
        return self

    async def serve(self, secret: str, gateway: GatewaySettings) -> str:
        await asyncio.sleep(0)
        return f"http://{gateway.host}/{secret}"

    def join(self, gym: HostedGym, **joined: Any) -> None:
        self.joined = {"gym": gym, **joined}

    async def rollout(self, request: RolloutRequest, *, sampling: Sampling) -> Rollout:
        raise NotImplementedError


class Host(GymHost):
    """A Gym that is looked at and never called."""

    enlisted: Sequence[str] = ()
    error: Exception | None = None

    async def start(self) -> HostedGym:
        if self.error:
            raise self.error
        return GYM

    def check(self) -> None: ...

    def enlist(self, url: str) -> int:
        self.enlisted = [*self.enlisted, url]
        return 5


class Told(JobActor):
    """The job's actor, which also keeps what it is told."""

    def __init__(self, gym_config: Path, run_dir: Path) -> None:
        settings = load_settings(gym_config)
        super().__init__(settings, str(run_dir), GatewaySettings())
        self.host = self._host = Host(settings, run_dir)
        self.told: list[tuple[str, Figures]] = []

    async def ended(self, split: str, figures: Figures, line: bytes) -> None:
        await super().ended(split, figures, line)
        figures.check_conservation()
        self.told.append((split, figures))


class Remote:
    """An actor's handle: what is called begins at once, whether it is waited for or not, in this process."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> asyncio.Task[Any]:
            called: Coroutine[Any, Any, Any] = getattr(self._actor, name)(*arguments)
            return asyncio.ensure_future(called)

        return SimpleNamespace(remote=remote)


class Actor:
    """One rollout actor, in a job that was started with these flags. `start` makes the executor."""

    kind = RolloutRayActor.__ray_metadata__.modified_class

    def __init__(
        self, folder: Path, flags: Sequence[str], tokenizer: Any, worker: Worker, patch: pytest.MonkeyPatch
    ) -> None:
        self.run_dir = folder / "gym"
        self.gym_config = folder / "gym.yaml"
        if not self.gym_config.exists():
            self.gym_config.write_text("gym: {config_paths: [a.yaml]}\n")
        self.tokenizer, self.worker = tokenizer, worker
        self.job = Told(self.gym_config, self.run_dir)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.executor: Any = None
        patch.setattr(module, "command_line", lambda: flags)
        patch.setattr("gymlink.rollout.neutral.GRACE_S", 0.02)
        patch.setattr(module, "RolloutWorker", worker.make)
        patch.setattr(module, "worker_gateway_of", lambda _: GatewaySettings(host="here"))
        patch.setattr(Job, "of", lambda *_: Job(Remote(self.job)))

    def start(self) -> None:
        self.executor = executor_for(gym_config=str(self.gym_config), run_dir=str(self.run_dir))()

    async def generate(self, prompt_token_ids: list[int], sampling_params: SamplingParams) -> RequestOutput:
        """In place of the actor's vLLM."""
        self.asked.append((prompt_token_ids, sampling_params))
        made = CompletionOutput(0, "", [3], None, [{3: Logprob(-0.75)}], finish_reason="length")
        return RequestOutput("0", None, prompt_token_ids, None, [made], finished=True)

    async def respond(
        self,
        label: str | Mapping[str, Any],
        siblings: int,
        *,
        prompt: str = "agent: go",
        max_length: int = 64,
        images: Any = None,
        logprobs: int | None = 1,
    ) -> list[dict[str, Any]]:
        """What the samples of one prompt came to, as the trainer gets it."""
        calling = self.kind.generate_responses(
            self,
            prompt=prompt,
            label=label,
            sampling_params=SamplingParams(temperature=0.5, top_k=-1, max_tokens=6, min_tokens=1, logprobs=logprobs),
            max_length=max_length,
            hf_tokenizer=self.tokenizer,
            num_samples=siblings,
            images=images,
        )
        told: list[dict[str, Any]] = await asyncio.wait_for(calling, 30)
        return told
