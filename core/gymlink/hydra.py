"""Settings in Hydra's grammar, which both NeMo Gym and verl read on their command lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gymlink.errors import ConfigError


def hydra_override(path: str, value: Any, *, how: str = "++") -> Iterator[str]:
    """`++path=value` in Hydra's grammar (https://hydra.cc/docs/advanced/override_grammar/basic/).

    `how` is "++" (set or add), "+" (add) or "" (set; Hydra refuses a path that there is not). A mapping becomes one
    override for each of its leaves, since Hydra cannot quote the keys of one.
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from hydra_override(f"{path}.{key}", item, how=how)
    else:
        yield f"{how}{path}={hydra_value(value)}"


def hydra_value(value: Any) -> str:
    """A value in Hydra's grammar; every string is quoted, so none is taken for a number or a list."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        # Backslashes count only before a quote.
        escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
        return "'" + re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped) + "'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    raise ConfigError(f"Cannot pass {value!r} ({type(value).__name__}) as a setting; use plain YAML values.")
