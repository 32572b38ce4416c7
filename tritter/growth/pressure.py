"""How hard the loss pulls at each neuron: |∇w| as a moving average."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritter.growth.places import FfnPlace


class Pressure:
    """Moving averages of the gradient norms of every neuron, and of the whole gradient.

    ema ← decay · ema + (1 − decay) · |∇w|, of a neuron over its rows of gate and up. A step whose
    gradient is not finite is left out, as it is refused.

    Args:
        decay: of both averages.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.neurons: dict[int, Tensor] = {}  # layer → float32 [F]
        self._whole = torch.zeros(())

    @torch.no_grad()
    def observe(
        self, model: nn.Module, places: Sequence[FfnPlace], *, whole: Tensor | None = None
    ) -> None:
        """Take the gradients that the parameters hold.

        Args:
            whole: norm of the whole gradient, where `model` is a part of what is trained.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = (nn.utils.get_total_norm(gradients) if whole is None else whole).float()
        is_finite = torch.isfinite(norm)
        self._whole = self._next(self._whole.to(norm), norm, is_finite)
        for place in places:
            norms = _row_norms(model, place)
            before = self.neurons.get(place.layer, torch.zeros_like(norms)).to(norms)
            self.neurons[place.layer] = self._next(before, norms, is_finite)

    def of_layers(self, places: Sequence[FfnPlace]) -> Tensor:
        """Return each layer's mean in proportion to the whole gradient's norm, float64 [L].

        What is common to all, a falling loss or a hard batch, is no sign of one layer.
        """
        means = torch.stack([self.neurons[place.layer].mean() for place in places])
        return (means / self._whole.clamp_min(1e-30)).double().cpu()

    def grow(self, layer: int, places: Tensor, width: int) -> None:
        """Let new neurons begin with the mean of their layer."""
        old = self.neurons[layer]
        new = old.new_full((width,), float(old.mean()))
        new[: len(old)] = old
        new[places.to(new.device)] = old.mean()
        self.neurons[layer] = new

    def state_dict(self) -> dict[str, Any]:
        return {"neurons": dict(self.neurons), "whole": self._whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.neurons = {int(layer): value for layer, value in state["neurons"].items()}
        self._whole = state["whole"]

    def _next(self, before: Tensor, now: Tensor, is_finite: Tensor) -> Tensor:
        return torch.where(is_finite, torch.lerp(now, before, self._decay), before)


def _row_norms(model: nn.Module, place: FfnPlace) -> Tensor:
    """Return the norm of each neuron's rows, float32 [F]."""
    parts = [model.get_parameter(name) for name in place.rows]
    norms = [
        torch.linalg.vector_norm(
            place.turned(part.grad),
            dim=1,
            dtype=torch.promote_types(part.dtype, torch.float32),
        ).float()
        for part in parts
        if part.grad is not None
    ]
    if not norms:
        return parts[0].new_zeros(place.width(model), dtype=torch.float32)
    return torch.stack(norms).square().sum(dim=0).sqrt()
