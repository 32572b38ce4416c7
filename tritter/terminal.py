"""The border to the terminal: text is shown, and never steers it.

Names of tensors and files, arguments, tokens of a model and fields of a lineage come from anywhere.
An escape sequence among them could clear the screen, change its title or hide what is said; an
override of direction could turn a line around. All that is printed goes through here, and what is
no visible sign appears as its escape.
"""

import sys
from collections.abc import Iterable

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

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
    print(_shown(text, getattr(stream, "encoding", None) or "utf-8"), file=stream, flush=True)


def _shown(text: str, encoding: str) -> str:
    return harmless(text).encode(encoding, "backslashreplace").decode(encoding)


class Console(RichConsole):
    """Rich's console, whose text is harmless in tables, notes and progress alike."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Control codes are Rich's own: what was given as text never becomes one
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                yield Segment(_shown(segment.text, self.encoding), segment.style)
