"""A run's folder: may this config write here, has it been here before, where is the last one."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tritter.checkpoint.left import digests_of, find_damage, read_left
from tritter.checkpoint.place import is_within
from tritter.config.fingerprint import describe_changes, fingerprint
from tritter.config.folders import front
from tritter.config.program import command, program_words, resume_command
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.errors import RequestError, TritterError, did_you_mean
from tritter.storage.atomic import write_text_atomic
from tritter.storage.links import check_tree
from tritter.storage.names import named_path
from tritter.storage.reading import read_object
from tritter.storage.records import read_record, record_text

FORMAT_VERSION = 2  # 2: overrides, what was left, a digest of the whole
RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
RUNS_FOLDER = Path("outputs/runs")  # hydra.run.dir of conf/config.yaml, without the time

_MADE_BY_HYDRA = {".hydra", "train.log"}  # they are there before the run file is
_LOGGER_FOLDERS = {"wandb"}  # W&B links to logs in its own cache
_STATUSES = ("running", "finished")


class RunState(Enum):
    """What a run folder holds of the run that is asked for."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What the run file says of a run.

    Args:
        fingerprint: of its configuration.
        status: running or finished.
        program: how it was called.
        overrides: of its command line, but for the folder.
        left: of a finished run: place → digest of what it leaves.
        config_folders: of --config-dir.
        config_name: of --config-name.
    """

    fingerprint: Mapping[str, Any]
    status: str
    program: str
    overrides: tuple[str, ...]
    left: Mapping[str, str]
    config_folders: tuple[str, ...] = ()
    config_name: str | None = None


def check_run_folder(folder: Path, config: RunConfig) -> RunState:
    """Say whether `config` starts in `folder`, goes on there, or has finished there.

    A run that says it is finished, and of whose things one is gone, goes on.

    Raises:
        RequestError: the folder holds something else, or a run of another configuration (lists
            the keys that changed), or can't be a folder at all.
        TritterError: what a finished run left was changed; names files and tensors.
    """
    _check_place(folder, config)
    is_run = os.path.lexists(folder / RUN_FILE)
    others = (path for path in folder.iterdir() if path.name not in _MADE_BY_HYDRA)
    if not is_run and folder.exists() and any(others):
        raise RequestError(
            f"hydra.run.dir = {folder}: output exists and is no run of Tritter (it has no "
            f"{RUN_FILE}); nothing was touched. Allowed is a new or empty folder, or one of "
            "an earlier run of the same configuration."
        )
    try:
        # What is written below it has to stay there
        check_tree(folder, passed_over=_LOGGER_FOLDERS)
    except TritterError as error:
        raise RequestError(f"hydra.run.dir = {folder}: {error}") from error
    if not is_run:
        return RunState.NEW
    run = read_run(folder)
    changes = describe_changes(run.fingerprint, fingerprint(config))
    if changes:
        raise RequestError(
            f"hydra.run.dir = {folder}: it holds a run of another configuration (there → now):\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nLeave them out to go on with it: {resume_command(folder)}\n"
            "Or give another folder as hydra.run.dir to start another run."
        )
    if run.status != "finished":
        return RunState.STARTED
    return RunState.FINISHED if _is_whole(folder, run) else RunState.STARTED


def _is_whole(folder: Path, run: RunRecord) -> bool:
    """Say whether what a finished run left is all there.

    Raises:
        TritterError: something is there and was changed.
    """
    damages = find_damage(folder, run.left)
    changed = [damage for damage in damages if not damage.is_gone]
    if changed:
        places = dict.fromkeys(str(folder / damage.place) for damage in changed)
        raise TritterError(
            "the run is finished, and what it left is not as it was left:\n"
            + "\n".join(f"  {damage.what}" for damage in changed)
            + f"\nDelete {' and '.join(places)}, and it is made again by: "
            + resume_command(folder)
        )
    return not damages and SUMMARY_FILE in run.left


def write_run_file(
    folder: Path,
    config: RunConfig,
    *,
    status: str,
    overrides: Sequence[str] = (),
    leaves: Sequence[str] = (),
) -> None:
    """Record in `folder`, atomically, whose run it is.

    Args:
        status: running or finished.
        overrides: of the command line; those of a run that is gone on with stay.
        leaves: what a finished run leaves, relative to its folder.
    """
    assert status in _STATUSES
    folder.mkdir(parents=True, exist_ok=True)
    held = read_run(folder) if (folder / RUN_FILE).exists() else None
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(config),
        "status": status,
        "program": held.program if held else " ".join(program_words()),
        "overrides": list(held.overrides if held else overrides),
        "left": digests_of(folder, leaves),
        "config_folders": list(held.config_folders if held else map(str, front().folders)),
        "config_name": held.config_name if held else front().config_name,
    }
    write_json(folder / RUN_FILE, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON record, with its digest, whole or not at all."""
    write_text_atomic(path, record_text(json.loads(json.dumps(content))))


