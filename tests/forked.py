"""A Python program in a process of its own that is forked from this one, which has its imports.

A process that is started anew takes seconds to import PyTorch, transformers and Lightning. Where
that is what a test is about, it starts one.
"""

import importlib
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory


def run_program(
    program: Path,
    words: Sequence[str],
    *,
    folder: Path,
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> "CompletedProcess[str]":
    """Run a program to its end and return its code and what it said.

    Args:
        folder: the current one of the process.
        path: where it finds modules first, which it imports anew.
        environment: what is added to that of this process.
    """
    with TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _redirect(out, err)
                os.chdir(folder)
                os.environ |= environment or {}
                code = _run(program, words, path)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        return CompletedProcess([str(program), *words], code, out.read_text(), err.read_text())


def _redirect(out: Path, err: Path) -> None:
    """Let this process say what it says to two files, and to nobody who listened to its parent."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    logging.getLogger().handlers.clear()


def _run(program: Path, words: Sequence[str], path: Path | None) -> int:
    if path is not None:
        own = {each.stem for each in path.iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.path.insert(0, str(path))
        importlib.invalidate_caches()
    sys.argv = [str(program), *words]
    try:
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
