"""The ledger: which stages of a run are done, what they found, what they cost, what they left."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tritter.checkpoints.folder import EXPERTS_FOLDER
from tritter.checkpoints.history import digests_of, find_damage
from tritter.checkpoints.record import LedgerRecord, Lineage, StageRecord
from tritter.errors import TritterError, brief
from tritter.evaluation.gate import Status
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import LEDGER_NAME
from tritter.storage.records import read_record, record, record_text, validated
from tritter.training import FitResult

_LOG = ".csv"  # what is only looked at: it may be gone, and holds times that differ


@record
class BaselineFound:
    """What the run starts from.

    Args:
        corpus: digest of the run's text.
    """

    parameters: int
    model_hash: str
    corpus: str


@record
class ChoiceFound:
    """The expert of each layer that new ones are cloned from."""

    clone_from: tuple[int, ...]


@record
class ImportanceFound:
    """What methods against forgetting prepared.

    Args:
        methods: what they found; plain data.
    """

    notes: tuple[str, ...] = ()
    methods: Mapping[str, Any] = field(default_factory=dict)


@record
class ExpansionFound:
    """What an expansion did.

    Args:
        parameters: of the expanded model.
        jump: of the logits; None where nothing was expanded.
        before: metric → what was evaluated of the model before it.
    """

    parameters: int
    notes: tuple[str, ...] = ()
    jump: Mapping[str, float | None] | None = None
    before: Mapping[str, float] = field(default_factory=dict)


@record
class TrainingFound:
    """What a training did; see `FitResult`."""

    steps: int
    refused_steps: int
    stopped_because: str | None
    ended_early: str | None
    update_norms: Mapping[str, Any]
    flow: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, result: FitResult) -> "TrainingFound":
        """Return what the ledger keeps of a training."""
        return cls(**{each.name: getattr(result, each.name) for each in fields(cls)})


@record
class EvaluationFound:
    """What an evaluation found besides scores.

    Args:
        samples: of each domain a prompt and how the models continue it.
        moe: use of a mixture's experts; None of a dense model.
        experts: use of LoRA experts; None without them.
    """

    samples: tuple[Mapping[str, str], ...]
    moe: Mapping[str, Any] | None = None
    experts: Mapping[str, Any] | None = None


@record
class GateFound:
    """What the gate decided, and by which checks."""

    status: Status
    checks: tuple[Mapping[str, Any], ...]


@record
class KeptFound:
    """The model that a round keeps."""

    model_hash: str


@record
class PublishedFound:
    """The model that a run keeps.

    Args:
        expansions: methods that made it, oldest first.
    """

    model_hash: str
    parent_hash: str | None
    base_model_hash: str
    expansions: tuple[str, ...]


Found = (
    BaselineFound
    | ChoiceFound
    | ImportanceFound
    | ExpansionFound
    | TrainingFound
    | EvaluationFound
    | GateFound
    | KeptFound
    | PublishedFound
)
F = TypeVar("F", bound=Found)
# Last word of a stage's name, without its number → what it finds
_FOUND: dict[str, type[Found]] = {
    "baseline": BaselineFound,
    "choose": ChoiceFound,
    "importance": ImportanceFound,
    "expand": ExpansionFound,
    "distill": TrainingFound,
    "adapt": TrainingFound,
    "fit": TrainingFound,
    "evaluate": EvaluationFound,
    "gate": GateFound,
    "keep": KeptFound,
    "publish": PublishedFound,
}


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage hands on.

    Args:
        found: what later stages read; larger things are in files.
        flops: floating-point operations by name of the stage as reports show it.
        seconds: wall time by the same names.
        leaves: what it left that later stages use: checkpoints, folders and files, relative to
            the run's folder.
        left: their digests, which the ledger adds.
        disk: kind → the most bytes of it in the run folder during the stage; likewise.
    """

    found: Found
    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)


