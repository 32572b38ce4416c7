"""`tritter history`: print the chain of a checkpoint as a table and a tree, and verify it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from rich.text import Text

from tritter.cli.options import AsJson, Folder, flag
from tritter.cli.output import EXIT_NO, CommandConsole, display_path, print_json, short
from tritter.errors import RequestError
from tritter.report.table import Table, count_text, number_text
from tritter.storage.hub import locate
from tritter.terminal import say, status

if TYPE_CHECKING:
    from tritter.checkpoints.history import Difference, Link

    _Changes: TypeAlias = tuple[Difference, ...] | None  # None: not checked

_FEW_EXPERTS = 2  # named in the table; longer lists only in the tree


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
        changes = [link.differences() if verify and link.can_be_checked else None for link in chain]
    is_intact = not any(changes)
    if as_json:
        print_json(
            {
                "folder": str(located),
                "verified": verify,
                "intact": is_intact if verify else None,
                "chain": [
                    _link_json(*pair, chain[-1]) for pair in zip(chain, changes, strict=True)
                ],
            }
        )
    else:
        _print(chain, changes, is_verified=verify)
    return 0 if is_intact else EXIT_NO


def _state(link: Link, changes: _Changes) -> str:
    if link.is_removed:
        return "removed"
    if changes is None:
        return "not checked"
    return "changed" if changes else "intact"


def _link_json(link: Link, changes: _Changes, newest: Link) -> dict[str, Any]:
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
        "state": _state(link, changes),
        "changes": [
            {"file": change.file or None, "tensor": change.tensor, "what": change.detail}
            for change in changes or ()
        ],
    }


def _print(chain: Sequence[Link], changes: Sequence[_Changes], *, is_verified: bool) -> None:
    console, states = CommandConsole(), list(map(_state, chain, changes))
    header = ["checkpoint", "made by", "size", "steps after", "hash", "when"]
    cells = []
    for link, state in zip(chain, states, strict=True):
        cells.append(
            (
                _name(link),
                link.origin(max_experts=_FEW_EXPERTS),
                count_text(link.num_parameters),
                number_text(link.steps_after(chain[-1])),
                short(link.model_hash),
                link.expansion_records[-1].timestamp.partition("T")[0]
                if link.expansion_records
                else "",
                *([state] if is_verified else []),
            )
        )
    table = Table((*header, *["check"] * is_verified), tuple(cells), numbers=(2, 3))
    wrapped = ("checkpoint", "made by", "steps after")
    console.print_table(table, wrapped=wrapped, breaks_words=False)
    console.print()
    # Parents come first. Rich's own tree truncates long lines, but folder names must be complete
    # for copying
    corner = "+-- " if console.options.ascii_only else "└── "
    for depth, link in enumerate(chain):
        name = display_path(link.folder) if link.folder else _name(link)
        guide = "    " * (depth - 1) + corner if depth else ""
        label = Text(guide + console.printable(f"{name}  ({link.origin()})"))
        console.print(label, soft_wrap=True)
    if not is_verified:
        return
    console.print()
    for link, found in zip(chain, changes, strict=True):
        for change in found or ():
            folder = display_path(link.folder) if link.folder else ""
            names = [f"{folder}/{change.file}" if change.file else folder, change.tensor or ""]
            text = f"{' '.join(filter(None, names))}: {change.detail}"
            console.print(Text(console.printable(text), style="red"), soft_wrap=True)
    counts = Counter(states)
    parts = [f"{counts[state]} {state}" for state in ("intact", "changed", "not checked")]
    if counts["removed"]:
        parts.append(f"{counts['removed']} removed by their run and not checked")
    number = "1 checkpoint" if len(chain) == 1 else f"{len(chain)} checkpoints"
    console.print(f"{number}: {', '.join(parts)}")


def _name(link: Link) -> str:
    return link.folder.resolve().name if link.folder else f"({short(link.model_hash)})"
