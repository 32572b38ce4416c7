"""Sandboxes for programs that a model wrote.

HumanEval and MBPP execute generated programs, followed by their tests, in separate namespaces
(`warden`). Without namespaces, no program runs.
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
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tritter.errors import RequestError, TritterError, refused
from tritter.evaluation.code import warden

_ADVICE = (
    "run Tritter on a system with unprivileged user namespaces (Linux 5.12 or newer; containers "
    "often disable them), or set a command that reads a program from standard input "
    'and runs it in your own sandbox: --code-sandbox "CMD", in a run '
    "evaluation.code_sandbox=external evaluation.code_sandbox_command=CMD"
)
_SECONDS = 10.0  # wall time of a program
_OUTPUT_BYTES = 2**20
# A program that tries to escape, for a sandbox that has to block all attempts; it lists the others
_ESCAPE = """
import os, socket, sys

def fork(number):
    ended, started = os.pipe()
    for _ in range(number):
        if os.fork() == 0:
            os.close(started)
            os.read(ended, 1)  # blocks until the parent ends
            os._exit(0)

possible = []
for escape, attempt in {{
    "it reads files outside": lambda: open({secret!r}),
    "it writes files outside": lambda: open({secret!r} + ".new", "w"),
    "it writes the libraries": lambda: open(os.__file__ + ".new", "w"),
    "it reaches the network": lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2),
    "it inherits an environment": lambda: os.environ[({{*os.environ}} - {{"LC_CTYPE"}}).pop()],
    "it exceeds the memory limit": lambda: bytearray({memory_bytes}),
    "it exceeds the process limit": lambda: fork({processes}),
}}.items():
    try:
        attempt()
        possible.append(escape)
    except (OSError, MemoryError, KeyError):
        pass
if possible:
    sys.exit(", ".join(possible))
