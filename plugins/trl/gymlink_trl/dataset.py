"""Gym rows as a dataset for GRPOTrainer, and back again.

TRL hands a rollout function the prompt and nothing else, so the prompt says which row it stands for: its first message
carries, beside role and content, the key `gym_row` with the file, the byte where the row's line starts and a digest
of the line. It is a short string whatever the size of the row, survives shuffling, mapping, concatenation and Arrow,
and a file that has changed since is noticed. Chat templates ignore the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from gymlink.errors import ConfigError
from gymlink.gym import parse_row, read_rows, readable_messages

ROW_KEY = "gym_row"


def gym_dataset(path: str | Path, agents: Sequence[str] | None = None) -> Dataset:
    """A dataset with the column `prompt`: one conversation for each row of a Gym JSONL file.

    The messages are the row's own input, for people and logs to read; what the policy sees is made by the agent.
    `agents` are the names that rows may refer to, when they are known already.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line is no Gym row.
    """
    path = Path(path).resolve()
    rows = read_rows(path, agents=agents)
    # The rows first: what is wrong with the file is said by their reader.
    prompts = [
        _prompt(row, reference=f"{path}@{offset}:{_digest(line)}")
        for row, (offset, line) in zip(rows, _lines(path), strict=True)
    ]
    return Dataset.from_dict({"prompt": prompts})


def load_rows(prompts: Sequence[Any], agents: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The row of each prompt, in their order. Prompts of one row share one object.

    `agents` are the names of those that run: a row that names none gets the only one.

    Raises:
        ConfigError: a prompt was not made by `gym_dataset`, its file is gone or has changed, or its agent does not
            run.
    """
    references = [row_reference(prompt) for prompt in prompts]
    rows = {reference: _load(reference, agents) for reference in dict.fromkeys(references)}
    return [rows[reference] for reference in references]


def row_files(prompts: Sequence[Any]) -> set[str]:
    """The files that the rows of these prompts are in."""
    return {_parts(row_reference(prompt))[0] for prompt in prompts}


def row_reference(prompt: Any) -> str:
    """What a prompt says about its row: equal for prompts of the same row."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    reference = first.get(ROW_KEY) if isinstance(first, Mapping) else None
    if not isinstance(reference, str):
        raise ConfigError(
            f"The prompt {str(prompt)[:200]!r} names no Gym row. Make the trainer's datasets with "
            "gymlink_trl.gym_dataset(path)."
        )
    return reference


def _parts(reference: str) -> tuple[str, int, str]:
    """Path, offset and digest."""
    place, _, digest = reference.rpartition(":")
    path, _, offset = place.rpartition("@")
    return path, int(offset), digest


def _load(reference: str, agents: Sequence[str] | None) -> dict[str, Any]:
    path, offset, digest = _parts(reference)
    try:
        with Path(path).open("rb") as file:
            file.seek(offset)
            line = file.readline()
    except OSError as error:
        raise ConfigError(f"The rows of the dataset are read from {path!r}: {error.strerror or error}.") from error
    if _digest(line) != digest:
        raise ConfigError(f"{path} has changed since the dataset was made from it: make the dataset anew.")
    return parse_row(line, f"{path} (byte {offset})", agents)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with the byte where it starts."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line.strip(), digest_size=8).hexdigest()


def _prompt(row: Mapping[str, Any], *, reference: str) -> list[dict[str, str]]:
    prompt = readable_messages(row)
    prompt[0][ROW_KEY] = reference
    return prompt
