"""What a mixture of experts costs in model FLOPs: the base, the adapters and what gates them.

Counted as in `tritter.families.flops`. Where experts are chosen (`top_k`), each is counted with an
even share of the tokens; the lookups of evidence are free.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from tritter.experts.adapters import adapted_layers, decoder_layers, factors
from tritter.experts.mixture import ROUTER, ExpertMixture
from tritter.families import Adapters, Flops, Gating, LowRank, forward_flops
from tritter.models import config_of
from tritter.training.compute import flops_of_sequence
from tritter.training.parameters import WRAPPED, live_layout


def step_flops_of(mixture: ExpertMixture) -> Flops:
    """Return the FLOPs of a training step on one sequence, with what needs a gradient now."""
    return flops_of_sequence(mixture.model, adapters=adapters_of(mixture))


def forward_flops_of(mixture: ExpertMixture) -> Flops:
    """Return the FLOPs of reading one sequence, output head included."""
    return forward_flops(config_of(mixture.model), adapters=adapters_of(mixture))


def adapters_of(mixture: ExpertMixture) -> Adapters:
    """Return what stands beside the base's own tensors in a mixture."""
    number, top_k = len(mixture.names), mixture.routing.top_k
    share = 1 if top_k is None or top_k >= number else top_k / number
    places, low_rank = dict(_places(mixture.model)), {}
    for name, layer in adapted_layers(mixture.model):
        found = (factors(layer, expert) for expert in mixture.adapters)
        beside = [
            LowRank(
                rank=each.rank,
                trains_down=each.down.requires_grad,
                trains_up=each.up.requires_grad,
                share=share,
            )
            for each in found
            if each is not None
        ]
        first, *others = places[name]
        low_rank[first] = beside
        low_rank |= {other: [replace(each, has_down=False) for each in beside] for other in others}
    return Adapters(low_rank, dict(_gating(mixture)))


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name of a layer with adapters, logical names of its matrix or matrices)."""
    for stored in live_layout(model):
        layer, is_wrapped, _ = stored.name.partition(f"{WRAPPED}.weight")
        if is_wrapped:
            yield layer, tuple(part.tensor.name for part in stored.parts)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, adapted in adapted_layers(model):
        if adapted is head:  # where it is tied, its weight is the embedding's
            yield name, ("head",)


def _gating(mixture: ExpertMixture) -> Iterator[tuple[int, Gating]]:
    """Yield (number, gating) of the decoder layers whose gates are learned."""
    for number, layer in decoder_layers(mixture.model).items():
        router = getattr(layer, ROUTER, None) or getattr(mixture.model, ROUTER, None)
        if router is not None:
            yield number, Gating(len(mixture.names), router.weight.requires_grad)
