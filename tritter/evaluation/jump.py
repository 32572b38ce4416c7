"""How far a model's function moved when it was expanded."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritter.errors import TritterError
from tritter.evaluation.estimate import finite_or_none
from tritter.evaluation.inference import evaluating


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
    before, after = _logits(before_model, input_ids), _logits(after_model, input_ids)
    if before.shape != after.shape:
        raise TritterError(
            f"evaluation: logits of shape {list(before.shape)} before and {list(after.shape)} "
            "after the expansion cannot be compared; the vocabulary must stay"
        )
    largest = (after - before).abs().max()
    return Jump(max_absolute=float(largest), relative_to_std=float(largest / before.std()))


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with evaluating(model) as device, torch.autocast(device.type, enabled=False):
        return model(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()
