"""Gym rows as OpenRLHF's file of prompts: a line for each, with the whole row as JSON in its label.

OpenRLHF hands prompt and label of a line to the agent, and reads the file with `datasets`, which would bring nested
rows into one schema: a string passes as it is. The prompt is for people; besides, OpenRLHF finds a result's data source
by it (`compute_eval_metrics`, 0.11.2), so it begins with that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from gymlink.errors import ConfigError
from gymlink.gym import read_rows, readable_messages, source_of

INPUT_KEY, LABEL_KEY = "input", "label"
"""What OpenRLHF's `--data.input_key` and `--data.label_key` are."""
LABEL_FIELD = "gymlink"
"""The key of a label that is not the row's: the number of the row in its file, from 0, and what it is for."""
READ_BY_OPENRLHF = ",@"
"""Characters that have a meaning to OpenRLHF in the path of a dataset: several of them, and a folder of one."""


def write_prompts(rows: Path, output: Path, evaluation: bool = False) -> Path:
    """Write the rows as prompts to `output`, whose folder is made; its absolute path. One row is in memory at a time.

    Raises:
        ConfigError: the rows cannot be read, or one of them or `output` cannot work. No file was written.
    """
    output = output.expanduser().absolute()
    check_path(output)
    if output == rows.expanduser().absolute():
        raise ConfigError(f"The prompts cannot be written over the rows they are made from, {str(rows)!r}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".part")
    try:
        with unfinished.open("wb") as file:
            for prompt in prompts_of(rows, evaluation):
                file.write(orjson.dumps(prompt, option=orjson.OPT_APPEND_NEWLINE))
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return output


def check_path(output: Path) -> None:
    """Refuse a path that OpenRLHF would take for something else.

    Raises:
        ConfigError: it holds a comma or an at sign.
    """
    for character in READ_BY_OPENRLHF:
        if character in str(output):
            raise ConfigError(
                f"OpenRLHF cannot read the prompts from {str(output)!r}: {character!r} in the path of a dataset has a "
                "meaning of its own. Choose another folder or name."
            )


def prompts_of(rows: Path, evaluation: bool) -> Iterator[dict[str, str]]:
    """The prompts of a file of rows, lazily.

    Raises:
        ConfigError: the file cannot be read or a row cannot work.
    """
    split = "val" if evaluation else "train"
    for index, row in enumerate(read_rows(rows)):
        if LABEL_FIELD in row:
            raise ConfigError(
                f"{rows}: row {index + 1} has a key {LABEL_FIELD!r}, under which gymlink keeps its own. Rename it."
            )
        source = source_of(row)
        label = {**row, LABEL_FIELD: {"index": index, "split": split}}
        yield {
            INPUT_KEY: f"{source}: {_last_text(row)}",
            LABEL_KEY: orjson.dumps(label).decode(),
            "datasource": source,
        }


def _last_text(row: Mapping[str, Any]) -> str:
    """What the user says last; the last message where none is the user's."""
    messages = readable_messages(row)
    asked = [message for message in messages if message["role"] == "user"]
    return (asked or messages)[-1]["content"]
