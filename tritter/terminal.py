"""The border to the terminal: text is shown, and never steers it.

Names of tensors and files, arguments, tokens of a model and fields of a lineage come from anywhere.
An escape sequence among them could clear the screen, change its title or hide what is said; an
override of direction could turn a line around. All that is printed goes through here, and what is
no visible sign appears as its escape.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

_LAYOUT = "\n\t"
ShowProgress = Callable[[int, int], None]  # done, of how many
NewBar = Callable[[str], ShowProgress | None]


def no_bar(label: str) -> None:
    """Show no bar of a label."""


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


def shows_bar(mode: str, console: Console) -> bool:
    """Say whether `trainer.progress` asks for bars: `on`, or `auto` on a terminal."""
    return mode == "on" or (mode == "auto" and console.is_terminal)


@contextmanager
def progress_bars(console: Console, *, is_shown: bool) -> Iterator[NewBar]:
    """Yield a function that makes a progress bar of a label; it makes none if none is to be shown.

    A bar shows how many are done and the time left. It appears when it is first updated, below the
    others, and all disappear at the end.
    """
    if not is_shown:
        yield no_bar
        return
    from rich import progress  # slow to import, and needed on a terminal alone

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as shown:

        def new_bar(label: str) -> ShowProgress:
            bar = cache(lambda: shown.add_task(label))
            return lambda done, total: shown.update(bar(), completed=done, total=total)

        yield new_bar
