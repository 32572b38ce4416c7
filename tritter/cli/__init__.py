"""The `tritter` command: thin, and importing only what the command at hand needs."""

from tritter.cli.main import main

__all__ = ["main"]
