"""The diagonal Fisher information of a causal language model, from per-sequence gradients.

F = E[(∂L/∂θ)²], where L is the mean next-token loss of one sequence. Squaring the gradient of a
batch's mean instead gives about a B-th of it for a batch of B (arXiv 2502.11756 compares the
estimators in use). `empirical` takes the tokens of the text as labels; `true` draws them from the
model itself, which is the Fisher in the strict sense.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Estimator = Literal["empirical", "true"]
Progress = Callable[[int, int], None]


def diagonal_fisher(
    model: nn.Module,
    sequences: Tensor,
    *,
    batch_size: int = 8,
    estimator: Estimator = "empirical",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Estimate the Fisher of every parameter.

    Args:
        model: `model(input_ids=[B, T], use_cache=False).logits` is [B, T, V]; its modules' own
            randomness (dropout) is off while it is looked at.
        sequences: integers [N, T].
        batch_size: sequences whose gradients are held at a time; the result does not depend on it.
        estimator: `empirical` or `true`.
        seed: of the labels that `true` draws.
        progress: called with (sequences done, sequences in all).

    Returns:
        Parameter name → float32 tensor of the parameter's shape, averaged over the sequences. A
        tied parameter stands once, with the sum of what it does in both roles.
    """
    parameters = {name: p.detach().float() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    per_sequence = vmap(grad(_sequence_loss, argnums=1), in_dims=(None, None, 0, 0))
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    done = 0
    try:
        for batch in sequences.split(batch_size):
            input_ids = batch.long().to(next(iter(parameters.values())).device)
            labels = _labels(model, input_ids, estimator, generator)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
                gradients = per_sequence(model, parameters, input_ids, labels)
            for name, gradient in gradients.items():
                total[name] += gradient.square().sum(dim=0)
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))
    finally:
        model.train(was_training)
    return {name: value / len(sequences) for name, value in total.items()}


def _sequence_loss(
    model: nn.Module, parameters: Mapping[str, Tensor], input_ids: Tensor, labels: Tensor
) -> Tensor:
    """Mean next-token loss of one sequence; input_ids [T], labels [T - 1]."""
    arguments = {"input_ids": input_ids.unsqueeze(0), "use_cache": False}
    logits = functional_call(model, dict(parameters), (), arguments).logits[0]  # [T, V]
    return nn.functional.cross_entropy(logits[:-1].float(), labels)


def _labels(
    model: nn.Module, input_ids: Tensor, estimator: Estimator, generator: torch.Generator
) -> Tensor:
    """Return the labels of positions 0 … T-2, int64 [B, T - 1]."""
    if estimator == "empirical":
        return input_ids[:, 1:]
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    chances = logits.float().softmax(dim=-1).flatten(0, 1).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator)
    return drawn.view(len(input_ids), -1).to(input_ids.device)
