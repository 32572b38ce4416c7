"""Run a program that nobody read: within limits, and where it reaches nothing.

HumanEval and MBPP ask a model for programs and execute them. They run in a process of their own
(`warden`), in namespaces of their own; where the system gives none, nothing is run.
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
from tritter.evaluation.code import probe, warden

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
        processes: at a time, the two that watch it and all threads included.
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
        is_passed: it ran to its last line.
        said: why not, in words; empty where it did.
        output: what it printed, errors too, as far as it was read.
    """

    is_passed: bool
    said: str = ""
    output: str = ""


class Sandbox(Protocol):
    """Where programs are run."""

    def run(self, program: str) -> Outcome:
        """Run a program of Python to its end, or to its limits."""

    def check(self) -> None:
        """Try whether it holds.

        Raises:
            RequestError: it does not.
        """


@dataclass(frozen=True, slots=True)
class NamespaceSandbox:
    """Tritter's own: namespaces, a root of its own, limits of the system."""

    limits: Limits = Limits()

    def run(self, program: str) -> Outcome:
        interpreter = Path(sys.executable).resolve()
        with tempfile.TemporaryDirectory(prefix="tritter-code-") as root:
            asked = {
                "root": root,
                "places": _places(interpreter),
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
            return _run(command, program, self.limits)

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

    def run(self, program: str) -> Outcome:
        return _run(shlex.split(self.command), program, self.limits, environment=dict(os.environ))

    def check(self) -> None:
        """See that it runs a program, and says so when one fails.

        Raises:
            RequestError: it does not.
        """
        try:
            is_right = self.run("x = 1").is_passed and not self.run("assert False").is_passed
        except (OSError, ValueError) as error:
            raise RequestError(
                f"--code-sandbox = {self.command}: cannot be run ({error})."
            ) from error
        if not is_right:
            raise RequestError(
                f"--code-sandbox = {self.command}: it does not run a Python program that it reads "
                "on its standard input, print what that prints, and end with its exit code."
            )


def _places(interpreter: Path) -> list[str]:
    """Return what of the system an interpreter needs: its own folder and the libraries."""
    own = str(interpreter.parents[1])
    system = ["/usr", "/lib", "/lib64", "/nix/store"]
    needed = [] if own == "/" or Path(own).is_relative_to("/usr") else [own]
    return [place for place in (*system, *needed) if os.path.lexists(place)]


def _run(
    command: Sequence[str],
    program: str,
    limits: Limits,
    *,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a command with a program on its standard input; end it, and all it started, in time.

    Raises:
        TritterError: the sandbox could not be set up.
    """
    # A program may end itself before its tests, so only its last line says that it passed. The
    # two halves keep the word out of the errors in which Python quotes a line.
    word = (secrets.token_hex(8), secrets.token_hex(8))
    last = f"\n__import__('os').write(1, ('{word[0]}' + '{word[1]}').encode())\n"
    with tempfile.TemporaryFile() as file:
        file.write((program + last).encode("utf-8", errors="surrogatepass"))
        file.seek(0)
        process = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment or {},
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
    try:
        output, said = _read(process, limits)
        _end(process)
    finally:
        _end(process)
    text = output.decode("utf-8", errors="replace")
    if process.returncode == warden.COULD_NOT_SHUT_IN and not said:
        raise TritterError(f"code: the sandbox could not be set up ({text}); {ADVICE}.")
    is_passed = not said and process.returncode == 0 and "".join(word) in text
    if is_passed:
        return Outcome(True, output=text.replace("".join(word), ""))
    return Outcome(False, said or f"it ended early, exit code {process.returncode}", text)


def _read(process: "subprocess.Popen[bytes]", limits: Limits) -> tuple[bytes, str]:
    """Return what a process prints until it ends, and why it has to be ended, if it has to."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    output = bytearray()
    descriptor = process.stdout.fileno()
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            continue
        piece = os.read(descriptor, 2**16)
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


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all of its session; one that has ended is left as it is."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
