"""Losses and features of a batch under the frozen base, from one forward pass without gradients.

B sequences · T positions · H hidden size
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tritter.core.models import layers_of
from tritter.data.packing import IGNORED
from tritter.errors import RequestError, TritterError
from tritter.evaluation.inference import device_of, preserve_modes
from tritter.evaluation.losses import nats_per_row

_MAX_FEATURES = 512
_SEED = 20261121  # of the random directions; changing it breaks existing libraries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """Losses and features of a batch under the frozen base.

    Args:
        losses: float64 [B], mean cross-entropy of each sequence, nats per token, or None.
        features: float32 [B, H], mean over each sequence of the middle layer's hidden states.
    """

    losses: Tensor | None
    features: Tensor

    def __post_init__(self) -> None:
        losses, batch = self.losses, len(self.features) if self.features.ndim == 2 else 0
        is_whole = losses is None or losses.shape == (batch,)
        if not batch or not is_whole:
            raise TritterError(
                f"novelty: losses {() if losses is None else tuple(losses.shape)} and features "
                f"{tuple(self.features.shape)} don't match; [B] and [B, H] are required"
            )
        if not all(each.isfinite().all() for each in (losses, self.features) if each is not None):
            raise TritterError("novelty: losses or features of the base are not finite")

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, index: Tensor) -> "Observation":
        """Return the sequences with these indices."""
        losses = None if self.losses is None else self.losses[index]
        return Observation(losses=losses, features=self.features[index])

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "features": self.features}

    @classmethod
    def concatenated(cls, observations: Sequence["Observation"]) -> "Observation":
        """Return several batches as one."""
        losses = [each.losses for each in observations if each.losses is not None]
        return cls(
            losses=torch.cat(losses) if len(losses) == len(observations) else None,
            features=torch.cat([each.features for each in observations]),
        )


class _AllSeen(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def observe(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    max_features: int = _MAX_FEATURES,
    with_losses: bool = True,
) -> Observation:
    """Return pooled features of the middle decoder layer and the loss of each sequence.

    The layer is number ⌈L/2⌉ of L. Features are pooled over the tokens of a sequence whose label is
    not −100. The loss counts those of them that follow another token.

    Args:
        model: a stock model of any family; disable adapters before the call.
        input_ids: int [B, T].
        attention_mask: [B, T], 0 for padding, on either side.
        labels: int [B, T], −100 for tokens that are not predicted; default: all are predicted.
        max_features: wider features are projected to this many fixed random directions, because a
            library stores a matrix of this size squared for each skill.
        with_losses: False: stop after the middle layer, without losses.

    Raises:
        RequestError: the model has no decoder layers.
        TritterError: a sequence has no token to predict.
    """
    device = device_of(model)
    ids = input_ids.to(device).long()
    is_token = torch.ones_like(ids) if attention_mask is None else attention_mask.to(device)
    is_counted = (
        is_token.bool() if labels is None else is_token.bool() & (labels.to(device) != IGNORED)
    )
    predicted = is_counted[:, 1:] & is_token[:, :-1].bool()
    if not predicted.any(dim=1).all():
        rows = (~predicted.any(dim=1)).nonzero().flatten().tolist()
        raise TritterError(f"novelty: sequences {rows} of the batch have no token to predict")
    seen: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        if not with_losses:
            raise _AllSeen

    hook, logits_BTV = _middle_layer(model).register_forward_hook(keep), None
    try:
        with preserve_modes(model), suppress(_AllSeen):
            model.eval()
            logits_BTV = model(input_ids=ids, attention_mask=is_token, use_cache=False).logits
    finally:
        hook.remove()
    hidden_BTH = seen[0].float()
    weight_BT1 = is_counted.unsqueeze(-1)
    features_BH = (hidden_BTH * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
    losses_B = None
    if logits_BTV is not None:
        nats_B = nats_per_row(logits_BTV[:, :-1], torch.where(predicted, ids[:, 1:], IGNORED))
        losses_B = (nats_B / predicted.sum(dim=1).to(nats_B.device)).cpu()
    features_BH = features_BH.cpu()
    if (width := features_BH.shape[1]) > max_features:  # norms are preserved on average
        with torch.autocast("cpu", enabled=False):
            features_BH = features_BH @ _directions(width, max_features)
    return Observation(losses=losses_B, features=features_BH)


def _middle_layer(model: nn.Module) -> nn.Module:
    """Return decoder layer number ⌈L/2⌉ of a stock model with L layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = layers_of(model) if lists else None
    if not layers:
        raise RequestError(
            f"novelty: {type(model).__name__} has no decoder layers; use a stock causal language "
            "model of transformers."
        )
    return layers[(len(layers) - 1) // 2]


@cache
def _directions(width: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(width, size, generator=generator, dtype=torch.float32) / size**0.5
