"""Content hashes: per tensor, over a whole model, per file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.errors import TritterError
from tritter.storage.reading import MAX_HEADER_BYTES, open_file, require_file

if TYPE_CHECKING:
    from torch import Tensor


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 over name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's values as they lie in memory, in row-major order."""
    import torch  # a lineage is read without it

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def merkle_hash(tensor_digests: Mapping[str, str]) -> str:
    """SHA-256 over the sorted tensor digests: independent of sharding and order."""
    lines = "\n".join(f"{name} {tensor_digests[name]}" for name in sorted(tensor_digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bounded_digest(path: Path) -> str:
    """SHA-256 of a file of a checkpoint folder, which may come from anywhere.

    Raises:
        TritterError: it is larger than any file of its name, or tensors without a header: hashing
            it could take hours and say nothing.
    """
    if path.suffix == ".safetensors":
        header_digest(path)
    else:
        require_file(path)
    return file_digest(path)


def header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's header, which names and places its tensors.

    Raises:
        TritterError: the file cannot be read, or no header is as long as it says.
    """
    with open_file(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 0 < length <= MAX_HEADER_BYTES:
            raise TritterError(f"{path} cannot be read: it states a header of {length} bytes.")
        return hashlib.sha256(start + file.read(length)).hexdigest()


class DigestQueue:
    """Digests of tensors, computed in a worker thread while the caller goes on.

    At most one tensor waits, so that a queue never holds more than two.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._digests: dict[str, Future[str]] = {}
        self._last: Future[str] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor, unless one of its name was added before."""
        if name in self._digests:
            return
        if self._last is not None:
            self._last.result()
        self._last = self._digests[name] = self._worker.submit(tensor_digest, name, tensor)

    def results(self) -> dict[str, str]:
        """Wait for what was added and return name → digest."""
        return {name: digest.result() for name, digest in self._digests.items()}
