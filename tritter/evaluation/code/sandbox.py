"""Run a program that nobody read: within limits, and where it reaches nothing.

HumanEval and MBPP ask a model for programs and execute them. They run in namespaces of their own
(`warden`), and their tests in another process there (`judge`). Without namespaces nothing is run.
"""

import json
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tritter.errors import RequestError, TritterError
from tritter.evaluation.code import judge, probe, warden

ADVICE = (
    "run Tritter where unprivileged user namespaces are allowed (Linux 5.12 or newer; in a "
    "container they often are not), or name a command that reads a program on its standard input "
    'and runs it in a sandbox of yours: --code-sandbox "CMD", in a run '
    "evaluation.code_sandbox=external evaluation.code_sandbox_command=CMD"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use.

    Args:
        seconds: from its start to its end.
        cpu_seconds: of computing, each process.
        memory_bytes: of addresses, each process.
        file_bytes: of a file that it writes, and of its folder.
        processes: at a time, the three that watch and test it and all threads included.
        output_bytes: that it prints.
    """

    seconds: float = 10.0
    cpu_seconds: int = 8
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 16 * 2**20
    processes: int = 12
    output_bytes: int = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Args:
        is_passed: it ran to its last line, and so did its tests.
        said: why not, in words; empty where it did.
        output: what it printed, errors too, as far as it was read.
    """

    is_passed: bool
    said: str = ""
    output: str = ""


class Sandbox(Protocol):
    """Where programs are run."""

    def run(self, program: str, tests: str = "") -> Outcome:
        """Run a Python program, then its tests, to their end or to the limits.

        Args:
            tests: Python as well; they run in another process, with the names that they take from
                the program.
        """

    def check(self) -> None:
        """Try whether it holds.

        Raises:
            RequestError: it does not.
        """


@dataclass(frozen=True, slots=True)
class NamespaceSandbox:
    """Tritter's own: namespaces, a root of its own, limits of the system."""

    limits: Limits = Limits()

    def run(self, program: str, tests: str = "") -> Outcome:
        interpreter = Path(sys.executable).resolve()
        # What of the system an interpreter needs: its own folder and the libraries
        own, system = str(interpreter.parents[1]), ["/usr", "/lib", "/lib64", "/nix/store"]
        needed = [] if own == "/" or Path(own).is_relative_to("/usr") else [own]
        with tempfile.TemporaryDirectory(prefix="tritter-code-") as root:
            asked = {
                "root": root,
                "places": [place for place in (*system, *needed) if os.path.lexists(place)],
                "interpreter": str(interpreter),
                "folder_bytes": self.limits.file_bytes,
                "limits": {
                    "CPU": self.limits.cpu_seconds,
                    "AS": self.limits.memory_bytes,
                    "FSIZE": self.limits.file_bytes,
                    "NPROC": self.limits.processes,
                    "CORE": 0,
                    "NOFILE": 64,
                },
            }
            command = [str(interpreter), "-I", "-S", "-B", warden.__file__, json.dumps(asked)]
            return _run(command, program, tests, self.limits)

    def check(self) -> None:
        """Try to break out: read, write and connect outside, fork and allocate without end.

        Raises:
            RequestError: the system gives no such sandbox, or it holds less than it should.
        """
        if not sys.platform.startswith("linux"):
            raise RequestError(
                f"code: {sys.platform} has no namespaces to run programs in; {ADVICE}."
            )
        with (
            tempfile.TemporaryDirectory(prefix="tritter-outside-") as outside,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            Path(outside).chmod(0o777)  # so that nothing but the sandbox keeps it from there
            secret = Path(outside, "secret")
            secret.write_text("secret")
            secret.chmod(0o666)
            attempts = {
                "folder": outside,
                "port": server.getsockname()[1],
                "memory_bytes": 2 * self.limits.memory_bytes,
                "processes": 4 * self.limits.processes,
            }
            source = Path(probe.__file__).read_text(encoding="utf-8")
            program = f"{source}\ntry_all({json.dumps(attempts)})\n"
            try:
                outcome = replace(self, limits=replace(self.limits, seconds=60)).run(program)
            except TritterError as error:
                raise RequestError(str(error)) from error
            is_written = list(Path(outside).iterdir()) != [secret] or secret.read_text() != "secret"
        if is_written or not outcome.is_passed:
            last = outcome.output.strip().rpartition("\n")[2]
            why = "it wrote outside" if outcome.is_passed else last or outcome.said
            raise RequestError(f"code: this system gives no sandbox that holds ({why}); {ADVICE}.")


@dataclass(frozen=True, slots=True)
class ExternalSandbox:
    """A command of the user's, which reads a program on its standard input and runs it.

    Args:
        command: split as a shell would, run without one; its environment is this process's.
    """

    command: str
    limits: Limits = Limits()

    def run(self, program: str, tests: str = "") -> Outcome:
        command = shlex.split(self.command)
        return _run(command, program, tests, self.limits, environment=dict(os.environ))

    def check(self) -> None:
        """See that it runs a program, and says so when one fails.

        Raises:
            RequestError: it does not.
        """
        try:
            is_right, is_wrong = (self.run("x = 1", f"assert x == {n}").is_passed for n in (1, 2))
        except (OSError, ValueError) as error:
            raise RequestError(
                f"--code-sandbox = {self.command}: cannot be run ({error})."
            ) from error
        if is_wrong or not is_right:
            raise RequestError(
                f"--code-sandbox = {self.command}: it must read a Python program on its standard "
                "input, run it, print its output and end with its exit code. The program starts "
                "a second Python process."
            )


def _run(
    command: Sequence[str],
    program: str,
    tests: str,
    limits: Limits,
    *,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a command with a program and its tests on its standard input; end all that it started.

    Raises:
        TritterError: the sandbox could not be set up.
    """
    word = [secrets.token_hex(8), secrets.token_hex(8)]
    source = Path(judge.__file__).read_text(encoding="utf-8")
    request = {"source": source, "program": program, "tests": tests, "word": word}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # a file could be read again, or written
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment or {},
        cwd="/",
        start_new_session=True,
    )
    try:
        output, why = _exchange(process, f"{source}\njudge(**{request!a})\n".encode(), limits)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    text = output.decode("utf-8", errors="replace")
    if process.returncode == warden.COULD_NOT_SHUT_IN and not why:
        raise TritterError(f"code: the sandbox could not be set up ({text}); {ADVICE}.")
    # A program may end early or print anything, but only its judge knows the word
    is_passed = not why and process.returncode == 0 and "".join(word) in text
    if is_passed:
        return Outcome(True, output=text.replace("".join(word), ""))
    return Outcome(False, why or f"it ended early, exit code {process.returncode}", text)


def _exchange(
    process: "subprocess.Popen[bytes]", content: bytes, limits: Limits
) -> tuple[bytes, str]:
    """Write to a process and return its output until it ends, and why it has to be ended, if so."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    output, written = bytearray(), 0
    reading, writing = process.stdout.fileno(), process.stdin.fileno()
    os.set_blocking(writing, False)
    while (remaining := deadline - time.monotonic()) > 0:
        waiting = [] if process.stdin.closed else [writing]
        readable, writable, _ = select.select([reading], waiting, [], remaining)
        if writable:
            with suppress(BrokenPipeError):
                written += os.write(writing, content[written : written + 2**16])
                if written < len(content):
                    continue
            process.stdin.close()
        if not readable:
            continue
        piece = os.read(reading, 2**16)
        if not piece:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
            return bytes(output), ""
        output += piece
        if len(output) > limits.output_bytes:
            return bytes(output), f"it printed more than {limits.output_bytes} bytes"
    return bytes(output), f"it took longer than {limits.seconds:g} s"
