"""The look that all tables of the terminal share."""

from rich import box
from rich.table import Table


def new_table(title: str, *, caption: str | None = None) -> Table:
    """Return an empty table with its title, and a caption below it."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
