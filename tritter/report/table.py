"""A table of plain text, which the terminal and the HTML page show alike."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from tritter.report.wording import ACCURACY
from tritter.terminal import Console

STYLES = {
    "passed": "green",
    "kept": "bold green",
    "failed": "bold red",
    "rolled_back": "bold red",
    "undecided": "yellow",
    "ungated": "cyan",
    "reported": "cyan",
    "not_asked": "dim",
}
_JUDGED = ("verdict", "status")  # columns whose cells are coloured


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain text.

    Args:
        numbers: positions of the columns that are set to the right.
        caption: lines below it.
        names: position of a column → characters that its cells have at most on a terminal.
        rules: positions of the rows above which there is a line.
        styles: of Rich, row by row; empty: all rows are plain.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    caption: str = ""
    title: str = ""
    names: Mapping[int, int] = field(default_factory=dict)
    rules: tuple[int, ...] = ()
    styles: tuple[str, ...] = ()

    def to_rich(self, console: Console, *, whole: Collection[int] = ()) -> RichTable:
        """Return the table as Rich prints it.

        Args:
            whole: positions of the columns whose cells are never broken into lines.
        """
        table = RichTable(
            title=_printable(self.title, console) or None,
            title_justify="left",
            title_style="bold",
            caption=_printable(self.caption, console) or None,
            caption_justify="left",
            caption_style="dim",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        for at, name in enumerate(self.header):
            # Folded where the terminal is narrow: an ellipsis would hide digits, and is not ASCII
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
                style = STYLES.get(cell.replace(" ", "_"), "") if is_judged else ""
                cells.append(Text(self._cell(at, cell, console), style))
            table.add_row(*cells, style=self.styles[number] if self.styles else None)
        return table

    def _cell(self, at: int, text: str, console: Console) -> str:
        if at not in self.names:
            return _printable(text, console)
        stem = text.removesuffix(_RIGHT)
        return console.shortened(stem, self.names[at]) + text[len(stem) :]


_RIGHT = " right"  # after the name of a domain whose right answers are meant


def label(subject: str) -> str:
    """Return the name of a domain, or of its right answers."""
    name = subject.removesuffix(ACCURACY)
    return name if name == subject else f"{name}{_RIGHT}"


def left_out(number: int, most: int, *, of: str = "") -> str:
    """Return a line on rows of which there are too many; empty where all are shown."""
    return f"{number - most} {of}more are in summary.json" if number > most else ""


def _printable(text: str, console: Console) -> str:
    return "\n".join(map(console.printable, text.splitlines()))
