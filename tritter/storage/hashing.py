"""Content hashes: per tensor, over a whole model, per file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event, Lock
from typing import TYPE_CHECKING

from tritter.errors import TritterError
from tritter.storage.reading import MAX_HEADER_BYTES, open_file, require_file

if TYPE_CHECKING:
    from torch import Tensor

_MAX_WAITING = 4  # tensors; those of a folder are mapped, and take no memory
_PIECE_BYTES = 16 * 2**20  # after which a queue that nobody needs any more stops


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it lies in a file.

    Args:
        dtype: as torch calls it, without "torch.".
        held: its values, in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    held: memoryview


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 over name, dtype, shape and bytes."""
    digest = begun_digest(name, str(tensor.dtype), tuple(tensor.shape))
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def begun_digest(name: str, dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """Return the digest of a tensor whose bytes are still to come.

    Args:
        dtype: as torch writes it, "torch.bfloat16".
    """
    return hashlib.sha256(f"{name}\0{dtype}\0{shape}\0".encode())


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


def _known(digest: str) -> Future[str]:
    found: Future[str] = Future()
    found.set_result(digest)
    return found


class DigestQueue:
    """Digests of tensors, computed in a worker thread while its callers go on.

    Few tensors wait: whoever adds more waits with them.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._digests: dict[str, Future[str]] = {}
        self._lock = Lock()
        self._room = BoundedSemaphore(_MAX_WAITING)
        self._are_added, self._is_over = Event(), Event()
        self._check: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, digests: Mapping[str, str]) -> DigestQueue:
        """Return a queue of known digests: tensors of these names are not hashed."""
        queue = cls()
        for name, digest in digests.items():
            queue._digests[name] = _known(digest)
        return queue

    def begin(
        self, tensors: Iterable[RawTensor], *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Hash tensors, one after the other, until the first is added or the queue is closed.

        What is wrong with them is found by those who add them.

        Args:
            check: raises where these are no longer the tensors that will have been added.
        """
        self._check = check
        self._worker.submit(self._hash_ahead, tensors)

    def close(self) -> None:
        """Hash no further ahead; the end of the process would wait for it."""
        self._is_over.set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor, unless one of its name was added before."""
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
        """Wait for the digest of a tensor that was added."""
        return self._digests[name].result()

    def results(self) -> dict[str, str]:
        """Wait for what was added and return name → digest.

        Raises:
            TritterError: what was hashed ahead has become something else since.
        """
        self._check()
        return {name: digest.result() for name, digest in dict(self._digests).items()}

    def _hash_ahead(self, tensors: Iterable[RawTensor]) -> None:
        for tensor in tensors:
            digest = begun_digest(tensor.name, f"torch.{tensor.dtype}", tensor.shape)
            for begin in range(0, len(tensor.held), _PIECE_BYTES):
                if self._is_over.is_set():
                    return
                digest.update(tensor.held[begin : begin + _PIECE_BYTES])
            self._digests.setdefault(tensor.name, _known(digest.hexdigest()))
            if self._are_added.is_set():
                return

    def _hash(self, name: str, tensor: Tensor) -> str:
        try:
            return tensor_digest(name, tensor)
        finally:
            self._room.release()
