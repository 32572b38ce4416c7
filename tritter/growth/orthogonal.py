"""Directions that differ from what a layer's neurons look at already ("contrastive growth")."""

from typing import Literal

import torch
from torch import Tensor

Against = Literal["none", "neighbours", "activations"]
MAX_NEIGHBOURS = 16


def orthogonalised(
    rows: Tensor, existing: Tensor, *, against: Against, inputs: Tensor | None = None
) -> Tensor:
    """Return new rows without what their nearest neighbours look at, of the length they had.

    Against as many rows as there are dimensions nothing would be left, so only the nearest count,
    at most a quarter of the dimensions.

    Args:
        rows: [k, H], each made orthogonal to its neighbours and to the rows before it.
        existing: [F, H].
        against: `neighbours`: as directions; `activations`: what they compute of the inputs is
            uncorrelated.
        inputs: [T, H], of `activations`.
    """
    if against == "none":
        return rows
    metric = None
    if against == "activations":
        assert inputs is not None, "activations are those of some inputs"
        metric = inputs.T @ inputs / len(inputs)  # [H, H]
    count = max(1, min(MAX_NEIGHBOURS, existing.shape[1] // 4))
    seen = existing if metric is None else existing @ metric
    norms = (existing * seen).sum(dim=1).clamp_min(1e-30).sqrt()
    made = list[Tensor]()
    for row in rows:
        nearest = existing[((seen @ row).abs() / norms).topk(min(count, len(existing))).indices]
        left = _without(row, torch.stack([*nearest, *made[-count:]]), metric)
        length = torch.linalg.vector_norm(left)
        if float(length) > 1e-6 * float(torch.linalg.vector_norm(row)):
            row = left * (torch.linalg.vector_norm(row) / length)
        made.append(row)
    return torch.stack(made) if made else rows


def _without(row: Tensor, others: Tensor, metric: Tensor | None) -> Tensor:
    """Return a row minus its projection on the span of others, by the inner product of a metric."""
    seen = others if metric is None else others @ metric  # [m, H]
    coefficients = torch.linalg.lstsq(
        (seen @ others.T).double(), (seen @ row).double()[:, None], driver="gelsd"
    ).solution
    return row - (coefficients.squeeze(1).to(row) @ others)
