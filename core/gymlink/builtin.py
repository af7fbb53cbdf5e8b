"""The core's own engines, made known by the same hooks as a stranger's. Imports none of them."""

from __future__ import annotations

from collections.abc import Sequence

from gymlink.hookspecs import EngineKind, hookimpl

_MAKE = "gymlink.engines.make"


@hookimpl
def gymlink_engines() -> Sequence[EngineKind]:
    return [
        EngineKind("vllm", "`vllm serve`, over HTTP", f"{_MAKE}:make_vllm", remote=True),
        EngineKind("sglang", "an SGLang server, over HTTP", f"{_MAKE}:make_sglang", remote=True),
        EngineKind("scripted", "no model: one reply to everything, to try things out", f"{_MAKE}:make_scripted"),
    ]