def find_run(resume: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder that `resume` (latest, or a folder) means, and what to tell of others.

    Raises:
        RequestError: there is no such run; names what there is.
    """
    runs = sorted(RUNS_FOLDER.glob(f"*/{RUN_FILE}"), key=_time, reverse=True)
    folders = [path.parent.absolute() for path in runs]
    if resume == "latest":
        return _latest(folders)
    folder = named_path(resume, key="resume").absolute()
    if not os.path.lexists(folder / RUN_FILE):
        known = ["latest", *(str(place.relative_to(Path.cwd())) for place in folders)]
        raise RequestError(
            f"resume = {resume}: that folder holds no run ({RUN_FILE} is missing); allowed is "
            f"latest, or the folder of a run.{did_you_mean(resume, known)}"
        )
    return folder, ()


def read_run(folder: Path) -> RunRecord:
    """Return what a folder's run file says.

    Raises:
        RequestError: it can't be read, was changed, or is of another format.
    """
    path = folder / RUN_FILE
    advice = f"start in another folder, as {command(['hydra.run.dir=NEW'])}"
    try:
        found = read_object(path).get("format_version")
        if found != FORMAT_VERSION:
            raise RequestError(
                f"{path}: the run is of format {found!r}; this Tritter goes on with those of "
                f"format {FORMAT_VERSION}. Its checkpoints can be used all the same; to run it "
                f"again, {advice}."
            )
        plain = read_record(path, format_version=FORMAT_VERSION)
        return _record(plain)
    except (ValueError, KeyError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path} can't be gone by ({error}); {advice}.") from error


def _record(plain: Mapping[str, Any]) -> RunRecord:
    """Rebuild a record.

    Raises:
        ValueError: something is missing or of another type.
    """
    overrides = plain.get("overrides")
    kinds = {"fingerprint": dict, "status": str, "program": str, "overrides": list, "left": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(plain.get(key), kind)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} missing or of another type")
    assert isinstance(overrides, list)
    if not all(isinstance(word, str) and word.isprintable() for word in overrides):
        raise ValueError("an override is no printable text")
    if plain["status"] not in _STATUSES:
        raise ValueError(f"a run is {' or '.join(_STATUSES)}")
    return RunRecord(
        fingerprint=plain["fingerprint"],
        status=plain["status"],
        program=plain["program"],
        overrides=tuple(overrides),
        left=read_left(plain["left"]),
        config_folders=_words(plain.get("config_folders", [])),
        config_name=plain.get("config_name") and str(plain["config_name"]),
    )


def _words(value: object) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [None]
    if not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("config_folders is no list of paths")
    return tuple(words)


def _latest(folders: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """Return the first folder that holds a run which can be gone on with."""
    skipped: list[str] = []
    for folder in folders:
        try:
            read_run(folder)
            return folder, tuple(skipped)
        except RequestError as error:
            skipped.append(f"resume     not {folder}: {error}")
    raise RequestError(
        "\n".join(
            [
                f"resume = latest: there is no run below {RUNS_FOLDER.absolute()}; allowed is the "
                "folder of a run, or nothing to start a new one.",
                *skipped,
            ]
        )
    )


def _time(path: Path) -> tuple[int, str]:
    return path.lstat().st_mtime_ns, str(path)


def _check_place(folder: Path, config: RunConfig) -> None:
    """Refuse a path that can't become a folder, or lies in the checkpoint that is trained on."""
    model = config.model
    if isinstance(model, CheckpointModelConfig) and is_within(folder, Path(model.path)):
        raise RequestError(
            f"hydra.run.dir = {folder}: it lies in the checkpoint that the run starts from, "
            f"{model.path}; a run stands beside it."
        )
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise RequestError(f"hydra.run.dir = {folder}: {place} is a file; a folder is needed.")
    if not os.access(place, os.W_OK):
        raise RequestError(f"hydra.run.dir = {folder}: {place} can't be written to.")
