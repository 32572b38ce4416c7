"""Independent oracle of dense models made sparse: what stock classes compute with and without."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tritter.core.expansions import ExpansionSpec, ResolvedExpansion, build_steps
from tritter.core.families import Model, unpack_all
from tritter.core.stock_routers import AddedExperts

PARTNERS = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}


def is_settled(folder: Path) -> bool:
    """Return True if stock classes compute the function of a folder with experts."""
    added = AddedExperts.read(folder)
    return added is None or added.is_settled


def steps_of(
    model: PreTrainedModel, *specs: ExpansionSpec, seed: int = 0
) -> tuple[ResolvedExpansion, ...]:
    return build_steps(Model(oracle_growth.config_of(model)), specs, seed=seed)


def upcycled(
    model: PreTrainedModel, specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PreTrainedModel:
    """Return the stock model that `specs` make of `model`, in memory and in its dtype."""
    return oracle_growth.grown(model, steps_of(model, *specs, seed=seed))


def identity_error(before: nn.Module, after: nn.Module, input_ids: Tensor) -> float:
    """Return max |Δ logits| of two float64 models, the classes' float32 casts lifted."""
    with oracle.float64_casts():
        return float(
            (oracle.logits(before, input_ids) - oracle.logits(after, input_ids)).abs().max()
        )


def by_logical_name(model: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return values by logical name, experts one by one, for values by name in memory."""
    config = oracle_growth.config_of(model)
    return unpack_all(Model(config).layout("live"), values)


def expert_gap(model: PreTrainedModel, *, layer: int = 0, part: str = "gate") -> float:
    """Return the distance of the closest two experts of a layer, relative to their size."""
    weights = oracle_growth.logical_state(model)
    stem = f"layers.{layer}.experts."
    held = [v for name, v in weights.items() if name.startswith(stem) and name.endswith(part)]
    gaps = torch.tensor(
        [float((a - b).norm() / a.norm()) for i, a in enumerate(held) for b in held[:i]]
    )
    return float(gaps.min())


def trained(
    model: PreTrainedModel, *, steps: int, learning_rate: float, balance: float = 0.0
) -> PreTrainedModel:
    """Train a stock model on random tokens, in place.

    Args:
        balance: weight of transformers' own load-balancing loss.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        input_ids = oracle.tokens(seed=step, batch=4)
        output = model(input_ids=input_ids, labels=input_ids, output_router_logits=balance > 0)
        optimizer.zero_grad()
        loss = output.loss if balance == 0 else _balanced(output, model, balance)
        loss.backward()
        optimizer.step()
    return model.eval()


def balance_gradients(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """Return the gradients of transformers' load-balancing loss alone."""
    model.zero_grad()
    model(input_ids=input_ids, labels=input_ids, output_router_logits=True).aux_loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _balanced(output: object, model: PreTrainedModel, balance: float) -> Tensor:
    coefficient = model.config.router_aux_loss_coef
    return output.loss + (balance - coefficient) * output.aux_loss  # type: ignore[attr-defined]
