"""Lightning checkpoints as folders of safetensors and JSON, without pickle.

Tensors are in one safetensors file, everything else is in a JSON file that refers to them. The JSON
stores dictionaries as lists of pairs, because keys may be integers, and marks tuples. It contains
the checksums of both files, which are verified before use.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

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
    """The content of `checkpoint.json`: the checksum of the tensors, and all other values."""

    FORMAT: ClassVar[str] = "saved training"

    tensors_sha256: Sha256
    content: Any


class SafetensorsCheckpointIO(CheckpointIO):
    """Write checkpoints atomically; read them without executing code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint folder, replacing the previous one."""
        tensors: dict[str, Tensor] = {}
        plain = encode(checkpoint, tensors, key_path="checkpoint")
        with atomic_folder(Path(path), overwrite=True) as folder:
            save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
            head = _SavedHead(tensors_sha256=file_digest(folder / _TENSORS), content=plain)
            (folder / _REST).write_text(record_text(head), encoding="utf-8")

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint folder."""
        folder = Path(path)
        try:
            head = read_record(folder / _REST, _SavedHead)
            if file_digest(folder / _TENSORS) != head.tensors_sha256:
                raise TritterError(f"{folder / _TENSORS} was edited: its checksum does not match.")
            content = decode(head.content, load_file(folder / _TENSORS, device="cpu"))
            if not isinstance(content, dict):
                raise ValueError("it is not a mapping")
            return content
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TritterError(
                f"the saved state {folder} is damaged: {error}\n"
                f"Delete {folder} to restart this training run from the beginning."
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def encode(value: Any, tensors: dict[str, Tensor], *, key_path: str) -> Any:
    """Return JSON values for nested plain data, moving tensors to `tensors`.

    Args:
        value: Data to encode.
        tensors: Receives the tensors by key path; large ones share memory with `value`.
        key_path: Dotted path of `value` in the checkpoint.
    """
    if isinstance(value, Tensor):
        own = value.detach().cpu().contiguous()
        # Copies of large tensors are a third of a run's memory; only shared memory needs them
        is_whole = 2**20 <= own.nbytes == own.untyped_storage().nbytes()
        is_alone = is_whole and all(own.data_ptr() != each.data_ptr() for each in tensors.values())
        tensors[key_path] = own if is_alone else own.clone()
        return {"tensor": key_path}
    if isinstance(value, Mapping):
        pairs = [
            [
                encode(key, tensors, key_path=f"{key_path}.key"),
                encode(value[key], tensors, key_path=f"{key_path}.{key}"),
            ]
            for key in value
        ]
        return {"pairs": pairs}
    if isinstance(value, (list, tuple)):
        items = [
            encode(item, tensors, key_path=f"{key_path}.{index}")
            for index, item in enumerate(value)
        ]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{key_path} is a {type(value).__name__}; checkpoints can contain tensors, strings, "
        "numbers, lists and dictionaries"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the data that `encode` has encoded."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(decode(item, tensors) for item in value["tuple"])
    return {decode(key, tensors): decode(item, tensors) for key, item in value["pairs"]}
