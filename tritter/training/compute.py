"""What a training step costs in model FLOPs: by what of the model needs a gradient in that step."""

from collections.abc import Collection

from torch import nn

from tritter.families import Flops, training_flops
from tritter.models import config_of
from tritter.training.parameters import live_layout


def flops_of_sequence(model: nn.Module, *, routed_to: Collection[int] | None = None) -> Flops:
    """Return the FLOPs of a step on one sequence, with what needs a gradient now.

    Args:
        routed_to: the experts that share the tokens evenly. Default: all.
    """
    config, trained = config_of(model), trained_tensors(model)
    return training_flops(
        config,
        is_trained=lambda tensor: tensor.name in trained,
        routed_to=routed_to,
    )


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the logical names of what needs a gradient in a live model."""
    return frozenset(
        part.tensor.name
        for stored in live_layout(model)
        if model.get_parameter(stored.name).requires_grad
        for part in stored.parts
    )
