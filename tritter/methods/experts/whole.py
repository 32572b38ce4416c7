"""Loading a checkpoint's model together with its experts."""

from pathlib import Path

import torch
from torch import nn

from tritter.checkpoints.expert_files import ExpertFiles
from tritter.core.families import Model
from tritter.core.models import load_model


def load_whole(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    base_bits: int | None = None,
    model: Model | None = None,
) -> nn.Module:
    """Load a checkpoint's model, including its experts if it has any.

    Args:
        folder: the checkpoint.
        dtype: data type of the weights.
        base_bits: 8 or 4, to quantise the base for new experts. Existing experts run on a base
            quantised as during their training.
        model: as `load_model`.

    Raises:
        TritterError: as `load_model` and `ExpertFolder.read`.
    """
    files = ExpertFiles.read(folder)
    bits = base_bits if files is None else files.head.base_bits
    live = load_model(folder, dtype=dtype, model=model)
    if bits is not None:
        from tritter.methods.experts.quantised import quantise  # slow to import

        quantise(live, bits)
    if files is not None:
        from tritter.methods.experts.stored import ExpertFolder  # slow to import, rarely needed

        ExpertFolder.of_files(files).apply(live)
    return live
