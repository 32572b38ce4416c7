"""A run's folder: may this config write here, has it been here before, where is the last one.

Two runs with one fingerprint are the same run: it holds what of a config determines the result.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from tritter.checkpoints.history import digests_of, find_damage
from tritter.checkpoints.location import is_within
from tritter.config.folders import CONFIG_NAME, SearchPath, composing_from, search_path
from tritter.config.overrides import command, program_command, resume_command
from tritter.config.schema import SECTIONS, CheckpointModelConfig, RunConfig
from tritter.data.skills import PREFIX
from tritter.errors import (
    Problem,
    RequestError,
    TritterError,
    did_you_mean,
    key_name,
    refused,
    show,
)
from tritter.options import leaves
from tritter.storage.atomic import write_text_atomic
from tritter.storage.lock import LOCK_NAME
from tritter.storage.reading import RUN_FILE, SUMMARY_FILE, check_tree, named_path
from tritter.storage.records import InnerName, read_record, record, record_text
from tritter.targets import Component, identity
from tritter.training.options import WITHOUT_EFFECT as NO_EFFECT

RUNS_FOLDER = Path("outputs/runs")  # hydra.run.dir of conf/config.yaml, without the time

OUTPUT_FILE = "output.txt"  # log of a job of a sweep

# Hydra's, and what holds the folder
_BEFORE_RUN_FILE = {".hydra", "train.log", LOCK_NAME, OUTPUT_FILE}
_NO_TEXT = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode
_LOGGER_FOLDERS = {"wandb"}  # W&B links to logs in its own cache


class RunState(Enum):
    """What a run folder holds of the run that is asked for."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


def _recordable(word: str) -> str:
    found = next((sign for sign in word if unicodedata.category(sign) in _NO_TEXT), None)
    if found is not None:
        raise ValueError(f"it holds the character {found!a}, which no record of a run holds")
    return word


def check_overrides(words: Sequence[str]) -> None:
    """Refuse overrides that the run's record can't hold: they stand wherever the run is told of.

    Raises:
        RequestError: one holds what is no text to a terminal: control characters, marks that turn
            the direction, halves of characters.
    """
    for word in words:
        try:
            _recordable(word)
        except ValueError as error:
            key, _, value = word.partition("=")
            advice = "give what it stands for another name"
            raise RequestError(Problem(key, value, reason=str(error), advice=advice)) from error


_Word = Annotated[str, AfterValidator(_recordable)]


@record
class RunRecord:
    """What the run file says of a run.

    Args:
        fingerprint: of its configuration.
        program: how it was called.
        overrides: of its command line, but for the folder.
        left: of a finished run: place → digest of what it leaves.
        config_folders: of --config-dir and hydra.searchpath.
        config_name: of --config-name.
    """

    FORMAT: ClassVar[str] = "run"

    fingerprint: dict[str, Any]
    status: Literal["running", "finished"]
    program: str
    overrides: tuple[_Word, ...]
    left: dict[InnerName, str]
    config_folders: tuple[_Word, ...] = ()
    config_name: _Word | None = None

    @property
    def search_path(self) -> SearchPath:
        """Where its options came from."""
        return SearchPath(tuple(map(Path, self.config_folders)), self.config_name or CONFIG_NAME)

    def resume_command(self, folder: Path) -> str:
        """Return the command that resumes it, given its folder."""
        with composing_from(self.search_path):
            return resume_command(folder, self.overrides)


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
    held = folder.iterdir() if folder.exists() else ()
    if not is_run and any(path.name not in _BEFORE_RUN_FILE for path in held):
        reason = (
            f"output exists and is no run of Tritter (it has no {RUN_FILE}); nothing was touched. "
            "Allowed is a new or empty folder, or one of an earlier run of the same configuration"
        )
        raise refused("hydra.run.dir", folder, reason)
    try:
        # What is written below it has to stay there
        check_tree(folder, passed_over=_LOGGER_FOLDERS)
    except TritterError as error:
        raise refused("hydra.run.dir", folder, f"{error}") from error
    # Before anything else Hydra writes its settings
    settings = folder / ".hydra"
    wrong = [settings] if settings.is_file() else [p for p in settings.glob("*") if p.is_dir()]
    for path in wrong:
        is_, wanted = ("a file", "folder") if path == settings else ("a folder", "file")
        reason = f"{path} is {is_}, where Hydra writes a {wanted} of its own"
        raise refused("hydra.run.dir", folder, reason)
    if not is_run:
        return RunState.NEW
    run = read_run(folder)
    changes = changes_between(run.fingerprint, fingerprint(config))
    if changes:
        key = key_name("hydra.run.dir")
        raise RequestError(
            f"{key} = {folder}: it holds a run of another configuration (there → now):\n"
            + "\n".join(f"  {key}: {show(a)} → {show(b)}" for key, (a, b) in changes.items())
            + f"\nLeave them out to resume it: {run.resume_command(folder)}\n"
            f"Or give another folder as {key} to start another run."
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
            + run.resume_command(folder)
        )
    return not damages and SUMMARY_FILE in run.left


