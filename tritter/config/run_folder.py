"""Run folders: their record, their state, and the most recent one.

The fingerprint of a run contains every setting that determines its result. Two runs with the same
fingerprint are the same run.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from tritter.checkpoints.history import changes_of, digests_of
from tritter.checkpoints.location import is_within
from tritter.checkpoints.record import LedgerRecord
from tritter.config.folders import CONFIG_NAME, SearchPath, search_path
from tritter.config.overrides import command, program_command, recorded_overrides, resume_command
from tritter.config.schema import SECTIONS, CheckpointModelConfig, RunConfig
from tritter.data.skills import SkillText
from tritter.errors import (
    Problem,
    RequestError,
    TritterError,
    key_name,
    refused,
    show,
)
from tritter.options import leaves
from tritter.storage.atomic import remove_folder, write_text_atomic
from tritter.storage.lock import FolderLock
from tritter.storage.reading import (
    RUN_FILE,
    SAVED_NAME,
    SUMMARY_FILE,
    check_tree,
)
from tritter.storage.records import InnerName, read_record, record, record_text
from tritter.targets import Component, identity

STATUS_FILE = "status.json"
OUTPUT_FILE = "output.txt"  # output of a job of a sweep

# Files of Hydra and of the launch, including the folder lock
_BEFORE_RUN_FILE = {".hydra", "train.log", FolderLock.NAME, OUTPUT_FILE}
_NO_TEXT = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode
_LOGGER_FOLDERS = {"wandb"}  # W&B links to logs in its own cache
# Settings that may change when a run resumes: hardware, logging and monitoring
_WITHOUT_EFFECT = {
    # max_steps, derived from it, is part of the fingerprint
    "pretraining": ("max_tokens",),
    "training": ("max_tokens",),
    "pipeline": ("keep_stages",),
    "trainer": (
        *("devices", "strategy", "progress", "save_every_n_steps", "check_memory"),
        "activation_checkpointing",  # bit-identical results
        *("device_index", "seed", "arguments"),  # the seed is a root key
    ),
}
_BENCHMARK_KEYS = {
    *("tasks", "tasks_path", "task_limit", "chat_template", "num_fewshot"),
    *("allow_code", "code_sandbox", "code_sandbox_command"),
}
_ABSENT = "(absent)"


class RunState(Enum):
    """State of the requested run in its folder."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


def _recordable(text: str) -> str:
    found = next(
        (character for character in text if unicodedata.category(character) in _NO_TEXT), None
    )
    if found is not None:
        raise ValueError(f"it contains the character {found!a}, which a run record can't store")
    return text


def check_overrides(overrides: Sequence[str]) -> None:
    """Reject overrides that the run record can't store; they are printed with every run."""
    for override in overrides:
        try:
            _recordable(override)
        except ValueError as error:
            key, _, value = override.partition("=")
            advice = "rename the file or object"
            raise RequestError(Problem(key, value, reason=str(error), advice=advice)) from error


def _repeatable(override: str) -> str:
    if not recorded_overrides([override]):
        raise ValueError(f"{override} is not an override that a run records")
    return override


_Word = Annotated[str, AfterValidator(_recordable)]
_Override = Annotated[_Word, AfterValidator(_repeatable)]


