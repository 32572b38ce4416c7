"""Shared output of all commands: tables that also work in pipes, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from tritter.errors import RequestError, TritterError
from tritter.report.table import Table
from tritter.stopping import Stopped
from tritter.storage.atomic import published_here
from tritter.terminal import Console, NewBar, say

if TYPE_CHECKING:
    from torch import nn

    from tritter.core.families import Model

_HASH_CHARACTERS = 12
EXIT_NO = 3  # a check failed
# Key of config.json → label, in display order
SHAPES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "FFN",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head size",
    "vocab_size": "vocabulary",
    "num_experts": "experts a layer",
    "experts_per_token": "experts a token",
    "expert_size": "expert",
    "shared_expert_size": "shared expert",
}


def shapes_of(model: Model) -> dict[str, int]:
    """Return the sizes of a model by config.json key, without those that it does not have."""
    sizes = {name: int(getattr(model.sizes, name)) for name in SHAPES}
    return {name: size for name, size in sizes.items() if size}


def short(digest: str | None) -> str:
    """Return the first characters of a hash, enough to identify a checkpoint."""
    return digest[:_HASH_CHARACTERS] if digest else "-"


def model_on_device(folder: Path, dtype: str = "float32") -> nn.Module:
    """Return a checkpoint's model with its experts, on a GPU if there is one."""
    import torch

    from tritter.core.models import non_finite_tensors
    from tritter.methods.whole import load_whole

    model = load_whole(folder, dtype=getattr(torch, dtype))
    if broken := non_finite_tensors(model):
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise RequestError(
            f"{folder}: {broken[0]}{more} has values that are not finite (NaN or infinity). "
            "Use an earlier checkpoint."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    say(json.dumps(content, indent=2, allow_nan=False))


class CommandConsole(Console):
    """The standard output of a command, without highlighting, markup or emoji."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def print_table(
        self, table: Table, *, wrapped: Collection[str] = (), breaks_words: bool = True
    ) -> None:
        """Print a table.

        Args:
            table: the table.
            wrapped: headers of columns to wrap on a narrow terminal.
            breaks_words: False allows a table wider than the terminal.
        """
        whole = [at for at, name in enumerate(table.header) if name not in wrapped]
        shown = table.to_rich(self, whole=whole)
        for column in () if breaks_words else shown.columns:
            texts = map(str, (column.header, *column.cells))
            words = [
                word for text in texts for word in ([text] if column.no_wrap else text.split())
            ]
            column.min_width = max(map(cell_len, words), default=0)
        self.print(shown, crop=breaks_words)

    def print_lines(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print labels and their texts in two columns; a label may be empty."""
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in lines:
            grid.add_row(Text(label, style="bold"), Text(self.printable(text)))
        self.print(grid)

    def print_command(self, label: str, command: str) -> None:
        """Print a label and a command to copy, without line breaks."""
        self.print(Text(f"{label}  {self.printable(command)}"), soft_wrap=True)


def progress_bars(*, is_shown: bool) -> AbstractContextManager[NewBar]:
    """Return progress bars on standard error; without a terminal, occasional lines."""
    return Console(stderr=True).progress_bars("auto" if is_shown else "off")


@contextmanager
def refuse_damage() -> Iterator[None]:
    """Turn errors about a damaged checkpoint into request errors."""
    try:
        yield
    except RequestError:
        raise
    except TritterError as error:
        raise RequestError(str(error)) from error


@contextmanager
def note_if_written(target: Path) -> Iterator[None]:
    """Add a note to an error in the block if this process has already written `target`.

    Folders are written atomically, so no other note is needed.
    """
    before = published_here(target)
    try:
        yield
    except (Stopped, TritterError) as error:
        if published_here(target) not in (None, before):
            error.add_note(f"{display_path(target)} was written and is complete.")
        raise


def display_path(path: Path) -> str:
    """Return a path for display, relative if it is in the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
