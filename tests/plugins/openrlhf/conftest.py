"""Leaves these tests out where OpenRLHF is not installed. No Ray cluster and no vLLM engine runs in them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

collect_ignore_glob = [] if find_spec("openrlhf") else ["test_*.py"]
if not collect_ignore_glob:
    import openrlhf_steps  # noqa: F401 - before anything else imports OpenRLHF


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    from gymlink_tiny import make_tokenizer

    return make_tokenizer()
