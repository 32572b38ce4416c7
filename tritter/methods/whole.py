"""A model together with its LoRA experts, if it has any: loading, writing, FLOPs and usage."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def experts_writer(model: nn.Module) -> Callable[[Path], None] | None:
    """Return a function that writes a live model's LoRA experts to the folder of its base.

    None: there are none. What they are now is written, with the state that training left.
    """
    from tritter.methods.experts.mixture import mixture_on  # slow to import
    from tritter.methods.experts.stored import ExpertFolder

    if (mixture := mixture_on(model)) is None:
        return None
    usage = mixture.extra.get("usage")
    by_stage = None if usage is None else {"training": usage}
    return ExpertFolder.of(mixture, usage=by_stage, extra=mixture.extra).write


def is_of_experts(name: str) -> bool:
    """Return True if a parameter of this name belongs to LoRA experts or their routers."""
    from tritter.methods.experts.adapters import is_of_adapter
    from tritter.methods.experts.mixture import ROUTER

    return is_of_adapter(name) or ROUTER in name


def expert_usage(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the usage of a model's LoRA experts; see `callback.expert_usage`."""
    from tritter.methods.experts import callback  # slow to import

    return callback.expert_usage(model, sequences, progress=progress)
