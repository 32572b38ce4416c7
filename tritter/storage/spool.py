"""What is written once, piece by piece, and then read: in memory while it is small, else a file.

The file has no name and is gone with the process, however that ends. It lies where `TMPDIR` says.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from typing import IO, TYPE_CHECKING

from tritter.errors import TritterError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

IN_MEMORY_BYTES = 64 * 2**20  # of one spool


def is_large(num_bytes: int) -> bool:
    """Say whether so much lies on disk."""
    return num_bytes > IN_MEMORY_BYTES


def mapped(file: IO[bytes]) -> mmap.mmap:
    """Return a file's bytes, whose pages come when they are read; none can be written.

    Shared, since what is private counts against the memory that the system promises, so that a
    file larger than memory would be refused.
    """
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def tensor_of(array: np.ndarray) -> Tensor:
    """Return an array as a tensor over the same memory, which nobody is to write to."""
    import torch  # bytes are spooled without it

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class Spool:
    """Bytes, appended and then read at any place."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._file: IO[bytes] | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, content: bytes | memoryview) -> None:
        """Put bytes behind those that are there.

        Raises:
            TritterError: the disk refused them.
        """
        self._size += len(content)
        if self._file is None and not is_large(self._size):
            self._held += content
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the spool
                self._file.write(self._held)
                self._held = bytearray()
            self._file.write(content)
        except OSError as error:
            raise _refused(error) from error

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`."""
        if self._file is None:
            return bytes(self._held[start:stop])
        self._flush()
        return os.pread(self._file.fileno(), stop - start, start)

    def array(self, dtype: str) -> np.ndarray:
        """Return all of it as one array that can't be written to; of a file it is mapped.

        What is appended later is not in it.
        """
        import numpy as np

        if not self._size:
            return np.empty(0, dtype=dtype)
        if self._file is None:
            return np.frombuffer(bytes(self._held), dtype=dtype)
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
        f"{tempfile.gettempdir()} cannot be written ({error.strerror or error}); text and tokens "
        "that memory should not hold are kept there meanwhile. Set TMPDIR to a folder with room "
        "for three times the text."
    )
