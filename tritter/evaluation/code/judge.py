"""Runs the tests of a program in a separate process from the program itself.

The sandbox receives this file as text, followed by a call of `judge`. `judge` starts a second
interpreter, which reads the program from a pipe and runs `serve`. That interpreter never sees the
tests, their expected values or the word that reports success: it only receives calls and answers
them with plain data. The file uses only the standard library.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import signal
import sys
import types

TYPE_CHECKING = False  # avoid imports: each one runs twice per program
if TYPE_CHECKING:
    import ast
    from collections.abc import Callable
    from typing import Any

_TYPES = {name: each for name, each in vars(builtins).items() if isinstance(each, type)}
_COPIED = (list, tuple, set, frozenset, bytes, bytearray)
_BUILD: dict[str, Callable[[Any], Any]] = {
    **{kind.__name__: kind for kind in _COPIED},
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "dict": dict,
    "type": lambda names: _TYPES[names[0]],
}
_ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda called, values, named: called(*values, **named),
    **{each.__name__: each for each in (getattr, setattr, len, iter, next, str)},
    **{each.__name__: each for each in (operator.getitem, operator.setitem)},
}
_PR_SET_DUMPABLE = 4


class _EndedError(BaseException):
    """The program's process ended; a BaseException, so tests can't catch it as an Exception."""


class Channel:
    """Two pipes between two processes, with one JSON message per line.

    Plain data are copied. Other objects stay in the program's process, and messages refer to
    them by number.

    Args:
        reading: file descriptor.
        writing: file descriptor.
        is_judge: whether this is the process of the tests, which has no objects of its own.
    """

    def __init__(self, *, reading: int, writing: int, is_judge: bool) -> None:
        self._reading = os.fdopen(reading, "rb")
        self._writing = os.fdopen(writing, "wb")
        self._is_judge = is_judge
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}  # id → number
        self._remotes: dict[int, Remote] = {}
        getattr(sys, "set_int_max_str_digits", int)(0)

    def send(self, *message: Any) -> None:
        """Send values."""
        line = json.dumps([self._encode(value) for value in message]).encode()
        try:
            self._writing.write(line + b"\n")
            self._writing.flush()
        except OSError as error:
            raise _EndedError from error

    def receive(self) -> list[Any]:
        """Return the values of the next message."""
        try:
            line = self._reading.readline()
        except OSError as error:
            raise _EndedError from error
        if not line:
            raise _EndedError
        return [self._decode(value) for value in json.loads(line)]

    def ask(self, *request: Any) -> Any:
        """Return the answer of the program's process to a request.

        Raises:
            Exception: the program raised; the type is the same built-in type, or RuntimeError.
        """
        self.send(*request)
        raised, answer = self.receive()
        if raised is None:
            return answer
        kind = _TYPES.get(raised, RuntimeError)
        # A StopIteration from a call would silently end a loop
        is_end = kind is StopIteration and request[0] != "next"
        if is_end or not issubclass(kind, Exception):
            kind = RuntimeError
        raise kind(f"{answer}" if raised == kind.__name__ else f"{raised}: {answer}")

    def _encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Remote):
            return ["object", value.number_]
        if isinstance(value, dict):
            return ["dict", [self._encode(pair) for pair in value.items()]]
        for kind in _COPIED:
            if isinstance(value, kind):
                return [kind.__name__, [self._encode(each) for each in value]]
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        if isinstance(value, range):
            return ["range", [value.start, value.stop, value.step]]
        if isinstance(value, type) and _TYPES.get(value.__name__) is value:
            return ["type", [value.__name__]]
        if self._is_judge:
            raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be copied")
        if not isinstance(value, type) and hasattr(value, "__index__"):  # such as numpy integers
            return operator.index(value)
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return ["object", self._numbers[id(value)]]

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, content = value
        if kind == "object" and self._is_judge:
            return self._remotes.setdefault(content, Remote(self, content))
        if kind == "object":
            return self._objects[content]
        return _BUILD[kind]([self._decode(each) for each in content])


class Remote:
    """A proxy of an object in the program's process.

    It equals only itself. Comparisons never run in the program's process, because they would
    reveal the expected values to the program.
    """

    channel_: Channel
    number_: int

    def __init__(self, channel: Channel, number: int) -> None:
        self.__dict__.update(channel_=channel, number_=number)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self.channel_.ask("call", self, values, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.channel_.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.channel_.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.channel_.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.channel_.ask("setitem", self, key, value)

    def __len__(self) -> Any:
        return self.channel_.ask("len", self)

    def __iter__(self) -> Any:
        return self.channel_.ask("iter", self)

    def __next__(self) -> Any:
        return self.channel_.ask("next", self)

    def __str__(self) -> Any:
        return self.channel_.ask("str", self)

    def __bool__(self) -> bool:
        return True


def serve(reading: int, writing: int) -> None:
    """Run a program from a pipe, then answer the requests of its tests."""
    channel = Channel(reading=reading, writing=writing, is_judge=False)
    (program,) = channel.receive()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(program, "<program>", "exec", dont_inherit=True), main.__dict__)
    sys.stdout.flush()
    channel.send("defined")
    while True:
        try:
            action, *values = channel.receive()
        except _EndedError:
            return
        try:
            answer = getattr(main, values[0]) if action == "name" else _ACTIONS[action](*values)
            channel.send(None, answer)
        except Exception as error:
            channel.send(type(error).__name__, str(error))


def judge(*, source: str, program: str, tests: str, word: list[str]) -> None:
    """Run the tests of a program, and write a secret word if they pass.

    Args:
        source: text of this file.
        program: the program.
        tests: its tests.
        word: the word in pieces, so that no traceback shows it completely.
    """
    import subprocess

    try:  # protect this process's memory from other processes of the user
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (ImportError, OSError, AttributeError, TypeError):  # not on Linux
        pass
    requests, answers = os.pipe(), os.pipe()
    flags = [("-I", sys.flags.isolated), ("-S", sys.flags.no_site)]
    command = [sys.executable, *(flag for flag, is_on in flags if is_on), "-B", "-X", "utf8"]
    process = subprocess.Popen(
        [*command, "-c", f"{source}\nserve({requests[0]}, {answers[1]})"],
        stdin=subprocess.PIPE,
        pass_fds=[requests[0], answers[1]],
    )
    assert process.stdin is not None
    process.stdin.close()
    os.close(requests[0])
    os.close(answers[1])
    # Keep the pipe open until the program is killed; otherwise the program would exit
    channel = Channel(reading=answers[0], writing=requests[1], is_judge=True)
    code = 1
    try:
        _test(channel, program, tests)
        code = 0
    except _EndedError:
        code = process.wait()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    process.kill()
    process.wait()
    sys.stdout.flush()
    if code == 0 and process.returncode == -signal.SIGKILL:  # it ran until the end of its tests
        os.write(1, "".join(word).encode())
    os._exit(code if code >= 0 else 128 - code)


def _test(channel: Channel, program: str, tests: str) -> None:
    import ast

    channel.send(program)
    tree = ast.parse(tests, "<tests>")
    channel.receive()
    names: dict[str, Any] = {"__name__": "__main__"}
    modules, others = _free_names(tree)
    for name in modules:
        names[name] = importlib.import_module(name)
    for name in others:
        try:
            names[name] = channel.ask("name", name)
        except AttributeError:  # the tests raise a NameError if they need it
            continue
    exec(compile(tree, "<tests>", "exec", dont_inherit=True), names)


def _free_names(tree: ast.Module) -> tuple[list[str], list[str]]:
    """Return the free names of the tests: modules, and names of the program.

    The program can't replace `math`, `set` or `abs` in its tests. A built-in name belongs to the
    program only if it is the only candidate, because some tests call a function named `sum`.
    """
    import ast

    used: set[str] = set()
    bound: set[str] = set()
    opened: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            opened.add(node.value.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    free = used - bound
    modules = free & opened & sys.stdlib_module_names
    own = sorted(free - modules)
    return sorted(modules), [name for name in own if name not in vars(builtins)] or own
