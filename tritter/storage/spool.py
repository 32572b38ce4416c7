"""Append-only buffers for temporary data: in memory while small, then in an unnamed file.

The file is in `TMPDIR`. The system deletes it when the process ends, even by a kill.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from typing import IO, TYPE_CHECKING, ClassVar

from tritter.errors import TritterError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def mapped(file: IO[bytes]) -> mmap.mmap:
    """Return a read-only memory map of a file.

    The map is shared: private maps count towards committed memory, so the system would refuse a
    file larger than memory.
    """
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def tensor_of(array: np.ndarray) -> Tensor:
    """Return a read-only tensor that shares the memory of an array."""
    import torch  # spooling bytes does not need it

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class Spool:
    """Bytes that are appended and then read at any offset."""

    IN_MEMORY_BYTES: ClassVar[int] = 64 * 2**20  # a larger spool is on disk

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self._size += len(content)
        if self._file is None and self._size <= self.IN_MEMORY_BYTES:
            self._buffer += content
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the spool
                self._file.write(self._buffer)
                self._buffer = bytearray()
            self._file.write(content)
        except OSError as error:
            raise _refused(error) from error

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`."""
        if self._file is None:
            return bytes(self._buffer[start:stop])
        self._flush()
        return os.pread(self._file.fileno(), stop - start, start)

    def array(self, dtype: str) -> np.ndarray:
        """Return all bytes so far as one read-only array, memory-mapped if they are on disk."""
        import numpy as np

        if not self._size:
            return np.empty(0, dtype=dtype)
        if self._file is None:
            return np.frombuffer(bytes(self._buffer), dtype=dtype)
        self._flush()
        return np.frombuffer(mapped(self._file), dtype=dtype)

    def tensor(self, dtype: str) -> Tensor:
        """Return `array` as a tensor."""
        return tensor_of(self.array(dtype))

    def _flush(self) -> None:
        assert self._file is not None
        try:
            self._file.flush()
        except OSError as error:
            raise _refused(error) from error


def _refused(error: OSError) -> TritterError:
    return TritterError(
        f"{tempfile.gettempdir()} cannot be written ({error.strerror or error}); Tritter stores "
        "temporary data there while it prepares a dataset. Set TMPDIR to a folder with space for "
        "three times the dataset."
    )
