"""Leaves out the tests of a trainer that is not installed: no environment holds both."""

from importlib.metadata import PackageNotFoundError, version


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


collect_ignore = [f"test_{trainer}.py" for trainer in ("trl", "verl", "openrlhf") if not _is_installed(trainer)]
if _is_installed("openrlhf"):
    import openrlhf_steps  # noqa: F401 - before anything else imports OpenRLHF
