"""A tiny model and tokenizer, and verl's own configuration composed with gymlink's part of it; no Ray, no server."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from gymlink_tiny import make_model, make_tokenizer

collect_ignore_glob = [] if find_spec("verl") else ["test_*.py"]
if not collect_ignore_glob:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl 0.9.1 imports what Ray and others call deprecated
        import verl.experimental.agent_loop
        import verl.trainer.ppo.v1.trainer_base  # noqa: F401

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    return make_model(tokenizer).eval()


@cache
def _base() -> Any:
    from gymlink_verl.train import compose

    return compose(["+gymlink=gym"])


@pytest.fixture(scope="session")
def composed() -> Callable[..., Any]:
    """verl's configuration with `+gymlink=gym`, and then with these overrides, such as `trainer.use_v1=false`."""
    from omegaconf import DictConfig, OmegaConf

    def with_overrides(*overrides: str) -> DictConfig:
        config: DictConfig = deepcopy(_base())
        for key, value in OmegaConf.from_dotlist(list(overrides)).items():
            OmegaConf.update(config, str(key), value)
        return config

    return with_overrides
