"""Safetensors folders, read one tensor at a time."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritter.errors import TritterError
from tritter.storage.reading import check_links, open_file, read_object, require_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# torch dtype → safetensors dtype; weights use the first four
WRITTEN_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
WEIGHT_DTYPES = tuple(WRITTEN_DTYPES)[:4]
_READ_DTYPES = {WRITTEN_DTYPES[dtype]: dtype for dtype in WEIGHT_DTYPES}
# Causal masks and rotary frequencies that older releases of transformers saved with the weights
# (for example in Pythia and GPT-2). Models compute them, so neither transformers nor Tritter reads
# them
_COMPUTED = (
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
)
_RANK_FILE = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """The header of one tensor in a safetensors file.

    Args:
        name: Name of the tensor.
        dtype: Name of the torch dtype without "torch.".
        shape: Shape of the tensor.
        file: Name of the file in its folder; empty if it is not written yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorHeader:
        """Return the header of a tensor to write."""
        return cls(name, str(dtype).removeprefix("torch."), shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch  # reading headers does not need it

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFolder(Mapping[str, "Tensor"]):
    """The tensors of a Hugging Face folder, read on access: the ones that transformers would load.

    Args:
        folder: Folder of the files.
        headers: Tensor name → header.
    """

    folder: Path
    headers: Mapping[str, TensorHeader]

    @classmethod
    def open(cls, folder: Path) -> TensorFolder:
        """Read the headers of the single file, or else of the files in the index.

        transformers uses the same order, and loads all tensors of a file that it opens.
        """
        check_links(folder)
        # Shards of torch.distributed: transformers would prefer them to all other files
        ranks = sorted(path.name for path in folder.glob("shard-*.safetensors"))
        if any(_RANK_FILE.fullmatch(name) for name in ranks):
            raise TritterError(
                f"{folder} contains shards of a distributed checkpoint ({ranks[0]}), which "
                f"Tritter does not read. Save the whole model as {SINGLE_NAME} in another folder."
            )
        if os.path.lexists(folder / SINGLE_NAME):
            return cls(folder, _headers_in(folder, SINGLE_NAME))
        if not os.path.lexists(folder / INDEX_NAME):
            others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".gguf"))
            hint = f" ({', '.join(others)}: Tritter never reads pickles or GGUF)" if others else ""
            raise TritterError(f"{folder} contains no {SINGLE_NAME} and no {INDEX_NAME}{hint}.")
        index = folder / INDEX_NAME
        try:
            content = read_object(index)
        except TritterError as error:
            raise TritterError(f"{index} is not a safetensors index: {error}") from error
        files, metadata = content.get("weight_map"), content.get("metadata")
        if not isinstance(files, dict) or not isinstance(metadata, dict):
            raise TritterError(
                f"{index} is not a safetensors index: it needs an object 'weight_map' (tensor → "
                "file) and an object 'metadata'."
            )
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise TritterError(f"{index} points outside its folder: '{file}'.")
        headers: dict[str, TensorHeader] = {}
        for file in sorted(set(files.values())):
            for name, header in _headers_in(folder, file).items():
                if name in headers:
                    raise TritterError(
                        f"{folder}: the tensor '{name}' is in both {headers[name].file} and "
                        f"{file}; remove it from one of them."
                    )
                headers[name] = header
        for name, file in files.items():
            if is_computed(name):
                continue
            if name not in headers or headers[name].file != file:
                raise TritterError(f"{folder / file} lacks the tensor '{name}' of the index.")
        return cls(folder, headers)

    @classmethod
    def open_file(cls, folder: Path, file_name: str) -> TensorFolder:
        """Read the header of one file in a folder."""
        check_links(folder)
        return cls(folder, _headers_in(folder, file_name))

    @property
    def files(self) -> dict[str, str]:
        """Tensor name → file name."""
        return {name: header.file for name, header in self.headers.items()}

    @property
    def paths(self) -> set[Path]:
        """The files that contain the tensors."""
        return {self.folder / header.file for header in self.headers.values()}

    def reader(self) -> _TensorReader:
        """Return a reader of many tensors, which keeps the last file open."""
        return _TensorReader(self)

    def __getitem__(self, name: str) -> Tensor:
        return self.reader().get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def raw(self) -> Iterator[tuple[TensorHeader, memoryview]]:
        """Yield the header and the memory-mapped bytes of every tensor, without importing torch."""
        for path in sorted(self.paths):
            with open_file(path) as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(start - 8))
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            names = (name for name, header in self.headers.items() if header.file == path.name)
            spans = {name: entries[name]["data_offsets"] for name in names}
            for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
                yield self.headers[name], content[start + begin : start + end]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.headers[name].shape

    @property
    def dtypes(self) -> frozenset[str]:
        """Names of the torch dtypes of all tensors, without "torch."."""
        return frozenset(header.dtype for header in self.headers.values())

    @property
    def main_dtype(self) -> str:
        """Name of the torch dtype of most values, without "torch."."""
        counts = Counter[str]()
        for header in self.headers.values():
            counts[header.dtype] += prod(header.shape)
        return counts.most_common(1)[0][0]


class _TensorReader:
    """Reads many tensors of a folder, keeping the last file open."""

    def __init__(self, folder: TensorFolder) -> None:
        self._folder = folder
        self._file: Any = None
        self._name = ""

    def get(self, name: str, *, index: tuple[int | slice, ...] = ()) -> Tensor:
        """Read one tensor, or the part that `index` selects."""
        from safetensors import SafetensorError, safe_open

        file_name = self._folder.headers[name].file
        path = self._folder.folder / file_name
        try:
            if file_name != self._name:
                self._file, self._name = safe_open(path, framework="pt"), file_name
            tensor: Tensor = (
                self._file.get_slice(name)[index] if index else self._file.get_tensor(name)
            )
        except (SafetensorError, OSError, MemoryError) as error:
            raise TritterError(f"{path} cannot be read ({error}).") from error
        return tensor


def is_computed(name: str) -> bool:
    """Return True for a tensor that models compute, although some files contain it."""
    return name.endswith(_COMPUTED)


def is_finite(tensor: Tensor) -> bool:
    """Return True if a tensor contains neither infinities nor NaN."""
    # aminmax propagates NaN, and is 20 times faster than isfinite in bf16.
    low, high = tensor.aminmax()
    return isfinite(low) and isfinite(high)


def _headers_in(folder: Path, file_name: str) -> dict[str, TensorHeader]:
    from safetensors import SafetensorError, safe_open

    path = folder / file_name
    headers = {}
    require_file(path, is_read_whole=False)
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            for name in names:
                if is_computed(name):
                    continue
                part = file.get_slice(name)
                written = str(part.get_dtype())
                if written not in _READ_DTYPES:
                    allowed = ", ".join(_READ_DTYPES)
                    raise TritterError(
                        f"{path}: {name} has dtype {written}; allowed for weights are {allowed}."
                    )
                shape = tuple(part.get_shape())
                headers[name] = TensorHeader(name, _READ_DTYPES[written], shape, file_name)
    except (SafetensorError, OSError, MemoryError) as error:
        raise TritterError(f"{path} cannot be read ({error}).") from error
    return headers
