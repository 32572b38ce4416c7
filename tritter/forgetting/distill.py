"""Distillation: answer as the model did before (Li & Hoiem 2016, LwF, arXiv 1606.09282).

weight · T² · KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv 1503.02531), added
to the loss of the task. The teacher is the model before the expansion, or any other with the same
tokenizer. As in LwF the text that it is asked about is the new one: no old text is needed.

When to use: there is no old text, or beside replay. Cost: the teacher's forward pass, a third of a
training step's FLOPs where it is as large as what is trained; its weights; the student's logits
are those of the task, and their gradient is all that is held of that size.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tritter.data.apart import kept_tokens, lengths_read
from tritter.data.ranks import this_rank
from tritter.errors import TritterError
from tritter.families import forward_flops
from tritter.forgetting.soft_targets import Logits, soft_target_loss
from tritter.options import Count, Text, options
from tritter.training import ForgettingMethod, Needs, Task

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

    def __init__(
        self,
        *,
        weight: float,
        temperature: float = 2.0,
        rows: Rows = "new",
        top_k: int | None = None,
        mask_gold: bool = False,
        teacher: str | None = None,
    ) -> None:
        self.weight = weight
        self.temperature = temperature
        self.rows = rows
        self.top_k = top_k
        self.mask_gold = mask_gold
        self._teacher: nn.Module | None = None
        self._flops = 0.0  # since the last look

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(
            teacher=True, teacher_place=options.teacher, replayed_rows=options.rows == "old"
        )

    def begin_task(self, model: nn.Module, task: Task) -> None:
        if task.teacher is None:
            raise TritterError("forgetting=distill was given no teacher.")
        self._teacher = task.teacher.to(next(model.parameters()).dtype).eval()

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """Return weight · T² · KL, averaged over the tokens of the rows that it is of.

        Over those of all processes: each averages its own gradients with the others'.
        """
        rows, length = self._rows(batch), batch["input_ids"].shape[1]
        input_ids, ranks = batch["input_ids"][rows], this_rank().count
        lengths = lengths_read(model, input_ids)
        self._flops += self._flops_of(lengths)
        tokens = torch.arange(length, device=rows.device)
        places, kept = (length * rows[:, None] + tokens).flatten(), kept_tokens(model, input_ids)
        left_out = _next_tokens(input_ids) if self.mask_gold else None
        if kept is not None:
            kept = kept.flatten()
            places, left_out = places[kept], None if left_out is None else left_out[kept]
        total = soft_target_loss(
            logits,
            self._answers(input_ids, kept),
            places,
            temperature=self.temperature,
            top_k=self.top_k,
            left_out=left_out,
        )
        count = sum(at * number for at, number in lengths.items())
        return self.weight * total / max(1.0, count / ranks)

    def look(self, model: nn.Module, step: int) -> float:
        flops, self._flops = self._flops, 0.0
        return flops

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        self._teacher = None
        return {}

    def _rows(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return which rows of a batch it is of, int64 [n]."""
        is_old = batch.get("is_replay")
        if is_old is None:
            is_old = torch.zeros(len(batch["input_ids"]), dtype=torch.bool)
        chosen = {"new": ~is_old, "old": is_old, "both": torch.ones_like(is_old)}[self.rows]
        return chosen.nonzero().squeeze(-1).to(batch["input_ids"].device)

    def _answers(self, input_ids: Tensor, kept: Tensor | None) -> Logits:
        """Let the teacher read rows [n, T], and return what gives its logits, some at a time.

        Args:
            kept: bool [n·T], the tokens that are asked about; None: all.
        """
        from tritter.models import backbone_of, head_of  # transformers, as below

        assert self._teacher is not None
        if not len(input_ids):
            return lambda part: input_ids  # nobody asks
        head = head_of(self._teacher)
        with torch.no_grad():
            read = backbone_of(self._teacher)(input_ids=input_ids, use_cache=False)
        hidden = read.last_hidden_state.flatten(0, 1)
        hidden = hidden if kept is None else hidden[kept]
        return lambda part: head(hidden[part])

    def _flops_of(self, lengths: Mapping[int, int]) -> float:
        from tritter.models import config_of  # transformers, which a refusal does not wait for

        assert self._teacher is not None
        return forward_flops(config_of(self._teacher)).of_all(lengths)


def _next_tokens(input_ids: Tensor) -> Tensor:
    """Return the token behind each, of all rows in a line; behind a row's last one is none."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -1)], dim=1).flatten()
