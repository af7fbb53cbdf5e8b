"""What the plugin needs of OpenRLHF (0.11.2), and of Ray and vLLM as OpenRLHF pins them, by name and by what it does.

A new version that lacks one fails here first. One private name of Ray is used: `ray._private.state.jobs`.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray._private.state
import ray._private.utils
from openrlhf.trainer.ppo_utils.experience import Experience, split_experience_batch
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor, _load_agent_executor
from openrlhf.utils.agent import AgentExecutorBase
from packaging.specifiers import SpecifierSet
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

import gymlink_openrlhf
from gymlink.plugins import find_framework
from gymlink.types import Sampling
from gymlink_openrlhf import executor
from gymlink_openrlhf.agent import write_agent
from gymlink_openrlhf.convert import placeholder, response_of, sample_of
from gymlink_openrlhf.engine import ActorEngine
from gymlink_openrlhf.executor import GymAgentExecutor
from gymlink_openrlhf.options import GROUP_RELATIVE
from gymlink_ray.job import Job
from openrlhf_flags import parser
from openrlhf_rollouts import failed, scored
from openrlhf_steps import generator, read

PACKAGE = Path(gymlink_openrlhf.__file__).parent
CHANGED = f"the plugin was written for OpenRLHF 0.11.2, and this is {version('openrlhf')}: look at "
ACTOR = RolloutRayActor.__ray_metadata__.modified_class


def test_the_framework_is_known_and_its_version_supported() -> None:
    assert SpecifierSet(find_framework("openrlhf").versions).contains(version("openrlhf"))


# How an agent is made and called.


def test_an_agent_file_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run by its path, outside of `sys.modules`, and its `AgentExecutor` is made without arguments."""
    gym_config = tmp_path / "gym.yaml"
    gym_config.write_text("gym: {config_paths: [a.yaml]}\n")
    expected: list[Any] = []
    actor = SimpleNamespace(expect=SimpleNamespace(remote=lambda *told: expected.append(told)))
    monkeypatch.setattr(Job, "of", lambda *told: expected.append(told) or Job(actor))
    monkeypatch.setattr(executor, "command_line", lambda: ["--rollout.batch_size", "3"])
    made = _load_agent_executor(str(write_agent(gym_config, tmp_path / "run")))
    assert isinstance(made, GymAgentExecutor), CHANGED + "_load_agent_executor in trainer/ray/vllm_engine.py"
    assert expected == [(str(gym_config), str(tmp_path / "run")), (set(), 3)]


def test_an_agent_is_called_as_ours_can_be() -> None:
    theirs, ours = (inspect.signature(kind.execute).parameters for kind in (AgentExecutorBase, GymAgentExecutor))
    assert list(theirs) == list(ours), CHANGED + "AgentExecutorBase in utils/agent.py"
    assert [one.default for one in theirs.values()] == [one.default for one in ours.values()]


async def test_the_samples_of_a_prompt_are_run_together() -> None:
    """They wait for each other, and know each other by the sampling parameters: one object, which lives as long."""
    given: list[dict[str, Any]] = []
    everyone = asyncio.Event()

    class Executor:
        async def execute(self, **arguments: Any) -> int:
            given.append(arguments)
            number = len(given)
            if number == 3:
                everyone.set()
            await everyone.wait()
            return number

    actor = SimpleNamespace(executor=Executor())
    call = ACTOR.generate_responses(
        actor,
        prompt="p",
        label="l",
        sampling_params=SamplingParams(),
        max_length=9,
        hf_tokenizer="t",
        num_samples=3,
        images=None,
    )
    told = await asyncio.wait_for(call, 10)
    where = CHANGED + "RolloutRayActor.generate_responses in trainer/ray/vllm_engine.py"
    assert told == [1, 2, 3], where
    names = {"prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "llm_engine", "images"}
    assert all(arguments.keys() == names for arguments in given), where
    assert names == inspect.signature(GymAgentExecutor.execute).parameters.keys() - {"self"}
    assert len({id(arguments["sampling_params"]) for arguments in given}) == 1, where
    assert all(arguments["llm_engine"] is actor for arguments in given), where


async def test_an_error_in_one_sample_is_the_prompts() -> None:
    class Executor:
        async def execute(self, **_: Any) -> None:
            raise RuntimeError("as told")

    call = ACTOR.generate_responses(SimpleNamespace(executor=Executor()), "p", "l", None, 9, "t", num_samples=2)
    with pytest.raises(RuntimeError, match="as told"):
        await call


def dispatched(monkeypatch: pytest.MonkeyPatch, level: str = "token", **more: Any) -> list[dict[str, Any]]:
    """What the trainer sends to rollout actors, for two prompts."""
    sent: list[dict[str, Any]] = []
    engine = SimpleNamespace(
        get_num_unfinished_requests=SimpleNamespace(remote=lambda: 0),
        generate_responses=SimpleNamespace(remote=lambda **told: sent.append(told)),
    )
    trainer = generator()
    trainer.vllm_engines, trainer.tokenizer = [engine], "t"
    advantage = SimpleNamespace(is_correction_level=level)
    trainer.args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage), rollout=SimpleNamespace(n_samples_per_prompt=4)
    )
    monkeypatch.setattr("openrlhf.trainer.ppo_utils.samples_generator.ray", SimpleNamespace(get=list))
    trainer._dispatch_prompts_to_vllm(["p", "q"], ["l", "m"], **more)
    return sent


DISPATCH = CHANGED + "SamplesGenerator._dispatch_prompts_to_vllm in trainer/ppo_utils/samples_generator.py"


