"""Freezing: some of the model is not trained at all, or not yet.

A frozen parameter leaves the optimizer: inside, weight decay and old momentum would move it. Where
only a part of a parameter is frozen, which no optimizer knows of, its gradient there is zero and
its values are put back after every step, bit for bit. A frozen weight is not a frozen function:
what is trained below, above or beside it changes what it is given and what becomes of it.

When to use: to spend less (no gradient, no moments), or to let what an expansion added find its
place first (`until`; from the top down as in Howard & Ruder 2018, ULMFiT, arXiv 1801.06146).
Cost: less than nothing, but for a copy and a mask of parameters that are frozen in part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.core.families import Config, LogicalTensor, ParameterSelection, family_of
from tritter.errors import Problem, RequestError
from tritter.options import Count, RunRequest, Start, Text, options
from tritter.training import ForgettingMethod, Needs, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change

Order = Literal["together", "top_down"]
Share = Annotated[float, Field(gt=0, lt=1)]
Layer = Annotated[int, Field(ge=0)]
_KEY = "forgetting.freeze"
DEFAULT = "attention"  # where nothing is named


@options
class FreezeOptions:
    """What is frozen, and until when."""

    layers: tuple[Layer | Text, ...] | Layer | Text | None = None
    new_only: bool = False
    old_experts: bool = False
    until: Count | Share | None = None
    thaw: Order = "together"

    def __post_init__(self) -> None:
        if self.thaw != "together" and self.until is None:
            told = f"with {_KEY}.until = null nothing thaws; say until when"
            raise RequestError(Problem(f"{_KEY}.thaw", self.thaw, reason=told))
        try:
            _ = self.places
        except RequestError as error:
            said = str(error).rstrip(".")
            raise RequestError(Problem(f"{_KEY}.layers", self.layers, reason=said)) from error

    @property
    def places(self) -> ParameterSelection | None:
        """Where all is frozen, whatever is new there; None: nowhere.

        Raises:
            RequestError: there is no such place.
        """
        asked = self.layers
        if asked is None:
            return None if self.new_only or self.old_experts else ParameterSelection.read([DEFAULT])
        return ParameterSelection.read([asked] if isinstance(asked, int | str) else asked)

    def first_step(self, max_steps: int) -> int | None:
        """Return the step from which all is trained; None: never."""
        if isinstance(self.until, float):
            return max(1, round(self.until * max_steps))
        return self.until


class Freeze(ForgettingMethod):
    """Leave parameters, or entries of them, as they are.

    Args:
        layers: places by words, see `ParameterSelection`; numbers are those of the model
            that is trained. None: attention, where nothing else is asked for.
        new_only: all that was there before the expansion, entry by entry.
        old_experts: experts that were there before the expansion.
        until: a step, or a share of all steps; None: to the end.
        thaw: then, `together`, or from the `top_down`: the head and what stands in no layer first,
            then layer after layer, the embedding last, evenly spread up to `until`.
    """

    name = "freeze"
    Options = FreezeOptions
    freezes = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._thaws: dict[str, int | None] = {}  # parameter → step from which it is trained
        self._step = 0
        self._held: dict[str, Tensor] = {}  # parameter → mask of the entries that are not
        self._values: dict[str, Tensor] = {}  # what stands there

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        steps, at = run.training.max_steps, options.first_step(run.training.max_steps)
        if at is not None and at >= steps:
            reason = (
                f"the training has training.max_steps = {steps}; allowed is less, or null for never"
            )
            yield Problem(f"{_KEY}.until", options.until, reason=reason)
        if options.new_only and run.optimizer.carry:
            reason = (
                f"with {_KEY}.new_only = true only what is new is trained, and it has no moments "
                "yet; leave one of the two out"
            )
            yield Problem("optimizer.carry", True, reason=reason)
        if run.growth is None:
            return
        if options.new_only:
            reason = (
                "neurons that grow would change what is frozen in part; with growth=none it works"
            )
            yield Problem(f"{_KEY}.new_only", True, reason=reason)
        if options.until is None and options.places is not None and "ffn" in options.places.parts:
            reason = "the FFNs, in which neurons grow, would be frozen; freeze attention, or an end"
            yield Problem(f"{_KEY}.layers", options.layers, reason=reason)

    @classmethod
    def start_problems(cls, options: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        specs, reason = run.expansion, ""
        if run.control:
            reason = "the control does not grow, and nothing of it would be trained; leave one out"
        elif len(run.text.tasks) > 1:
            reason = "the model grows for the first task alone, and the others add nothing new"
        elif not specs and run.pipeline.target_params is None:
            reason = "without an expansion nothing is new; choose one, or name layers instead"
        elif specs and all(s.expansion_type == "depth" and not s.is_exact for s in specs):
            names = " and ".join(spec.name for spec in specs)
            reason = f"{names} only copies layers, which are not new; use llama_pro, width or moe"
        if options.new_only and reason:
            yield Problem(f"{_KEY}.new_only", True, reason=reason)
        if options.old_experts and not family_of(start.trained[-1]).has_experts:
            reason = "the model is dense and has no experts; name layers instead"
            yield Problem(f"{_KEY}.old_experts", True, reason=reason)
        places = options.places
        if places is not None and (reason := _unfreezable_reason(places, start.trained)):
            yield Problem(f"{_KEY}.layers", options.layers, reason=reason)

    @classmethod
    def num_frozen(cls, options: Any, trained: Config, before: Config, run: RunRequest) -> int:
        if options.until is not None:
            return 0
        family, places, frozen = family_of(trained), options.places, 0
        appends = any(getattr(spec, "is_append", False) for spec in run.expansion)
        for tensor, is_tied in _tensors(trained):
            is_held = places is not None and places.has(tensor, is_tied=is_tied)
            if is_held or (options.old_experts and tensor.is_per_expert and not appends):
                frozen += prod(family.shape(tensor, trained))
        return max(frozen, family.count_parameters(before)) if options.new_only else frozen

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(carried=options.new_only or options.old_experts)

    def freeze(self, model: nn.Module, task: Task, *, max_steps: int) -> None:
        import torch

        from tritter.training.parameters import live_layout  # transformers, as in `distill`

        asked, stored_in_order = self.options, live_layout(model)
        wanted, is_tied = (
            asked.places,
            all(part.tensor.kind != "head" for stored in stored_in_order for part in stored.parts),
        )
        heights: dict[str, float] = {}  # the embedding below all layers, the rest above
        self._held = {}
        for stored in stored_in_order:
            tensors = [part.tensor for part in stored.parts]
            mask = torch.zeros(stored.shape, dtype=torch.bool)  # of what is frozen
            if wanted and all(wanted.has(tensor, is_tied=is_tied) for tensor in tensors):
                mask[...] = True
            if asked.new_only or (asked.old_experts and tensors[0].is_per_expert):
                mask |= task.carried[stored.name]
            parameter = model.get_parameter(stored.name)
            if not parameter.requires_grad or not bool(mask.any()):
                continue
            is_embedding = tensors[0].kind in ("embed", "embed_positions")
            outside = -1 if is_embedding else math.inf
            heights[stored.name] = outside if stored.layer is None else stored.layer
            if bool(mask.all()):
                parameter.requires_grad_(False)
            else:
                self._held[stored.name] = mask
        end = asked.first_step(max_steps)
        self._thaws = dict.fromkeys(heights, end)
        if end is not None and asked.thaw == "top_down":
            order = sorted(set(heights.values()), reverse=True)
            self._thaws = {
                name: math.ceil(end * (order.index(height) + 1) / len(order))
                for name, height in heights.items()
            }

    def thawed(self, step: int) -> Collection[str]:
        return [name for name, at in self._thaws.items() if at is not None and step >= at]

    def begin_task(self, model: nn.Module, task: Task) -> None:
        for name, mask in self._held.items():
            parameter = model.get_parameter(name)
            self._held[name] = mask.to(parameter.device)
            self._values[name] = parameter.detach().clone()

    def add_to_gradients(self, model: nn.Module) -> None:
        for name, mask in self._held.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    def look(self, model: nn.Module, step: int) -> float:
        import torch

        self._step = step
        with torch.no_grad():
            for name, mask in self._held.items():
                parameter = model.get_parameter(name)
                parameter.copy_(torch.where(mask, self._values[name], parameter))
        for name in self._held.keys() & set(self.thawed(step)):
            del self._held[name], self._values[name]
        return 0.0

    def parameters_changed(self, change: Change) -> None:
        altered = {stored.name for stored in change.altered} | set(change.removed)
        frozen = self._thaws.keys() - set(self.thawed(self._step))
        if touched := sorted(altered & frozen):
            raise RequestError(
                f"forgetting=freeze: {touched[0]} is frozen, and can't change during the training."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"held": sorted(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._held.keys() - set(state["held"]):  # it thawed before
            del self._held[name], self._values[name]


def _unfreezable_reason(places: ParameterSelection, grown: tuple[Config, ...]) -> str:
    smallest = grown[0]
    layers = family_of(smallest).dimensions(smallest).num_hidden_layers
    if places.last_layer >= layers:
        which = "smallest model that is trained" if len(grown) > 1 else "model that is trained"
        return f"the {which} has {layers} layers; allowed are 0 to {layers - 1}"
    for word in places.parts:
        one = ParameterSelection.read([word])
        if not any(one.has(tensor, is_tied=is_tied) for tensor, is_tied in _tensors(grown[-1])):
            return f"the model has no {word}; leave it out"
    for each in grown:
        if all(places.has(tensor, is_tied=is_tied) for tensor, is_tied in _tensors(each)):
            return "that is all of the model, and nothing is left to train"
    return ""


def _tensors(config: Config) -> Iterator[tuple[LogicalTensor, bool]]:
    """Yield the tensors of a model, each with whether its head is tied."""
    tensors = family_of(config).logical_tensors(config)
    is_tied = all(tensor.kind != "head" for tensor in tensors)
    yield from ((tensor, is_tied) for tensor in tensors)
