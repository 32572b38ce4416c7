"""The routers of a stock mixture-of-experts model, within reach: offsets, selection bias, records.

A router of Mixtral, Qwen2-MoE or Qwen3-MoE is asked for three things that the stock class has no
place for: an offset of the logits (experts that are being added start at −∞), a bias that takes
part in the selection but not in the weights (Wang et al. 2024, arXiv 2408.15664), and what it
decided in the last forward pass. With offset and bias zero the outputs are the stock class's, bit
for bit. The model's state dict does not change.

A model with appended experts computes what it should with their offset alone. How routers are
trained is in `tritter.methods.moe_routing`.

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
from tritter.storage.records import Finite, WholeNumber, read_record, record, record_text

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
            if hasattr(router, _RECORDER):
                continue
            weight: Any = router.weight
            zeros = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
            router.register_buffer(_OFFSET, zeros, persistent=False)
            router.register_buffer(_BIAS, zeros.clone(), persistent=False)
            setattr(router, _RECORDER, _Recorder(layer))
            # A partial: spawned processes are sent the model, and can't be sent a method
            router.forward = partial(_forward, router)
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
            offset = self.offset(layer)
            changed = offset.detach().clone()
            changed[indices.to(offset.device)] = value
            num_open = int((changed > -math.inf).sum())
            if num_open < self.top_k:
                raise RequestError(
                    f"router offset = {value}: {num_open} experts of layer {layer} would stay "
                    f"open; each token needs {self.top_k}."
                )
            with torch.no_grad():
                offset.copy_(changed)

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


# Experts that were appended to a model and are not open yet: `state/router.json`. A router offset
# keeps them out at first and is raised to 0 while the model is trained. A stock class knows no
# offset, so a folder with this file computes the right function in Tritter alone.

LOWEST_OFFSET = -20.0  # e⁻²⁰: the smallest weight from which an expert is raised
_PLACE = ("state", "router.json")
_CLOSED: Literal["-inf"] = "-inf"  # JSON has no number for it


@record
class _RouterHead:
    """What `router.json` says; see `AddedExperts`."""

    FORMAT: ClassVar[str] = "router state"

    new_experts: tuple[WholeNumber, ...]
    offset: Literal["-inf"] | Finite
    anneal_steps: WholeNumber | None
    step: WholeNumber

    def __post_init__(self) -> None:
        experts = self.new_experts
        if not experts or experts != tuple(range(experts[0], experts[0] + len(experts))):
            raise ValueError("new_experts; allowed are indices one after the other")
        if self.offset != _CLOSED and self.offset > 0:
            raise ValueError(f"offset = {self.offset}; allowed is a number up to 0")


def router_offset(step: int, *, anneal_steps: int) -> float:
    """Return the offset of new experts after so many steps: −∞, then from −20 in a line to 0.

    Args:
        step: optimizer steps since they were appended.
        anneal_steps: after so many the offset is 0.
    """
    if step <= 0:
        return -math.inf
    return LOWEST_OFFSET * max(0.0, 1 - step / anneal_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedExperts:
    """Appended experts, in every layer that has experts, and how far they are open.

    Args:
        experts: their indices, one behind the other; all others come before.
        offset: what the router adds to their logits; −∞ closes them, 0 opens them wholly.
        step: optimizer steps since they were appended.
        anneal_steps: after how many the offset is 0; None while that is not decided.
    """

    experts: tuple[int, ...]
    offset: float = -math.inf
    step: int = 0
    anneal_steps: int | None = None

    @property
    def is_settled(self) -> bool:
        """True when a stock class computes the same."""
        return self.offset == 0

    @property
    def num_settled_experts(self) -> int:
        """How many experts a layer has without the appended ones."""
        return self.experts[0]

    def at(self, step: int, *, anneal_steps: int) -> "AddedExperts":
        """Return what they are after so many steps."""
        offset = router_offset(step, anneal_steps=anneal_steps)
        return replace(self, offset=offset, step=step, anneal_steps=anneal_steps)

    @classmethod
    def of(cls, model: nn.Module) -> "AddedExperts | None":
        """Return what a live model's offsets say; None where no expert is held back."""
        routing = Routing.attached(model)
        if routing is None:
            return None
        offsets = routing.offset(routing.layers[0]).tolist()
        held_back = tuple(expert for expert, offset in enumerate(offsets) if offset != 0)
        return cls(experts=held_back, offset=offsets[held_back[0]]) if held_back else None

    def apply(self, model: nn.Module) -> Routing:
        """Set the offset in a live model.

        Raises:
            TritterError: the model has no such experts.
        """
        routing = Routing.of(model)
        if routing is None:
            raise TritterError(f"{'/'.join(_PLACE)} speaks of experts, and the model has none.")
        try:
            routing.set_offset(self.experts, self.offset)
        except RequestError as error:
            raise TritterError(f"{'/'.join(_PLACE)} does not fit the model: {error}") from error
        return routing

    def write(self, folder: Path) -> None:
        """Write `state/router.json`; meant for a checkpoint folder that is still being made."""
        path = folder.joinpath(*_PLACE)
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
        """Return what a checkpoint folder says; None where no expert is being added.

        Raises:
            TritterError: the file is damaged, or of another format.
        """
        path = folder.joinpath(*_PLACE)
        if not path.exists():
            return None
        head = read_record(path, _RouterHead)
        return cls(
            experts=head.new_experts,
            offset=-math.inf if head.offset == _CLOSED else float(head.offset),
            step=head.step,
            anneal_steps=head.anneal_steps,
        )


def stock_obstacle(folder: Path) -> str | None:
    """Return why stock classes compute something else than the model; None where they do not.

    Raises:
        TritterError: the folder's state is damaged, or of a newer format.
    """
    added = AddedExperts.read(folder)
    if added is None or added.is_settled:
        return None
    first, last = added.experts[0], added.experts[-1]
    named = f"expert {first} was" if first == last else f"experts {first} to {last} were"
    return (
        f"{named} appended and the router offset that keeps them back is {added.offset:g}, not 0 "
        "yet; stock classes know no such offset"
    )
