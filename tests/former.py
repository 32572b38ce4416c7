"""A Python with transformers 4.57, whose models Tritter must leave readable, for slow tests."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_PYTHON = "TRITTER_OLD_TRANSFORMERS_PYTHON"  # names a ready one
_VERSION = "4.57.*"


@cache
def former_python() -> str:
    """Return a Python with transformers 4.57, in an environment made once; skip if it can't be."""
    if python := os.environ.get(_PYTHON):
        return python
    folder = Path.home() / ".cache" / "tritter-tests" / "transformers-4.57"
    python = str(folder / "bin" / "python")
    is_complete = folder / "complete"
    if not is_complete.is_file():
        packages = [f"transformers=={_VERSION}", "torch", "peft"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
        ):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                reason = (made.stderr.strip().splitlines() or ["no output"])[-1]
                pytest.skip(f"transformers {_VERSION} can't be installed: {reason[:300]}")
        is_complete.touch()
    return python
