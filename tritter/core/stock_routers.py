"""Control of the routers of a stock mixture-of-experts model: offsets, selection bias, records.

It adds three features to the routers of Mixtral, Qwen2-MoE and Qwen3-MoE: an offset of the logits
(new experts start at −∞), a bias of the selection but not of the weights (Wang et al. 2024, arXiv
2408.15664), and a record of the last forward pass. With zero offset and bias the outputs equal the
stock class bit for bit. The state dict of the model does not change.

The sigmoid routers of GLM-4-MoE have their own selection bias, `e_score_correction_bias`, which
files contain. They have no offset.

A model with appended experts computes the right function only with their offset.
`tritter.methods.moe_routing` trains the routers.

Shapes: N tokens, E experts of a layer, k experts per token, H hidden size.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.errors import RequestError, TritterError
from tritter.options import WholeNumber
from tritter.storage.records import Finite, read_record, record, record_text

_SIGMOID_ROUTERS = {"Glm4MoeTopkRouter"}
_ROUTERS = {"MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter"} | _SIGMOID_ROUTERS
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.gate$")
_OFFSET, _BIAS, _RECORDER = "routing_offset", "routing_selection_bias", "routing_recorder"
_OWN_BIAS = "e_score_correction_bias"
_LOWEST_OFFSET = -20.0  # first finite offset: a weight of e⁻²⁰
_PATH = ("state", "router.json")
_CLOSED: Literal["-inf"] = "-inf"  # JSON has no number for it


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Decisions of one router in the last forward pass, with their autograd graph.

    Args:
        layer: index of the layer.
        own_logits: [N, E], logits of the router before the offset.
        logits: [N, E], input of the softmax, for losses. Of a sigmoid router, the logarithms of
            its scores: their softmax is the scores divided by their sum (arXiv 2412.19437).
        probabilities: [N, E], over all experts.
        selected: int64 [N, k], the experts of each token.
    """

    layer: int
    own_logits: Tensor
    logits: Tensor
    probabilities: Tensor
    selected: Tensor


