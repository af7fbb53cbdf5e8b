"""The engine on a live model keeps the contract of every engine."""

from collections.abc import Iterator

import pytest
import torch

from gymlink.testing import EngineContract
from gymlink.types import Sampling
from gymlink_tiny import make_model, make_tokenizer
from gymlink_transformers.engine import LiveModelEngine


class TestLiveModelEngine(EngineContract):
    prompt = (5, 6, 7)

    @pytest.fixture
    def engine(self) -> Iterator[LiveModelEngine]:
        torch.set_num_threads(1)
        engine = LiveModelEngine(make_model(make_tokenizer(), max_context=128), version=lambda: 3)
        with engine.sampling(Sampling()):
            yield engine
