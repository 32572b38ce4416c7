"""The routers of a stock mixture-of-experts model, within reach: offsets, selection bias, records.

A router of Mixtral, Qwen2-MoE or Qwen3-MoE is asked for three things that the stock class has no
place for: an offset of the logits (experts that are being added start at −∞), a bias that takes
part in the selection but not in the weights (Wang et al. 2024, arXiv 2408.15664), and what it
decided in the last forward pass. With offset and bias zero the outputs are the stock class's, bit
for bit. The model's state dict does not change.

Shapes: N tokens, E experts of a layer, k experts per token, H hidden size.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.errors import RequestError

_ROUTERS = {"MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.gate$")
_OFFSET, _BIAS, _RECORDER = "routing_offset", "routing_selection_bias", "routing_recorder"


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What one router decided in the last forward pass, with its graph.

    Args:
        layer: number of the layer.
        own_logits: [N, E], of the router alone, before the offset.
        logits: [N, E], what the softmax was taken of; losses take these.
        probabilities: [N, E], over all experts.
        selected: int64 [N, k], the experts that each token was sent to.
    """

    layer: int
    own_logits: Tensor
    logits: Tensor
    probabilities: Tensor
    selected: Tensor


class Routing:
    """All routers of one model; attaching again gives the same control.

    What is set here lives on the routers, so that it follows the model to another device and into
    a copy.
    """

    def __init__(self, routers: Mapping[int, nn.Module]) -> None:
        self._routers = dict(routers)

    @classmethod
    def of(cls, model: nn.Module) -> "Routing | None":
        """Attach to a model's routers; None if it has none.

        Args:
            model: a stock model, or a module that holds one.
        """
        routers = dict(_routers(model))
        for layer, router in routers.items():
            if not hasattr(router, _RECORDER):
                _attach(layer, router)
        return cls(routers) if routers else None

    @classmethod
    def attached(cls, model: nn.Module) -> "Routing | None":
        """Return the control of a model that it is attached to already; leaves others alone."""
        routers = {n: router for n, router in _routers(model) if hasattr(router, _RECORDER)}
        return cls(routers) if routers else None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        return tuple(self._routers)

    @property
    def num_experts(self) -> int:
        """E, the same in every layer."""
        return int(self._first.weight.shape[0])

    @property
    def top_k(self) -> int:
        """k, the same in every layer."""
        return int(self._first.top_k)

    def router(self, layer: int) -> nn.Module:
        """Return a layer's router; its weight [E, H] is what routes."""
        return self._routers[layer]

    def offset(self, layer: int) -> Tensor:
        """Return [E], what is added to a layer's logits: the live buffer."""
        return getattr(self._routers[layer], _OFFSET)

    def set_offset(self, experts: Sequence[int], value: float) -> None:
        """Set what is added to the logits of some experts, in all layers; others stay.

        Args:
            experts: their indices.
            value: in the log domain; −∞ closes an expert.

        Raises:
            RequestError: there is no such expert, the value is no number or +∞, or fewer than k
                experts would stay open.
        """
        wrong = [expert for expert in experts if not 0 <= expert < self.num_experts]
        if wrong:
            raise RequestError(
                f"router offset: experts {wrong}; allowed are 0 to {self.num_experts - 1}."
            )
        if math.isnan(value) or value == math.inf:
            raise RequestError(f"router offset = {value}; allowed is any number, or -inf.")
        indices = torch.as_tensor(list(experts), dtype=torch.int64)
        for layer in self.layers:
            self._set_offset(layer, indices, value)

    def selection_bias(self, layer: int) -> Tensor:
        """Return [E], what is added to a layer's probabilities for the selection alone."""
        return getattr(self._routers[layer], _BIAS)

    def set_selection_bias(self, layer: int, values: Tensor) -> None:
        """Set the selection bias of one layer.

        Args:
            values: [E], finite.
        """
        with torch.no_grad():
            self.selection_bias(layer).copy_(values)

    @property
    def is_recording(self) -> bool:
        return self._recorder(self.layers[0]).is_on

    def start_recording(self) -> None:
        """Keep what the routers decide from the next forward pass on."""
        for layer in self.layers:
            self._recorder(layer).is_on = True

    def stop_recording(self) -> None:
        """Keep nothing any more, and let go of what was kept."""
        for layer in self.layers:
            recorder = self._recorder(layer)
            recorder.is_on, recorder.record = False, None

    @contextmanager
    def recording(self) -> Iterator["Routing"]:
        """Record inside the block; afterwards it is as it was before."""
        was_on = self.is_recording
        self.start_recording()
        try:
            yield self
        finally:
            if not was_on:
                self.stop_recording()

    def recorded(self) -> tuple[Record, ...]:
        """Return what each layer decided in the last forward pass; empty without one."""
        records = (self._recorder(layer).record for layer in self.layers)
        return tuple(record for record in records if record is not None)

    def detach(self) -> None:
        """Give the routers their stock forward back; offsets and biases are gone."""
        for router in self._routers.values():
            if hasattr(router, _RECORDER):
                for name in ("forward", _OFFSET, _BIAS, _RECORDER):
                    delattr(router, name)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return offsets and selection biases by layer: plain data."""
        return {
            "offset": {str(n): self.offset(n).detach().clone() for n in self.layers},
            "selection_bias": {
                str(n): self.selection_bias(n).detach().clone() for n in self.layers
            },
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take offsets and selection biases from `state_dict`.

        Raises:
            RequestError: it belongs to a model with other layers, or another number of experts.
        """
        held = {int(layer): offset.numel() for layer, offset in state["offset"].items()}
        if held != dict.fromkeys(self.layers, self.num_experts):
            raise RequestError(
                f"routing state: experts per layer {held}; this model has {self.num_experts} in "
                f"layers {list(self.layers)}."
            )
        with torch.no_grad():
            for layer in self.layers:
                self.offset(layer).copy_(state["offset"][str(layer)])
                self.selection_bias(layer).copy_(state["selection_bias"][str(layer)])

    @property
    def _first(self) -> Any:
        return next(iter(self._routers.values()))

    def _recorder(self, layer: int) -> "_Recorder":
        return getattr(self._routers[layer], _RECORDER)

    def _set_offset(self, layer: int, experts: Tensor, value: float) -> None:
        offset = self.offset(layer)
        changed = offset.detach().clone()
        changed[experts.to(offset.device)] = value
        num_open = int((changed > -math.inf).sum())
        if num_open < self.top_k:
            raise RequestError(
                f"router offset = {value}: {num_open} experts of layer {layer} would stay open; "
                f"each token needs {self.top_k}."
            )
        with torch.no_grad():
            offset.copy_(changed)


