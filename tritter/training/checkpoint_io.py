"""Lightning checkpoints as folders of safetensors and JSON: nothing is pickled, nothing unpickled.

Tensors go into one safetensors file, everything else into JSON, in which a tensor is a reference.
Dictionaries are lists of pairs, so that keys may be whole numbers; tuples are marked. The JSON
holds the digest of the tensors' file and one of itself, which are checked before either is used.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tritter.errors import TritterError
from tritter.storage.atomic import atomic_folder
from tritter.storage.hashing import file_digest
from tritter.storage.records import Sha256, read_record, record, record_text

_TENSORS, _REST = "tensors.safetensors", "checkpoint.json"


@record
class _SavedHead:
    """What `checkpoint.json` says: the digest of the tensors, and all that is no tensor."""

    FORMAT: ClassVar[str] = "saved training"

    tensors_sha256: Sha256
    content: Any


class SafetensorsCheckpointIO(CheckpointIO):
    """Write each checkpoint whole, or not at all; read it without running anything."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint folder in place of the one before.

        Raises:
            TypeError: it holds something that is neither plain data nor a tensor; names the place.
            TritterError: the disk refused a write.
        """
        tensors: dict[str, Tensor] = {}
        plain = encode(checkpoint, tensors, place="checkpoint")
        with atomic_folder(Path(path), overwrite=True) as folder:
            save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
            head = _SavedHead(tensors_sha256=file_digest(folder / _TENSORS), content=plain)
            (folder / _REST).write_text(record_text(head), encoding="utf-8")

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint folder.

        Raises:
            TritterError: it is damaged, or of another format.
        """
        folder = Path(path)
        try:
            head = read_record(folder / _REST, _SavedHead)
            if file_digest(folder / _TENSORS) != head.tensors_sha256:
                raise TritterError(f"{folder / _TENSORS} was changed since it was written.")
            tensors = load_file(folder / _TENSORS, device="cpu")
            content = decode(head.content, tensors)
            if not isinstance(content, dict):
                raise ValueError("it holds no mapping")
            return content
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TritterError(
                f"the saved state {folder} is damaged: {error}\n"
                f"Delete {folder}, and this training starts again from its beginning."
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def encode(value: Any, tensors: dict[str, Tensor], *, place: str) -> Any:
    """Return JSON for nested plain data; tensors move to `tensors`, named by their place.

    Raises:
        TypeError: something is neither plain nor a tensor; names the place.
    """
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, Mapping):
        pairs = [
            [encode(key, tensors, place=f"{place}.key"), _child(value[key], tensors, place, key)]
            for key in value
        ]
        return {"pairs": pairs}
    if isinstance(value, (list, tuple)):
        items = [_child(item, tensors, place, index) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{place} is a {type(value).__name__}; a checkpoint holds tensors, text, numbers, lists "
        "and dictionaries"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `encode` was given."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(decode(item, tensors) for item in value["tuple"])
    return {decode(key, tensors): decode(item, tensors) for key, item in value["pairs"]}


def _child(value: Any, tensors: dict[str, Tensor], place: str, name: Any) -> Any:
    return encode(value, tensors, place=f"{place}.{name}")


def random_state() -> dict[str, Any]:
    """Return the state of torch's global generators, the GPU's that is in use included."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set torch's global generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
