"""Logit shift of a model at expansion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.core.streamed import StreamedModel, blocks
from tritter.errors import TritterError
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.statistics import finite_or_none


@dataclass(frozen=True, slots=True)
class Jump:
    """The largest change of a logit, absolute and in standard deviations of the old logits.

    Args:
        max_absolute: of the logits of old tokens.
        relative_to_std: the same in standard deviations; infinite if all old logits are equal.
        new_token_mass: mean probability of new tokens; None without new tokens. Rows of no token,
            which pad the vocabulary, do not count.
    """

    max_absolute: float
    relative_to_std: float
    new_token_mass: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the record for summary.json; non-finite values become None."""
        plain = {
            "max_absolute": finite_or_none(self.max_absolute),
            "relative_to_std": finite_or_none(self.relative_to_std),
        }
        if self.new_token_mass is not None:
            plain["new_token_mass"] = finite_or_none(self.new_token_mass)
        return plain


def logit_jump(
    before_model: nn.Module,
    after_model: nn.Module,
    input_ids: Tensor,
    *,
    new_tokens: Sequence[int] | None = None,
) -> Jump:
    """Compare two models on the same tokens, in float32 and without autocast.

    Args:
        before_model: the model before expansion.
        after_model: the model after expansion.
        input_ids: int64 [B, T] of real text; random tokens may miss some changes.
        new_tokens: their ids. Default: all rows that the vocabulary has more.

    Raises:
        TritterError: the vocabulary shrank.
    """
    before, after = logits_of(before_model, input_ids), logits_of(after_model, input_ids)
    kinds, mass = _kinds_of_rows(before.shape[-1], after.shape[-1], new_tokens), None
    old = (kinds == _OLD).nonzero().flatten()
    kept = before[..., old]
    largest = (after[..., old] - kept).abs().max()
    if bool((kinds == _NEW).any()):
        mass = float(after.softmax(dim=-1)[..., kinds == _NEW].sum(dim=-1).mean())
    return Jump(float(largest), float(largest / kept.std()), mass)


_OLD, _NEW, _UNUSED = range(3)  # kinds of rows; rows of no token that were there are old


def _kinds_of_rows(before: int, after: int, new_tokens: Sequence[int] | None) -> Tensor:
    """Return the kind of each row of the vocabulary after the expansion, int64 [after]."""
    if after < before:
        raise TritterError(
            f"evaluation: vocabularies of {before} tokens before and {after} after the expansion "
            "cannot be compared; old tokens are missing"
        )
    kinds = torch.full((after,), _UNUSED)
    kinds[:before] = _OLD
    new = range(before, after) if new_tokens is None else new_tokens
    kinds[torch.tensor(new, dtype=torch.int64)] = _NEW
    return kinds


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return logits, float32 [B, T, V], for tokens int64 [B, T]."""
    with eval_mode(model) as device, torch.autocast(device.type, enabled=False):
        return model(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()


# Logit shift of checkpoints of any size.
#
# The weights stay on disk (`tritter.core.streamed`): layers run one by one, then logits are
# compared in blocks of the vocabulary.
#
# Shapes: B sequences, T tokens, V tokens of a vocabulary block, H hidden size.

_ROUNDING = 1e-4  # relative to the largest hidden state, far above float32 rounding

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FolderJump:
    """The logit shift between two checkpoints and its origin.

    Args:
        jump: the logit shift.
        states: hidden states of both models, before the first layer and after each layer.
    """

    jump: Jump
    states: tuple[Sequence[Tensor], Sequence[Tensor]]

    def first_difference(self, layer_sources: Sequence[int]) -> str:
        """Return the first module of the result whose output differs from the source model.

        Args:
            layer_sources: index of the copied source layer, for each layer of the result.
        """
        before, after = self.states
        if not _are_same(before[0], after[0]):
            return "the embedding"
        # A copy of the next source layer either computes it, or is an identity if more copies
        # follow. Any other layer is an identity. A wider hidden state begins with the old one.
        done = 0  # source layers that are already computed
        for layer, source in enumerate(layer_sources):
            output = after[layer + 1]
            if source == done and _are_same(before[done + 1], output):
                done += 1
                continue
            is_due = source == done and source not in layer_sources[layer + 1 :]
            if is_due or not _are_same(before[done], output):
                return f"layer {layer}"
        return "the final norm or the head"


def folder_jump(
    before: Path,
    after: Path,
    input_ids: Tensor,
    *,
    new_tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> FolderJump:
    """Compare the models of two folders on the same tokens, in float32.

    Args:
        before: folder of the model before expansion.
        after: folder of the model after expansion.
        input_ids: int64 [B, T].
        new_tokens: their ids. Default: all rows that the vocabulary has more.
        progress: called with bytes read so far and in total.

    Raises:
        TritterError: a checkpoint is damaged or unsupported, or the vocabulary shrank.
    """
    used = 0

    def count(num_bytes: int) -> None:
        nonlocal used
        used += num_bytes
        if progress is not None:
            progress(used, total)

    models = [StreamedModel(folder, input_ids, on_read=count) for folder in (before, after)]
    total = sum(model.num_bytes for model in models)
    before_size, after_size = (model.vocab_size for model in models)
    kinds = _kinds_of_rows(before_size, after_size, new_tokens)
    step = min(model.rows_per_block for model in models)
    largest, mass = torch.zeros(()), None
    moments = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares
    totals = [torch.tensor(-torch.inf)] * 3  # log of the sum of exp over the rows of each kind
    parts = (slice(0, before_size), slice(before_size, after_size))
    for rows in chain.from_iterable(blocks(part, step) for part in parts):
        new_BTV, kinds_V = models[1].logits(rows), kinds[rows]
        for kind in kinds_V.unique().tolist():
            sum_BT = new_BTV[..., kinds_V == kind].logsumexp(dim=-1)
            totals[kind] = torch.logaddexp(totals[kind], sum_BT)
        if bool((kinds_V == _OLD).any()):
            old_BTV = models[0].logits(rows)[..., kinds_V == _OLD]
            largest = torch.maximum(largest, (new_BTV[..., kinds_V == _OLD] - old_BTV).abs().max())
            wide = old_BTV.double()
            number = torch.tensor(wide.numel()).double()
            moments += torch.stack([number, wide.sum(), wide.square().sum()])
    if bool((kinds == _NEW).any()):
        others = torch.logaddexp(totals[_OLD], totals[_UNUSED])
        mass = float((totals[_NEW] - others).sigmoid().mean())
    number, total_logits, squares = moments
    # Same as `Tensor.std`
    deviation = ((squares - total_logits**2 / number).clamp(min=0) / (number - 1)).sqrt()
    jump = Jump(float(largest), float(largest.double() / deviation), mass)
    return FolderJump(jump, (models[0].states, models[1].states))


def _are_same(old: Tensor, new: Tensor) -> bool:
    moved = (new[..., : old.shape[-1]] - old).abs().max()
    return bool(moved <= _ROUNDING * old.abs().max())
