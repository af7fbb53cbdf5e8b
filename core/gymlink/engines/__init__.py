"""Engines: token in, token out. `Engine` is the protocol; `ScriptedEngine` is the public test double."""

from gymlink.engines.base import Engine, ServedEngine, UpdatesWeights
from gymlink.engines.scripted import ScriptedEngine, scripted_logprob

__all__ = ["Engine", "ScriptedEngine", "ServedEngine", "UpdatesWeights", "scripted_logprob"]
