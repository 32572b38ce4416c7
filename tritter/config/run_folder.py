"""A run's folder: may this config write here, has it been here before, where is the last one."""

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

from tritter.config.fingerprint import describe_changes, fingerprint
from tritter.config.schema import RunConfig
from tritter.errors import RequestError, did_you_mean
from tritter.storage.atomic import write_text_atomic

FORMAT_VERSION = 1
RUN_FILE = "run.json"
RUNS_FOLDER = Path("outputs/runs")  # hydra.run.dir of conf/config.yaml, without the time

_MADE_BY_HYDRA = {".hydra", "train.log"}  # they are there before the run file is
_STATUSES = ("running", "finished")


class RunState(Enum):
    """What a run folder holds of the run that is asked for."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


def check_run_folder(folder: Path, config: RunConfig) -> RunState:
    """Say whether `config` starts in `folder`, goes on there, or has finished there.

    Raises:
        RequestError: the folder holds something else, or a run of another configuration (lists
            the keys that changed), or can't be a folder at all.
    """
    _check_place(folder)
    if not (folder / RUN_FILE).exists():
        if folder.exists() and any(path.name not in _MADE_BY_HYDRA for path in folder.iterdir()):
            raise RequestError(
                f"hydra.run.dir = {folder}: output exists and is no run of Tritter (it has no "
                f"{RUN_FILE}); nothing was touched. Allowed is a new or empty folder, or one of "
                "an earlier run of the same configuration."
            )
        return RunState.NEW
    run = _read_run_file(folder)
    changes = describe_changes(run["fingerprint"], fingerprint(config))
    if changes:
        raise RequestError(
            f"hydra.run.dir = {folder}: it holds a run of another configuration (there → now):\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nUse the old values, or another folder."
        )
    return RunState.FINISHED if run["status"] == "finished" else RunState.STARTED


def write_run_file(folder: Path, config: RunConfig, *, status: str) -> None:
    """Record in `folder`, atomically, whose run it is; `status` is running or finished."""
    assert status in _STATUSES
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(config),
        "status": status,
    }
    write_json(folder / RUN_FILE, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def find_run(resume: str) -> Path:
    """Return the folder that `resume` (latest, or a folder) means.

    Raises:
        RequestError: there is no such run; names what there is.
    """
    runs = sorted(RUNS_FOLDER.glob(f"*/{RUN_FILE}"), key=lambda p: (p.stat().st_mtime_ns, str(p)))
    names = [str(path.parent) for path in runs]
    if resume == "latest":
        if not names:
            raise RequestError(
                f"resume = latest: there is no run below {RUNS_FOLDER.absolute()}; allowed is the "
                "folder of a run, or nothing to start a new one."
            )
        return Path(names[-1]).absolute()
    folder = Path(resume).expanduser().absolute()
    if not (folder / RUN_FILE).is_file():
        raise RequestError(
            f"resume = {resume}: that folder holds no run ({RUN_FILE} is missing); allowed is "
            f"latest, or the folder of a run.{did_you_mean(resume, ['latest', *names])}"
        )
    return folder


def _read_run_file(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} can't be read ({error}); use another hydra.run.dir.") from error
    is_ours = isinstance(run, dict) and isinstance(run.get("fingerprint"), dict)
    if not is_ours or run.get("format_version") != FORMAT_VERSION:
        raise RequestError(
            f"{path} is not of format {FORMAT_VERSION}, which this version reads; use another "
            "hydra.run.dir."
        )
    return {"fingerprint": run["fingerprint"], "status": run.get("status")}


def _check_place(folder: Path) -> None:
    """Refuse a path that can't become a folder, before anything tries."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise RequestError(f"hydra.run.dir = {folder}: {place} is a file; a folder is needed.")
    if not os.access(place, os.W_OK):
        raise RequestError(f"hydra.run.dir = {folder}: {place} can't be written to.")
