"""The ledger: which stages of a run are done, what they found, what they cost, what they left."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from tritter.checkpoint.left import digests_of, find_damage, read_left
from tritter.errors import TritterError
from tritter.storage.atomic import write_text_atomic
from tritter.storage.records import read_record, record_text

FORMAT_VERSION = 2  # 2: what each stage left, and a digest of the whole
LEDGER_NAME = "ledger.json"
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
        self._again: set[str] = set()  # stages that are done, and of whose things one is gone
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
        self._stages[stage], self._left[stage] = result, left
        plain = {
            name: {
                "found": r.found,
                "flops": r.flops,
                "seconds": r.seconds,
                "left": self._left[name],
            }
            for name, r in self._stages.items()
        }
        record = {"format_version": FORMAT_VERSION, "stages": plain}
        write_text_atomic(self._path, record_text(record))

    def check_left(self) -> tuple[str, ...]:
        """Hold what finished stages left against what the ledger says of it.

        A stage of whose things one is gone altogether counts as not done.

        Returns:
            The stages that are done again, each with what is gone.

        Raises:
            TritterError: something was changed; names files and tensors.
        """
        changed: list[str] = []
        places: list[str] = []
        gone: dict[str, str] = {}
        for stage, left in self._left.items():
            for damage in find_damage(self._folder, left):
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
        self._again = set(gone)
        return tuple(f"{what}: {stage} is done again" for stage, what in gone.items())

    def flops(self) -> dict[str, float]:
        """Return FLOPs per stage and in total."""
        return _with_total(result.flops for result in self._stages.values())

    def seconds(self) -> dict[str, float]:
        """Return seconds per stage and in total."""
        return _with_total(result.seconds for result in self._stages.values())

    def _outcome(self, stage: str) -> str:
        return _outcome(self._stages[stage], self._left[stage])

    def _forget_after(self, stage: str) -> None:
        names = list(self._stages)
        for name in names[names.index(stage) + 1 :]:
            del self._stages[name], self._left[name]
            self._again.discard(name)

    def _read(self) -> None:
        advice = "start in another folder"
        try:
            stages = read_record(self._path, format_version=FORMAT_VERSION)["stages"]
            for name, plain in stages.items():
                left = read_left(plain["left"])
                self._stages[name] = _result(name, plain, tuple(left))
                self._left[name] = left
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
    costs = [*plain["flops"].values(), *plain["seconds"].values()]
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


def content_key(content: Mapping[str, object]) -> str:
    """SHA-256 of plain data, the name of what it made."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
