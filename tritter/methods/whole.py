"""A checkpoint's model together with its LoRA experts, if it has any: loading, and FLOPs."""

from pathlib import Path

import torch
from torch import nn

from tritter.checkpoints.expert_files import ExpertFiles
from tritter.checkpoints.source import Source
from tritter.core.families import Flops, Model, forward_flops
from tritter.core.models import load_model, model_of


def load_whole(
    folder: Path, *, dtype: torch.dtype = torch.float32, model: Model | None = None
) -> nn.Module:
    """Load a checkpoint's model, including its experts if it has any.

    Args:
        folder: the checkpoint.
        dtype: data type of the weights.
        model: as `load_model`.
    """
    if ExpertFiles.read(folder) is None:
        return load_model(folder, dtype=dtype, model=model)
    from tritter.methods.experts.stored import load_with_experts  # slow to import

    return load_with_experts(folder, dtype=dtype, model=model)


def reading_flops(model: nn.Module) -> Flops:
    """Return the FLOPs of reading a sequence with a live model, including its LoRA experts."""
    from tritter.methods.experts.mixture import mixture_on  # slow to import

    mixture = mixture_on(model)
    return forward_flops(model_of(model)) if mixture is None else mixture.reading_flops()


def reading_flops_of(source: Source) -> Flops:
    """Return the FLOPs of reading a sequence with a checkpoint's model."""
    if source.experts is None:
        return forward_flops(source.model)
    return reading_flops(load_whole(source.folder, model=source.model))
