"""Sequences of tokens in one safetensors file, by name."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tritter.errors import TritterError
from tritter.storage.reading import require_file


def write_sequences(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of tokens, and of what is known of them, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_sequences(path: Path) -> dict[str, Tensor]:
    """Return what was written.

    Raises:
        TritterError: there is no such file, or it is damaged.
    """
    try:
        require_file(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TritterError(f"{path} can't be read as sequences of tokens ({error}).") from error
