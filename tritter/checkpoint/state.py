"""The `state/` folder of a checkpoint: what a training can go on from, by kind and parameter.

One subfolder of safetensors for each kind (`exp_avg`, `fisher`, …), tensors named as on disk, and
`state.json` with the step. A parameter that is absent from a kind has no state yet.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tritter.errors import TritterError, brief
from tritter.limits import MAX_COUNT
from tritter.parameter_map.carry import STATE_KINDS
from tritter.storage.reading import read_object
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorStream, write_tensors

FORMAT_VERSION = 1
STATE_FOLDER = "state"
_HEAD = "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """State on disk, read lazily.

    Args:
        step: optimiser steps behind it.
        kinds: kind → its tensors.
    """

    step: int
    kinds: Mapping[str, TensorFolder]


def write_state(
    folder: Path, kinds: Mapping[str, TensorStream], *, step: int, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `folder/state`; meant for a checkpoint folder that is still being made."""
    place = folder / STATE_FOLDER
    place.mkdir()
    written = []
    for kind, stream in kinds.items():
        assert kind in STATE_KINDS, kind
        if stream.entries:
            (place / kind).mkdir()
            write_tensors(place / kind, stream, max_shard_bytes=max_shard_bytes)
            written.append(kind)
    head = {"format_version": FORMAT_VERSION, "step": step, "kinds": written}
    (place / _HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path) -> State | None:
    """Return the state beside a model, or None where there is none.

    Raises:
        TritterError: it is damaged, or of a newer format.
    """
    path = folder / STATE_FOLDER / _HEAD
    if not path.exists():
        return None
    try:
        head = read_object(path)
        version, step, kinds = head["format_version"], head["step"], head["kinds"]
    except TritterError as error:
        raise TritterError(f"{path} is damaged: {error}") from error
    except KeyError as error:
        raise TritterError(f"{path} is damaged ({error!r}).") from error
    if version != FORMAT_VERSION:
        raise TritterError(
            f"{path}: format_version {brief(version)}; this Tritter reads {FORMAT_VERSION}."
        )
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MAX_COUNT:
        raise TritterError(
            f"{path} is damaged: step = {brief(step)}; allowed is a whole number from 0 to "
            f"{MAX_COUNT}."
        )
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise TritterError(f"{path} is damaged: kinds = {brief(kinds)}; allowed are names.")
    unknown = [kind for kind in kinds if kind not in STATE_KINDS]
    if unknown:
        raise TritterError(f"{path} names kinds that are not known: {brief(unknown)}.")
    return State(step, {kind: TensorFolder.open(folder / STATE_FOLDER / kind) for kind in kinds})


def state_tensors(folder: TensorFolder) -> dict[str, Tensor]:
    """Read all tensors of one kind."""
    return {name: folder.get(name) for name in folder.files}
