"""The pages that people read, and the fenced blocks in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    (
        page
        for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "plugins/*/*.md", "benchmarks/*.md")
        for page in REPOSITORY.glob(pattern)
    ),
    key=str,
)
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and where it begins."""

    language: str
    text: str
    page: Path
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a console, without the variables that are set before it."""
        lines = (line.removeprefix("$ ") for line in self.text.replace("\\\n", " ").splitlines())
        return [_without_assignments(shlex.split(line, comments=True)) for line in lines]


def _without_assignments(words: Sequence[str]) -> list[str]:
    first = next((at for at, word in enumerate(words) if not ASSIGNMENT.fullmatch(word)), len(words))
    return list(words[first:])


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(language=match[2], text=dedent(match[3]), page=page, line=text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
