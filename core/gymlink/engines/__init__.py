"""Engines: token in, token out. `Engine` is the protocol; `ScriptedEngine` is the public test double."""

from gymlink.engines.base import Engine, ServedEngine, UpdatesWeights
from gymlink.engines.pool import EnginePool
from gymlink.engines.scripted import ScriptedEngine, scripted_logprob
from gymlink.engines.sglang import SglangEngine
from gymlink.engines.vllm import VllmEngine

__all__ = [
    "Engine",
    "EnginePool",
    "ScriptedEngine",
    "ServedEngine",
    "SglangEngine",
    "UpdatesWeights",
    "VllmEngine",
    "scripted_logprob",
]
