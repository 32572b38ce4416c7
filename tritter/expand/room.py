"""What an expansion takes of disk and memory, told before the first byte is written."""

import os
import resource
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tritter.checkpoint import Source
from tritter.checkpoint.kept_sequences import KEPT_FILE
from tritter.checkpoint.state import STATE_FOLDER
from tritter.checkpoint.tokenizer_files import check_tokenizer_files
from tritter.errors import RequestError
from tritter.families import StoredTensor
from tritter.parameter_map import TensorMap
from tritter.parameter_map.held import held_bytes
from tritter.storage.writer import HELD_TENSORS, KEPT_BYTES, TensorEntry, num_threads

_BYTES_OF_A_NAME = 512  # of one tensor in a file's header, in the index and in the record
_BYTES_OF_RECORDS = 2**16  # the record, the card and the configs, without names
_WIDE = 4  # bytes of what is computed in float32
_AT_ONCE_PADDED = 3  # its pieces, the whole, and the one that is filled up
_AT_ONCE_OF_STATE = 4  # gathered along each axis, multiplied, and with a mean in new entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that an expansion takes.

    Args:
        weights: of the result on disk, padding included.
        state: of what follows beside it: moments, importances, kept sequences.
        others: tokenizer files, and headers, configs and records, estimated.
        in_flight: memory at most for the tensors that are read, computed and written at a time.
        process: memory that the process has held already.
    """

    weights: int
    state: int
    others: int
    in_flight: int
    process: int

    @property
    def disk(self) -> int:
        """What the temporary folder takes that becomes the result: no byte is written twice."""
        return self.weights + self.state + self.others

    @property
    def memory(self) -> int:
        return self.process + self.in_flight

    @classmethod
    def of(
        cls,
        weights: Sequence[TensorEntry],
        state: Sequence[TensorEntry],
        *,
        source: Source,
        in_flight: int,
    ) -> "Room":
        """Return what it takes to write these tensors, made of those of a source."""
        kept = source.folder / STATE_FOLDER / KEPT_FILE
        files = sum(path.stat().st_size for path in check_tokenizer_files(source.folder))
        return cls(
            weights=sum(entry.num_bytes for entry in weights),
            state=sum(e.num_bytes for e in state) + (kept.stat().st_size if kept.is_file() else 0),
            others=files + _BYTES_OF_RECORDS + _BYTES_OF_A_NAME * (len(weights) + len(state)),
            in_flight=in_flight,
            process=_held_bytes(),
        )


def in_flight_bytes(
    targets: Sequence[StoredTensor],
    maps: Mapping[str, TensorMap],
    state: Sequence[TensorEntry],
    *,
    source: Source,
    padded: Collection[str],
) -> int:
    """Return the memory that tensors take at most that are made and written at a time.

    Each of the writer's threads makes a target in blocks of rows, or whole where its rows do not
    follow from rows. State comes whole: read and mapped, while the two before it are written.

    Args:
        maps: of the targets' parts, by logical name.
        padded: names of targets that are put together, and filled up, before they are written.
    """

    def shape_of(name: str) -> tuple[int, ...]:
        stored, number = source.places[name]
        return source.family.shape(stored.parts[number].tensor, source.config)

    usual, rare = [], 0
    for target in targets:
        parts = [held_bytes(maps[part.tensor.name], shape_of) for part in target.parts]
        origins = {maps[part.tensor.name].origin for part in target.parts}
        is_whole = target.name in padded
        copied = [o for o in origins if o and source.places[o][0].name in source.live_shapes]
        usual.append(
            max(part.usual for part in parts)
            + _AT_ONCE_PADDED * _WIDE * prod(target.shape) * (is_whole or target.is_transposed)
            + _WIDE * max((prod(shape_of(name)) for name in copied), default=0)
        )
        rare = max(rare, *(part.rare for part in parts))
    weights = sum(sorted(usual)[-num_threads() :]) + rare
    largest = max((entry.num_bytes for entry in state), default=0)
    return KEPT_BYTES + max(weights, (HELD_TENSORS + _AT_ONCE_OF_STATE) * largest)


def _held_bytes() -> int:
    """Return what this process has held at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(destination: Path) -> int | None:
    """Return what is free on the disk that a folder would lie on; None where it does not say."""
    place = destination.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free if usage.total else None


def check_room(destination: str | os.PathLike[str], room: Room) -> None:
    """Refuse a result that the disk has no room for.

    Raises:
        RequestError: says what it takes and what is free.
    """
    free = free_bytes(Path(destination))
    if free is not None and room.disk > free:
        raise RequestError(
            f"{destination}: the result takes {size_text(room.disk)} (weights "
            f"{size_text(room.weights)}, state {size_text(room.state)}), and {size_text(free)} are "
            "free on the disk there. What it replaces goes only once it is whole. Choose another "
            "place, or a smaller dtype."
        )


def size_text(num_bytes: int) -> str:
    """Return a size as a person reads it: 1.53 GB."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
