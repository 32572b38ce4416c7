"""A run that is resumed: its folder, and the overrides that it recorded there.

The folder may come from anywhere. Of what it records only options that are part of Tritter and
plain values of listed keys are replayed (`schema.REPLAYED_KEYS`). Everything else, the folders of
its options included, has to be typed by somebody who trusts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override

from tritter.config.folders import Front, composing_from, front
from tritter.config.launch.composition import Composer
from tritter.config.overrides import as_value, command, not_replayed, parse
from tritter.config.run_folder import find_run, read_run
from tritter.errors import RequestError, brief


@dataclass(frozen=True, slots=True)
class Resumption:
    """A run to resume.

    Args:
        folder: of the run.
        overrides: those that it recorded, and those typed now, which win.
        notes: what to print before anything that they name is opened, a line each.
    """

    folder: Path
    overrides: tuple[str, ...]
    notes: tuple[str, ...]


def resumption(composing: Composer, overrides: Sequence[str]) -> Resumption | None:
    """Return the run that `resume` among some overrides means; None where it is not typed.

    Raises:
        RequestError: there is no such run, or it recorded what is not replayed.
    """
    typed = parse(overrides, loader=composing.loader)
    asked = [o for o in typed if o.key_or_group == "resume" and not o.is_delete()]
    value = asked[-1].value() if asked and not asked[-1].is_sweep_override() else None
    if value is None:
        return None
    if any(o.key_or_group == "hydra.run.dir" for o in typed):
        raise RequestError(
            f"resume = {value}: it chooses the folder, and so does hydra.run.dir; give one of them."
        )
    folder, notes = find_run(str(value))
    run = read_run(folder)
    kept = [word for word in run.overrides if not _is_overridden(word, run.overrides, typed)]
    words = [*kept, *(o.input_line or "" for o in typed if o.key_or_group != "resume")]
    meant = front() if front() != Front() else run.front
    if refused := [*(meant.flags if front() == Front() else ()), *not_replayed(kept)]:
        with composing_from(meant):
            whole = command([*words, f"resume={as_value(str(folder))}"])
        raise RequestError(
            f"resume = {value}: the run was started with {', '.join(map(brief, refused))}. A run "
            "folder may come from anywhere, so only shipped options and plain settings are "
            f"replayed. If you trust the rest, type the whole command:\n  {whole}"
        )
    replayed = f"resume     {folder}{': ' if kept else ''}{' '.join(kept)}"
    return Resumption(folder, (*words, asked[-1].input_line or ""), (*notes, replayed))


def recorded_words(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return what a run records of its overrides: not where it lies."""
    left_out = ("resume", "hydra.run.dir", "hydra.sweep.dir")
    return tuple(word for word in overrides if _key(word) not in left_out)


def _is_overridden(word: str, recorded: Sequence[str], typed: Sequence[Override]) -> bool:
    """Say whether a recorded override gives way: to its key typed again, or to another group."""
    key = _key(word)
    return any(
        key == other.key_or_group
        or (key.startswith(f"{other.key_or_group}.") and other.input_line not in recorded)
        for other in typed
    )


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]
