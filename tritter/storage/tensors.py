"""Safetensors folders: read one tensor at a time, write shards of a bounded size."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tritter.errors import TritterError
from tritter.storage.hashing import tensor_digest

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorFolder:
    """The tensors of a Hugging Face folder, read lazily.

    Args:
        folder: where the files lie.
        files: tensor name → file name.
    """

    folder: Path
    files: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> "TensorFolder":
        """Read the index, or the one file's header.

        Raises:
            TritterError: no safetensors, an unreadable file, an index that points outside the
                folder, or a shard that lacks what the index promises.
        """
        index = folder / INDEX_NAME
        if index.exists():
            return cls(folder, _read_index(folder, index))
        if not (folder / SINGLE_NAME).exists():
            pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
            hint = f" ({', '.join(pickles)} hold pickles, which are never read)" if pickles else ""
            raise TritterError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}{hint}.")
        return cls(folder, dict.fromkeys(_names_in(folder / SINGLE_NAME), SINGLE_NAME))

    def get(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            TritterError: the file is damaged.
        """
        path = self.folder / self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TritterError(f"{path} cannot be read ({error}).") from error

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 5 * 10**9
) -> dict[str, str]:
    """Write tensors as they come, in shards of bounded size, and return their digests.

    One shard gives `model.safetensors`; several give numbered files and an index, as
    transformers reads them. At most one shard is held in memory.

    Raises:
        TritterError: the disk refused a write.
    """
    digests: dict[str, str] = {}
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        _save(pending, _part(folder, len(shards)))
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        digests[name] = tensor_digest(name, tensor)
        pending_bytes += size
        total_bytes += size
    flush()
    _name_shards(folder, shards, total_bytes)
    return digests


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise TritterError(f"{path} could not be written ({error}).") from error


def _part(folder: Path, position: int) -> Path:
    return folder / f"part-{position:05d}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        _part(folder, 0).rename(folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for position, names in enumerate(shards):
        final = f"model-{position + 1:05d}-of-{len(shards):05d}.safetensors"
        _part(folder, position).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TritterError(f"{index} is not a safetensors index ({error!r}).") from error
    held: dict[str, set[str]] = {}
    for file in sorted(set(pairs.values())):
        if Path(file).name != file:
            raise TritterError(f"{index} points outside its folder: '{file}'.")
        held[file] = set(_names_in(folder / file))
    for name, file in pairs.items():
        if name not in held[file]:
            raise TritterError(f"{folder / file} lacks the tensor '{name}' that the index names.")
    return pairs


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise TritterError(f"{path} cannot be read ({error}).") from error
