"""Safetensors folders, read one tensor at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tritter.errors import TritterError
from tritter.storage.reading import read_json, require_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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

    def get(self, name: str, *, index: tuple[int | slice, ...] = ()) -> Tensor:
        """Read one tensor, or what `index` selects of it.

        Raises:
            TritterError: the file is damaged.
        """
        path = self.folder / self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                if index:
                    return file.get_slice(name)[index]
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TritterError(f"{path} cannot be read ({error}).") from error

    def torch_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor.

        Raises:
            TritterError: a type that models are not made of.
        """
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            written = str(file.get_slice(name).get_dtype())
        for dtype, known in DTYPE_NAMES.items():
            if known == written and dtype.is_floating_point:
                return dtype
        raise TritterError(f"{self.folder / self.files[name]}: {name} is of type {written}.")

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor of numbers holds neither infinities nor NaN."""
    # The extremes of a tensor with a NaN are NaN; this is 20 times quicker than isfinite in bf16.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    try:
        files = read_json(index)["weight_map"]
        pairs = {str(name): str(file) for name, file in files.items()}
    except TritterError as error:
        raise TritterError(f"{index} is not a safetensors index: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
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
    require_file(path, is_read_whole=False)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise TritterError(f"{path} cannot be read ({error}).") from error
