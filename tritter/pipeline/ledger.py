"""The ledger: which stages of a run are done, what they found and what they cost."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritter.errors import TritterError
from tritter.storage.atomic import write_text_atomic

FORMAT_VERSION = 1
LEDGER_NAME = "ledger.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage hands on.

    Args:
        found: plain data that later stages read; larger things lie in files.
        flops: floating-point operations by name of the stage as reports show it.
        seconds: wall time by the same names.
    """

    found: Mapping[str, Any] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class Ledger:
    """Stage results on disk, written whole after each stage."""

    def __init__(self, folder: Path) -> None:
        """Open the ledger of a run folder, or start one.

        Raises:
            TritterError: it is damaged or of another format.
        """
        self._path = folder / LEDGER_NAME
        self._stages: dict[str, StageResult] = {}
        if self._path.exists():
            self._stages = _read(self._path)

    def get(self, stage: str) -> StageResult | None:
        return self._stages.get(stage)

    def record(self, stage: str, result: StageResult) -> None:
        """Add a finished stage and write the ledger."""
        self._stages[stage] = result
        plain = {
            name: {"found": r.found, "flops": r.flops, "seconds": r.seconds}
            for name, r in self._stages.items()
        }
        text = json.dumps({"format_version": FORMAT_VERSION, "stages": plain}, indent=1)
        write_text_atomic(self._path, text + "\n")

    def flops(self) -> dict[str, float]:
        """Return FLOPs per stage and in total."""
        return _with_total(result.flops for result in self._stages.values())

    def seconds(self) -> dict[str, float]:
        """Return seconds per stage and in total."""
        return _with_total(result.seconds for result in self._stages.values())


def _with_total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged.get(name, 0.0) + float(value)
    return {**merged, "total": sum(merged.values())}


def _read(path: Path) -> dict[str, StageResult]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["format_version"] != FORMAT_VERSION:
            raise TritterError(
                f"{path}: format_version {plain['format_version']}; this Tritter reads "
                f"{FORMAT_VERSION}."
            )
        return {name: StageResult(**result) for name, result in plain["stages"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, TritterError):
            raise
        raise TritterError(f"{path} is damaged ({error!r}); start in another folder.") from error
