"""Makes the core's own engines for `gymlink serve`, as `gymlink.builtin` names them."""

from __future__ import annotations

from collections.abc import Callable

from gymlink.engines import Engine, EnginePool, ScriptedEngine, ServedEngine, SglangEngine, VllmEngine
from gymlink.hookspecs import EngineRequest
from gymlink.types import TokenIds

DEFAULT_REPLY = "This is a scripted reply."


def make_vllm(request: EngineRequest) -> Engine:
    """Samples on one or several `vllm serve`."""

    def replica(url: str) -> ServedEngine:
        return VllmEngine(url, api_key=request.api_key, max_context=request.max_context)

    return _pooled(request, replica)


def make_sglang(request: EngineRequest) -> Engine:
    """Samples on one or several SGLang servers."""

    def replica(url: str) -> ServedEngine:
        return SglangEngine(url, api_key=request.api_key, max_context=request.max_context)

    return _pooled(request, replica)


def _pooled(request: EngineRequest, replica: Callable[[str], ServedEngine]) -> Engine:
    # One alone too: the pool notices that it has hung or is ending, and that it came back without its weights.
    return EnginePool([replica(url) for url in request.urls])


def make_scripted(request: EngineRequest) -> Engine:
    """Says `request.reply` to everything, and ends its turn."""
    text = DEFAULT_REPLY if request.reply is None else request.reply
    reply = TokenIds((*request.tokenizer.encode(text, add_special_tokens=False), request.tokenizer.eos_token_id))
    return ScriptedEngine(lambda _: reply, max_context=request.max_context, keep_calls=False)
