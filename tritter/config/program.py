"""The command as a person typed it, and the one that goes on with a run: words for a shell."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tritter.config.folders import front
from tritter.config.overrides import as_value, not_replayed


def program_words() -> tuple[str, ...]:
    """Return how this program was called, so that it can be called again from the same place."""
    called = sys.argv[0] if sys.argv else ""
    name = Path(called).name
    if name == "tritter":
        return ("tritter", "train")
    if name == "__main__.py" and Path(called).parent.name == "tritter":
        return (_python(), "-m", "tritter", "train")
    return (_python(), called if name == "train.py" else "train.py")


def command(words: Sequence[str]) -> str:
    """Return a command line with these words, quoted for a shell; it finds the same options."""
    return shlex.join([*program_words(), *front().flags, *words])


def tritter_command(words: Sequence[str]) -> str:
    """Return a command line of `tritter`, which may be called beside this program."""
    is_found = program_words()[0] == "tritter"
    return shlex.join(["tritter", *words]) if is_found else tool_command("tritter", words)


def tool_command(program: str, words: Sequence[str]) -> str:
    """Return a command line of a program that is installed beside this one."""
    start = [program] if _is_ours(program) else [_python(), "-m", program]
    return shlex.join([*start, *words])


def resume_command(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Return the command that resumes the run in a folder.

    Args:
        folder: of the run.
        overrides: those of the run; they are part of the command if `resume` alone does not replay
            all of them.
    """
    needed = overrides if not_replayed(overrides) else ()
    return command([*needed, f"resume={as_value(str(folder))}"])


def _python() -> str:
    return "python" if _is_ours("python") else sys.executable


def _is_ours(program: str) -> bool:
    """Say whether a shell finds a program in the environment that runs this one."""
    found = shutil.which(program)
    return found is not None and Path(found).parent == Path(sys.executable).parent
