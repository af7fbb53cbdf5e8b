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
        first = next(iter(str(error).splitlines()), "")
        if Path(name).exists():
            raise ConfigError(f"{name!r} is no model's folder with a tokenizer in it ({first})") from error
        raise ConfigError(f"There is no folder {name!r}, and no such model can be had from the hub: {first}") from error
