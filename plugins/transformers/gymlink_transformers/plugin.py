"""Makes the engine on a transformers model known to `gymlink serve`. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence

from gymlink.hookspecs import EngineKind, hookimpl


@hookimpl
def gymlink_engines() -> Sequence[EngineKind]:
    return [
        EngineKind(
            name="transformers",
            summary="a model of transformers, loaded in the gateway's own process",
            make="gymlink_transformers.served:make",
            extra="transformers",
        )
    ]