class RouterControl:
    """All routers of one model; attaching again returns the same control.

    Settings are stored on the routers, so they move and are copied with the model.
    """

    def __init__(self, routers: Mapping[int, nn.Module]) -> None:
        self._routers = dict(routers)

    @classmethod
    def of(cls, model: nn.Module) -> "RouterControl | None":
        """Attach to a model's routers; None if it has none.

        Args:
            model: a stock model, or a module that holds one.
        """
        routers = dict(_routers(model))
        for layer, router in routers.items():
            if hasattr(router, _RECORDER):
                continue
            weight: Any = router.weight
            zeros = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
            router.register_buffer(_OFFSET, zeros, persistent=False)
            if not _has_sigmoid(router):
                router.register_buffer(_BIAS, zeros.clone(), persistent=False)
            setattr(router, _RECORDER, _Recorder(layer))
            # A partial can be pickled for spawned processes, a method cannot
            forward = _forward_sigmoid if _has_sigmoid(router) else _forward
            router.forward = partial(forward, router)
        return cls(routers) if routers else None

    @classmethod
    def attached(cls, model: nn.Module) -> "RouterControl | None":
        """Return the control that is already attached to a model, or None."""
        routers = {n: router for n, router in _routers(model) if hasattr(router, _RECORDER)}
        return cls(routers) if routers else None

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(self._routers)

    @property
    def has_sigmoid(self) -> bool:
        """The routers have sigmoids instead of a softmax, and a selection bias that is saved."""
        return _has_sigmoid(self._first)

    @property
    def num_experts(self) -> int:
        """E, the same in every layer."""
        return int(self._first.weight.shape[0])

    @property
    def top_k(self) -> int:
        """k, the same in every layer."""
        return int(self._first.top_k)

    def router(self, layer: int) -> nn.Module:
        """Return the router of a layer, with its weight [E, H]."""
        return self._routers[layer]

    def offset(self, layer: int) -> Tensor:
        """Return the offset [E] of a layer's logits: the live buffer."""
        return getattr(self._routers[layer], _OFFSET)

    def set_offset(self, experts: Sequence[int], value: float) -> None:
        """Set the logit offset of some experts in all layers.

        Args:
            experts: their indices.
            value: added to the logits; −∞ disables an expert. k experts must remain enabled.
        """
        wrong = [expert for expert in experts if not 0 <= expert < self.num_experts]
        if wrong:
            raise RequestError(
                f"router offset: experts {wrong}; must be from 0 to {self.num_experts - 1}."
            )
        if math.isnan(value) or value == math.inf:
            raise RequestError(f"router offset = {value}; must be a finite number, or -inf.")
        if self.has_sigmoid and value:
            raise RequestError("router offset: sigmoid routers have none.")
        indices = torch.as_tensor(list(experts), dtype=torch.int64)
        for layer in self.layers:
            offset = self.offset(layer)
            changed = offset.detach().clone()
            changed[indices.to(offset.device)] = value
            num_open = int((changed > -math.inf).sum())
            if num_open < self.top_k:
                raise RequestError(
                    f"router offset = {value}: {num_open} experts of layer {layer} would remain "
                    f"enabled; each token needs {self.top_k}."
                )
            with torch.no_grad():
                offset.copy_(changed)

    def selection_bias(self, layer: int) -> Tensor:
        """Return the bias [E] of a layer's probabilities, which affects the selection only."""
        return getattr(self._routers[layer], _OWN_BIAS if self.has_sigmoid else _BIAS)

    def set_selection_bias(self, layer: int, values: Tensor) -> None:
        """Set the selection bias of one layer.

        Args:
            layer: index of the layer.
            values: [E], finite.
        """
        with torch.no_grad():
            self.selection_bias(layer).copy_(values)

    @property
    def is_recording(self) -> bool:
        return self._recorder(self.layers[0]).is_on

    def start_recording(self) -> None:
        """Record the decisions of the routers from the next forward pass on."""
        for layer in self.layers:
            self._recorder(layer).is_on = True

    def stop_recording(self) -> None:
        """Stop recording and delete the records."""
        for layer in self.layers:
            recorder = self._recorder(layer)
            recorder.is_on, recorder.record = False, None

    @contextmanager
    def recording(self) -> Iterator["RouterControl"]:
        """Record inside the block, then restore the previous setting."""
        was_on = self.is_recording
        self.start_recording()
        try:
            yield self
        finally:
            if not was_on:
                self.stop_recording()

    def recorded(self) -> tuple[Record, ...]:
        """Return the records of the last forward pass, one per layer; empty if there are none."""
        records = (self._recorder(layer).record for layer in self.layers)
        return tuple(record for record in records if record is not None)

    def detach(self) -> None:
        """Restore the stock forward of the routers; this deletes offsets and biases."""
        for router in self._routers.values():
            if hasattr(router, _RECORDER):
                own = () if _has_sigmoid(router) else (_BIAS,)
                for name in ("forward", _OFFSET, *own, _RECORDER):
                    delattr(router, name)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return offsets and selection biases by layer."""
        return {
            "offset": {str(n): self.offset(n).detach().clone() for n in self.layers},
            "selection_bias": {
                str(n): self.selection_bias(n).detach().clone() for n in self.layers
            },
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load offsets and selection biases from a `state_dict`."""
        sizes = {int(layer): offset.numel() for layer, offset in state["offset"].items()}
        if sizes != dict.fromkeys(self.layers, self.num_experts):
            raise RequestError(
                f"routing state: experts per layer {sizes}; this model has {self.num_experts} in "
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


class _Recorder:
    """The slot for a router's record; empty in a copy of the model."""

    __slots__ = ("is_on", "layer", "record")

    def __init__(self, layer: int, is_on: bool = False) -> None:
        self.layer = layer
        self.is_on = is_on
        self.record: Record | None = None

    def __reduce__(self) -> tuple[type["_Recorder"], tuple[int, bool]]:
        return _Recorder, (self.layer, self.is_on)


def _routers(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match and type(module).__name__ in _ROUTERS:
            yield int(match[1]), module


def _has_sigmoid(router: nn.Module) -> bool:
    return type(router).__name__ in _SIGMOID_ROUTERS


def _forward_sigmoid(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Route with the stock class, and record its decisions."""
    logits, weights, selected = type(router).forward(router, hidden_states)
    if router.routing_recorder.is_on:
        log_scores = F.logsigmoid(logits)
        router.routing_recorder.record = Record(
            router.routing_recorder.layer, logits, log_scores, log_scores.softmax(-1), selected
        )
    return logits, weights, selected


def _forward(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Route as the stock class does, with offset and selection bias.

    Args:
        router: the stock router.
        hidden_states: [..., H].

    Returns:
        Logits [N, E], weights [N, k] and selected experts [N, k], as in the stock class.
    """
    offset, recorder = router.routing_offset, router.routing_recorder
    own_logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    logits = own_logits.float() + offset.float()
    probabilities = logits.softmax(dim=-1)
    # Keep disabled experts disabled: a bias could lift their probability of 0 above others
    choice = (probabilities + router.routing_selection_bias).masked_fill(
        offset == -math.inf, -math.inf
    )
    selected = choice.topk(router.top_k, dim=-1).indices
    weights = probabilities.gather(-1, selected)
    if getattr(router, "norm_topk_prob", True):  # Mixtral has no such option and always normalises
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if hasattr(router, "norm_topk_prob"):
        weights = weights.to(own_logits.dtype)
    if recorder.is_on:
        recorder.record = Record(recorder.layer, own_logits, logits, probabilities, selected)
    return own_logits + offset.to(own_logits.dtype), weights, selected


# Appended experts that are not fully enabled yet: `state/router.json`. A router offset disables
# them at first and rises to 0 during training. Stock classes ignore the offset, so only Tritter
# computes the right function of a folder with this file.


@record
class _RouterHead:
    """The record in `router.json`; see `AddedExperts`."""

    FORMAT: ClassVar[str] = "router state"

    new_experts: tuple[WholeNumber, ...]
    offset: Literal["-inf"] | Finite
    anneal_steps: WholeNumber | None
    step: WholeNumber

    def __post_init__(self) -> None:
        experts = self.new_experts
        if not experts or experts != tuple(range(experts[0], experts[0] + len(experts))):
            raise ValueError("new_experts; must be consecutive indices")
        if self.offset != _CLOSED and self.offset > 0:
            raise ValueError(f"offset = {self.offset}; must be at most 0")


def _router_offset(step: int, *, anneal_steps: int) -> float:
    """Return the offset of new experts after some steps: −∞, then linear from −20 to 0.

    Args:
        step: optimizer steps since the experts were appended.
        anneal_steps: step at which the offset reaches 0.
    """
    if step <= 0:
        return -math.inf
    return _LOWEST_OFFSET * max(0.0, 1 - step / anneal_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedExperts:
    """Appended experts of every layer with experts, and their router offset.

    Args:
        experts: their indices, consecutive, after all other experts.
        offset: added to their logits; −∞ disables them, 0 enables them fully.
        step: optimizer steps since they were appended.
        anneal_steps: step at which the offset reaches 0; None if that is not set yet.
    """

    experts: tuple[int, ...]
    offset: float = -math.inf
    step: int = 0
    anneal_steps: int | None = None

    @property
    def is_settled(self) -> bool:
        """True if stock classes compute the same function."""
        return self.offset == 0

    @property
    def stock_obstacle(self) -> str:
        """The reason that stock classes compute another function, until the experts are settled."""
        first, last = self.experts[0], self.experts[-1]
        named = f"expert {first} was" if first == last else f"experts {first} to {last} were"
        return (
            f"{named} appended, and the router offset is still {self.offset:g} instead of 0; stock "
            "classes ignore this offset"
        )

    @property
    def num_settled_experts(self) -> int:
        """Number of experts per layer without the appended ones."""
        return self.experts[0]

    def at(self, step: int, *, anneal_steps: int) -> "AddedExperts":
        """Return the same experts after some steps."""
        offset = _router_offset(step, anneal_steps=anneal_steps)
        return replace(self, offset=offset, step=step, anneal_steps=anneal_steps)

    @classmethod
    def of(cls, model: nn.Module) -> "AddedExperts | None":
        """Return the experts of a live model with a router offset, or None."""
        routing = RouterControl.attached(model)
        if routing is None:
            return None
        offsets = routing.offset(routing.layers[0]).tolist()
        added = tuple(expert for expert, offset in enumerate(offsets) if offset != 0)
        return cls(experts=added, offset=offsets[added[0]]) if added else None

    def apply(self, model: nn.Module) -> RouterControl:
        """Set the offset in a live model."""
        routing = RouterControl.of(model)
        if routing is None:
            raise TritterError(f"{'/'.join(_PATH)} lists experts, but the model has none.")
        try:
            routing.set_offset(self.experts, self.offset)
        except RequestError as error:
            raise TritterError(f"{'/'.join(_PATH)} does not match the model: {error}") from error
        return routing

    def write(self, folder: Path) -> None:
        """Write `state/router.json` to a checkpoint folder under construction."""
        path = folder.joinpath(*_PATH)
        path.parent.mkdir(exist_ok=True)
        head = _RouterHead(
            new_experts=self.experts,
            offset=_CLOSED if self.offset == -math.inf else self.offset,
            anneal_steps=self.anneal_steps,
            step=self.step,
        )
        path.write_text(record_text(head), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "AddedExperts | None":
        """Return the new experts of a checkpoint folder, or None."""
        path = folder.joinpath(*_PATH)
        if not path.exists():
            return None
        head = read_record(path, _RouterHead)
        return cls(
            experts=head.new_experts,
            offset=-math.inf if head.offset == _CLOSED else float(head.offset),
            step=head.step,
            anneal_steps=head.anneal_steps,
        )