class _Recorder:
    """Where a router puts its record; a copy of the model gets an empty one."""

    __slots__ = ("is_on", "layer", "record")

    def __init__(self, layer: int, is_on: bool = False) -> None:
        self.layer = layer
        self.is_on = is_on
        self.record: Record | None = None

    def __reduce__(self) -> tuple[type["_Recorder"], tuple[int, bool]]:
        return _Recorder, (self.layer, self.is_on)


def _routers(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for name, module in model.named_modules():
        place = _LAYER.search(name)
        if place and type(module).__name__ in _ROUTERS:
            yield int(place[1]), module


def _attach(layer: int, router: nn.Module) -> None:
    weight: Any = router.weight
    zeros = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    router.register_buffer(_OFFSET, zeros, persistent=False)
    router.register_buffer(_BIAS, zeros.clone(), persistent=False)
    setattr(router, _RECORDER, _Recorder(layer))
    # A partial, because processes that are spawned are sent the model, and can't be sent a method
    router.forward = partial(_forward, router)


def _forward(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Route as the stock class does, with offset and selection bias.

    Args:
        hidden_states: [..., H].

    Returns:
        As the stock classes do: logits [N, E], weights [N, k], selected experts [N, k].
    """
    offset, recorder = router.routing_offset, router.routing_recorder
    own_logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    logits = own_logits.float() + offset.float()
    probabilities = logits.softmax(dim=-1)
    # A closed expert stays closed: a bias could lift its probability of 0 above others
    choice = (probabilities + router.routing_selection_bias).masked_fill(
        offset == -math.inf, -math.inf
    )
    selected = choice.topk(router.top_k, dim=-1).indices
    weights = probabilities.gather(-1, selected)
    if getattr(router, "norm_topk_prob", True):  # Mixtral has no such switch and always does
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if hasattr(router, "norm_topk_prob"):
        weights = weights.to(own_logits.dtype)
    if recorder.is_on:
        recorder.record = Record(recorder.layer, own_logits, logits, probabilities, selected)
    return own_logits + offset.to(own_logits.dtype), weights, selected
