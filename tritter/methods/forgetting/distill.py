"""Distillation: answer as the model did before (Li & Hoiem 2016, LwF, arXiv 1606.09282).

weight · T² · KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv 1503.02531), added
to the loss of the task. The teacher is the model before the expansion, or any other with the same
tokenizer. As in LwF the text that it is asked about is the new one: no old text is needed.

When to use: there is no old text, or beside replay. Cost: the teacher's forward pass, a third of a
training step's FLOPs where it is as large as what is trained; its weights; the student's logits
are those of the task, and their gradient is all that is held of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.core.families import forward_flops
from tritter.data.batches import this_rank
from tritter.data.packing import kept_tokens, lengths_read
from tritter.errors import Problem, TritterError
from tritter.options import Count, RunRequest, Text, options
from tritter.training import ForgettingMethod, Needs, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# T² · KL(teacher ‖ student) at temperature T, a few tokens at a time (arXiv 1503.02531, sec. 2).
#
# A vocabulary is large: written down plainly, this loss holds half a dozen tensors [tokens, V] in
# float32 beside the student's logits. Here the teacher's logits are made, used and dropped for as
# many tokens at a time as fill a chunk of fixed size; of the size [tokens, V] there is the
# gradient of the student's logits, in their own precision, and nothing else.
#
# Shapes: N tokens, V entries of the vocabulary; k of them where only the teacher's best count.

CHUNK_ENTRIES = 2**20  # of one tensor of a chunk, tokens times vocabulary
_NEVER = -1e30  # as a logit: no probability, and finite, so that no product with it is undefined

Logits = Callable[[slice], "Tensor"]


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
    loss: Tensor = _autograd_function().apply(said, wanted, places, options)
    return loss


@cache
def _autograd_function() -> type[torch.autograd.Function]:
    """Return the loss with its gradient, which is made with it: the teacher is asked once."""
    import torch

    class SoftTargetLoss(torch.autograd.Function):
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
            loss: Tensor = temperature**2 * total
            return loss

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
            (gradient,) = ctx.saved_tensors
            # In place: nobody comes here twice, which torch would tell by the version of the tensor
            gradient.mul_(outer[0] * ctx.temperature)
            return gradient.view(ctx.shape), None, None, None

    return SoftTargetLoss


def _divergence(log_p: Tensor, log_q: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q), summed over tokens, and its slope in the logits of q; both [n, V]."""
    import torch

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


Rows = Literal["new", "old", "both"]


@options
class DistillOptions:
    """Whom the model is to answer like, how firmly, and on which text."""

    weight: Annotated[float, Field(ge=0)] = 2.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    rows: Rows = "new"
    top_k: Count | None = None
    mask_gold: bool = False
    teacher: Text | None = None


class Distill(ForgettingMethod):
    """Distillation from a teacher, which stands outside of what is trained and saved.

    Args:
        weight: of the divergence, the loss of the task being 1.
        temperature: of both models' probabilities.
        rows: of a batch: `new`, `old` (those that another method replays) or `both`.
        top_k: see `soft_target_loss`.
        mask_gold: the text's own next token is left out of both distributions: about it the task
            has its own say.
        teacher: a checkpoint; None: the model before the expansion.
    """

    name = "distill"
    Options = DistillOptions

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher: nn.Module | None = None
        self._flops = 0.0  # since the last look

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(teacher=True, teacher_folder=options.teacher)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        is_mixed = any(one.kind.needs(one.options).mixes for one in run.forgetting)
        if options.rows == "old" and not is_mixed:
            reason = (
                "there are no old rows, as no method replays any; allowed is new, or replay "
                "beside it: forgetting=[replay,distill]"
            )
            yield Problem("forgetting.distill.rows", options.rows, reason=reason)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        if task.teacher is None:
            raise TritterError("forgetting=distill was given no teacher.")
        self._teacher = task.teacher.to(next(model.parameters()).dtype).eval()

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """Return weight · T² · KL, averaged over the tokens of the rows that it is of.

        Over those of all processes: each averages its own gradients with the others'.
        """
        import torch

        from tritter.core.models import config_of  # transformers, which a refusal does not wait for

        assert self._teacher is not None
        of_batch, length = batch["input_ids"], batch["input_ids"].shape[1]
        is_old = batch.get("is_replay")
        if is_old is None:
            is_old = torch.zeros(len(of_batch), dtype=torch.bool)
        chosen = {"new": ~is_old, "old": is_old, "both": torch.ones_like(is_old)}
        rows = chosen[self.options.rows].nonzero().squeeze(-1).to(of_batch.device)  # [n]
        input_ids = of_batch[rows]
        lengths = lengths_read(model, input_ids)
        self._flops += forward_flops(config_of(self._teacher)).of_all(lengths)
        tokens = torch.arange(length, device=rows.device)
        places, kept = (length * rows[:, None] + tokens).flatten(), kept_tokens(model, input_ids)
        left_out = None
        if self.options.mask_gold:  # the token behind each; behind a row's last one is none
            none = torch.full_like(input_ids[:, :1], -1)
            left_out = torch.cat([input_ids[:, 1:], none], dim=1).flatten()
        if kept is not None:
            kept = kept.flatten()
            places, left_out = places[kept], None if left_out is None else left_out[kept]
        total = soft_target_loss(
            logits,
            self._answers(input_ids, kept),
            places,
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            left_out=left_out,
        )
        count = sum(at * number for at, number in lengths.items())
        return self.options.weight * total / max(1.0, count / this_rank().count)

    def look(self, model: nn.Module, step: int) -> float:
        flops, self._flops = self._flops, 0.0
        return flops

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        self._teacher = None
        return {}

    def _answers(self, input_ids: Tensor, kept: Tensor | None) -> Logits:
        """Let the teacher read rows [n, T], and return what gives its logits, some at a time.

        Args:
            kept: bool [n·T], the tokens that are asked about; None: all.
        """
        import torch

        from tritter.core.models import backbone_of, head_of  # transformers, as above

        assert self._teacher is not None
        if not len(input_ids):
            return lambda part: input_ids  # nobody asks
        head = head_of(self._teacher)
        with torch.no_grad():
            read = backbone_of(self._teacher)(input_ids=input_ids, use_cache=False)
        hidden = read.last_hidden_state.flatten(0, 1)
        hidden = hidden if kept is None else hidden[kept]
        return lambda part: head(hidden[part])