class Ledger:
    """Stage results on disk, written whole after each stage."""

    def __init__(self, folder: Path) -> None:
        """Open the ledger of a run folder, or start one.

        Raises:
            TritterError: it is damaged or of another format.
        """
        self._folder = folder
        self._path = folder / LEDGER_NAME
        self._stages: dict[str, StageResult] = {}
        self._watched: Counter[str] = Counter()  # the most bytes of a kind during this stage
        self._again: set[str] = set()  # stages that are done, and of whose things one is gone
        self._removed: set[str] = set()  # places whose weights no later stage needs
        self._released: set[str] = set()  # places whose weights can be made again, and may be gone
        self._incomplete: set[str] = set()  # those of them that are
        if not self._path.exists():
            return
        try:
            content = read_record(self._path, LedgerRecord)
            for stage, each in content.stages.items():
                kind = _FOUND.get(stage.rpartition(".")[2].partition("_")[0])
                wrong = f"{self._path} is not a ledger"
                if kind is None:
                    raise TritterError(f"{wrong}: there is no stage {brief(stage)}.")
                found = validated(each.found, kind, what=f"{wrong}: {stage}")
                self._stages[stage] = StageResult(
                    found, each.flops, each.seconds, tuple(each.left), each.left, each.disk
                )
        except TritterError as error:
            raise TritterError(
                f"{error} Nothing was made of it; start in another folder."
            ) from error
        self._removed |= set(content.removed)
        self._released |= set(content.released)

    def get(self, stage: str) -> StageResult | None:
        return None if stage in self._again else self._stages.get(stage)

    def __getitem__(self, stage: str) -> StageResult:
        """Return what a stage that is done found.

        Raises:
            KeyError: it is not.
        """
        if (done := self.get(stage)) is None:
            raise KeyError(stage)
        return done

    def found(self, stage: str, kind: type[F]) -> F:
        """Return what a stage that is done found, which is of this kind.

        Raises:
            KeyError: it is not done.
        """
        found = self[stage].found
        assert isinstance(found, kind), f"{stage} found {type(found).__name__}"
        return found

    def record(
        self, stage: str, result: StageResult, *, lineages: Mapping[str, Lineage] | None = None
    ) -> None:
        """Add a finished stage, with the digests of what it left, and write the ledger.

        A stage that was done again keeps its place. When it came out otherwise, the stages after
        it went by what is no more, and are forgotten.

        Args:
            lineages: place → lineage, of checkpoints in the run folder that are open.
        """
        left = digests_of(self._folder, result.leaves, lineages=lineages)
        self.watch_disk()
        result = replace(result, left=left, disk=dict(self._watched))
        if stage in self._again:
            self._again.remove(stage)
            if _outcome(self._stages[stage]) != _outcome(result):
                names = list(self._stages)
                for name in names[names.index(stage) + 1 :]:
                    del self._stages[name]
                    self._again.discard(name)
        self._stages[stage], self._watched = result, Counter()
        for marked in (self._removed, self._released, self._incomplete):
            marked.difference_update(left)
        self._write()

    def watch_disk(self) -> None:
        """Note how many bytes the run folder holds, at a moment when they may be the most."""
        self._watched |= disk_bytes(self._folder)

    def mark_removed(self, place: str) -> None:
        """Record that a folder's weights are removed; its checksums stay in the ledger.

        Call this before anything is removed.
        """
        self._released.discard(place)
        self._mark(self._removed, place)

    def mark_released(self, place: str) -> None:
        """Record that a folder's weights may be removed while the next stage runs."""
        self._mark(self._released, place)

    def is_incomplete(self, place: str) -> bool:
        """Say whether a run that was killed has removed a released folder's weights."""
        return place in self._incomplete

    def check_complete(self, place: str) -> None:
        """Compare a folder that was made again with its checksums.

        Raises:
            TritterError: it came out otherwise.
        """
        left = next(each.left for each in self._stages.values() if place in each.left)
        for damage in find_damage(self._folder, {place: left[place]}):
            raise TritterError(
                f"{damage.what}. This stage does not come out as before; start in another folder."
            )
        self._incomplete.discard(place)

    def _mark(self, marked: set[str], place: str) -> None:
        known = {name for each in self._stages.values() for name in each.left}
        new = {name for name in known if name == place or name.startswith(f"{place}/")} - marked
        if new:
            marked |= new
            self._write()

    def _write(self) -> None:
        stages = {
            name: StageRecord(
                found=asdict(result.found),
                flops=result.flops,
                seconds=result.seconds,
                left=result.left,
                disk=result.disk,
            )
            for name, result in self._stages.items()
        }
        content = LedgerRecord(
            stages=stages,
            removed=tuple(sorted(self._removed)),
            released=tuple(sorted(self._released)),
        )
        write_text_atomic(self._path, record_text(content))

    def verify_outputs(self) -> tuple[str, ...]:
        """Hold what finished stages left against what the ledger says of it.

        A stage of whose things one is gone altogether counts as not done. So do the stages before
        it whose things the run itself removed: it may need them again.

        Returns:
            The stages that are done again, each with what is gone.

        Raises:
            TritterError: something was changed; names files and tensors.
        """
        changed: list[str] = []
        places: list[str] = []
        gone: dict[str, str] = {}
        for stage, done in self._stages.items():
            for place in (place for place in done.left if place not in self._removed):
                damages = find_damage(self._folder, {place: done.left[place]})
                if place in self._released and any(each.is_missing for each in damages):
                    self._incomplete.add(place)
                    continue
                for damage in damages:
                    if not damage.is_gone:
                        changed.append(f"  {damage.what}")
                        places.append(str(self._folder / damage.place))
                    elif not damage.place.endswith(_LOG):
                        gone.setdefault(stage, damage.what)
        if changed:
            raise TritterError(
                "what the run left is not as it was left:\n"
                + "\n".join(changed)
                + "\nNothing was made of it. Delete "
                + " and ".join(dict.fromkeys(places))
                + ", and the run makes it again; or start in another folder."
            )
        names = list(self._stages)
        for stage in names[: max((names.index(name) for name in gone), default=0)]:
            for place in sorted(self._removed.intersection(self._stages[stage].left)):
                gone.setdefault(stage, f"{self._folder / place} was removed")
        self._again = set(gone)
        return tuple(f"{what}: {stage} is done again" for stage, what in gone.items())

    def flops(self) -> dict[str, float]:
        """Return FLOPs per stage and in total."""
        return _with_total(result.flops for result in self._stages.values())

    def seconds(self) -> dict[str, float]:
        """Return seconds per stage and in total."""
        return _with_total(result.seconds for result in self._stages.values())

    def peak(self, kind: str) -> int:
        """Return the most bytes of `weights` or `state` that the run folder had so far."""
        return max((each.disk.get(kind, 0) for each in self._stages.values()), default=0)


def _outcome(result: StageResult) -> str:
    """Return what later stages go by, as text that two outcomes can be compared by."""
    kept = {place: digest for place, digest in result.left.items() if not place.endswith(_LOG)}
    return json.dumps([asdict(result.found), kept], sort_keys=True)


def _with_total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged.get(name, 0.0) + float(value)
    return {**merged, "total": sum(merged.values())}


def disk_bytes(folder: Path) -> Counter[str]:
    """Return the bytes of the `weights` and the training `state` below a folder.

    Weights are the safetensors next to a config.json and those of LoRA experts. A file with
    several names counts once.
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


def content_key(content: Mapping[str, object]) -> str:
    """SHA-256 of plain data, the name of what it made."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
