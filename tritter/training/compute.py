"""What a training step costs in model FLOPs: by what of the model needs a gradient in that step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from tritter.families import NO_ADAPTERS, Adapters, Flops, training_flops
from tritter.models import config_of
from tritter.training.parameters import live_layout


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of a step, whatever it reads.

    Args:
        sequence: of each sequence, or document where models read these apart.
        besides: of the step, of all processes together.
    """

    sequence: Flops
    besides: float = 0.0

    def of(self, lengths: Mapping[int, int]) -> float:
        """Return the FLOPs of a step on sequences, by length how many of all processes."""
        return self.sequence.of_all(lengths) + self.besides


def flops_of_sequence(
    model: nn.Module,
    *,
    routed_to: Collection[int] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:
    """Return the FLOPs of a step on one sequence, with what needs a gradient now.

    Args:
        routed_to: the experts that share the tokens evenly. Default: all.
        adapters: what stands beside the model's own tensors.
    """
    config, trained = config_of(model), trained_tensors(model)
    return training_flops(
        config,
        is_trained=lambda tensor: tensor.name in trained,
        routed_to=routed_to,
        adapters=adapters,
    )


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the logical names of what needs a gradient in a live model."""
    return frozenset(
        part.tensor.name
        for stored in live_layout(model)
        if model.get_parameter(stored.name).requires_grad
        for part in stored.parts
    )
