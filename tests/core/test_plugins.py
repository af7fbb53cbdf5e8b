import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from gymlink import plugins
from gymlink.errors import PluginError
from gymlink.hookspecs import Framework, hookimpl
from gymlink.plugins import find_framework, load_plugins, resolve


class Stranger:
    @hookimpl
    def gymlink_frameworks(self):
        return [Framework("mine", "pytest", ">=1", "mine", "a stranger's trainer", "os.path:join")]


class Entry:
    def __init__(self, name: str, value: object) -> None:
        self.name, self._value = name, value

    def load(self) -> object:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    def install(*entries: Entry | EntryPoint) -> None:
        load_plugins.cache_clear()
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries)

    yield install
    load_plugins.cache_clear()


def test_a_broken_plugin_is_reported_and_breaks_no_other(installed) -> None:
    installed(Entry("broken", ImportError("no module named x")), Entry("good", Stranger()))
    found = load_plugins()
    assert list(found.frameworks) == ["mine"]
    assert found.failures == {"broken": "ImportError: no module named x"}
    with pytest.raises(PluginError, match=r"known: mine.*'broken' could not be loaded: ImportError"):
        find_framework("broken")


def test_a_misspelt_hook_is_a_failure_of_that_plugin(installed) -> None:
    class Misspelt:
        @hookimpl
        def gymlink_framework(self):
            return []

    installed(Entry("misspelt", Misspelt()), Entry("good", Stranger()))
    assert list(load_plugins().frameworks) == ["mine"]
    assert "unknown hook 'gymlink_framework'" in load_plugins().failures["misspelt"]


def test_a_hook_that_raises_breaks_no_other_and_a_name_is_taken_once(installed) -> None:
    class Raises:
        @hookimpl
        def gymlink_frameworks(self):
            raise RuntimeError("boom")

    installed(Entry("raises", Raises()), Entry("good", Stranger()), Entry("again", Stranger()))
    assert list(load_plugins().frameworks) == ["mine"]
    assert load_plugins().failures == {
        "raises": "RuntimeError: boom",
        "again": "PluginError: another plugin already connects 'mine'",
    }


def test_a_wrong_version_names_the_install_command(installed) -> None:
    class Old:
        @hookimpl
        def gymlink_frameworks(self):
            return [
                Framework("old", "pytest", "<1", "old", "", "a:b"),
                Framework("gone", "gymlink-no-such-thing", ">=1", "gone", "", "a:b"),
            ]

    installed(Entry("old", Old()))
    with pytest.raises(PluginError, match=r"works with <1: pip install 'gymlink\[old\]'"):
        find_framework("old")
    with pytest.raises(PluginError, match=r"is not installed: pip install 'gymlink\[gone\]'"):
        find_framework("gone")


def test_listing_frameworks_imports_none() -> None:
    code = (
        "import sys; from gymlink.plugins import load_plugins; names = list(load_plugins().frameworks); "
        "assert 'trl' in names, (names, load_plugins().failures); "
        "heavy = {'torch', 'trl', 'transformers', 'ray'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_resolve_imports_what_is_named() -> None:
    assert resolve("os.path:join")("a", "b") == "a/b"
