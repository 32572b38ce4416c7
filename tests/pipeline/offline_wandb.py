"""Reads offline runs of W&B: a LevelDB log of protobuf records."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _HEADER, _BLOCK = 7, 7, 32768
_FULL, _FIRST, _LAST = 1, 2, 4
_MAX_WAIT = 5  # seconds; a killed run has no exit


@dataclass
class OfflineRun:
    """One folder `offline-run-*`.

    Args:
        axes: metric, which may be `*` → the metric that is its x axis.
        rows: the history, in order.
        models: artifact of the type `model` → its files, by name.
    """

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    started_ns: int = 0
    exit_code: int | None = None


def offline_runs(run_folder: Path) -> list[OfflineRun]:
    """Return the W&B runs in a run folder, in the order of their start.

    On a busy machine, W&B writes the last records after a run has finished.
    """
    latest = monotonic() + _MAX_WAIT
    while True:
        runs = [*map(_read, run_folder.glob("wandb/offline-run-*/run-*.wandb"))]
        if all(run.exit_code is not None for run in runs) or monotonic() > latest:
            return sorted(runs, key=lambda run: run.started_ns)
        sleep(0.1)


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in map(Record.FromString, _records(path.read_bytes())):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            opened = record.run  # a busy machine adds an update that has only its id
            run.started_ns = opened.start_time.ToNanoseconds() or run.started_ns
            run.id, run.name = opened.run_id, opened.display_name or run.name
            run.group = opened.run_group or run.group
            run.job_type = opened.job_type or run.job_type
            run.tags = tuple(opened.tags) or run.tags
            run.config |= _values(record.run.config.update)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            run.axes[name] = record.metric.step_metric
        elif kind == "history" and record.history.item:  # it ends with an empty one
            run.rows.append(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "artifact" and record.artifact.type == "model":
            files = record.artifact.manifest.contents
            run.models[record.artifact.name] = {each.path: Path(each.local_path) for each in files}
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {
        ".".join([each.key] if each.key else each.nested_key): json.loads(each.value_json)
        for each in items
    }


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the payloads of a LevelDB log whose first block starts with W&B's header."""
    assert data[:4] == b":W&B"
    at, parts = _FILE_HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + _HEADER + size > len(data):  # W&B is still writing it
            return
        parts = (b"" if kind in (_FULL, _FIRST) else parts) + data[at + _HEADER :][:size]
        at += _HEADER + size
        if kind in (_FULL, _LAST):
            yield parts
