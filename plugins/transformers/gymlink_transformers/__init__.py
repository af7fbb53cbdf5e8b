"""Sampling from a transformers model in this process, whatever trains it.

    from gymlink_transformers import LiveModelEngine, max_logprob_error

Importing the package imports neither torch nor transformers; the names above do, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymlink_transformers.engine import LiveModelEngine
    from gymlink_transformers.logprobs import SampledRow, max_logprob_error

__all__ = ["LiveModelEngine", "SampledRow", "max_logprob_error"]

_HOMES = {"LiveModelEngine": "engine", "SampledRow": "logprobs", "max_logprob_error": "logprobs"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
