"""Mixtures on tiny stock models, with experts that have nonzero output."""

from collections.abc import Sequence

import torch
from torch import nn

from tests.oracle import tiny_llama
from tritter.checkpoints.expert_files import AdapterShape
from tritter.methods.experts.adapters import LoraLayers
from tritter.methods.experts.mixture import ExpertMixture, RouterKind

TARGETS = ("q_proj", "v_proj", "down_proj")


def mixture_of(
    model: nn.Module | None = None,
    *,
    ranks: Sequence[int] = (2, 4, 3),
    targets: Sequence[Sequence[str]] = (TARGETS, TARGETS, ("q_proj",)),
    is_shared: bool = False,
    router: RouterKind = "learned",
    has_base: bool = False,
) -> ExpertMixture:
    """Return a mixture whose B factors, routers and counts are random, in the model's dtype."""
    model = tiny_llama() if model is None else model
    evidence = None if router == "learned" else {"end_of_text_id": 0, "window": 6}
    mixture = ExpertMixture(
        model, router=router, has_base=has_base, is_shared=is_shared, evidence=evidence
    )
    for number, (rank, names) in enumerate(zip(ranks, targets, strict=False)):
        shape = AdapterShape(rank, 2.0 * rank + number, tuple(names))
        mixture.add(f"e{number}", shape, seed=number)
    torch.manual_seed(5)
    with torch.no_grad():
        for name in mixture.adapters:
            for key, parameter in LoraLayers(model).parameters(name).items():
                if ".lora_B." in key:
                    parameter.normal_(std=0.3)
        for router in mixture.routers():
            router.weight.normal_()
            router.bias.normal_()
    if mixture.evidence is not None:
        for number in range(len(mixture.names)):
            shares = torch.rand(mixture.evidence.counts.shape[1]) ** 4
            mixture.evidence.count(number, torch.multinomial(shares, 5000, replacement=True))
    return mixture
