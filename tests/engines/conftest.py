"""Two real vLLM servers for all tests of this folder, started at the same time; none where vLLM is not installed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_server import VllmServer

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
if not collect_ignore_glob:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what OpenRLHF's dependencies import calls much of itself deprecated
        from gymlink_tiny import make_model, make_tokenizer

CONTEXT = 1024
HEADS = 2
"""vLLM takes no attention head with fewer than 32 dimensions."""


@dataclass(frozen=True)
class Model:
    """A tiny model: in a folder, for a server, and as it is, to compare with."""

    folder: Path
    network: Qwen2ForCausalLM


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """Two that differ in their weights only."""
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("model")
        # By a process of its own: transformers imports DeepSpeed to save a model, with warnings.
        arguments = ["-m", "gymlink_tiny", str(folder), f"--seed={seed}", f"--heads={HEADS}"]
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=200)
        made.append(Model(folder, make_model(make_tokenizer(), seed=seed, heads=HEADS).eval()))
    return made[0], made[1]


@pytest.fixture(scope="session")
def servers(models: tuple[Model, Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, ...]]:
    """Two replicas of the first model."""
    folder = tmp_path_factory.mktemp("vllm")
    flags = [f"--max-model-len={CONTEXT}"]
    both = tuple(VllmServer(models[0].folder, folder, flags=flags) for _ in range(2))
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture
def server(servers: tuple[VllmServer, ...]) -> VllmServer:
    return servers[0]
