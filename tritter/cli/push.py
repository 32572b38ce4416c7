"""`tritter push`: upload a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritter.cli.options import AsJson, flag
from tritter.cli.output import (
    CommandConsole,
    print_json,
    refuse_damage,
)
from tritter.errors import RequestError
from tritter.loading import loading
from tritter.report.table import Table, si_text
from tritter.storage.hub import Repository
from tritter.storage.reading import named_path

if TYPE_CHECKING:
    from tritter.checkpoints import Source

_REPOSITORY = "OWNER/NAME"

_Folder = Annotated[str, typer.Argument(help="Folder of the checkpoint.", metavar="DIR")]
_Repository = Annotated[
    str, typer.Argument(help="Repository on the hub; created if needed.", metavar=_REPOSITORY)
]


def push(
    folder: _Folder,
    repository: _Repository,
    public: Annotated[
        bool, flag("--public", "Make the repository public. Default: private.")
    ] = False,
    overwrite: Annotated[
        bool, flag("--overwrite", "Replace the files of a repository that has some.")
    ] = False,
    dry_run: Annotated[
        bool, flag("--dry-run", "Print the files without contacting the hub.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Upload a checkpoint to the Hugging Face Hub, private by default.

    tritter push grown owner/grown --dry-run
    """
    with loading("transformers"):
        from tritter.checkpoints import Source
        from tritter.checkpoints.card import Card
        from tritter.checkpoints.location import public_files
        from tritter.core.models import read_model

    target = Repository(repository, key=_REPOSITORY)
    target.check()
    place = named_path(folder, key="DIR")
    if not place.is_dir():
        raise RequestError(f"DIR = {folder}: no such folder.")
    with refuse_damage():
        source = Source.open(place, read_model(place)).intact()
        if source.lineage is not None and not dry_run:
            source.read_digests()  # raises if a tensor differs from the lineage
        files, left_out = public_files(place, source.lineage)
    notes = _notes(source, "license" in Card.read(place).kept)
    address = None
    if not dry_run:
        address = target.push(
            files,
            message=f"Upload {place.resolve().name} with Tritter",
            is_public=public,
            overwrite=overwrite,
        )
    sizes = {
        name: content.stat().st_size if isinstance(content, Path) else len(content)
        for name, content in sorted(files.items())
    }
    if as_json:
        print_json(
            {
                "repository": repository,
                "public": public,
                "files": sizes,
                "left_out": sorted(left_out),
                "notes": notes,
                "commit": address,
            }
        )
    else:
        _print(repository, sizes, sorted(left_out), notes, public=public, address=address)
    return 0


def _notes(source: Source, has_licence: bool) -> list[str]:
    """Return sentences about what the repository names or lacks."""
    notes = []
    if not has_licence:
        notes.append("the card has no licence: set `license` in the metadata of README.md")
    if source.lineage is not None:
        notes.append(
            "tritter.json and the card name the domains, and tritter.json the paths of the data; "
            "`tritter export` writes a folder without tritter.json"
        )
    return notes


def _print(
    repository: str,
    sizes: Mapping[str, int],
    left_out: list[str],
    notes: list[str],
    *,
    public: bool,
    address: str | None,
) -> None:
    console = CommandConsole()
    rows = tuple((name, f"{si_text(size)}B") for name, size in sizes.items())
    console.print_table(Table(("file", "size"), rows, numbers=(1,)), breaks_words=False)
    console.print()
    lines = [("total", f"{si_text(sum(sizes.values()))}B in {len(sizes)} files")]
    if left_out:
        lines.append(("left out", ", ".join(left_out)))
    lines += [("note", note) for note in notes]
    console.print_lines(lines)
    console.print()
    visibility = "public" if public else "private"
    if address is None:
        console.print_command("not pushed", f"--dry-run; {repository} would be {visibility}")
    else:
        console.print_command(f"pushed ({visibility})", address)
