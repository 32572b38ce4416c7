"""Terminal output that escapes control characters.

Names of tensors and files, arguments, tokens and lineage fields are untrusted. Escape sequences in
them could clear the screen, change its title or hide output; a direction override could reverse a
line. All output passes through this module, which prints non-printable characters as escapes.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from threading import Event, Thread
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from tritter.errors import RequestError, TritterError, panics_as_errors
from tritter.stopping import Stopped, stopping

# Errors of the operating system or interpreter
SYSTEM_ERRORS = (OSError, MemoryError, RecursionError, OverflowError, UnicodeError)
_LAYOUT = "\n\t"
_WITHOUT_LAYOUT = str.maketrans("", "", _LAYOUT)
_FIRST_LINE_SECONDS = 5.0
_ASCII = str.maketrans({"→": "->", "σ": "std"})
ShowProgress = Callable[[int, int], None]  # done, of how many
NewBar = Callable[[str], ShowProgress | None]


def no_bar(label: str) -> None:
    """Show no progress bar."""


def harmless(text: str) -> str:
    r"""Return text with each non-printable character escaped, such as \x1b.

    Line breaks and tabs stay.
    """
    if text.translate(_WITHOUT_LAYOUT).isprintable():
        return text
    return "".join(char if char in _LAYOUT else _visible(char) for char in text)


def _visible(char: str) -> str:
    return char if char.isprintable() else ascii(char)[1:-1]


def say(text: str, *, is_error: bool = False, end: str = "\n") -> None:
    """Print a line, or a text with another end, escaped for the encoding of the terminal."""
    stream = sys.stderr if is_error else sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(_encodable(harmless(text), encoding), file=stream, end=end, flush=True)
    except BrokenPipeError as error:
        raise Stopped(signal.SIGPIPE) from error


def exit_code(program: Callable[[], int], *, describe_stop: Callable[[Stopped], str]) -> int:
    """Run a program, print the error that ends it, and return its exit code.

    It is 0 (done), 1 (failed), 2 (invalid request), 130 (Ctrl-C), 141 (broken pipe), 143 (SIGTERM)
    or the one that the program returns.

    Args:
        program: returns an exit code.
        describe_stop: returns the text to print after Ctrl-C or SIGTERM.
    """
    try:
        with panics_as_errors(), stopping():
            return program()
    except RequestError as error:
        say(f"error: {error}\nNothing was written.", is_error=True)
        return 2
    except TritterError as error:  # its notes list files that were written
        say("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), is_error=True)
        return 1
    # Errors of the system (a full disk, a name that is too long, no memory) need no traceback
    except SYSTEM_ERRORS as error:
        message = " ".join(str(error).split()) or "out of memory"
        say(f"error: {message} ({type(error).__name__}).", is_error=True)
        return 1
    except Stopped as stop:
        if stop.signal_number == signal.SIGPIPE:  # the reader has closed the pipe, as in `| head`
            _close_pipe()
        else:
            say(describe_stop(stop), is_error=True)
        return stop.exit_code


def _close_pipe() -> None:
    """Redirect output to devnull if its reader is closed (`| head`): Python flushes on exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


@contextmanager
def redirected(number: int, file: TextIO) -> Iterator[None]:
    """Send standard output (1) or standard error (2) to a file.

    The descriptor of the process is redirected, because of child processes and of log handlers
    that a library makes inside and that stay.
    """
    stream = sys.stdout if number == 1 else sys.stderr
    if not _is_descriptor(stream, number):  # replaced, as notebooks and tests do
        with (redirect_stdout if number == 1 else redirect_stderr)(file):
            yield
        return
    stream.flush()
    before = os.dup(number)
    os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(before, number)
        os.close(before)


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):  # closed, or not a file
        return False


