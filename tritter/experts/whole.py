"""A checkpoint's model as it is to be run: with its experts where it has any."""

from pathlib import Path

import torch
from torch import nn

from tritter.checkpoint.expert_files import ExpertFiles
from tritter.models import load_model


def load_whole(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a checkpoint's model, which runs its experts where it has any.

    Raises:
        TritterError: as `load_model` and `ExpertFolder.read`.
    """
    has_experts = ExpertFiles.read(folder) is not None
    model = load_model(folder, dtype=dtype)
    if has_experts:
        from tritter.experts.stored import ExpertFolder  # slow to import, and seldom needed

        experts = ExpertFolder.read(folder)
        assert experts is not None
        experts.apply(model)
    return model
