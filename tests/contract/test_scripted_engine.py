import pytest

from gymlink.engines import ScriptedEngine
from gymlink.testing import EngineContract


class TestScriptedEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> ScriptedEngine:
        return ScriptedEngine(lambda prompt: range(10, 30), max_context=64)
