"""The stand-ins for a GPU: OpenRLHF's own program trains with them, and vLLM samples with the weights just trained."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import torch

from openrlhf_on_cpu.device import _CurrentDevice
from openrlhf_on_cpu.imports import after_import
from openrlhf_runs import GENERATIONS, HEADS, ON_CPU, PROMPTS, Run, train
from processes import json_lines

STEPS = 3
AGENT = """\
    import json
    import os

    from openrlhf.utils.agent import AgentExecutorBase


    class AgentExecutor(AgentExecutorBase):
        async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
            ids = hf_tokenizer(prompt)["input_ids"]
            answer = (await llm_engine.generate(ids, sampling_params)).outputs[0]
            chosen = [tried[token].logprob for token, tried in zip(answer.token_ids, answer.logprobs)]
            reward = sum(token % 2 for token in answer.token_ids) / len(answer.token_ids)
            told = {
                "prompt": prompt,
                "label": label,
                "observation_tokens": [*ids, *answer.token_ids],
                "action_ranges": [(len(ids), len(ids) + len(answer.token_ids))],
                "rollout_log_probs": [0.0] * len(ids) + chosen,
                "reward": reward,
                "scores": reward,
                "truncated": False,
                "extra_logs": {},
            }
            with open(os.environ["TOLD"], "a") as file:
                file.write(json.dumps(told) + "\\n")
            return told
"""


class TestImports:
    @pytest.fixture
    def name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A module that can be imported, and has not been."""
        name = "module_to_wait_for"
        (tmp_path / f"{name}.py").write_text("made = 'as written'\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield name
        sys.modules.pop(name, None)

    def test_a_module_is_mended_when_it_has_been_imported_and_once(self, name: str) -> None:
        seen: list[ModuleType] = []
        after_import(name, seen.append)
        assert find_spec(name) is not None
        assert seen == [], "asking whether a module is there imports nothing"
        module = importlib.import_module(name)
        assert seen == [module]
        assert module.made == "as written"
        importlib.reload(module)
        assert seen == [module]

    def test_a_module_that_is_there_is_mended_at_once(self) -> None:
        seen: list[ModuleType] = []
        after_import("json", seen.append)
        assert seen == [json]


def test_python_starts_as_before_where_openrlhf_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.other_sitecustomize = True\n")
    show = """
        import os, sys
        assert sys.other_sitecustomize
        assert "DS_ACCELERATOR" not in os.environ
        print(*sorted({name.partition(".")[0] for name in sys.modules} & {"openrlhf_on_cpu", "torch", "ray", "vllm"}))
    """
    env = {"PYTHONPATH": f"{ON_CPU}:{tmp_path}"}
    shown = subprocess.run(
        [sys.executable, "-c", dedent(show)], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert (shown.stdout.split(), shown.stderr) == (["openrlhf_on_cpu"], "")


class TestDevice:
    def test_the_current_device_is_where_tensors_are_and_a_number_in_a_name(self) -> None:
        current = _CurrentDevice("cpu")
        assert torch.zeros(2, device=current).to(current).device.type == "cpu"
        assert torch.device(f"cuda:{current}") == torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gymlink_tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), heads=HEADS)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps with an agent of our own, and steps so large that old weights would be seen."""
    folder = tmp_path_factory.mktemp("run")
    agent, prompts = folder / "agent.py", folder / "prompts.jsonl"
    agent.write_text(dedent(AGENT))
    rows = [{"input": f"say {number}", "label": str(number)} for number in range(STEPS * PROMPTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--algo.advantage.estimator=group_norm", "--algo.advantage.is_correction_level=token"]
    flags += ["--actor.adam.lr=1e-2"]
    return train(folder, model, agent, prompts, flags, env={"TOLD": str(folder / "told.jsonl")})


@pytest.mark.slow
class TestRun:
    def test_it_ends_well_and_leaves_nothing(self, run: Run) -> None:
        assert run.status == 0, run.said[-5000:]
        assert run.left == ()
        assert all(f"Global step {step}:" in run.said for step in range(1, STEPS + 1))

    def test_what_reaches_the_loss_is_what_the_agent_told(self, run: Run) -> None:
        told = json_lines(run.folder / "told.jsonl")
        assert len(told) == STEPS * PROMPTS * GENERATIONS
        keys = []
        for one in told:
            [(start, end)] = one["action_ranges"]
            ids = tuple(one["observation_tokens"])
            mask = tuple(int(start <= at < end) for at in range(len(ids)))
            keys.append((ids, mask, tuple(torch.tensor(one["rollout_log_probs"]).tolist())))
        assert sorted(row.key for row in run.rows) == sorted(keys)
        assert sorted({row.step for row in run.rows}) == list(range(1, STEPS + 1))

    def test_vllm_samples_with_the_weights_that_were_just_trained(self, run: Run, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        first = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        for step in range(1, STEPS + 1):
            rows = [row for row in run.rows if row.step == step]
            to_trainer = mean_distance([(row.rollout_log_probs - row.old_log_probs)[row.mask] for row in rows])
            to_first = mean_distance([(row.rollout_log_probs - logprobs(first, row.ids))[row.mask] for row in rows])
            assert to_trainer < 0.005, "bfloat16, computed by two programs"
            assert step == 1 or to_first > 10 * to_trainer, "the trainer's first weights would have been as good"


def mean_distance(differences: list[torch.Tensor]) -> float:
    return float(torch.cat(differences).abs().mean())


def logprobs(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Of each id but the first, given those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
