"""From a checkpoint back to the recipe that makes it of its parent."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tritter.checkpoint.history import Link, read_chain
from tritter.checkpoint.record import ExpansionRecord
from tritter.config.folders import option_files
from tritter.config.recipe import recipe_text
from tritter.errors import RequestError, TritterError
from tritter.storage.tensors import WEIGHT_DTYPES, TensorFolder


def recorded_recipe(folder: Path) -> str:
    """Return the text of a recipe by which the parent of a checkpoint becomes it once more.

    Raises:
        RequestError: there is no checkpoint, its lineage can't be read, or what made it is no
            expansion, or several with a training between them.
    """
    chain = read_chain(folder)
    link = chain[-1]
    if link.problem:
        raise RequestError(link.problem)
    if link.lineage is None:
        raise RequestError(f"{folder} is a plain folder: no record says what made it.")
    records = link.made_by
    if not records:
        raise RequestError(f"{folder} was trained or stands at the start: no expansion made it.")
    parent = chain[-2] if len(chain) > 1 else None
    starts = link.lineage.parent_hash == link.lineage.base_model_hash
    if not starts and (parent is None or parent.lineage is None):
        raise RequestError(
            f"{folder}: its parent is not there, whose record says which of these came before it: "
            f"{', '.join(record.method for record in link.lineage.expansion_history)}."
        )
    _check_steps(folder, records)
    settings: dict[str, Any] = {"seed": records[0].seed}
    if (dtype := _stated_dtype(folder, parent)) is not None:
        settings["dtype"] = dtype
    steps = [(record.method, dict(record.options)) for record in records]
    return recipe_text(steps, settings, comments=_comments(link, parent))


def _check_steps(folder: Path, records: Sequence[ExpansionRecord]) -> None:
    """Refuse what `expand` doesn't make in one go."""
    known = option_files()["expansion"]
    for record in records:
        if record.method not in known:
            raise RequestError(
                f"{folder}: {record.method} made it, which no recipe of expand holds; there are "
                f"{', '.join(name for name in known if name != 'none')}."
            )
    seeds = [record.seed for record in records]
    sizes = [(a.target_config, b.source_config) for a, b in pairwise(records)]
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))) or any(a != b for a, b in sizes):
        methods = ", ".join(record.method for record in records)
        raise RequestError(
            f"{folder}: {methods} were carried out by several commands, and the checkpoints "
            "between them are not there; no one recipe makes it of what is."
        )


def _stated_dtype(folder: Path, parent: Link | None) -> str | None:
    """Return the dtype of all tensors where they can't be said to have it from their source."""
    own = _dtypes(folder)
    before = None if parent is None or parent.folder is None else _dtypes(parent.folder)
    if len(own) != 1 or own == before or not own <= set(WEIGHT_DTYPES):
        return None
    return next(iter(own))


def _dtypes(folder: Path) -> set[str]:
    try:
        return {header.dtype for header in TensorFolder.open(folder).headers.values()}
    except TritterError as error:
        raise RequestError(str(error)) from error


def _comments(link: Link, parent: Link | None) -> list[str]:
    """Say what the recipe starts from, what comes of it, and what it leaves out."""
    lineage = link.lineage
    assert lineage is not None and link.folder is not None
    place = parent.folder if parent is not None and parent.folder is not None else None
    name = f"{_word(place)}, " if place is not None else ""
    lines = [f"of {name}the checkpoint {lineage.parent_hash}"]
    if lineage.step:
        lines.append(
            f"a training of {lineage.step} steps followed, which no recipe of expand holds"
        )
    else:
        lines.append(f"it makes {_word(link.folder)}, {lineage.model_hash}")
    return lines


def _word(folder: Path) -> str:
    """Return a folder's name, which must not end the comment that it stands in."""
    name = folder.resolve().name
    return name if name.isprintable() else ascii(name)
