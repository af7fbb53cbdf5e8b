"""What NeMo Gym's own capture of token ids (0.6 and newer) holds of a rollout.

It is for agents that drive their calls themselves and hand back no ids: Gym's model server knows them by their path,
and writes the ids of each call into a file for the rollout, which Gym's own trainers read. gymlink reads it, and
leaves it where it is.
Source: token_id_capture/store.py and records.py of NeMo Gym 0.7.0 (record schema 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from gymlink.types import CallIds, TokenIds


def capture_folder(config: Mapping[str, Any]) -> Path | None:
    """Where a Gym of this configuration keeps its captures, as its own trainers find it; None when it keeps none."""
    block = config.get("token_id_capture")
    if not isinstance(block, Mapping) or not block.get("enabled") or block.get("sink"):
        return None
    folder = block.get("dir") or config.get("model_call_capture_dir")
    return Path(str(folder)) if folder else None


def captured_ids(folder: Path, rollout_id: str) -> list[CallIds]:
    """Of each call that was captured for a rollout, in their order; none when there is no file for it.

    They are evidence of what was sampled, not the truth.
    """
    try:
        lines = (folder / f"{rollout_id}.tokens.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    calls: dict[str, CallIds] = {}
    for entry in map(orjson.loads, filter(None, lines)):
        calls[entry["model_call_id"]] = CallIds(
            TokenIds(entry["prompt_token_ids"]),
            TokenIds(entry["generation_token_ids"]),
            # Only what follows the parent's prompt and completion is written then.
            extends=calls[entry["parent_call_id"]] if entry.get("prompt_is_delta") else None,
        )
    return list(calls.values())
