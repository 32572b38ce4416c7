"""Content hashes of tensors, models and files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore, Event, Lock
from typing import TYPE_CHECKING

from tritter.errors import TritterError
from tritter.storage.reading import open_file, require_file

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.storage.tensors import TensorHeader

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_WAITING = 4  # tensors in memory; those of a folder are mapped
_PIECE_BYTES = 16 * 2**20  # a closed queue stops after a piece


def tensor_digest(name: str, tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's name, dtype, shape and bytes."""
    digest = start_digest(name, str(tensor.dtype), tuple(tensor.shape))
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def start_digest(name: str, dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """Return a hash object that is ready for the bytes of a tensor.

    Args:
        name: Name of the tensor.
        dtype: Name of the torch dtype, such as "torch.bfloat16".
        shape: Shape of the tensor.
    """
    return hashlib.sha256(f"{name}\0{dtype}\0{shape}\0".encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    import torch  # reading a lineage does not need it

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def merkle_hash(tensor_digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of the sorted tensor checksums: independent of sharding and order."""
    lines = "\n".join(f"{name} {tensor_digests[name]}" for name in sorted(tensor_digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bounded_digest(path: Path) -> str:
    """Return the SHA-256 of a file in an untrusted checkpoint folder."""
    if path.suffix == ".safetensors":
        header_digest(path)
    else:
        require_file(path)
    return file_digest(path)


def header_digest(path: Path) -> str:
    """Return the SHA-256 of a safetensors header, which lists the tensors and their offsets."""
    with open_file(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise TritterError(f"{path} cannot be read: it states a header of {length} bytes.")
        return hashlib.sha256(start + file.read(length)).hexdigest()


def _completed_future(digest: str) -> Future[str]:
    found: Future[str] = Future()
    found.set_result(digest)
    return found


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class DigestQueue:
    """Checksums of tensors, computed in a worker thread while the caller continues.

    The queue is short: `add` blocks when it is full.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._digests: dict[str, Future[str]] = {}
        self._lock = Lock()
        self._room = BoundedSemaphore(_MAX_WAITING)
        self._are_added, self._is_over = Event(), Event()
        self._stamps: dict[Path, tuple[int, int]] = {}

    @classmethod
    def of(cls, digests: Mapping[str, str]) -> DigestQueue:
        """Return a queue of known checksums: tensors with these names are not hashed."""
        queue = cls()
        for name, digest in digests.items():
            queue._digests[name] = _completed_future(digest)
        return queue

    def begin(
        self, tensors: Iterable[tuple[TensorHeader, memoryview]], *, files: Iterable[Path] = ()
    ) -> None:
        """Hash tensors one by one until the first `add` or `close`.

        Errors are ignored here; reading the same tensors for `add` raises them again.

        Args:
            tensors: Headers and bytes of tensors that will be added later.
            files: That contain them, and must not change before they are added. Default: none.
        """
        self._stamps = {path: _stamp(path) for path in files}
        self._worker.submit(self._hash_ahead, tensors)

    def close(self) -> None:
        """Stop hashing ahead, which would delay the end of the process."""
        self._is_over.set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor, unless its name was added before."""
        self._are_added.set()
        if name in self._digests:
            return
        self._room.acquire()
        with self._lock:
            if name not in self._digests:
                self._digests[name] = self._worker.submit(self._hash, name, tensor)
                return
        self._room.release()

    def digest(self, name: str) -> str:
        """Wait for the checksum of an added tensor and return it."""
        return self._digests[name].result()

    def results(self) -> dict[str, str]:
        """Wait for all added tensors and return their checksums by name."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise TritterError(f"{path} has changed since it was hashed.")
        return {name: digest.result() for name, digest in dict(self._digests).items()}

    def _hash_ahead(self, tensors: Iterable[tuple[TensorHeader, memoryview]]) -> None:
        for header, content in tensors:
            digest = start_digest(header.name, f"torch.{header.dtype}", header.shape)
            for begin in range(0, len(content), _PIECE_BYTES):
                if self._is_over.is_set():
                    return
                digest.update(content[begin : begin + _PIECE_BYTES])
            self._digests.setdefault(header.name, _completed_future(digest.hexdigest()))
            if self._are_added.is_set():
                return

    def _hash(self, name: str, tensor: Tensor) -> str:
        try:
            return tensor_digest(name, tensor)
        finally:
            self._room.release()
