"""Mixtures on tiny stock models, with experts that compute something."""

from collections.abc import Sequence

import torch
from torch import nn

from tests.oracle import tiny_llama
from tritter.experts.adapters import AdapterShape, parameters_of
from tritter.experts.mixture import ExpertMixture

TARGETS = ("q_proj", "v_proj", "down_proj")


def mixture_of(
    model: nn.Module | None = None,
    *,
    ranks: Sequence[int] = (2, 4, 3),
    targets: Sequence[Sequence[str]] = (TARGETS, TARGETS, ("q_proj",)),
    is_shared: bool = False,
) -> ExpertMixture:
    """Return a mixture whose B factors and routers are random, in the dtype of the model."""
    model = tiny_llama() if model is None else model
    mixture = ExpertMixture(model, is_shared=is_shared)
    for number, (rank, names) in enumerate(zip(ranks, targets, strict=False)):
        shape = AdapterShape(rank, 2.0 * rank + number, tuple(names))
        mixture.add(f"e{number}", shape, seed=number)
    torch.manual_seed(5)
    with torch.no_grad():
        for name in mixture.names:
            for key, parameter in parameters_of(model, name).items():
                if ".lora_B." in key:
                    parameter.normal_(std=0.3)
        for router in mixture.routers():
            router.weight.normal_()
            router.bias.normal_()
    return mixture
