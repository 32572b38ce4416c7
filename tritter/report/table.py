"""A table of plain text, for the terminal and the HTML page, and numbers as text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from tritter.terminal import Console

if TYPE_CHECKING:
    from tritter.evaluation import jump as measured
    from tritter.report import summary

ACCURACY = "/accuracy"  # after the name of a domain or task
MISSING = "-"
_PREFIXES = "kMGTPE"
_JUDGED = ("verdict", "status")  # columns whose cells are coloured
_ACCURACY = " accuracy"  # after the name of a domain


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain text.

    Args:
        header: Titles of the columns.
        rows: Cells, row by row.
        numbers: Positions of the right-aligned columns.
        caption: Lines below it.
        title: Line above it.
        names: Position of a column → largest number of characters of its cells on a terminal.
        rules: Positions of the rows with a line above.
        styles: Rich style of each row; empty: all rows are plain.
    """

    STYLES: ClassVar[Mapping[str, str]] = {
        "passed": "green",
        "kept": "bold green",
        "failed": "bold red",
        "rolled_back": "bold red",
        "undecided": "yellow",
        "ungated": "cyan",
        "reported": "cyan",
        "not_asked": "dim",
    }

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    caption: str = ""
    title: str = ""
    names: Mapping[int, int] = field(default_factory=dict)
    rules: tuple[int, ...] = ()
    styles: tuple[str, ...] = ()

    def to_rich(self, console: Console, *, whole: Collection[int] = ()) -> RichTable:
        """Return the table for Rich.

        Args:
            console: The console that prints it.
            whole: Positions of the columns whose cells are never wrapped.
        """
        table = RichTable(  # of texts, in which [..] is no markup
            title=Text(_printable(self.title, console)) if self.title else None,
            title_justify="left",
            title_style="bold",
            caption=Text(_printable(self.caption, console)) if self.caption else None,
            caption_justify="left",
            caption_style="dim",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        for at, name in enumerate(self.header):
            # Folded on a narrow terminal: an ellipsis would hide digits, and is not ASCII
            table.add_column(
                Text(self._cell(at, name, console)),
                justify="right" if at in self.numbers else "left",
                overflow="fold",
                no_wrap=at in whole,
            )
        for number, row in enumerate(self.rows):
            if number in self.rules:
                table.add_section()
            cells = []
            for at, cell in enumerate(row):
                is_judged = self.header[at] in _JUDGED
                style = self.STYLES.get(cell.replace(" ", "_"), "") if is_judged else ""
                cells.append(Text(self._cell(at, cell, console), style))
            table.add_row(*cells, style=self.styles[number] if self.styles else None)
        return table

    def _cell(self, at: int, text: str, console: Console) -> str:
        if at not in self.names:
            return _printable(text, console)
        stem = text.removesuffix(_ACCURACY)
        return console.shortened(stem, self.names[at]) + text[len(stem) :]


def label(subject: str) -> str:
    """Return the name of a domain, or of its accuracy."""
    name = subject.removesuffix(ACCURACY)
    return name if name == subject else f"{name}{_ACCURACY}"


def omitted_note(number: int, most: int, *, of: str = "") -> str:
    """Return a line on rows that are not shown; empty if all are."""
    return f"{number - most} {of}more are in summary.json" if number > most else ""


def _printable(text: str, console: Console) -> str:
    return "\n".join(map(console.printable, text.splitlines()))


def count_text(value: float | None) -> str:
    """Return a number of parameters, tokens or steps with three digits: 1.23 M, 7.24 B."""
    return si_text(value).replace(" G", " B")


def si_text(value: float | None) -> str:
    """Return FLOPs or bytes with three digits and an SI prefix: 1.00 M, 45.6 G."""
    if value is None:
        return MISSING
    if abs(value) < 999.5:
        return f"{value:.3g}"
    power = 1
    while abs(value) / 1000**power >= 999.5 and power < len(_PREFIXES):
        power += 1
    return f"{value / 1000**power:#.3g}".removesuffix(".") + f" {_PREFIXES[power - 1]}"


def number_text(value: float | None, form: str = "") -> str:
    """Return a number in a format of Python's, such as `.3f`; `-` if it is None."""
    return MISSING if value is None else format(value, form)


def ratio_text(ratio: float) -> str:
    """Return a ratio of sizes: 1.67 times, or +0.12 % for less than a tenth."""
    if ratio == 1:
        return "unchanged"
    if abs(ratio - 1) >= 0.1:
        return f"{ratio:.3g} times"
    return f"{100 * (ratio - 1):+.2g} %"


def mean_shift_text(jump: measured.Jump | summary.Jump) -> str:
    """Return the mean figures of a logit shift, to follow the largest; empty if there is none."""
    if not jump.rms_to_std or jump.divergence is None:
        return ""
    text = f"; root mean square {jump.rms_to_std:.1e} σ, KL {jump.divergence:.1e} nats"
    if jump.bfloat16_rms_to_std is not None and jump.bfloat16_divergence is not None:
        text += (
            "; computing the source in bfloat16 instead of float32 gives "
            f"{jump.bfloat16_rms_to_std:.1e} σ, KL {jump.bfloat16_divergence:.1e} nats"
        )
    return text
