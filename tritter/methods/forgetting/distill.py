"""Distillation: match the model before training (Li & Hoiem 2016, LwF, arXiv 1606.09282).

weight · T² · KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv 1503.02531), added
to the loss of the task. The teacher is the model before the expansion, or any other model with the
same tokenizer. It sees the new data, as in LwF, or the rows that another method replays.

When to use: without old data, with `self_replay`. Cost: the teacher's weights and its forward pass,
a third of a step's FLOPs if both are as large and all rows are read. The student reuses the logits
of the task; the only extra tensor of their size is their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.core.families import forward_flops
from tritter.data.batches import num_ranks
from tritter.data.chat import ids_of
from tritter.data.packing import forward_options, kept_tokens, lengths_read
from tritter.errors import Problem
from tritter.options import Count, RunRequest, Text, options
from tritter.training import ForgettingMethod, Needs, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# T² · KL(teacher ‖ student) at temperature T, a few tokens at a time (arXiv 1503.02531, sec. 2).
#
# With a large vocabulary a plain implementation needs half a dozen float32 tensors [tokens, V] in
# addition to the student's logits. Here the teacher's logits are computed, used and freed in chunks
# of a fixed size. The only tensor of size [tokens, V] is the gradient of the student's logits, in
# their own precision.
#
# Shapes: N tokens, V entries of the vocabulary; k entries if only the teacher's top k count.

_CHUNK_ENTRIES = 2**20  # entries of one tensor of a chunk, tokens times vocabulary
_NEVER = -1e30  # a logit with probability zero; finite, so that products with it are defined

_Logits = Callable[[slice], "Tensor"]
_Rows = Literal["new", "old", "both"]


def _soft_target_loss(
    student: Tensor,
    teacher: _Logits,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    excluded: Tensor | None = None,
    chunk_entries: int = _CHUNK_ENTRIES,
) -> Tensor:
    """Return T² · KL(teacher ‖ student) in nats, summed over tokens, in float32 or wider.

    Gradients flow to the student's logits only, and only once.

    Args:
        student: logits of the student [..., V], contiguous.
        teacher: slice of `tokens` → logits of the teacher [n, V]; called once for each slice.
        tokens: int64 [N], flat indices of the student's tokens (all dimensions but the last), each
            at most once.
        temperature: T.
        top_k: the teacher's k most probable entries count individually, and all others as one
            bucket. The result is then unbiased for these k, unlike renormalising them
            (arXiv 2503.16870, sec. 3). None: all entries.
        excluded: int64 [N], one entry per token to exclude from both distributions, which are then
            renormalised; negative: none.
        chunk_entries: upper bound on n · V.
    """
    options = (temperature, top_k, excluded, chunk_entries)
    loss: Tensor = _autograd_function().apply(student, teacher, tokens, options)
    return loss


@cache
def _autograd_function() -> type[torch.autograd.Function]:
    """Return the loss as an autograd function: forward also computes the gradient."""
    import torch

    class SoftTargetLoss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, student: Tensor, teacher: _Logits, tokens: Tensor, options: Any
        ) -> Tensor:
            temperature, top_k, excluded, chunk_entries = options
            flat = student.view(-1, student.shape[-1])
            dtype = torch.promote_types(student.dtype, torch.float32)
            total = torch.zeros((), dtype=dtype, device=student.device)
            gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
            step = max(1, chunk_entries // flat.shape[-1])
            for start in range(0, len(tokens), step):
                part = slice(start, start + step)
                logits = [flat[tokens[part]], teacher(part)]
                scaled = [each.to(dtype) / temperature for each in logits]
                if excluded is not None:
                    token = (excluded[part] >= 0).nonzero().squeeze(-1)
                    for each in scaled:
                        each[token, excluded[part][token]] = _NEVER
                log_q, log_p = (each.log_softmax(dim=-1) for each in scaled)
                divergence, slope = _divergence(log_p, log_q, top_k)
                total += divergence
                if gradient is not None:
                    gradient[tokens[part]] = slope.to(gradient.dtype)
            ctx.temperature, ctx.shape = temperature, student.shape
            if gradient is not None:
                ctx.save_for_backward(gradient)
            loss: Tensor = temperature**2 * total
            return loss

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
            (gradient,) = ctx.saved_tensors
            # In place: backward is called only once, which torch checks by the tensor's version
            gradient.mul_(outer[0] * ctx.temperature)
            return gradient.view(ctx.shape), None, None, None

    return SoftTargetLoss


def _divergence(log_p: Tensor, log_q: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q), summed over tokens, and its gradient in the logits of q; both [n, V]."""
    import torch

    if top_k is None or top_k >= log_p.shape[-1]:
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(), log_q.exp_().sub_(p)  # in this order
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


