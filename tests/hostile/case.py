"""One hostile case: what is run where, and the judgement on what came of it."""

import contextlib
import gc
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.sandbox import EXECUTED, SECRET, Sandbox, touched, watched

TIME_LIMIT_SECONDS = 30
MEMORY_LIMIT_BYTES = 2 * 10**9
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}-\d+\.")


@dataclass(frozen=True, slots=True)
class Case:
    """A command line in a sandbox.

    Args:
        story: what was made of the input, for a person who repeats it.
        program: `tritter`, `train.py`, or `train.py --dry`, whose pipeline takes notes only.
        words: its arguments.
        may_change: paths below the sandbox that a command which fails or succeeds may write to
            (its own run folder or output).
        unread: folders that no command may list, nor read files in.
    """

    story: str
    program: str
    words: tuple[str, ...]
    may_change: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What a case came to; `faults` is empty when it is as promised."""

    code: int | None = None
    output: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    faults: list[str] = field(default_factory=list)


class _OutOfTime(BaseException):
    pass


def run_case(case: Case, sandbox: Sandbox, program: Callable[[list[str]], int]) -> Outcome:
    """Run a case in this process and judge it."""
    before, outcome = sandbox.snapshot(), Outcome()
    out, err = io.StringIO(), io.StringIO()
    _reset_peak()
    resting, since = _resident(), time.monotonic()
    touched.clear()
    watched.update(Path(folder).resolve() for folder in case.unread)
    try:
        with _in_folder(sandbox.inside), _alarm(), _captured(out, err):
            outcome.code = _called(program, list(case.words))
    except _OutOfTime:
        outcome.faults.append(f"hang: more than {TIME_LIMIT_SECONDS} s")
    except MemoryError:
        outcome.faults.append("memory: MemoryError")
    except BaseException:
        outcome.faults.append(f"traceback: {traceback.format_exc(limit=-6)}")
    watched.clear()
    outcome.seconds = time.monotonic() - since
    outcome.faults += [f"read: {touched[:3]}"] if touched else []
    outcome.peak_bytes = max(0, _peak() - resting)
    outcome.output = out.getvalue() + err.getvalue()
    outcome.faults += _faults_of_output(outcome, err.getvalue())
    outcome.faults += _faults_on_disk(case, outcome, before, sandbox)
    gc.collect()
    return outcome


def _called(program: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        return int(program(words))
    except SystemExit as stop:
        return int(stop.code) if isinstance(stop.code, int) else 1 if stop.code else 0


def _faults_of_output(outcome: Outcome, errors: str) -> Iterator[str]:
    if outcome.peak_bytes > MEMORY_LIMIT_BYTES:
        yield f"memory: {outcome.peak_bytes / 1e9:.1f} GB"
    if outcome.code is None:
        return
    if outcome.code not in (0, 1, 2, 3):
        yield f"exit code {outcome.code}"
    if "Traceback" in outcome.output:
        yield f"traceback: {outcome.output[-800:]}"
    if outcome.code in (1, 2) and "error:" not in errors:
        yield f"unclear: exit code {outcome.code} without an error"
    if len(errors) > 200_000:
        yield f"unclear: {len(errors)} characters of errors"
    if found := _CONTROL.search(outcome.output.replace("\r\n", "\n")):
        near = outcome.output[max(0, found.start() - 60) : found.end() + 20]
        yield f"escape: {near!r}"
    if SECRET in outcome.output:
        yield "leak: the secret was printed"


def _faults_on_disk(
    case: Case, outcome: Outcome, before: dict[str, str], sandbox: Sandbox
) -> Iterator[str]:
    after = sandbox.snapshot()

    def may_change(path: str) -> bool:
        return any(path == free or path.startswith(f"{free}/") for free in case.may_change)

    lost = [path for path in before if after.get(path) != before[path]]
    new = [path for path in after if path not in before]
    if outcome.code == 2:
        if changed := [*lost, *(path for path in new if not may_change(path))]:
            yield f"written although refused: {changed[:5]}"
    elif destroyed := [path for path in lost if not may_change(path)]:
        yield f"loss: {destroyed[:5]}"
    if strays := [path for path in new if _TEMPORARY.match(Path(path).name)]:
        yield f"left behind: {strays[:3]}"
    if any(Path(path).name == EXECUTED for path in new):
        yield "executed: code that the input names"
    for path in new:
        place = sandbox.root / path
        is_small = place.is_file() and not place.is_symlink() and place.stat().st_size < 2**26
        if is_small and SECRET.encode() in place.read_bytes():
            yield f"leak: {path} holds the secret"


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _OutOfTime

    held = signal.signal(signal.SIGALRM, ring)
    signal.alarm(TIME_LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, held)


@contextlib.contextmanager
def _captured(out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident() -> int:
    return _memory("VmRSS")


def _peak() -> int:
    return _memory("VmHWM")


def _memory(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # elsewhere than on Linux
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
