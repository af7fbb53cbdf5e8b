"""A tiny model and its tokenizer."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from gymlink_tiny import make_model, make_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    return make_model(tokenizer)
