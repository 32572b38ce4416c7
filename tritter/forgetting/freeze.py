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
from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.errors import Problem, RequestError
from tritter.families import Config, LogicalTensor, Places, StoredTensor, family_of
from tritter.options import Count, RunRequest, Start, Text, options
from tritter.training import ForgettingMethod, Needs, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.expand import Change

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
    def places(self) -> Places | None:
        """Where all is frozen, whatever is new there; None: nowhere.

        Raises:
            RequestError: there is no such place.
        """
        asked = self.layers
        if asked is None:
            return None if self.new_only or self.old_experts else Places.read([DEFAULT])
        return Places.read([asked] if isinstance(asked, int | str) else asked)

    def first_step(self, max_steps: int) -> int | None:
        """Return the step from which all is trained; None: never."""
        if isinstance(self.until, float):
            return max(1, round(self.until * max_steps))
        return self.until


class Freeze(ForgettingMethod):
    """Leave parameters, or entries of them, as they are.

    Args:
        layers: places by words, see `tritter.families.Places`; numbers are those of the model
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

    def __init__(
        self,
        *,
        layers: Any = None,
        new_only: bool = False,
        old_experts: bool = False,
        until: float | None = None,
        thaw: Order = "together",
    ) -> None:
        self.options = FreezeOptions(
            layers=layers, new_only=new_only, old_experts=old_experts, until=until, thaw=thaw
        )
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
        if options.new_only and (reason := _why_nothing_is_new(run)):
            yield Problem(f"{_KEY}.new_only", True, reason=reason)
        if options.old_experts and not family_of(start.trained[-1]).has_experts:
            reason = "the model is dense and has no experts; name layers instead"
            yield Problem(f"{_KEY}.old_experts", True, reason=reason)
        places = options.places
        if places is not None and (reason := _why_no_places(places, start.trained)):
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
        from tritter.training.parameters import live_layout  # transformers, as in `distill`

        parameters = dict(model.named_parameters())
        chosen = dict(self._masks(model, live_layout(model), task))
        trained = {name: mask for name, mask in chosen.items() if parameters[name].requires_grad}
        self._held = {name: mask for name, mask in trained.items() if not bool(mask.all())}
        frozen = [name for name in trained if name not in self._held]
        hold_still(model, frozen.__contains__)
        order = {stored.name: stored.layer for stored in live_layout(model)}
        embeddings = {
            stored.name
            for stored in live_layout(model)
            if stored.parts[0].tensor.kind in ("embed", "embed_positions")
        }
        groups = {name: _height(name, order, embeddings) for name in trained}
        self._thaws = self._schedule(groups, max_steps)

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
        """Refuse what it would have to follow: what is frozen stays as it is."""
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

    def _masks(
        self, model: nn.Module, places: tuple[StoredTensor, ...], task: Task
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters of which something is frozen, and a mask of what is."""
        import torch

        wanted, is_tied = self.options.places, _is_tied(places)
        for stored in places:
            tensors = [part.tensor for part in stored.parts]
            mask = torch.zeros(stored.shape, dtype=torch.bool)
            if wanted and all(wanted.has(tensor, is_tied=is_tied) for tensor in tensors):
                mask[...] = True
            if self.options.new_only or (self.options.old_experts and tensors[0].is_per_expert):
                mask |= task.carried[stored.name]
            if bool(mask.any()):
                yield stored.name, mask

    def _schedule(self, heights: dict[str, float], max_steps: int) -> dict[str, int | None]:
        """Return the step from which each parameter is trained."""
        end = self.options.first_step(max_steps)
        if end is None or self.options.thaw == "together":
            return dict.fromkeys(heights, end)
        order = sorted(set(heights.values()), reverse=True)
        at = {height: math.ceil(end * n / len(order)) for n, height in enumerate(order, start=1)}
        return {name: at[height] for name, height in heights.items()}


def hold_still(model: nn.Module, is_frozen: Callable[[str], bool]) -> None:
    """Let the parameters of some names need no gradient; others stay as they are."""
    for name, parameter in model.named_parameters():
        if is_frozen(name):
            parameter.requires_grad_(False)


def _height(name: str, layers: dict[str, int | None], embeddings: Collection[str]) -> float:
    """Return how far up a parameter stands: the embedding below all layers, the rest above."""
    layer = layers[name]
    if layer is not None:
        return layer
    return -1 if name in embeddings else math.inf


def _is_tied(places: tuple[StoredTensor, ...]) -> bool:
    return all(part.tensor.kind != "head" for stored in places for part in stored.parts)


def _why_nothing_is_new(run: RunRequest) -> str:
    specs, is_planned = run.expansion, run.pipeline.target_params is not None
    if run.control:
        return "the control does not grow, and nothing of it would be trained; leave one out"
    if len(run.text.tasks) > 1:
        return "the model grows for the first task alone, and the others add nothing new"
    if not specs and not is_planned:
        return "without an expansion nothing is new; choose one, or name layers instead"
    if specs and all(s.expansion_type == "depth" and not s.is_exact for s in specs):
        names = " and ".join(spec.name for spec in specs)
        return f"{names} only copies layers, which are not new; use llama_pro, width or moe"
    return ""


def _why_no_places(places: Places, grown: tuple[Config, ...]) -> str:
    smallest = grown[0]
    layers = family_of(smallest).dimensions(smallest).num_hidden_layers
    if places.last_layer >= layers:
        which = "smallest model that is trained" if len(grown) > 1 else "model that is trained"
        return f"the {which} has {layers} layers; allowed are 0 to {layers - 1}"
    for word in places.parts:
        one = Places.read([word])
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
