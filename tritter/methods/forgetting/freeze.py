"""Freezing: some parameters are not trained, either at all or up to a given step.

Frozen parameters are removed from the optimizer, whose weight decay and momentum would move them.
If only some entries of a parameter are frozen, their gradient is zeroed and their values are
restored after every step, bit for bit. A frozen weight is not a frozen function: trained weights in
other layers still change its inputs and how its outputs are used.

When to use: to save compute and memory (no gradients, no moments), or to let the weights that an
expansion added settle first (`until`; top-down as in Howard & Ruder 2018, ULMFiT,
arXiv 1801.06146). Cost: negative, except for a copy and a mask of partly frozen parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.core.families import LogicalTensor, Model, ParameterSelection
from tritter.errors import Problem, RequestError
from tritter.options import Count, RunRequest, Start, Text, options
from tritter.training import ForgettingMethod, Needs, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change

_Order = Literal["together", "top_down"]
_Share = Annotated[float, Field(gt=0, lt=1)]
_Layer = Annotated[int, Field(ge=0)]
_KEY = "forgetting.freeze"
_WITHOUT_WEIGHTS = ("depth", "context")  # only exact depth adds weights of its own
_DEFAULT = "attention"  # if no option selects anything


@options
class FreezeOptions:
    """Which parameters are frozen, and until which step."""

    layers: tuple[_Layer | Text, ...] | _Layer | Text | None = None
    new_only: bool = False
    old_experts: bool = False
    old_rows: bool = False
    until: Count | _Share | None = None
    thaw: _Order = "together"

    def __post_init__(self) -> None:
        if self.thaw != "together" and self.until is None:
            reason = (
                f"has no effect with {_KEY}.until = null; set {_KEY}.until to a step or a share"
            )
            raise RequestError(Problem(f"{_KEY}.thaw", self.thaw, reason=reason))
        try:
            _ = self.selection
        except RequestError as error:
            reason = str(error).rstrip(".")
            raise RequestError(Problem(f"{_KEY}.layers", self.layers, reason=reason)) from error

    @property
    def selection(self) -> ParameterSelection | None:
        """The parts that are frozen as a whole, new entries included; None if there are none."""
        layers = self.layers
        if layers is None:
            is_chosen = self.new_only or self.old_experts or self.old_rows
            return None if is_chosen else ParameterSelection.read([_DEFAULT])
        return ParameterSelection.read([layers] if isinstance(layers, int | str) else layers)

    def first_step(self, max_steps: int) -> int | None:
        """Return the step from which everything is trained; None: never."""
        if isinstance(self.until, float):
            return max(1, round(self.until * max_steps))
        return self.until


class Freeze(ForgettingMethod):
    """Freeze parameters, or some of their entries.

    Args:
        layers: parts to freeze, see `tritter.core.families.ParameterSelection`; layer numbers are
            those of the trained model. None: attention, unless one of the next three is set.
        new_only: freeze every entry that existed before the expansion.
        old_experts: freeze the experts that existed before the expansion.
        old_rows: freeze the rows of embedding and head that existed before the expansion.
        until: a step, or a share of all steps; None: to the end.
        thaw: how parameters are unfrozen. `together`: all at once. `top_down`: first the head and
            other parameters outside the layers, then layer by layer, the embedding last, evenly
            spread up to `until`.
    """

    name = "freeze"
    Options = FreezeOptions
    freezes = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._thaws: dict[str, int | None] = {}  # parameter → step from which it is trained
        self._step = 0
        self._partly_frozen: dict[str, Tensor] = {}  # parameter → mask of its frozen entries
        self._values: dict[str, Tensor] = {}  # parameter → values to restore

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        steps, at = run.training.max_steps, options.first_step(run.training.max_steps)
        if at is not None and at >= steps:
            reason = (
                f"the training run has training.max_steps = {steps}; use fewer, or null for never"
            )
            yield Problem(f"{_KEY}.until", options.until, reason=reason)
        if run.growth is not None and options.new_only:
            reason = (
                "neurons that grow would change partly frozen parameters; use growth=none instead"
            )
            yield Problem(f"{_KEY}.new_only", True, reason=reason)

    @classmethod
    def start_problems(cls, options: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        specs, reason = run.expansion, ""
        if run.control:
            reason = (
                "the control is not expanded, so nothing would be trained; remove one of the two"
            )
        elif not specs and run.pipeline.target_params is None:
            reason = "without an expansion nothing is new; choose one, or set layers instead"
        elif specs and not any(
            s.expansion_type not in _WITHOUT_WEIGHTS or s.is_exact or getattr(s, "identity", None)
            for s in specs
        ):
            names = " and ".join(spec.name for spec in specs)
            reason = f"{names} adds no new weights; use llama_pro, width or moe"
        if len(run.text.tasks) > 1:
            appends = any(getattr(spec, "is_append", False) for spec in specs)
            for key in ("new_only", "old_rows", *(["old_experts"] if appends else [])):
                if getattr(options, key):
                    late = "later tasks would freeze new weights too; use one task"
                    yield Problem(f"{_KEY}.{key}", True, reason=late)
        elif options.new_only and reason:
            yield Problem(f"{_KEY}.new_only", True, reason=reason)
        if options.old_rows and not any(spec.expansion_type == "vocab" for spec in specs):
            reason = "no expansion adds rows; choose expansion=vocab, or set layers to embeddings"
            yield Problem(f"{_KEY}.old_rows", True, reason=reason)
        family = start.trained[-1].family
        if options.old_experts and not (family.has_experts and family.has_table):
            reason = "the model is dense, or its family has no table; set layers instead"
            yield Problem(f"{_KEY}.old_experts", True, reason=reason)
        selection = options.selection
        grows = run.growth is not None and options.until is None
        if selection is not None and (reason := _unfit_reason(selection, start.trained, grows)):
            yield Problem(f"{_KEY}.layers", options.layers, reason=reason)

    @classmethod
    def num_frozen(cls, options: Any, trained: Model, before: Model, run: RunRequest) -> int:
        if options.until is not None:
            return 0
        selection, shapes, frozen = options.selection, trained.shapes, 0
        appends = any(getattr(spec, "is_append", False) for spec in run.expansion)
        for tensor, is_tied in _tensors(trained):
            is_frozen = selection is not None and selection.has(tensor, is_tied=is_tied)
            if is_frozen or (options.old_experts and tensor.is_per_expert and not appends):
                frozen += prod(shapes[tensor.name])
        return max(frozen, before.num_parameters) if options.new_only else frozen

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(carried=options.new_only or options.old_experts or options.old_rows)

    def freeze(self, model: nn.Module, task: Task, *, max_steps: int) -> None:
        import torch

        from tritter.training.parameters import live_layout  # transformers, as in `distill`

        options, chosen, stored_in_order = self.options, self.options.selection, live_layout(model)
        is_tied = "head" not in (p.tensor.kind for stored in stored_in_order for p in stored.parts)
        heights: dict[str, float] = {}  # the embedding is below all layers, the rest above
        self._partly_frozen = {}
        for stored in stored_in_order:
            tensors = [part.tensor for part in stored.parts]
            mask = torch.zeros(stored.shape, dtype=torch.bool)  # of frozen entries
            if chosen and all(chosen.has(tensor, is_tied=is_tied) for tensor in tensors):
                mask[...] = True
            if options.new_only or (options.old_experts and tensors[0].is_per_expert):
                mask |= task.carried[stored.name]
            if options.old_rows and tensors[0].kind in ("embed", "head"):
                mask |= task.carried[stored.name]
            parameter = model.get_parameter(stored.name)
            if not parameter.requires_grad or not bool(mask.any()):
                continue
            outside = -1 if tensors[0].kind in ("embed", "embed_positions") else math.inf
            heights[stored.name] = outside if stored.layer is None else stored.layer
            if bool(mask.all()):
                parameter.requires_grad_(False)
            else:
                self._partly_frozen[stored.name] = mask
        end = options.first_step(max_steps)
        self._thaws = dict.fromkeys(heights, end)
        if end is not None and options.thaw == "top_down":
            order = sorted(set(heights.values()), reverse=True)
            self._thaws = {
                name: math.ceil(end * (order.index(height) + 1) / len(order))
                for name, height in heights.items()
            }

    def thawed(self, step: int) -> Collection[str]:
        return [name for name, at in self._thaws.items() if at is not None and step >= at]

    def begin_task(self, model: nn.Module, task: Task) -> None:
        for name, mask in self._partly_frozen.items():
            parameter = model.get_parameter(name)
            self._partly_frozen[name] = mask.to(parameter.device)
            self._values[name] = parameter.detach().clone()

    def add_to_gradients(self, model: nn.Module) -> None:
        for name, mask in self._partly_frozen.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    def observe_step(self, model: nn.Module, step: int) -> float:
        import torch

        self._step = step
        with torch.no_grad():
            for name, mask in self._partly_frozen.items():
                parameter = model.get_parameter(name)
                parameter.copy_(torch.where(mask, self._values[name], parameter))
        for name in self._partly_frozen.keys() & set(self.thawed(step)):
            del self._partly_frozen[name], self._values[name]
        return 0.0

    def parameters_changed(self, change: Change) -> None:
        altered = {stored.name for stored in change.altered} | set(change.removed)
        if touched := sorted(altered & self._thaws.keys() - set(self.thawed(self._step))):
            raise RequestError(
                f"forgetting=freeze: {touched[0]} is frozen and can't change during training."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"held": sorted(self._partly_frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._partly_frozen.keys() - set(state["held"]):  # thawed earlier
            del self._partly_frozen[name], self._values[name]


def _unfit_reason(selection: ParameterSelection, grown: tuple[Model, ...], grows: bool) -> str:
    layers = grown[0].sizes.num_hidden_layers
    if selection.last_layer >= layers:
        which = "smallest trained model" if len(grown) > 1 else "trained model"
        return f"the {which} has {layers} layers; allowed are 0 to {layers - 1}"
    for word in selection.parts:
        one = ParameterSelection.read([word])
        if not any(one.has(tensor, is_tied=is_tied) for tensor, is_tied in _tensors(grown[-1])):
            return f"the model has no {word}; remove it"
    for each in grown:
        if all(selection.has(tensor, is_tied=is_tied) for tensor, is_tied in _tensors(each)):
            return "this is the whole model, so nothing would be trained"
    if grows:
        wide = grown[-1].widened
        ffns = (tensor for tensor in wide.tensors if wide.family.ffn_part(tensor))
        if all(selection.has(tensor, is_tied=False) for tensor in ffns):
            return "the FFNs, in which neurons grow, would be frozen; freeze attention or set until"
    return ""


def _tensors(model: Model) -> Iterator[tuple[LogicalTensor, bool]]:
    """Yield each tensor of a model, and whether the head is tied."""
    is_tied = all(tensor.kind != "head" for tensor in model.tensors)
    yield from ((tensor, is_tied) for tensor in model.tensors)
