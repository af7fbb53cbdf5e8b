"""Gives each test a page, or a block of a page, at a time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pages import BLOCKS, PAGES, REPOSITORY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes `page`, or a block named by its language, one run for each there is."""
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
    for language in ("python", "yaml", "json", "toml", "console"):
        if f"{language}_block" in metafunc.fixturenames:
            found = [block for block in BLOCKS if block.language == language]
            metafunc.parametrize(f"{language}_block", found, ids=str)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def make_targets() -> set[str]:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


@pytest.fixture(scope="session")
def languages() -> set[str]:
    """The languages of all blocks that are on any page."""
    return {block.language for block in BLOCKS}