def write_run_file(
    folder: Path,
    config: RunConfig,
    *,
    status: Literal["running", "finished"],
    overrides: Sequence[str] = (),
    leaves: Sequence[str] = (),
) -> None:
    """Record in `folder`, atomically, whose run it is.

    Args:
        overrides: of the command line; those of a run that is gone on with stay.
        leaves: what a finished run leaves, relative to its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = RunRecord(
        fingerprint=fingerprint(config),
        status=status,
        program=" ".join(program_command()),
        overrides=tuple(overrides),
        left=digests_of(folder, leaves),
        config_folders=tuple(map(str, search_path().folders)),
        config_name=search_path().config_name,
    )
    if (folder / RUN_FILE).exists():
        held = read_run(folder)
        words = ("program", "overrides", "config_folders", "config_name")
        run = replace(run, **{name: getattr(held, name) for name in words})
    write_text_atomic(folder / RUN_FILE, record_text(run))


def require_writable(folder: Path, *, key: str) -> None:
    """Make the folder, as Hydra would do with a traceback where it can't.

    Raises:
        RequestError: the system does not allow it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise refused(key, folder, f"no folder can be made there ({error.strerror})") from error
    if not is_writable:
        raise refused(key, folder, "nothing can be written there")


def find_run(resume: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder that `resume` (latest, or a folder) means, and what to tell of others.

    Raises:
        RequestError: there is no such run; names what there is.
    """
    found = RUNS_FOLDER.glob(f"*/{RUN_FILE}")
    runs = sorted(found, key=lambda path: (path.lstat().st_mtime_ns, str(path)), reverse=True)
    folders = [path.parent.absolute() for path in runs]
    if resume == "latest":
        skipped: list[str] = []
        for folder in folders:
            try:
                read_run(folder)
                return folder, tuple(skipped)
            except RequestError as error:
                skipped.append(f"resume     not {folder}: {error}")
        none = f"resume = latest: there is no run below {RUNS_FOLDER.absolute()}; must be the "
        none += "folder of a run, or nothing to start a new one."
        raise RequestError("\n".join([none, *skipped]))
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
    advice = f"To run it again, start in another folder: {command(['hydra.run.dir=NEW'])}"
    try:
        return read_record(folder / RUN_FILE, RunRecord)
    except TritterError as error:
        raise RequestError(f"{error} {advice}") from error


def _check_place(folder: Path, config: RunConfig) -> None:
    """Refuse a path that can't become a folder, or lies in the checkpoint that is trained on."""
    model = config.model
    if isinstance(model, CheckpointModelConfig) and is_within(folder, Path(model.path)):
        reason = f"it is in the checkpoint that the run starts from, {model.path}; choose a place"
        raise refused("hydra.run.dir", folder, f"{reason} next to it")
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise refused("hydra.run.dir", folder, f"{place} is a file; a folder is needed")
    if not os.access(place, os.W_OK):
        raise refused("hydra.run.dir", folder, f"{place} can't be written to")


# What may differ between the parts of one run: where it is, who watches, and how.
_WITHOUT_EFFECT = {
    # The steps that follow from it are what is trained
    "pretraining": ("max_tokens",),
    "training": ("max_tokens",),
    "pipeline": ("keep_stages",),
    "trainer": (
        *("devices", "strategy", "progress", "save_every_n_steps", "check_memory"),
        "activation_checkpointing",  # the same bits
        *("device_index", "seed", "arguments"),  # the seed is at the root
    ),
}
_OF_BENCHMARKS = {
    *("tasks", "tasks_path", "task_limit"),
    *("allow_code", "code_sandbox", "code_sandbox_command"),
}
_ABSENT = "(absent)"


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return, as plain JSON values, everything of a config that determines the result.

    `resume`, `cache_dir`, `logger` and, of `trainer`, `devices`, `strategy`, `progress`,
    `save_every_n_steps`, `check_memory`, `activation_checkpointing` and arguments that only watch
    are left out. The methods of an ordered group stand beside the list of their names; of a class
    from outside (a source, method, callback or optimizer) also its dotted name and the SHA-256 of
    its file. Of ours the version of Tritter tells, or every edit of a comment would keep runs from
    going on.
    """
    paths = [path for domain in config.text.domains for path in domain.paths]
    asks_questions = any(path.startswith(PREFIX) for path in paths)
    result: dict[str, Any] = {"seed": config.seed, "control": config.control}
    for section in SECTIONS:
        without = _WITHOUT_EFFECT.get(section, ())
        if section == "evaluation" and not asks_questions:
            without = ("task_questions",)
        values = asdict(getattr(config, section))
        result[section] = {key: values[key] for key in values if key not in without}
    if not config.evaluation.tasks:
        result["evaluation"] = {
            key: value for key, value in result["evaluation"].items() if key not in _OF_BENCHMARKS
        }
    if config.gate.ladder is not None:
        kept = [*result["training"]]
        result["gate"]["rungs"] = [
            {
                "training": {key: getattr(fallback.training, key) for key in kept},
                **_methods(fallback),
            }
            for fallback in config.fallbacks
        ]
    result["data"] |= identity(type(config.data))
    result["trainer"] |= effective_arguments(config)
    result["optimizer"] = optimizer_record(config)
    if config.callbacks:
        result["callbacks"] = {one.name: one.plain() for one in config.callbacks}
    if config.growth is not None:
        result["growth"] = config.growth.plain()
    if config.experts is not None:
        result["experts"] = {"name": config.experts.name, **config.experts.plain()}
    return result | _methods(config)


def _methods(config: RunConfig) -> dict[str, Any]:
    expansion = [Component(name=s.name, kind=type(s), options=s) for s in config.expansion]
    result = {}
    for group, chosen in (("expansion", expansion), ("forgetting", config.forgetting)):
        bodies = {one.name: one.plain() for one in chosen}
        result[group] = {"methods": [*bodies], **bodies}
    return result


def effective_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the further arguments of the Trainer that determine what is trained."""
    arguments = config.trainer.arguments
    return {name: arguments[name] for name in arguments if name not in NO_EFFECT}


def optimizer_record(config: RunConfig) -> dict[str, Any]:
    """Return the optimizer's class and all its keys side by side."""
    optimizer = config.optimizer
    return {
        "target": optimizer.target,
        "weight_decay": optimizer.weight_decay,
        "carry": optimizer.carry,
        **optimizer.arguments,
        **identity(optimizer.target),
    }


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → both values, of those that differ between two fingerprints."""
    before, after = leaves(old), leaves(new)
    both = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in before | after}
    return {key: (a, b) for key, (a, b) in both.items() if a != b}
