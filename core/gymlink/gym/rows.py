"""Reads Gym rows (JSONL), one at a time, and checks each: a file of any size costs the memory of one line.

A row that leaves here has `responses_create_params.input` and an `agent_ref` that names its agent. What is wrong with
one is said as `file.jsonl:12: ...`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import orjson

from gymlink.errors import ConfigError

AGENT_TYPE = "responses_api_agents"
NO_AGENT = "gym"
"""The source of rows that name no agent."""


def read_rows(path: str | Path, *, agents: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, lazily; empty lines are passed over.

    Args:
        path: a JSONL file. Its rows may belong to several environments.
        agents: names of the agents that run. A row without `agent_ref` gets it when there is exactly one; None leaves
            rows as they are.

    Raises:
        ConfigError: the file cannot be read or holds no row, or a row is not JSON, is not an object, has no
            `responses_create_params.input`, or names no agent or one that does not run.
    """
    path = Path(path)
    found = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found = True
                    yield parse_row(line, f"{path}:{number}", agents)
    except OSError as error:
        raise ConfigError(f"Cannot read the rows {str(path)!r}: {error.strerror or error}.") from error
    if not found:
        raise ConfigError(f"{path}: no rows. Write one JSON object a line, each with responses_create_params.input.")


def check_rows(path: str | Path, agents: Sequence[str] | None = None) -> dict[str, int]:
    """Read a whole file and count its rows by agent, in the order of appearance; raises as `read_rows` does.

    Rows that name no agent are counted under "" (only when `agents` is None).
    """
    return dict(Counter(map(agent_of, read_rows(path, agents=agents))))


def agent_of(row: Mapping[str, Any]) -> str:
    """The agent's name; "" when the row names none, and the only one that runs takes it."""
    return str((row.get("agent_ref") or {}).get("name", ""))


def source_of(row: Mapping[str, Any]) -> str:
    """What trainers that tell results by their source call that of a row: its agent, or `NO_AGENT`."""
    return agent_of(row) or NO_AGENT


def parse_row(line: bytes, where: str, agents: Sequence[str] | None = None) -> dict[str, Any]:
    """The row of one line; `where` begins the message of what is wrong with it. Raises as `read_rows` does."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, got {_kind(row)}.")
    if "responses_create_params" not in row:
        raise ConfigError(f"{where}: the key 'responses_create_params' is missing (found: {', '.join(row) or 'none'}).")
    parameters = row["responses_create_params"]
    if not isinstance(parameters, dict):
        raise ConfigError(f"{where}: 'responses_create_params' must be an object, got {_kind(parameters)}.")
    if not isinstance(parameters.get("input"), str | list) or not parameters["input"]:
        raise ConfigError(
            f"{where}: 'responses_create_params.input' is missing or empty; give a text or a list of messages."
        )
    if isinstance(parameters["input"], list):
        for index, item in enumerate(parameters["input"]):
            if not isinstance(item, dict):
                raise ConfigError(f"{where}: item {index} of the input must be an object, got {_kind(item)}.")
    _check_metadata(parameters.get("metadata"), where)
    return _with_agent(row, where, agents)


def readable_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row's input as messages that a person can read, whatever it holds, at least one: Gym judges it, not this."""
    given = row["responses_create_params"]["input"]
    messages = [_message(item) for item in ([given] if isinstance(given, str) else given)]
    return messages or [{"role": "user", "content": ""}]


def _message(item: Any) -> dict[str, str]:
    if not isinstance(item, Mapping):
        return {"role": "user", "content": item if isinstance(item, str) else orjson.dumps(item).decode()}
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_text(part) for part in content)
    if not isinstance(content, str):
        content = orjson.dumps(item).decode()
    return {"role": str(item.get("role") or item.get("type") or "user"), "content": content}


def _text(part: Any) -> str:
    """The text of a content part; other kinds (an image, say) and parts without one are left out."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


def _check_metadata(metadata: Any, where: str) -> None:
    """The rollout's id travels in `metadata.extra_body`, beside what the row has there."""
    if metadata is not None and not isinstance(metadata, dict):
        raise ConfigError(f"{where}: 'responses_create_params.metadata' must be an object, got {_kind(metadata)}.")
    extra_body = (metadata or {}).get("extra_body")
    if extra_body is None:
        return
    try:
        is_object = isinstance(extra_body, str) and isinstance(orjson.loads(extra_body), dict)
    except orjson.JSONDecodeError:
        is_object = False
    if not is_object:
        raise ConfigError(
            f"{where}: 'responses_create_params.metadata.extra_body' must be a JSON object in a string, "
            f"got {extra_body!r}."
        )


def _with_agent(row: dict[str, Any], where: str, agents: Sequence[str] | None) -> dict[str, Any]:
    reference = row.get("agent_ref")
    if reference is not None and (not isinstance(reference, dict) or not isinstance(reference.get("name"), str)):
        raise ConfigError(f"{where}: 'agent_ref' must be an object with a 'name', got {reference!r}.")
    if agents is None:
        return row
    running = ", ".join(sorted(agents)) or "none"
    if reference is None:
        if len(agents) != 1:
            raise ConfigError(
                f"{where}: 'agent_ref' is missing, and {len(agents)} agents run ({running}): "
                f'name one as {{"type": "{AGENT_TYPE}", "name": ...}}.'
            )
        return {**row, "agent_ref": {"type": AGENT_TYPE, "name": agents[0]}}
    if reference["name"] not in agents:
        nearest = get_close_matches(reference["name"], agents, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"{where}: no agent {reference['name']!r} runs; running: {running}.{hint}")
    return row


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