@record
class RunRecord:
    """Content of the run file.

    Args:
        fingerprint: fingerprint of the configuration.
        status: "running" or "finished".
        program: command that started the run.
        overrides: overrides of the command line, without the folder.
        left: for a finished run: file or folder → checksum of what the run leaves.
        config_folders: folders of --config-dir and hydra.searchpath.
        config_name: value of --config-name.
    """

    FORMAT: ClassVar[str] = "run"

    fingerprint: Annotated[dict[str, Any], Field(min_length=1)]
    status: Literal["running", "finished"]
    program: str
    overrides: tuple[_Override, ...]
    left: dict[InnerName, str]
    config_folders: tuple[_Word, ...] = ()
    config_name: _Word | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the content of a folder's run file."""
        advice = f"To run it again, use another folder: {command(['hydra.run.dir=NEW'])}"
        try:
            return read_record(folder / RUN_FILE, cls)
        except TritterError as error:
            raise RequestError(f"{error} {advice}") from error

    @classmethod
    def of(
        cls,
        folder: Path,
        config: RunConfig,
        *,
        status: Literal["running", "finished"],
        overrides: Sequence[str] = (),
        leaves: Sequence[str] = (),
    ) -> Self:
        """Return the record of a run of this command.

        Args:
            folder: of the run.
            config: its configuration.
            status: "running" or "finished".
            overrides: overrides of the command line.
            leaves: outputs of a finished run, relative to its folder.
        """
        return cls(
            fingerprint=fingerprint(config),
            status=status,
            program=" ".join(program_command()),
            overrides=tuple(overrides),
            left=digests_of(folder, leaves),
            config_folders=tuple(map(str, search_path().folders)),
            config_name=search_path().config_name,
        )

    def write(self, folder: Path) -> None:
        """Write the run file of a folder, atomically.

        A resumed run keeps the command that began it. A changed configuration replaces the record;
        saved states of its unfinished training go.
        """
        folder.mkdir(parents=True, exist_ok=True)
        run = self
        if (folder / RUN_FILE).exists():
            recorded = type(self).read(folder)
            if changes_between(recorded.fingerprint, self.fingerprint):
                for saved in folder.glob(f"*/{SAVED_NAME}"):  # weights of the other configuration
                    remove_folder(saved)
            else:
                kept = ("program", "overrides", "config_folders", "config_name")
                run = replace(self, **{name: getattr(recorded, name) for name in kept})
        write_text_atomic(folder / RUN_FILE, record_text(run))

    @property
    def search_path(self) -> SearchPath:
        """The search path of the run's options."""
        return SearchPath(tuple(map(Path, self.config_folders)), self.config_name or CONFIG_NAME)

    def resume_command(self, folder: Path) -> str:
        """Return the command that resumes the run in `folder`."""
        with self.search_path.in_use():
            return resume_command(folder, self.overrides)


@record
class RunStatus:
    """How a job ended, or that it is running.

    Args:
        status: the gate's status; or running, failed, interrupted, not run, unknown.
        metric: the value that a sweep minimises; None if it is missing or not finite.
        summary: path of summary.json.
        error: reason of a failure.
    """

    FORMAT: ClassVar[str] = "run status"
    EXIT_REQUEST: ClassVar[int] = 2  # the request was invalid

    status: str
    exit_code: int
    overrides: list[str] = field(default_factory=list)
    metric: float | None = None
    summary: str | None = None
    error: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the content of a job's `status.json`, or an error if it is missing or damaged."""
        path = folder / STATUS_FILE
        if not path.exists():
            return cls(status="not run", exit_code=1, error=f"it left no {STATUS_FILE}")
        try:
            return read_record(path, cls)
        except TritterError as error:
            return cls(status="unknown", exit_code=1, error=str(error))

    def write(self, folder: Path) -> None:
        """Write the `status.json` of a job's folder, atomically."""
        write_text_atomic(folder / STATUS_FILE, record_text(self))

    @property
    def is_of_outcome(self) -> bool:
        """Whether the job ended with a result, which the gate may have rolled back."""
        return self.status in ("kept", "rolled_back", "undecided", "ungated")


def check_run_folder(folder: Path, config: RunConfig) -> RunState:
    """Return the state of a run with this configuration in `folder`.

    A finished run with a missing output counts as started, so it resumes. So does a run of another
    configuration that failed before a stage finished: the user corrects a key and resumes.

    Raises:
        RequestError: the folder contains other files, or a run of another configuration (lists the
            keys that changed).
        TritterError: outputs of a finished run were modified; names files and tensors.
    """
    model = config.model
    if isinstance(model, CheckpointModelConfig) and is_within(folder, Path(model.path)):
        reason = f"it is inside the initial checkpoint, {model.path}; choose a folder next to it"
        raise refused("hydra.run.dir", folder, reason)
    if folder.is_file():
        raise refused("hydra.run.dir", folder, "it is a file, not a folder")
    is_run = os.path.lexists(folder / RUN_FILE)
    strays = {path.name for path in folder.glob("*")} - _BEFORE_RUN_FILE
    if not is_run and not all(name.startswith(f".{RUN_FILE}.") for name in strays):  # half written
        reason = f"output exists and is not a Tritter run (it has no {RUN_FILE}); nothing was "
        reason += "changed. Use a new or empty folder, or that of a run of the same configuration"
        raise refused("hydra.run.dir", folder, reason)
    try:
        # No link may lead out of the folder
        check_tree(folder, skipped=_LOGGER_FOLDERS)
    except TritterError as error:
        raise refused("hydra.run.dir", folder, f"{error}") from error
    # Hydra writes its settings first
    settings = folder / ".hydra"
    wrong = [settings] if settings.is_file() else [p for p in settings.glob("*") if p.is_dir()]
    for path in wrong:
        is_, expected = ("a file", "folder") if path == settings else ("a folder", "file")
        reason = f"{path} is {is_}, but Hydra needs a {expected} there"
        raise refused("hydra.run.dir", folder, reason)
    if not is_run:
        return RunState.NEW
    run = RunRecord.read(folder)
    changes = changes_between(run.fingerprint, fingerprint(config))
    if changes and (
        RunStatus.read(folder).status != "failed" or (folder / LedgerRecord.FILE_NAME).exists()
    ):
        key = key_name("hydra.run.dir")
        raise RequestError(
            f"{key} = {folder}: the folder contains a run of another configuration "
            "(recorded → requested):\n"
            + "\n".join(f"  {key}: {show(a)} → {show(b)}" for key, (a, b) in changes.items())
            + f"\nTo resume that run, undo these changes: {run.resume_command(folder)}\n"
            f"To start a new run, set {key} to another folder."
        )
    if run.status != "finished":
        return RunState.STARTED
    return RunState.FINISHED if _is_complete(folder, run) else RunState.STARTED


