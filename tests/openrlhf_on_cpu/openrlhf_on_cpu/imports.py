"""Calls a function when a module has been imported, so that what is mended is there and nothing is imported for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Then = Callable[[Any], None]
_waiting: dict[str, Then] = {}


def after_import(name: str, then: Then) -> None:
    """Call `then` with the module `name`: now if it is there, else right after its import, before anyone sees it."""
    if name in sys.modules:
        then(sys.modules[name])
        return
    _waiting[name] = then
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder(MetaPathFinder):
    """Finds what the others find; the modules that are waited for tell when they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then(module: ModuleType) -> None:
                execute(module)
                _waiting.pop(fullname)(module)  # not before: many only ask whether a module could be imported

            spec.loader.exec_module = execute_then  # type: ignore[method-assign] # a loader serves one module
        return spec


_finder = _Finder()
