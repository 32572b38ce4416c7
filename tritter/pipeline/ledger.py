"""The ledger of a run: finished stages with their results, costs and outputs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from tritter.checkpoints.history import changes_of, digests_of
from tritter.checkpoints.record import EXPERTS_FOLDER, LedgerRecord, Lineage, StageRecord
from tritter.errors import TritterError, brief
from tritter.pipeline.branch import Branch
from tritter.storage.atomic import write_text_atomic
from tritter.storage.records import read_record, record, record_text, validate_record
from tritter.training import FitResult

_F = TypeVar("_F")
_UNCHANGED = "The run was not changed; start in another folder."
_LOG = ".csv"  # logs contain times and may be missing


@record
class ExpansionFound:
    """Result of an expansion.

    Args:
        parameters: number of parameters of the expanded model.
        notes: lines for the report.
        jump: statistics of the logit shift; None without an expansion.
        before: metric → value before the expansion.
    """

    parameters: int
    notes: tuple[str, ...] = ()
    jump: Mapping[str, float | None] | None = None
    before: Mapping[str, float] = field(default_factory=dict)


@record
class TrainingFound:
    """Result of a training run; see `FitResult`."""

    steps: int
    refused_steps: int
    stopped_because: str | None
    ended_early: str | None
    update_norms: Mapping[str, Any]
    best_step: int | None = None
    flow: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: FitResult) -> "TrainingFound":
        """Return the part of a training result that the ledger stores."""
        names = {each.name: each.name for each in fields(cls)} | {"held": "memory"}
        return cls(**{key: getattr(result, name) for key, name in names.items()})


@dataclass(frozen=True, slots=True)
class StageResult:
    """Result of a stage.

    Args:
        found: the result itself, for later stages: a record, or a dict of plain values; larger
            results are stored in files.
        flops: report label of the stage → floating-point operations.
        seconds: report label of the stage → wall time.
        leaves: outputs for later stages: checkpoints, folders and files, relative to the run
            folder.
    """

    found: Any
    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()

    def plain(self) -> Mapping[str, Any]:
        """Return its result as plain values."""
        return self.found if isinstance(self.found, Mapping) else asdict(self.found)


class Ledger:
    """Stage results on disk; the whole file is rewritten after each stage."""

    def __init__(self, folder: Path) -> None:
        """Open the ledger of a run folder, or create a new one."""
        self._folder = folder
        self._path = folder / LedgerRecord.FILE_NAME
        self._stages: dict[str, StageRecord] = {}
        self._found: dict[str, object] = {}  # typed results
        self._watched: Counter[str] = Counter()  # peak bytes per kind during this stage
        self._again: set[str] = set()  # finished stages with missing outputs
        self._removed: set[str] = set()  # folders whose weights no later stage needs
        self._released: set[str] = set()  # folders whose weights can be recreated
        self._incomplete: set[str] = set()  # released folders without their weights
        if not self._path.exists():
            return
        try:
            content = read_record(self._path, LedgerRecord)
        except TritterError as error:
            raise TritterError(f"{error} {_UNCHANGED}") from error
        self._stages |= content.stages
        self._removed |= set(content.removed)
        self._released |= set(content.released)

    def check(self, kinds: Mapping[str, type]) -> None:
        """Validate the results of all finished stages.

        Args:
            kinds: last part of a stage's name, without its number → record of its result.
        """
        for stage in self._stages:
            name = stage.rpartition(".")[2]
            kind = kinds.get(name) or kinds.get(name.partition("_")[0])
            if kind is None:
                reason = f"is not a ledger: there is no stage {brief(stage)}."
                raise TritterError(f"{self._path} {reason} {_UNCHANGED}")
            self.found(stage, kind)

    def get(self, stage: str) -> StageRecord | None:
        """Return the result of a stage, or None if it has to run."""
        return None if stage in self._again else self._stages.get(stage)

    def __getitem__(self, stage: str) -> StageResult:
        """Return the result of a finished stage; a KeyError is raised for any other."""
        if (done := self.get(stage)) is None:
            raise KeyError(stage)
        found = self._found.get(stage, done.found)
        return StageResult(found, done.flops, done.seconds, tuple(done.left))

    def found(self, stage: str, kind: type[_F]) -> _F:
        """Return the typed result of a finished stage."""
        found = self[stage].found
        if stage not in self._found and kind is not dict:
            what = f"{self._path} is not a ledger: {stage}"
            try:
                self._found[stage] = found = validate_record(found, kind, what=what)
            except TritterError as error:
                raise TritterError(f"{error} {_UNCHANGED}") from error
        assert isinstance(found, kind), f"{stage} found {type(found).__name__}"
        return found

    def training(self, branch: str) -> TrainingFound:
        """Return the result of a branch's main training run."""
        return self.found(f"{branch}.fit", TrainingFound)

    def steps(self, branches: Iterable[Branch]) -> int:
        """Return the number of steps of the main training runs of branches."""
        return sum(self.training(branch.name).steps for branch in branches)

    def record(
        self, stage: str, result: StageResult, *, lineages: Mapping[str, Lineage] | None = None
    ) -> None:
        """Add a finished stage with the checksums of its outputs, and write the ledger.

        A repeated stage keeps its position. If its result differs, the stages after it are invalid
        and are removed.

        Args:
            lineages: folder → lineage, for checkpoints in the run folder that are open.
        """
        checksums = digests_of(self._folder, result.leaves, lineages=lineages)
        self.watch_disk()
        done = StageRecord(
            found=result.plain(),
            flops=result.flops,
            seconds=result.seconds,
            left=checksums,
            disk=dict(self._watched),
        )
        if stage in self._again:
            self._again.remove(stage)
            before = StageResult(self.found(stage, type(result.found))).plain()
            if _outcome(before, self._stages[stage].left) != _outcome(done.found, checksums):
                names = list(self._stages)
                for name in names[names.index(stage) + 1 :]:
                    del self._stages[name]
                    self._found.pop(name, None)
                    self._again.discard(name)
        self._stages[stage], self._found[stage] = done, result.found
        self._watched = Counter()
        for marked in (self._removed, self._released, self._incomplete):
            marked.difference_update(checksums)
        self._write()

    def watch_disk(self) -> None:
        """Record the current size of the run folder, which may be its peak."""
        self._watched |= _disk_bytes(self._folder)

    def mark_removed(self, location: str) -> None:
        """Record that a folder's weights are removed; its checksums stay in the ledger.

        Call this before removing them.
        """
        self._released.discard(location)
        self._mark(self._removed, location)

    def mark_released(self, location: str) -> None:
        """Record that a folder's weights may be removed during the next stage."""
        self._mark(self._released, location)

    def is_incomplete(self, location: str) -> bool:
        """Return True if a killed run has removed the weights of a released folder."""
        return location in self._incomplete

    def check_complete(self, location: str) -> None:
        """Compare a recreated folder with its checksums."""
        checksums = next(each.left for each in self._stages.values() if location in each.left)
        for change in changes_of(self._folder / location, checksums[location]):
            raise TritterError(
                f"{change}. The stage is not reproducible here; start in another folder."
            )
        self._incomplete.discard(location)

    def _mark(self, marked: set[str], location: str) -> None:
        known = {name for each in self._stages.values() for name in each.left}
        new = {
            name for name in known if name == location or name.startswith(f"{location}/")
        } - marked
        if new:
            marked |= new
            self._write()

    def _write(self) -> None:
        content = LedgerRecord(
            stages=self._stages,
            removed=tuple(sorted(self._removed)),
            released=tuple(sorted(self._released)),
        )
        write_text_atomic(self._path, record_text(content))

    def verify_outputs(self) -> tuple[str, ...]:
        """Compare the outputs of finished stages with their checksums.

        A stage with a missing output is not finished. Earlier stages whose outputs the run itself
        removed are repeated too, because the stage may need them.

        Returns:
            A message for each stage to repeat.
        """
        changed: list[str] = []
        locations: list[str] = []
        missing: dict[str, str] = {}
        for stage, done in self._stages.items():
            for location in (location for location in done.left if location not in self._removed):
                path = self._folder / location
                is_there, changes = path.exists(), changes_of(path, done.left[location])
                if not is_there and not location.endswith(_LOG):
                    missing.setdefault(stage, changes[0])
                elif is_there and changes:
                    lacks_file = any(change.endswith(": missing") for change in changes)
                    if lacks_file and location in self._released:
                        self._incomplete.add(location)
                        continue
                    changed += [f"  {change}" for change in changes]
                    locations.append(str(path))
        if changed:
            raise TritterError(
                "outputs of this run were modified:\n"
                + "\n".join(changed)
                + "\nThe run was not changed. Delete "
                + " and ".join(dict.fromkeys(locations))
                + " to recreate them, or start in another folder."
            )
        names = list(self._stages)
        for stage in names[: max((names.index(name) for name in missing), default=0)]:
            for location in sorted(self._removed.intersection(self._stages[stage].left)):
                missing.setdefault(stage, f"{self._folder / location} was removed")
        self._again = set(missing)
        return tuple(f"{what}: repeating {stage}" for stage, what in missing.items())

    def flops(self) -> dict[str, float]:
        """Return FLOPs per stage and in total."""
        return _with_total(result.flops for result in self._stages.values())

    def seconds(self) -> dict[str, float]:
        """Return seconds per stage and in total."""
        return _with_total(result.seconds for result in self._stages.values())

    def disk_use(self) -> dict[str, dict[str, int]]:
        """Return the bytes of weights and training state in the run folder, for summary.json.

        `peak` and `end` cover the whole folder; `source` and `result` are two checkpoints in it.
        """
        end, stages = _disk_bytes(self._folder), self._stages.values()
        use = {}
        for kind in ("weights", "state"):
            peak = max((each.disk.get(kind, 0) for each in stages), default=0)
            use[kind] = {"peak": peak, "end": end[kind]}
        for name, location in (("source", "baseline"), ("result", "checkpoint")):
            use["weights"][name] = _disk_bytes(self._folder / location)["weights"]
        return use


def _outcome(found: Mapping[str, Any], left: Mapping[str, str]) -> str:
    """Return the result of a stage as text, for comparing two results."""
    kept = {location: digest for location, digest in left.items() if not location.endswith(_LOG)}
    return json.dumps([found, kept], sort_keys=True)


def _with_total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged.get(name, 0.0) + float(value)
    return {**merged, "total": sum(merged.values())}


def _disk_bytes(folder: Path) -> Counter[str]:
    """Return the number of bytes of `weights` and training `state` in a folder.

    Weights are the safetensors files next to a config.json and those of LoRA experts. Hard links
    count once.
    """
    counts, seen = Counter[str](), set[int]()
    for path in sorted(folder.rglob("*.safetensors")):
        found = path.stat()
        if found.st_ino not in seen:
            seen.add(found.st_ino)
            parts = path.relative_to(folder).parts
            is_weights = (path.parent / "config.json").exists() or EXPERTS_FOLDER in parts
            counts["weights" if is_weights else "state"] += found.st_size
    return counts
