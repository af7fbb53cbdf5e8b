"""Tokenizers and formats of the chats in tests/support/chats.py, under the names that these tests use."""

from __future__ import annotations

from typing import Any

import pytest

from chats import chat_of, make_tokenizer


@pytest.fixture(scope="session")
def make() -> Any:
    """Makes a fresh tokenizer, with another template text if given."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Any:
    """Gives the tokenizer of a template."""
    return lambda name: chat_of(name).tokenizer


@pytest.fixture(scope="session")
def format_of() -> Any:
    """Gives the format of a template."""
    return lambda name: chat_of(name).format
