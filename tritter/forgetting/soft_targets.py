"""T² · KL(teacher ‖ student) at temperature T, a few tokens at a time (arXiv 1503.02531, sec. 2).

A vocabulary is large: written down plainly, this loss holds half a dozen tensors [tokens, V] in
float32 beside the student's logits. Here the teacher's logits are made, used and dropped for as
many tokens at a time as fill a chunk of fixed size; of the size [tokens, V] there is the gradient
of the student's logits, in their own precision, and nothing else.

Shapes: N tokens, V entries of the vocabulary; k of them where only the teacher's best count.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ENTRIES = 2**20  # of one tensor of a chunk, tokens times vocabulary
_NEVER = -1e30  # as a logit: no probability, and finite, so that no product with it is undefined

Logits = Callable[[slice], Tensor]


def soft_target_loss(
    said: Tensor,
    wanted: Logits,
    places: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    left_out: Tensor | None = None,
    chunk_entries: int = CHUNK_ENTRIES,
) -> Tensor:
    """Return T² · KL(wanted ‖ said), summed over tokens, in float32 or wider; nats.

    Its gradient goes to `said` alone, once.

    Args:
        said: logits of the student [..., V], contiguous.
        wanted: slice of `places` → logits of the teacher [n, V]; asked for each of them once.
        places: int64 [N], which of the student's tokens, counted through all dimensions but the
            last, each at most once.
        temperature: T.
        top_k: the teacher's k most probable entries count one by one, and all others as one: both
            models' mass there is a bucket of its own. What is learned is then right where it is
            learned, which it is not where the k are renormalised (arXiv 2503.16870, sec. 3).
            None: all entries.
        left_out: int64 [N], an entry of each token that neither distribution has, both being
            renormalised; negative: none.
        chunk_entries: bound on n · V.
    """
    options = (temperature, top_k, left_out, chunk_entries)
    loss: Tensor = _SoftTargetLoss.apply(said, wanted, places, options)
    return loss


class _SoftTargetLoss(torch.autograd.Function):
    """The loss with its gradient, which is made with it: the teacher is asked once."""

    @staticmethod
    def forward(ctx: Any, said: Tensor, wanted: Logits, places: Tensor, options: Any) -> Tensor:
        temperature, top_k, left_out, chunk_entries = options
        flat = said.view(-1, said.shape[-1])
        dtype = torch.promote_types(said.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=said.device)
        gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        step = max(1, chunk_entries // flat.shape[-1])
        for start in range(0, len(places), step):
            part = slice(start, start + step)
            logits = [flat[places[part]], wanted(part)]
            scaled = [each.to(dtype) / temperature for each in logits]
            if left_out is not None:
                token = (left_out[part] >= 0).nonzero().squeeze(-1)
                for each in scaled:
                    each[token, left_out[part][token]] = _NEVER
            log_q, log_p = (each.log_softmax(dim=-1) for each in scaled)
            divergence, slope = _divergence(log_p, log_q, top_k)
            total += divergence
            if gradient is not None:
                gradient[places[part]] = slope.to(gradient.dtype)
        ctx.temperature, ctx.shape = temperature, said.shape
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return temperature**2 * total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: nobody comes here twice, which torch would tell by the version of the tensor
        gradient.mul_(outer[0] * ctx.temperature)
        return gradient.view(ctx.shape), None, None, None


def _divergence(log_p: Tensor, log_q: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q), summed over tokens, and its slope in the logits of q; both [n, V]."""
    if top_k is None or top_k >= log_p.shape[-1]:
        p = log_p.exp()
        divergence = (p * (log_p - log_q)).sum()
        return divergence, log_q.exp_().sub_(p)
    best, entries = log_p.topk(top_k, dim=-1)  # [n, k]
    p, q = log_p.exp(), log_q.exp()
    smallest = torch.finfo(p.dtype).tiny
    rest_p, rest_q = (  # [n, 1]
        each.scatter(-1, entries, 0.0).sum(dim=-1, keepdim=True).clamp_(min=smallest)
        for each in (p, q)
    )
    divergence = (best.exp() * (best - log_q.gather(-1, entries))).sum()
    divergence += (rest_p * (rest_p / rest_q).log()).sum()
    slope = q * (1 - rest_p / rest_q)
    return divergence, slope.scatter_(-1, entries, (q - p).gather(-1, entries))