"""


class Sandbox(ABC):
    """Runs programs that a model wrote."""

    @classmethod
    def checked(cls, command: str | None, *, key: str) -> "Sandbox":
        """Return a working sandbox: Tritter's own, or the command of the user.

        Args:
            command: the command, if the user set one.
            key: the option that sets it, for messages.
        """
        sandbox = ExternalSandbox(command, key=key) if command else NamespaceSandbox()
        sandbox.check()
        return sandbox

    @abstractmethod
    def run(self, program: str, tests: str = "") -> tuple[str, str]:
        """Run a Python program and its tests within the limits.

        Args:
            program: the program.
            tests: Python code that runs after the program and uses its names.

        Returns:
            The reason of a failure, empty if both ran to their end; and the output up to a limit.
        """

    @abstractmethod
    def check(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceSandbox(Sandbox):
    """Tritter's sandbox: Linux namespaces, a separate root and resource limits.

    Args:
        seconds: wall time.
        cpu_seconds: CPU time per process.
        memory_bytes: address space per process.
        file_bytes: size of each file, and of the working folder.
        processes: number of processes and threads, including the three of the sandbox.
    """

    seconds: float = _SECONDS
    cpu_seconds: int = 8
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 16 * 2**20
    processes: int = 12

    def run(self, program: str, tests: str = "") -> tuple[str, str]:
        interpreter = Path(sys.executable).resolve()
        # The interpreter needs its own folder and the system's libraries
        own, system = str(interpreter.parents[1]), ["/usr", "/lib", "/lib64", "/nix/store"]
        needed = [] if own == "/" or Path(own).is_relative_to("/usr") else [own]
        with tempfile.TemporaryDirectory(prefix="tritter-code-") as root:
            request = {
                "root": root,
                "folders": [folder for folder in (*system, *needed) if os.path.lexists(folder)],
                "interpreter": str(interpreter),
                "folder_bytes": self.file_bytes,
                "limits": {
                    "CPU": self.cpu_seconds,
                    "AS": self.memory_bytes,
                    "FSIZE": self.file_bytes,
                    "NPROC": self.processes,
                    "CORE": 0,
                    "NOFILE": 64,
                },
            }
            command = [str(interpreter), "-I", "-S", "-B", warden.__file__, json.dumps(request)]
            return _run(command, program, tests, seconds=self.seconds)

    def check(self) -> None:
        """Try to escape: read, write and connect outside, fork and allocate beyond the limits."""
        if not sys.platform.startswith("linux"):
            raise RequestError(f"code: {sys.platform} has no namespaces; {_ADVICE}.")
        with (
            tempfile.TemporaryDirectory(prefix="tritter-outside-") as outside,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            Path(outside).chmod(0o777)  # so that only the sandbox blocks access
            secret = Path(outside, "secret")
            secret.write_text("secret")
            secret.chmod(0o666)
            program = _ESCAPE.format(
                secret=str(secret),
                port=server.getsockname()[1],
                memory_bytes=2 * self.memory_bytes,
                processes=4 * self.processes,
            )
            try:
                failure, output = replace(self, seconds=60).run(program)
            except TritterError as error:
                raise RequestError(str(error)) from error
            is_written = list(Path(outside).iterdir()) != [secret] or secret.read_text() != "secret"
        if is_written or failure:
            last = output.strip().rpartition("\n")[2]
            reason = (last or failure) if failure else "it wrote outside"
            raise RequestError(f"code: the sandbox of this system leaks ({reason}); {_ADVICE}.")


@dataclass(frozen=True, slots=True)
class ExternalSandbox(Sandbox):
    """A user-defined command that reads a program from standard input and runs it.

    Args:
        command: split like a shell command and run without a shell, in the current environment.
        key: the option that sets the command, for messages.
    """

    command: str
    key: str = "--code-sandbox"

    def run(self, program: str, tests: str = "") -> tuple[str, str]:
        command = shlex.split(self.command)
        return _run(command, program, tests, seconds=_SECONDS, environment=dict(os.environ))

    def check(self) -> None:
        """Check that the command runs programs and reports failures."""
        try:
            is_right, is_wrong = (not self.run("x = 1", f"assert x == {n}")[0] for n in (1, 2))
        except (OSError, ValueError) as error:
            reason = f"the command can't be run ({error})"
            raise refused(self.key, self.command, reason) from error
        if is_wrong or not is_right:
            reason = "it must read a Python program from standard input, run it, print its output"
            raise refused(self.key, self.command, f"{reason} and return its exit code")


def _run(
    command: Sequence[str],
    program: str,
    tests: str,
    *,
    seconds: float,
    environment: dict[str, str] | None = None,
) -> tuple[str, str]:
    """Run a command with a program and its tests on standard input, then kill its processes."""
    word = secrets.token_hex(16)  # printed after the last test; a program may exit before
    # Not as `__main__`, so that a program's own main block does not run, as in HF's code_eval
    whole = f"{program}\n{tests}\n".encode("utf-8", "replace").decode("utf-8-sig")
    content = "import sys, types\nsys.modules['program'] = types.ModuleType('program')\n"
    content += f"exec({whole!r}, vars(sys.modules['program']))\n"
    content += f"__import__('os').write(1, b'{word}')\n"
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # the program could read or write a file again
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment or {},
        cwd="/",
        start_new_session=True,
    )
    try:
        output, reason = _exchange(process, content.encode("utf-8", "replace"), seconds)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    text = output.decode("utf-8", errors="replace")
    if process.returncode == warden.SETUP_FAILED and not reason:
        raise TritterError(f"code: the sandbox can't be set up ({text}); {_ADVICE}.")
    if not reason and process.returncode == 0 and word in text:
        return "", text.replace(word, "")
    return reason or f"it ended early, exit code {process.returncode}", text


def _exchange(
    process: "subprocess.Popen[bytes]", content: bytes, seconds: float
) -> tuple[bytes, str]:
    """Write to a process; return its output, and the reason to kill it, if there is one."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + seconds
    output, written = bytearray(), 0
    reading, writing = process.stdout.fileno(), process.stdin.fileno()
    os.set_blocking(writing, False)
    while (remaining := deadline - time.monotonic()) > 0:
        writers = [] if process.stdin.closed else [writing]
        readable, writable, _ = select.select([reading], writers, [], remaining)
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
        if len(output) > _OUTPUT_BYTES:
            return bytes(output), f"it printed more than {_OUTPUT_BYTES} bytes"
    return bytes(output), f"it took longer than {seconds:g} s"