def _is_complete(folder: Path, run: RunRecord) -> bool:
    """Return True if all outputs of a finished run are complete."""
    left = {folder / name: digest for name, digest in run.left.items()}
    present = [path for path in left if path.exists()]
    changes = {str(path): changes_of(path, left[path]) for path in present}
    if changed := [path for path, lines in changes.items() if lines]:
        raise TritterError(
            "the run is finished, but its outputs were modified:\n"
            + "\n".join(f"  {line}" for path in changed for line in changes[path])
            + f"\nDelete {' and '.join(changed)} and recreate it with: "
            + run.resume_command(folder)
        )
    return len(present) == len(left) and SUMMARY_FILE in run.left


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return all settings that determine the result of a run, as plain JSON values.

    Omitted are `resume`, `cache_dir`, `logger`, Trainer arguments without effect on the weights,
    and these keys of `trainer`: `devices`, `strategy`, `progress`, `save_every_n_steps`,
    `check_memory`, `activation_checkpointing`. An ordered group lists its methods and
    their options. For third-party classes (sources, methods, callbacks, stages, optimizers) the
    fingerprint includes the dotted name and the SHA-256 of the file. Tritter's own classes are
    identified by its version, so that an edited comment does not prevent resuming.
    """
    paths = [path for domain in config.text.domains.values() for path in domain.paths]
    asks_questions = any(path.startswith(SkillText.PREFIX) for path in paths)
    result: dict[str, Any] = {"seed": config.seed, "control": config.control}
    for section in SECTIONS:
        without = _WITHOUT_EFFECT.get(section, ())
        if section == "evaluation" and not asks_questions:
            without = ("task_questions",)
        values = asdict(getattr(config, section))
        result[section] = {key: values[key] for key in values if key not in without}
    if not config.evaluation.tasks:
        result["evaluation"] = {
            key: value for key, value in result["evaluation"].items() if key not in _BENCHMARK_KEYS
        }
    if config.gate.ladder is not None:
        kept = [*result["training"]]
        result["gate"]["fallbacks"] = [
            {
                "training": {key: getattr(fallback.training, key) for key in kept},
                **_methods(fallback),
            }
            for fallback in config.fallbacks
        ]
    result["data"] |= identity(type(config.data))
    result["trainer"] |= config.trainer.effective_arguments()
    result["optimizer"] = config.optimizer_record()
    if config.callbacks:
        result["callbacks"] = {one.name: one.plain() for one in config.callbacks}
    if config.metrics:
        result["metrics"] = {one.name: one.plain() for one in config.metrics}
    if config.stages:
        result["stages"] = _stages(config)
    if config.growth is not None:
        result["growth"] = config.growth.plain()
    if config.experts is not None:
        result["experts"] = {"name": config.experts.name, **config.experts.plain()}
    return result | _methods(config)


def _stages(config: RunConfig) -> dict[str, Any]:
    """Return the stages in order; one that only measures may be mended before it is finished."""
    bodies = {one.name: one.plain() for one in config.stages}
    for one in config.stages:
        if not one.kind.writes:
            bodies[one.name].pop("sha256", None)
    return {"order": [*bodies], **bodies}


def _methods(config: RunConfig) -> dict[str, Any]:
    expansion = [Component(name=s.name, kind=type(s), options=s) for s in config.expansion]
    result = {}
    for group, chosen in (("expansion", expansion), ("forgetting", config.forgetting)):
        bodies = {one.name: one.plain() for one in chosen}
        result[group] = {"methods": [*bodies], **bodies}
    return result


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → (old value, new value) of the differences between two fingerprints.

    A key that the earlier version of Tritter lacked and that is null is no difference.
    """
    before, after = leaves(old), leaves(new)
    both = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in before | after}
    return {key: (a, b) for key, (a, b) in both.items() if a != b and (a, b) != (_ABSENT, None)}
