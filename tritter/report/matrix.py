"""Every domain after every task: what summary.json's `matrix` has to be, and its table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Required

from pydantic import AfterValidator, Field
from rich.table import Table
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.report.bounds import Count, Number
from tritter.report.rich_table import new_table
from tritter.report.wording import MISSING, Signs

MAX_ROWS = 24
_MOST = 1000  # rows, and domains
_DOMAIN_CHARACTERS = 20
_Transfer = dict[str, Number | None]
_Row = Annotated[list[Number | None], Field(max_length=_MOST)]


class _Matrix(TypedDict, total=False):
    rows: Required[Annotated[list[str], Field(min_length=1, max_length=_MOST)]]
    domains: Required[Annotated[list[str], Field(min_length=1, max_length=_MOST)]]
    loss_per_byte: Required[list[_Row]]
    trained: list[list[str]]
    accuracy: dict[str, _Row]
    own: dict[str, Count]
    backward_transfer: _Transfer
    forward_transfer: _Transfer
    mean_backward_transfer: Number | None
    mean_forward_transfer: Number | None


def _consistent(matrix: _Matrix) -> _Matrix:
    """Refuse a matrix whose parts are not of the rows and domains that it names."""
    number, domains = len(matrix["rows"]), matrix["domains"]
    losses = matrix["loss_per_byte"]
    if len(losses) != number or any(len(row) != len(domains) for row in losses):
        raise ValueError(f"loss_per_byte is not of {number} rows and {len(domains)} domains")
    if len(set(domains)) < len(domains):
        raise ValueError("a domain stands in it twice")
    if any(len(row) != number for row in matrix.get("accuracy", {}).values()):
        raise ValueError(f"an accuracy is not of {number} rows")
    if "trained" in matrix and len(matrix["trained"]) != number:
        raise ValueError(f"trained is not of {number} rows")
    if any(row >= number for row in matrix.get("own", {}).values()):
        raise ValueError(f"a domain's own row is none of {number}")
    return matrix


MatrixSummary = Annotated[_Matrix, AfterValidator(_consistent)]


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A domain's losses per byte, and what the other tasks did to it.

    Args:
        learned: the row in which it was learned first, such as `task 1`.
        before: of the model that the run started from.
        right_after: behind the task in which it was learned.
        backward: what later tasks changed of it; negative is good.
        forward: what earlier tasks changed of it; likewise.
    """

    domain: str
    learned: str
    before: float | None
    right_after: float | None
    at_the_end: float | None
    backward: float | None
    forward: float | None


def transfer_rows(matrix: Mapping[str, Any]) -> tuple[TransferRow, ...]:
    """Return a row per domain that was learned, and their means where there are several."""
    rows, losses = matrix["rows"], matrix["loss_per_byte"]
    own = matrix.get("own") or {}
    backward, forward = (matrix.get(f"{n}_transfer") or {} for n in ("backward", "forward"))
    found = [
        TransferRow(
            domain=name,
            learned="before" if own[name] == 0 else rows[own[name]],
            before=losses[0][place],
            right_after=losses[own[name]][place],
            at_the_end=losses[-1][place],
            backward=backward.get(name),
            forward=forward.get(name),
        )
        for place, name in enumerate(matrix["domains"])
        if name in own
    ]
    return tuple(found)


def transfer_table(matrix: Mapping[str, Any], *, signs: Signs) -> Table:
    """Return a row per domain that was learned: its losses per byte, and the transfers."""
    rows = transfer_rows(matrix)
    table = new_table(
        "Transfer between tasks, in nats per byte; negative is good",
        caption="backward: what later tasks changed; forward: what earlier ones did",
    )
    for name in ("domain", "learned in"):
        table.add_column(name, overflow="fold")
    for name in ("before", "then", "at the end", "backward", "forward"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows[:MAX_ROWS]:
        losses = (row.before, row.right_after, row.at_the_end)
        table.add_row(
            signs.shortened(row.domain, _DOMAIN_CHARACTERS),
            signs.shortened(row.learned, _DOMAIN_CHARACTERS),
            *map(loss_text, losses),
            *map(transfer_text, (row.backward, row.forward)),
        )
    if len(rows) > MAX_ROWS:
        table.caption = f"{table.caption}\n{len(rows) - MAX_ROWS} more are in summary.json"
    if len(rows) > 1:
        table.add_section()
        table.add_row("mean", "", "", "", "", *mean_transfers(matrix))
    return table


def mean_transfers(matrix: Mapping[str, Any]) -> tuple[str, str]:
    """Return the means of backward and forward transfer, in words."""
    backward, forward = (matrix.get(f"mean_{n}_transfer") for n in ("backward", "forward"))
    return transfer_text(backward), transfer_text(forward)


def loss_text(value: float | None) -> str:
    """Return a loss per byte."""
    return MISSING if value is None else f"{value:.4f}"


def transfer_text(value: float | None) -> str:
    """Return a difference of losses per byte, with its sign."""
    return MISSING if value is None else f"{value:+.4f}"
