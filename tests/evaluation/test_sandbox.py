"""Programs can't escape from the sandbox, and only correct programs pass."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.evaluation.programs import HUMANEVAL_ROWS, MBPP_ROWS
from tritter.errors import RequestError, TritterError
from tritter.evaluation.benchmarks.files import Questions, TasksFolder
from tritter.evaluation.benchmarks.formats import BENCHMARKS
from tritter.evaluation.code import sandbox as code
from tritter.evaluation.code.sandbox import (
    ExternalSandbox,
    NamespaceSandbox,
    Sandbox,
)
from tritter.evaluation.code.warden import _WORK

QUICK = NamespaceSandbox(seconds=3, cpu_seconds=1)
# What ends by itself gets the time, however busy the machine: only the limit it is about ends it
PATIENT = NamespaceSandbox(seconds=60, cpu_seconds=60, memory_bytes=256 * 2**20)
SHARED = Path(__file__).resolve().parents[3] / "shared/data"

try:
    NamespaceSandbox().check()
    WHY_NOT = ""
except RequestError as error:
    WHY_NOT = str(error)
held_here = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.mark.quick_cases(1)
@held_here
@pytest.mark.parametrize("attempt", ["while True: pass", "import time; time.sleep(60)"])
def test_what_does_not_end(attempt: str) -> None:
    failure, _ = QUICK.run(attempt)
    assert failure in ("it took longer than 3 s", "it ended early, exit code 137")


@pytest.mark.quick_cases(2)
@held_here
@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("x = []\nwhile True: x.append('a' * 10**6)", "MemoryError"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("while True: print('x' * 10**6)", "printed more than"),
        ("import sys; sys.exit(0)", "ended early, exit code 0"),
        ("import os; os._exit(0)", "ended early, exit code 0"),
        ("'''", "unterminated"),
        ("(", "never closed"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), timeout=1)", "unreachable"),
        (f"open('{_WORK}/large', 'wb').write(b'0' * 10**8)", "File too large"),
        ("for i in range(99): open(f'{i}', 'wb').write(b'0' * 10**6)", "No space left"),
        ("open('/usr/lib/x', 'w')", "Read-only file system"),
        ("import os; open(os.__file__, 'a')", "Error"),
        ("open('/x', 'w')", "Permission denied"),
        ("open('/etc/passwd')", "No such file"),
        ("open('/proc/self/environ')", "No such file"),
        ("import os; os.kill(1, 9); assert False", "AssertionError"),
        ("import os; os.setuid(0)", "OSError"),
        ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        ("input()", "EOFError"),
    ],
    ids=str,
)
def test_what_is_held(attempt: str, expected: str) -> None:
    failure, output = PATIENT.run(attempt)
    assert failure and expected in failure + output


@held_here
def test_neither_the_home_nor_the_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "of mine")
    home = Path.home()
    failure, output = QUICK.run(
        "import os\n"
        "assert 'A_SECRET' not in os.environ and 'HOME' not in os.environ\n"
        f"assert not os.path.isfile({str(home / '.bashrc')!r})\n"
        f"assert not os.path.exists({str(Path(__file__))!r})\n"
        f"assert os.listdir('.') == [] and os.getcwd() == {_WORK!r}\n"
        "assert not [d for d in range(3, 64) if os.path.exists(f'/dev/fd/{d}')]\n"
        "import stat\n"
        "for descriptor in range(64):\n"
        "    try: mode = os.fstat(descriptor).st_mode\n"
        "    except OSError: continue\n"
        "    assert stat.S_ISFIFO(mode), descriptor\n"
    )
    assert not failure, output


@held_here
def test_nothing_lives_on() -> None:
    since = time.monotonic()
    failure, _ = QUICK.run(
        "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1234)\n"
    )
    assert not failure and time.monotonic() - since < 3
    listed = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True)
    assert "-I -S -B -X utf8 -" not in listed.stdout


@held_here
def test_right_programs_pass_and_wrong_ones_fail() -> None:
    for name, rows, field in (
        ("humaneval", HUMANEVAL_ROWS, "canonical_solution"),
        ("mbpp", MBPP_ROWS, "code"),
    ):
        found = Questions.of_rows(BENCHMARKS[name], rows, origin="rows").questions
        solutions = {str(row["task_id"]): row[field] for row in rows}
        for key, question in found.items():
            solution = solutions[key.removeprefix("MBPP/")]
            assert question.passes(solution, NamespaceSandbox())
            wrong = solution.replace("return", "return None and")
            assert not question.passes(wrong, NamespaceSandbox())
            assert not question.passes("", NamespaceSandbox())


@held_here
def test_a_program_passes_by_its_tests_alone() -> None:
    right = "from __future__ import annotations\ndef square(x: Number): return x * x"
    wrong, tests = "def square(x): return 0", "assert square(3) == 9\nassert square(0) == 0"
    assert not PATIENT.run(right, tests)[0]
    for main in ("print(square(int(input())))", "import unittest\n    unittest.main()"):
        assert not PATIENT.run(f"{right}\nif __name__ == '__main__':\n    {main}", tests)[0]
    rereads = f"{wrong}\nimport os\nexec(os.pread(0, 10**6, 0).decode().rpartition('\\n')[2])"
    for program in (wrong, f"{wrong}\nraise SystemExit(0)", f"{wrong}\nprint('0' * 32)", rereads):
        assert PATIENT.run(program, tests)[0]
    in_a_test = "def square(x):\n    import os\n    os._exit(0)"
    at_the_end = f"{right}\nimport atexit, os\natexit.register(os._exit, 1)"
    for program in (in_a_test, at_the_end, "(", "'''"):
        assert PATIENT.run(program, tests)[0]
    for failing in ("assert square(2) == 5", "missing()", "("):
        assert PATIENT.run(right, failing)[0]


@held_here
def test_nothing_is_written_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write = (
        "import os\nfor end in range(64):\n    try: os.pwrite(end, b'x' * 10**6, 0)\n"
        "    except OSError: continue\n    raise AssertionError(end)\n"
    )
    failure, output = PATIENT.run(write)
    assert not failure, output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@held_here
@pytest.mark.skipif(not SHARED.is_dir(), reason="requires the published files next to the project")
@pytest.mark.parametrize(
    ("name", "field", "key"),
    [("humaneval", "canonical_solution", "task_id"), ("mbpp", "code", "task_id")],
)
def test_all_canonical_solutions_pass(name: str, field: str, key: str) -> None:
    folder = TasksFolder(SHARED, key="--tasks-path")
    (found,) = folder.load([BENCHMARKS[name]])
    rows = folder.rows(SHARED / found.files[0])
    solutions = {str(row[key]).removeprefix("MBPP/"): row[field] for row in rows}
    failed = [
        name
        for name, question in found.questions.items()
        if not question.passes(solutions[name.removeprefix("MBPP/")], NamespaceSandbox())
    ]
    assert failed == []


@dataclass(frozen=True)
class Open(NamespaceSandbox):
    """A sandbox without isolation: the negative control of the check."""

    def run(self, program: str, tests: str = "") -> tuple[str, str]:
        command = [sys.executable, "-I", "-"]
        return code._run(command, program, tests, seconds=60, environment={"A": "b"})


def test_a_sandbox_that_does_not_hold_is_refused() -> None:
    with pytest.raises(RequestError, match="it reads files outside") as refused:
        Open(memory_bytes=2**20, processes=2).check()
    for expected in ("writes files outside", "reaches the network", "inherits", "process limit"):
        assert expected in str(refused.value)
    assert "--code-sandbox" in str(refused.value)


def test_without_namespaces_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # Request a folder that does not exist here, such as /nix/store
    monkeypatch.setattr(code.os.path, "lexists", lambda path: True)
    with pytest.raises(TritterError, match=r"can't be set up .*evaluation.code_sandbox=external"):
        NamespaceSandbox().run("pass")
    with pytest.raises(RequestError):
        NamespaceSandbox().check()


def test_an_external_command_reads_the_program() -> None:
    outer = ExternalSandbox(f"{sys.executable} -I -")
    outer.check()
    assert outer.run("print('here')")[1].startswith("here")
    assert outer.run("raise SystemExit(0)")[0]
    for command, expected in (("/no/such/command", "can't be run"), ("cat", "must read a Python")):
        with pytest.raises(RequestError, match=expected):
            ExternalSandbox(command).check()
    key = "evaluation.code_sandbox_command"  # in a run
    with pytest.raises(RequestError, match=f"{key} = /no/such/command: the command can't be run"):
        Sandbox.checked("/no/such/command", key=key)
