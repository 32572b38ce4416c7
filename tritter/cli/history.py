"""`tritter history`: print the chain of a checkpoint as a table and a tree, and verify it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from tritter.cli.options import AsJson, Folder, flag
from tritter.cli.output import EXIT_NO, CommandConsole, display_path, print_json, short
from tritter.errors import RequestError
from tritter.report.table import Table, count_text, number_text
from tritter.storage.hub import locate
from tritter.terminal import say, status

if TYPE_CHECKING:
    from tritter.checkpoints.history import Difference, Link

_FEW_EXPERTS = 2  # named in the table; longer lists only in the tree


@dataclass(frozen=True, slots=True)
class _Checked:
    """A checkpoint of the chain and its differences; None if it was not checked."""

    link: Link
    changes: tuple[Difference, ...] | None

    @property
    def state(self) -> str:
        if self.link.is_removed:
            return "removed"
        if self.changes is None:
            return "not checked"
        return "changed" if self.changes else "intact"


def history(
    folder: Folder,
    verify: Annotated[
        bool, flag("--verify", "Recompute the hashes; exit code 3 if one differs.")
    ] = False,
    recipe: Annotated[
        bool, flag("--recipe", "Print only the `expand` recipe that makes it from its parent.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Show the lineage of a checkpoint, and verify its hashes."""
    if recipe:
        from tritter.cli.recipe import recorded_recipe

        if verify or as_json:
            other = "--verify" if verify else "--json"
            raise RequestError(f"--recipe can't be combined with {other}.")
        say(recorded_recipe(locate(folder, key="checkpoint")).rstrip("\n"))
        return 0
    from tritter.checkpoints.history import Link

    located = locate(folder, key="checkpoint")
    chain = Link.chain(located)
    # --verify reports damage as a change
    if not verify and chain[-1].problem:
        raise RequestError(chain[-1].problem)
    with status("hashing") if verify and not as_json else nullcontext():
        rows = [
            _Checked(link, link.differences() if verify and link.can_be_checked else None)
            for link in chain
        ]
    is_intact = not any(row.changes for row in rows)
    if as_json:
        print_json(
            {
                "folder": str(located),
                "verified": verify,
                "intact": is_intact if verify else None,
                "chain": [_row_json(row, chain[-1]) for row in rows],
            }
        )
    else:
        _print(rows, is_verified=verify)
    return 0 if is_intact else EXIT_NO


def _row_json(row: _Checked, newest: Link) -> dict[str, Any]:
    link = row.link
    return {
        "folder": str(link.folder) if link.folder else None,
        "model_hash": link.model_hash,
        "parent_hash": link.lineage.parent_hash if link.lineage else None,
        "made_by": link.origin(),
        "methods": [record.method for record in link.expansion_records],
        "experts": list(link.experts),
        "parameters": link.num_parameters,
        "parameters_on_disk": link.num_parameters_on_disk,
        "continued_training_steps": link.steps_after(newest),
        "timestamp": link.expansion_records[-1].timestamp if link.expansion_records else None,
        "state": row.state,
        "changes": [
            {"file": change.file or None, "tensor": change.tensor, "what": change.detail}
            for change in row.changes or ()
        ],
    }


def _print(rows: Sequence[_Checked], *, is_verified: bool) -> None:
    console = CommandConsole()
    header = ["checkpoint", "made by", "size", "steps after", "hash", "when"]
    cells = []
    for row in rows:
        link, steps = row.link, row.link.steps_after(rows[-1].link)
        cells.append(
            (
                _name(link),
                link.origin(max_experts=_FEW_EXPERTS),
                count_text(link.num_parameters),
                number_text(steps),
                short(link.model_hash),
                link.expansion_records[-1].timestamp.partition("T")[0]
                if link.expansion_records
                else "",
                *([row.state] if is_verified else []),
            )
        )
    table = Table((*header, *["check"] * is_verified), tuple(cells), numbers=(2, 3))
    wrapped = ("checkpoint", "made by", "steps after")
    console.print_table(table, wrapped=wrapped, breaks_words=False)
    console.print()
    # Parents come first. Rich's own tree truncates long lines, but folder names must be complete
    # for copying
    corner = "+-- " if console.options.ascii_only else "└── "
    for depth, row in enumerate(rows):
        link = row.link
        name = display_path(link.folder) if link.folder else _name(link)
        guide = "    " * (depth - 1) + corner if depth else ""
        label = Text(guide + console.printable(f"{name}  ({link.origin()})"))
        console.print(label, soft_wrap=True)
    if not is_verified:
        return
    console.print()
    for row in rows:
        for change in row.changes or ():
            folder = display_path(row.link.folder) if row.link.folder else ""
            names = [f"{folder}/{change.file}" if change.file else folder, change.tensor or ""]
            text = f"{' '.join(filter(None, names))}: {change.detail}"
            console.print(Text(console.printable(text), style="red"), soft_wrap=True)
    states = Counter(row.state for row in rows)
    parts = [f"{states[state]} {state}" for state in ("intact", "changed", "not checked")]
    if states["removed"]:
        parts.append(f"{states['removed']} removed by their run and not checked")
    number = "1 checkpoint" if len(rows) == 1 else f"{len(rows)} checkpoints"
    console.print(f"{number}: {', '.join(parts)}")


def _name(link: Link) -> str:
    return link.folder.resolve().name if link.folder else f"({short(link.model_hash)})"
