"""The ledger: which stages of a run are done, what they found, what they cost, what they left."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from tritter.checkpoint.folder import EXPERTS_FOLDER
from tritter.checkpoint.left import digests_of, find_damage, read_left
from tritter.errors import TritterError
from tritter.storage.atomic import write_text_atomic
from tritter.storage.records import LEDGER_NAME, read_record, record_text

FORMAT_VERSION = 2  # 2: what each stage left, and a digest of the whole
_LOG = ".csv"  # what is only looked at: it may be gone, and holds times that differ

_Kind = type | tuple[type, ...]
# Last word of a stage's name → what later stages take from what it found.
_FOUND: dict[str, dict[str, _Kind]] = {
    "baseline": {"parameters": int, "model_hash": str, "corpus": str},
    "choose": {"clone_from": list},
    "expand": {"parameters": int, "notes": list},
    "adapt": {"refused_steps": int, "stopped_because": (str, NoneType)},
    "fit": {
        "steps": int,
        "refused_steps": int,
        "stopped_because": (str, NoneType),
        "update_norms": dict,
    },
    "evaluate": {"samples": list},
    "gate": {"status": str, "checks": list},
}


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage hands on.

    Args:
        found: plain data that later stages read; larger things lie in files.
        flops: floating-point operations by name of the stage as reports show it.
        seconds: wall time by the same names.
        leaves: what it left that later stages use: checkpoints, folders and files, relative to
            the run's folder.
    """

    found: Mapping[str, Any] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()


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
        self._left: dict[str, dict[str, str]] = {}
        self._disk: dict[str, Counter[str]] = {}  # stage → the most bytes of a kind during it
        self._watched: Counter[str] = Counter()  # the same of the stage that is going on
        self._again: set[str] = set()  # stages that are done, and of whose things one is gone
        self._removed: set[str] = set()  # places whose weights no later stage needs
        self._released: set[str] = set()  # places whose weights can be made again, and may be gone
        self._incomplete: set[str] = set()  # those of them that are
        if self._path.exists():
            self._read()

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

    def record(self, stage: str, result: StageResult) -> None:
        """Add a finished stage, with the digests of what it left, and write the ledger.

        A stage that was done again keeps its place. When it came out otherwise, the stages after
        it went by what is no more, and are forgotten.
        """
        left = digests_of(self._folder, result.leaves)
        if stage in self._again:
            self._again.remove(stage)
            if self._outcome(stage) != _outcome(result, left):
                self._forget_after(stage)
        self.watch_disk()
        self._stages[stage], self._left[stage], self._disk[stage] = result, left, self._watched
        self._watched = Counter()
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
        left = next(left for left in self._left.values() if place in left)
        for damage in find_damage(self._folder, {place: left[place]}):
            raise TritterError(
                f"{damage.what}. This stage does not come out as before; start in another folder."
            )
        self._incomplete.discard(place)

    def _mark(self, marked: set[str], place: str) -> None:
        known = {name for left in self._left.values() for name in left}
        new = {name for name in known if name == place or name.startswith(f"{place}/")} - marked
        if new:
            marked |= new
            self._write()

    def _write(self) -> None:
        plain = {
            name: {
                "found": r.found,
                "flops": r.flops,
                "seconds": r.seconds,
                "left": self._left[name],
                "disk": dict(self._disk[name]),
            }
            for name, r in self._stages.items()
        }
        record = {"format_version": FORMAT_VERSION, "stages": plain}
        for name, marked in (("removed", self._removed), ("released", self._released)):
            if marked:
                record[name] = sorted(marked)
        write_text_atomic(self._path, record_text(record))

    def check_left(self) -> tuple[str, ...]:
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
        for stage, left in self._left.items():
            for place in (place for place in left if place not in self._removed):
                damages = find_damage(self._folder, {place: left[place]})
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
        before = list(self._left)[: max((list(self._left).index(name) for name in gone), default=0)]
        for stage in before:
            for place in sorted(self._removed.intersection(self._left[stage])):
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
        return max((disk[kind] for disk in self._disk.values()), default=0)

    def _outcome(self, stage: str) -> str:
        return _outcome(self._stages[stage], self._left[stage])

    def _forget_after(self, stage: str) -> None:
        names = list(self._stages)
        for name in names[names.index(stage) + 1 :]:
            del self._stages[name], self._left[name], self._disk[name]
            self._again.discard(name)

    def _read(self) -> None:
        advice = "start in another folder"
        try:
            record = read_record(self._path, format_version=FORMAT_VERSION)
            stages = record["stages"]
            for name, marked in (("removed", self._removed), ("released", self._released)):
                marked |= set(read_left(dict.fromkeys(record.get(name, ()), "")))
            for name, plain in stages.items():
                left = read_left(plain["left"])
                self._stages[name] = _result(name, plain, tuple(left))
                self._left[name] = left
                self._disk[name] = Counter(plain.get("disk", {}))  # the ledgers of before had none
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TritterError):
                raise TritterError(f"{error} Nothing was made of it; {advice}.") from error
            raise TritterError(f"{self._path} is damaged ({error!r}); {advice}.") from error


def _result(name: str, plain: Mapping[str, Any], leaves: tuple[str, ...]) -> StageResult:
    """Rebuild a result.

    Raises:
        ValueError: a value is missing, or of another type than the stage gives it.
    """
    for part in ("found", "flops", "seconds"):
        if not isinstance(plain[part], dict):
            raise ValueError(f"{name}.{part} is no mapping")
    costs = [*plain["flops"].values(), *plain["seconds"].values(), *plain.get("disk", {}).values()]
    if not all(isinstance(cost, int | float) for cost in costs):
        raise ValueError(f"{name}: a cost is no number")
    for key, kind in _FOUND.get(name.rpartition(".")[2], {}).items():
        if not isinstance(plain["found"].get(key), kind):
            raise ValueError(f"{name}.found.{key} is missing or of another type")
    return StageResult(plain["found"], plain["flops"], plain["seconds"], leaves)


def _outcome(result: StageResult, left: Mapping[str, str]) -> str:
    """Return what later stages go by, as text that two outcomes can be compared by."""
    kept = {place: digest for place, digest in left.items() if not place.endswith(_LOG)}
    return json.dumps([result.found, kept], sort_keys=True)


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
