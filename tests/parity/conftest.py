"""Leaves out the tests of a trainer that is not installed: no environment holds both."""

from importlib.metadata import PackageNotFoundError, version


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


collect_ignore = [f"test_{trainer}.py" for trainer in ("trl", "verl") if not _is_installed(trainer)]
