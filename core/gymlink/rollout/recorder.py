"""Writes rollouts to a JSONL file as they end, a line each, so that a run can be looked at while it goes on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from gymlink.gateway.wire import ID_FIELDS
from gymlink.rollout.figures import Figures
from gymlink.rollout.response import output_items
from gymlink.types import Rollout

Detail = Literal["full", "text", "off"]
Split = Literal["train", "val"]


class Recorder:
    """Appends to `path`; the file is made with the first rollout.

    `detail` "full" writes the training segments (ids, mask, logprobs) too, "text" only what a person reads, "off"
    writes nothing.
    """

    def __init__(self, path: Path, *, detail: Detail = "full") -> None:
        self.path = path
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        """Tells the lines of one run from those of another in the same file."""
        self._detail = detail

    def write(self, rollout: Rollout, *, batch: int, split: Split = "train") -> None:
        """`batch` is the number of the collection that the rollout belongs to, from 0."""
        self.append(self.line(rollout, batch=batch, split=split))

    def line(self, rollout: Rollout, *, batch: int, split: Split = "train", figures: Figures | None = None) -> bytes:
        """What `write` appends; empty for the detail "off". `figures` are the rollout's, where more is known now."""
        if self._detail == "off":
            return b""
        line = self._line(rollout, batch, split, figures or Figures.of(rollout))
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)

    def append(self, line: bytes) -> None:
        """Append a line that this or another process made."""
        if line:
            with self.path.open("ab") as file:
                file.write(line)

    def _line(self, rollout: Rollout, batch: int, split: Split, figures: Figures) -> dict[str, Any]:
        agent = rollout.request.row.get("agent_ref", {}).get("name")
        line: dict[str, Any] = {
            "run": self.run,
            "split": split,
            "batch": batch,
            "index": rollout.request.index,
            "group": rollout.request.group,
            "rollout_id": rollout.rollout_id,
            "agent": agent,
            "status": rollout.status.value,
            "reward": rollout.reward,
            "failure": rollout.failure,
            "detail": rollout.detail,
            "attempts": rollout.attempts,
            "turns": len(rollout.turns),
            "prefix_breaks": {cause.value: count for cause, count in rollout.prefix_breaks.items()},
            "tokens_sampled": rollout.sampled_tokens,
            "tokens_trained": figures.tokens_trained,
            "tokens_dropped": figures.dropped,
            "seconds": round(rollout.seconds, 4),
            "seconds_in_model": round(rollout.seconds_in_model, 4),
            "weight_versions": sorted({turn.weight_version for turn in rollout.turns}),
            "input": rollout.request.row.get("responses_create_params", {}).get("input"),
            "output": _readable(rollout.response),
        }
        if self._detail == "full":
            line["segments"] = rollout.segments
        return line


def _readable(response: Mapping[str, Any] | None) -> list[Any]:
    """Gym's output items without the ids that Gym may hang on them: the segments hold those."""
    return [{k: v for k, v in item.items() if k not in ID_FIELDS} for item in output_items(response)]
