"""How far a model's function moved when it was expanded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.core.streamed import StreamedModel, blocks
from tritter.errors import TritterError
from tritter.evaluation.inference import evaluating
from tritter.evaluation.statistics import finite_or_none


@dataclass(frozen=True, slots=True)
class Jump:
    """The largest change of a logit, in logits and in standard deviations of the old logits."""

    max_absolute: float
    relative_to_std: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the record of summary.json; what is not finite becomes None."""
        return {
            "max_absolute": finite_or_none(self.max_absolute),
            "relative_to_std": finite_or_none(self.relative_to_std),
        }


def logit_jump(before_model: nn.Module, after_model: nn.Module, input_ids: Tensor) -> Jump:
    """Compare two models on the same tokens, in float32 and without autocast.

    Args:
        input_ids: int64 [B, T], real text: random tokens hide what only some of them excite.

    Raises:
        TritterError: the two have different vocabularies.
    """
    before, after = logits_of(before_model, input_ids), logits_of(after_model, input_ids)
    if before.shape != after.shape:
        raise TritterError(
            f"evaluation: logits of shape {list(before.shape)} before and {list(after.shape)} "
            "after the expansion cannot be compared; the vocabulary must stay"
        )
    largest = (after - before).abs().max()
    return Jump(max_absolute=float(largest), relative_to_std=float(largest / before.std()))


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return logits, float32 [B, T, V], for tokens int64 [B, T]."""
    with evaluating(model) as device, torch.autocast(device.type, enabled=False):
        return model(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()


# How far a model's function moved when it was expanded, of models of any size.
#
# The weights stay on disk (`tritter.core.streamed`): one layer after the other is run, then logits
# are compared for a part of the vocabulary at a time.
#
# Shapes: B sequences, T tokens, V part of the vocabulary, H hidden size.

_ROUNDING = 1e-4  # of the largest hidden state, far above float32's

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FolderJump:
    """A jump, and where it comes from.

    Args:
        states: the kept hidden states of both models, before the first layer and behind each.
    """

    jump: Jump
    states: tuple[Sequence[Tensor], Sequence[Tensor]]

    def parting(self, layer_sources: Sequence[int]) -> str:
        """Name the place of the result at which hidden states leave what the source computes.

        Args:
            layer_sources: of each layer of the result, the layer that it copies.
        """
        before, after = self.states
        if not _are_same(before[0], after[0]):
            return "the embedding"
        # A copy of the layer that is due does its work or, where there are more copies of it, may
        # leave it to the next one; any other layer adds nothing. A wider stream begins with the old
        done = 0  # layers of the source whose work is done
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
    before: Path, after: Path, input_ids: Tensor, *, progress: Progress | None = None
) -> FolderJump:
    """Compare the models of two folders on the same tokens, in float32.

    Args:
        input_ids: int64 [B, T].
        progress: called with bytes used so far and how many will be.

    Raises:
        TritterError: one can't be built or is damaged, or the two have different vocabularies.
    """
    used = 0

    def count(num_bytes: int) -> None:
        nonlocal used
        used += num_bytes
        if progress is not None:
            progress(used, total)

    models = [StreamedModel(folder, input_ids, on_read=count) for folder in (before, after)]
    total = sum(model.num_bytes for model in models)
    sizes = [model.vocab_size for model in models]
    if sizes[0] != sizes[1]:
        raise TritterError(
            f"evaluation: vocabularies of {sizes[0]} tokens before and {sizes[1]} after the "
            "expansion cannot be compared; the vocabulary must stay"
        )
    step = min(model.rows_per_block for model in models)
    largest = torch.zeros(())
    moments = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares
    for rows in blocks(slice(0, sizes[0]), step):
        old_BTV, new_BTV = (model.logits(rows) for model in models)
        largest = torch.maximum(largest, (new_BTV - old_BTV).abs().max())  # keeps NaN
        wide = old_BTV.double()
        number = torch.tensor(wide.numel()).double()
        moments += torch.stack([number, wide.sum(), wide.square().sum()])
    number, total_logits, squares = moments
    # As `Tensor.std` has it
    deviation = ((squares - total_logits**2 / number).clamp(min=0) / (number - 1)).sqrt()
    jump = Jump(float(largest), float(largest.double() / deviation))
    return FolderJump(jump, (models[0].states, models[1].states))


def _are_same(old: Tensor, new: Tensor) -> bool:
    moved = (new[..., : old.shape[-1]] - old).abs().max()
    return bool(moved <= _ROUNDING * old.abs().max())
