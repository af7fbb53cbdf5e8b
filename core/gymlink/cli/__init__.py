"""The command line. Exit status: 0 all is well, 1 something was found wrong, 2 used wrongly."""

from gymlink.cli.app import app, main

__all__ = ["app", "main"]