def _encodable(text: str, encoding: str) -> str:
    text = text if encoding.lower().startswith("utf") else text.translate(_ASCII)
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Console(RichConsole):
    """Rich console that escapes the text of tables, notes and progress bars.

    In a file or a pipe, lines have no trailing blanks.
    """

    def on_broken_pipe(self) -> None:
        raise Stopped(signal.SIGPIPE)

    def printable(self, text: str) -> str:
        """Return text for one line, with escapes for characters that the terminal can't show."""
        shown = text if text.isprintable() else "".join(map(_visible, text))
        return _encodable(shown, self.encoding)

    def shortened(self, text: str, num_characters: int) -> str:
        """Return printable text, truncated with two dots: Rich's ellipsis is not ASCII."""
        text = self.printable(text)
        return text if len(text) <= num_characters else text[: num_characters - 2] + ".."

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        segments = map(self._harmless, super().render(renderable, options))
        return segments if self.is_terminal else _without_trailing_blanks(segments)

    def shows_bar(self, mode: str) -> bool:
        """Return True if `trainer.progress` enables bars: `on`, or `auto` on a terminal."""
        return mode == "on" or (mode == "auto" and self.is_terminal)

    @contextmanager
    def progress_bars(self, mode: str) -> Iterator[NewBar]:
        """Yield a function that makes a progress bar from a label.

        A bar shows the count and the remaining time. It appears below the other bars, and all
        disappear at the end. Without a terminal, `auto` prints a line for what takes long.

        Args:
            mode: of `trainer.progress`: `on`, `off` or `auto`.
        """
        if not self.shows_bar(mode):
            with _Lines(self) if mode == "auto" else nullcontext(no_bar) as new_line:
                yield new_line
            return
        from rich import progress  # slow to import, and needed on a terminal only

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self, transient=True) as shown:

            def new_bar(label: str) -> ShowProgress:
                bar = shown.add_task(label, total=None)
                return lambda done, total: shown.update(bar, completed=done, total=total)

            yield new_bar

    def _harmless(self, segment: Segment) -> Segment:
        # Control codes are Rich's own: text never becomes one
        if segment.control or (segment.text.isascii() and segment.text.isprintable()):
            return segment
        return Segment(_encodable(harmless(segment.text), self.encoding), segment.style)


def _without_trailing_blanks(segments: Iterable[Segment]) -> Iterator[Segment]:
    blanks: list[Segment] = []  # trailing blanks, unless more text follows
    for segment in segments:
        if segment.control:
            yield segment
            continue
        text = re.sub(" +\n", "\n", segment.text)
        body = text.rstrip(" ")
        if body and not body.startswith("\n"):
            yield from blanks
        if body:
            blanks.clear()
            yield Segment(body, segment.style)
        if len(body) < len(text):
            blanks.append(Segment(text[len(body) :], segment.style))
    yield from blanks


def status(text: str) -> AbstractContextManager[object]:
    """Return a context that shows a line on standard error while it lasts, on a terminal only."""
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


@contextmanager
def waiting(new_bar: NewBar, label: str) -> Iterator[None]:
    """Show a bar without a count while the block lasts."""
    show = new_bar(label)
    yield
    if show is not None:
        show(1, 1)


class _Lines:
    """Prints a line on what runs longer than 5 seconds, then twice as late each time.

    A thread prints, because a single batch or file may take minutes.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._latest: tuple[str, float, int, int] | None = None  # label, its start, done, total
        self._ended = Event()
        self._thread = Thread(target=self._print, daemon=True)

    def __enter__(self) -> NewBar:
        self._thread.start()
        return self._new_bar

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _new_bar(self, label: str) -> ShowProgress:
        since = time.monotonic()
        self._latest = label, since, 0, 0

        def show(done: int, total: int) -> None:
            self._latest = label, since, done, total

        return show

    def _print(self) -> None:
        wait = _FIRST_LINE_SECONDS
        while not self._ended.wait(wait):
            if self._latest is None:
                continue
            label, since, done, total = self._latest
            elapsed = time.monotonic() - since
            text = f"  {label}: {elapsed:.0f} s"
            if 0 < done < total:
                remaining = elapsed / done * (total - done)
                text = f"  {label}: {done:,}/{total:,}, about {remaining:.0f} s left"
            text = self._console.printable(text)
            with suppress(Stopped):  # the main thread notices a closed pipe, too
                self._console.print(text, highlight=False, soft_wrap=True)
            wait *= 2
