"""A run that is gone on with: its folder, and the overrides that it recorded there.

The folder may come from anywhere. Of what it holds only overrides are replayed, which are checked
as if they were typed, and none that name code, Hydra's own settings or what lies in the
environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override

from tritter.checkpoint.place import is_within
from tritter.config.folders import Front, front_of
from tritter.config.launch.composition import Composer
from tritter.config.overrides import as_value, parse
from tritter.config.program import command
from tritter.config.run_folder import find_run, read_run
from tritter.errors import Problem, RequestError

_NOT_REPLAYED = ("_target_", "${")  # classes by name; the environment and other resolvers


@dataclass(frozen=True, slots=True)
class Resumption:
    """A run to go on with.

    Args:
        folder: where it lies.
        overrides: those that it recorded, and those typed now, which win.
        notes: what to tell of it, a line each.
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
    recorded = read_run(folder).overrides
    keys = {override.key_or_group for override in typed}
    refused = [w for w in recorded if not _is_replayed(w) and _key(w) not in keys]
    if refused:
        words = [*recorded, f"resume={as_value(str(folder))}"]
        raise RequestError(
            f"resume = {value}: the run was started with {', '.join(refused)}, and what names "
            "code, Hydra's own settings or the environment is not taken from a folder. If you "
            f"trust it, type the whole command:\n  {command(words)}"
        )
    kept = [word for word in recorded if not _is_overridden(word, recorded, typed)]
    added = [o.input_line or "" for o in typed if o.key_or_group != "resume"]
    told = f"resume     {folder}{': ' if kept else ''}{' '.join(kept)}"
    last = asked[-1].input_line or ""
    return Resumption(folder, (*kept, *added, last), (*notes, told))


def recorded_front(words: Sequence[str]) -> Front | None:
    """Return where the options of the run came from that `resume=` among some words means.

    Raises:
        RequestError: its folders are gone, or lie in the run's own.
    """
    asked = [word for word in words if word.lstrip("+").startswith("resume=")]
    value = parse(asked)[-1].value() if asked else None
    if value is None or isinstance(value, list | dict):
        return None
    try:
        folder, _ = find_run(str(value))
        run = read_run(folder)
    except RequestError:  # told when the run is looked for
        return None
    inside = [place for place in run.config_folders if is_within(Path(place), folder)]
    gone = [place for place in run.config_folders if not Path(place).is_dir()]
    if inside or gone:
        reason = "what names code is not taken from a run's folder" if inside else "it is not there"
        reason += "; name the folder of its options with --config-dir"
        raise RequestError(
            Problem("resume", value, reason=f"its --config-dir was {(inside or gone)[0]}, {reason}")
        )
    return front_of(run.config_folders, run.config_name)


def recorded_words(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return what a run records of its overrides: not where it lies."""
    left_out = ("resume", "hydra.run.dir", "hydra.sweep.dir")
    return tuple(word for word in overrides if _key(word) not in left_out)


def _is_replayed(word: str) -> bool:
    is_plain = not any(sign in word for sign in _NOT_REPLAYED)
    return is_plain and not _key(word).startswith(("hydra", "-"))


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