def test_a_prompt_is_sent_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of an actor, and so one object of sampling parameters, made of what Ray sent: no prompts share it."""
    sent = dispatched(monkeypatch, temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=5, max_len=99)
    assert [(one["prompt"], one["label"], one["num_samples"]) for one in sent] == [("p", "l", 4), ("q", "m", 4)], (
        DISPATCH
    )
    assert {one["max_length"] for one in sent} == {99}, DISPATCH
    params = sent[0]["sampling_params"]
    assert executor.sampling_of(params) == Sampling(0.5, 0.9, 7, 0.0, 5), DISPATCH
    assert params.min_tokens == 1, DISPATCH


def test_logprobs_are_asked_for_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one["sampling_params"].logprobs for one in dispatched(monkeypatch)} == {1}, DISPATCH
    assert {one["sampling_params"].logprobs for one in dispatched(monkeypatch, "off")} == {None}, DISPATCH


def test_evaluation_says_how_many_samples_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = dispatched(monkeypatch, n_samples_per_prompt=2)
    assert {one["num_samples"] for one in sent} == {2}, DISPATCH


# The actor's vLLM.


class Vllm:
    """Stands where `AsyncLLMEngine` stands, in OpenRLHF's own actor."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.ended = False

    async def generate(self, prompt: Any, params: SamplingParams, *, request_id: str) -> AsyncIterator[RequestOutput]:
        self.asked.append((prompt, params))
        try:
            for ids in ([5], [5, 6]):
                await asyncio.sleep(0 if request_id else 60)
                made = CompletionOutput(0, "", ids, None, [{one: Logprob(-0.5)} for one in ids], finish_reason="stop")
                yield RequestOutput(request_id, None, [1], None, [made], finished=len(ids) == 2)
        finally:
            self.ended = True


async def test_the_actor_generates_ids_from_ids() -> None:
    actor = object.__new__(ACTOR)
    actor.llm, actor._mm_pad_token_ids = Vllm(), None
    made = await ActorEngine(actor, 10).generate([1, 2], Sampling(), stop_token_ids=[7], rollout_id="0.r")
    where = CHANGED + "RolloutRayActor.generate in trainer/ray/vllm_engine.py"
    assert (made.token_ids, made.finish_reason) == ((5, 6), "stop"), where
    [(prompt, params)] = actor.llm.asked
    assert prompt["prompt_token_ids"] == [1, 2], where
    assert (params.max_tokens, params.stop_token_ids, params.logprobs) == (8, [7], 0), where


# What is read of a response, and what advantages are made of.


def test_the_estimators_are_those_that_are_treated() -> None:
    [choices] = [one.choices for one in parser()._actions if one.dest == "algo.advantage.estimator"]
    assert choices is not None
    assert set(choices) == GROUP_RELATIVE | {"gae", "reinforce", "flash_reinforce"}, (
        CHANGED + "compute_advantages_and_returns in trainer/ppo_utils/experience_maker.py, and say in "
        "gymlink_openrlhf.rewards what a failed rollout is given under the new one"
    )


def test_a_group_is_what_stands_together() -> None:
    """Rewards are reshaped to groups by their order, which is that of the responses."""
    source = inspect.getsource(RemoteExperienceMaker.compute_advantages_and_returns)
    assert "rewards.reshape(-1, args.rollout.n_samples_per_prompt)" in source, CHANGED + "experience_maker.py"


def test_every_key_of_a_response_is_read() -> None:
    told = response_of(
        scored(1.0), sample_of(scored(1.0)), prompt="p", label="l", reward=0.5, score=0.25, with_logprobs=True
    )
    source = inspect.getsource(type(generator())._process_response_into_experience)
    used = {node.value for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Constant)}
    assert told.keys() <= used, CHANGED + "_process_response_into_experience in trainer/ppo_utils/samples_generator.py"
    assert read(told).info.keys() == {"reward", "score", "response_clip_ratio", *told["extra_logs"]}


def test_samples_of_one_batch_must_have_the_same_figures() -> None:
    """So a failed rollout has all of them."""
    with_figures = response_of(
        failed(), placeholder((1,), 2, -0.5), prompt="p", label="l", reward=0, score=0, with_logprobs=True
    )
    without = with_figures | {"extra_logs": {}}
    batch = Experience.concat_experiences([read(with_figures), read(without)], 0)
    with pytest.raises(ValueError, match=r"Size of info\[gym_turns\]"):
        split_experience_batch(batch)


# Ray.


def test_ray_tells_a_jobs_command_line() -> None:
    """Without a cluster: what `jobs` is said to tell, and what of it is the command line."""
    where = f"this is Ray {version('ray')}, and 2.55.0 was looked at: find how a job's entry point is known, and see "
    where += "gymlink_openrlhf.options.command_line"
    source = inspect.getsource(ray._private.state.GlobalState.job_table)
    assert 'job_info["JobID"] = entry.job_id.hex()' in source, where
    assert 'job_info["Entrypoint"] = entry.entrypoint' in source, where
    assert inspect.signature(ray._private.state.jobs).parameters.keys() == set(), where
    assert ray._private.utils.get_entrypoint_name() == subprocess.list2cmdline(psutil.Process().cmdline()), where


def test_private_names_are_used_in_one_place() -> None:
    """Of OpenRLHF none, and of Ray the one above."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FOREIGN:
                names = [*node.module.split("."), *(name.name for name in node.names)]
                found += [(path.name, node.module)] if any(name.startswith("_") for name in names) else []
    assert found == [("options.py", "ray._private.state")]


FOREIGN = {"openrlhf", "ray", "vllm"}


def test_what_lists_frameworks_imports_none() -> None:
    code = "import sys, gymlink_openrlhf.plugin as p; p.gymlink_frameworks(); print(*sys.modules)"
    path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert not {*FOREIGN, "torch"} & set(made.stdout.split())
