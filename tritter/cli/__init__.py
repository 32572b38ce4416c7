"""The `tritter` command: thin, and importing only what the command in use needs."""

from tritter.cli.main import main

__all__ = ["main"]
