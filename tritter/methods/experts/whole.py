"""A checkpoint's model as it is to be run: with its experts where it has any."""

from pathlib import Path

import torch
from torch import nn

from tritter.checkpoints.expert_files import ExpertFiles
from tritter.core.families import Config
from tritter.core.models import load_model


def load_whole(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    base_bits: int | None = None,
    config: Config | None = None,
) -> nn.Module:
    """Load a checkpoint's model, which runs its experts where it has any.

    Args:
        base_bits: 8 or 4, in which the base is to be held for experts that it will get; those that
            it has run on a base held as it was when they were trained.
        config: as `load_model`.

    Raises:
        TritterError: as `load_model` and `ExpertFolder.read`.
    """
    files = ExpertFiles.read(folder)
    bits = base_bits if files is None else files.head.base_bits
    model = load_model(folder, dtype=dtype, config=config)
    if bits is not None:
        from tritter.methods.experts.quantised import quantise  # slow to import

        quantise(model, bits)
    if files is not None:
        from tritter.methods.experts.stored import ExpertFolder  # slow to import, and seldom needed

        ExpertFolder.of_files(files).apply(model)
    return model
