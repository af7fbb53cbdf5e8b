"""What gymlink knows of OpenRLHF before it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gymlink.plugins import find_framework, resolve


def test_gymlink_knows_it() -> None:
    framework = find_framework("openrlhf")
    assert framework.versions == ">=0.11.2,<0.12"
    for function in (framework.train, framework.demo, framework.path, framework.prompts):
        assert function is not None
        assert callable(resolve(function))


@pytest.mark.parametrize("module", ["plugin", "prompts", "train"])
def test_asking_imports_no_trainer(module: str) -> None:
    heavy = ("torch", "transformers", "ray", "vllm", "openrlhf")
    code = f"import sys, gymlink_openrlhf.{module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
