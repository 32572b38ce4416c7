"""The border to the terminal: text is shown, and never steers it.

Names of tensors and files, arguments, tokens of a model and fields of a lineage come from anywhere.
An escape sequence among them could clear the screen, change its title or hide what is said; an
override of direction could turn a line around. All that is printed goes through here, and what is
no visible sign appears as its escape.
"""

import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from tritter.stopping import Stopped

_LAYOUT = "\n\t"


def harmless(text: str) -> str:
    r"""Return text with everything that is no visible sign written as its escape, such as \x1b.

    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(s if s.isprintable() or s in _LAYOUT else ascii(s)[1:-1] for s in text)


def say(text: str, *, is_error: bool = False) -> None:
    """Print a line, whatever is in it and whatever the terminal's encoding."""
    stream = sys.stderr if is_error else sys.stdout
    shown = _shown(text, getattr(stream, "encoding", None) or "utf-8")
    try:
        print(shown, file=stream, flush=True)
    except BrokenPipeError as error:
        raise Stopped(signal.SIGPIPE) from error


def close_pipe() -> None:
    """Let nothing more go to a reader that left (`| head`): Python flushes when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


def _shown(text: str, encoding: str) -> str:
    return harmless(text).encode(encoding, "backslashreplace").decode(encoding)


class Console(RichConsole):
    """Rich's console, whose text is harmless in tables, notes and progress alike.

    In a file or a pipe no line ends with blanks.
    """

    def on_broken_pipe(self) -> None:
        raise Stopped(signal.SIGPIPE)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        segments = map(self._harmless, super().render(renderable, options))
        return segments if self.is_terminal else _without_trailing_blanks(segments)

    def _harmless(self, segment: Segment) -> Segment:
        # Control codes are Rich's own: what was given as text never becomes one
        if segment.control or (segment.text.isascii() and segment.text.isprintable()):
            return segment
        return Segment(_shown(segment.text, self.encoding), segment.style)


def _without_trailing_blanks(segments: Iterable[Segment]) -> Iterator[Segment]:
    blanks: list[Segment] = []  # which end the line, or come before further text
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