@options
class DistillOptions:
    """Teacher, weight and rows of the distillation loss."""

    weight: Annotated[float, Field(ge=0)] = 2.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    rows: _Rows | None = None
    top_k: Count | None = None
    mask_gold: bool = False
    teacher: Text | None = None


class Distill(ForgettingMethod):
    """Distillation from a teacher, which is neither trained nor saved.

    Args:
        weight: of the divergence; the loss of the task has weight 1.
        temperature: of both models' probabilities.
        rows: rows of a batch: `new`, `old` (replayed by another method) or `both`. None: `old` if
            another method replays any, else `new`.
        top_k: the teacher's most probable entries that count individually; None: all.
        mask_gold: exclude the actual next token, which the task's loss covers, from both.
        teacher: a checkpoint; None: the model before the expansion.
    """

    name = "distill"
    Options = DistillOptions

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher: nn.Module | None = None
        self._flops = 0.0  # since the last call of the hook

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(teacher=True, teacher_folder=options.teacher)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        is_mixed = any(one.kind.needs(one.options).mixes for one in run.forgetting)
        if options.rows == "old" and not is_mixed:
            reason = (
                "there are no old rows, because no method replays any; use new, or add "
                "replay: forgetting=[replay,distill]"
            )
            yield Problem("forgetting.distill.rows", options.rows, reason=reason)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        from tritter.core.models import convert  # imports transformers, so not at the top

        assert task.teacher is not None, "`needs` asks for a teacher"
        self._teacher = convert(task.teacher, next(model.parameters()).dtype).eval()

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> Tensor:
        """Return weight · T² · KL, averaged over the tokens of the chosen rows.

        The average is over all batches of a step and all processes: their gradients are averaged.
        """
        import torch

        from tritter.core.models import model_of  # imports transformers, so not at the top

        assert self._teacher is not None
        of_batch, length = batch["input_ids"], batch["input_ids"].shape[1]
        rows = self._rows(batch)
        input_ids, reading = of_batch[rows], forward_options(batch, rows)
        mask = reading.get("attention_mask")
        lengths = self._lengths(model, batch)
        self._flops += forward_flops(model_of(self._teacher)).of_all(lengths)
        positions = (length * rows[:, None] + torch.arange(length, device=rows.device)).flatten()
        kept = kept_tokens(model, input_ids, mask)
        excluded = None
        if self.options.mask_gold:  # the next token; the last token of a row has none
            none = torch.full_like(input_ids[:, :1], -1)
            excluded = torch.cat([ids_of(input_ids)[:, 1:], none], dim=1).flatten()
        if kept is not None:
            kept = kept.flatten()
            positions, excluded = positions[kept], None if excluded is None else excluded[kept]
        total = _soft_target_loss(
            logits,
            self._teacher_logits(input_ids, reading, kept),
            positions,
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            excluded=excluded,
        )
        window = batch.get("window")
        all_lengths = [lengths] if window is None else [self._lengths(model, w) for w in window]
        count = sum(at * number for each in all_lengths for at, number in each.items())
        return self.options.weight * total * len(all_lengths) * num_ranks() / max(1, count)

    def _rows(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of the chosen rows of a batch, [n]."""
        import torch

        input_ids = batch["input_ids"]
        is_old = batch.get("is_replay", torch.zeros(len(input_ids), dtype=torch.bool))
        kind = self.options.rows or ("old" if self.has_replay else "new")
        chosen = {"new": ~is_old, "old": is_old, "both": torch.ones_like(is_old)}
        return chosen[kind].nonzero().squeeze(-1).to(input_ids.device)

    def _lengths(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[int, int]:
        """Return `lengths_read` of the chosen rows."""
        rows = self._rows(batch)
        mask = forward_options(batch, rows).get("attention_mask")
        return lengths_read(model, batch["input_ids"][rows], mask)

    def observe_step(self, model: nn.Module, step: int) -> float:
        flops, self._flops = self._flops, 0.0
        return flops

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        self._teacher = None
        return {}

    def _teacher_logits(
        self, input_ids: Tensor, reading: Mapping[str, Tensor], kept: Tensor | None
    ) -> _Logits:
        """Run the teacher on rows [n, T] and return a function from a slice to its logits.

        Args:
            reading: further inputs of the teacher's forward pass.
            kept: bool [n·T], the tokens that are used; None: all.
        """
        import torch

        from tritter.core.models import backbone_of, head_of  # imports transformers

        assert self._teacher is not None
        if not len(input_ids):
            return lambda part: input_ids  # never called
        head = head_of(self._teacher)
        reader = self._teacher if head is None else backbone_of(self._teacher)
        with torch.no_grad():
            read = reader(input_ids=input_ids, use_cache=False, **reading)
        found: Tensor = read.logits if head is None else read.last_hidden_state
        found = found.flatten(0, 1)
        found = found if kept is None else found[kept]
        return lambda part: found[part] if head is None else head(found[part])
