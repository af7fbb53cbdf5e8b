"""Loads the tokenizer of a policy by its name or folder. Needs transformers, and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gymlink.errors import ConfigError


def load_tokenizer(name: str) -> Any:
    """The tokenizer, with its chat template.

    Raises:
        ConfigError: there is none of that name, or it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = "in that folder" if Path(name).exists() else "on the Hugging Face hub, and there is no such folder"
        raise ConfigError(f"No tokenizer {name!r} can be loaded {where}: {error}") from error
