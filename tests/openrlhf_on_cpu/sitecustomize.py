"""Python runs this file as it starts, when this folder is on PYTHONPATH: in the driver, in each of Ray's workers and in
vLLM's engine alike. Nothing changes until `openrlhf` is imported; another sitecustomize, farther along, still runs.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import openrlhf_on_cpu

openrlhf_on_cpu.activate()

_here = Path(__file__).parent
_hidden = PathFinder.find_spec(
    "sitecustomize", [entry for entry in sys.path if Path(entry).resolve() != _here.resolve()]
)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
