"""Triggers: when a model grows, and in which layers.

A trigger is evaluated at each check and decides from a view, which is saved with the run. It has no
state of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tritter.errors import Problem
from tritter.limits import MAX_PARAMETERS
from tritter.methods.growth.initialisers import GradMax, Initialiser, Random, SourceNoise, Split
from tritter.options import Count, WholeNumber, options, part_field

_REFERENCE_STEPS = 2_000  # length of run that the next three defaults are for
_COOLDOWN, _CHECK_EVERY, _MATURATION_AGE = 200, 100, 500
_WARMUP_SHARE = 0.05  # share of a run; the first gradients are not informative
_SIZE_EXPONENT = 0.076
_MIN_STEPS, _BINS, _MOMENTS = 40, 24, 64
INITIALISERS: Mapping[str, type[Initialiser]] = {
    kind.name: kind for kind in (GradMax, Split, SourceNoise, Random)
}
_Percent = Annotated[float, Field(gt=0, lt=100)]
_Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The schedule of growth, in steps of one training run.

    Args:
        check_every: steps between checks.
        cooldown: steps before the first event and between events.
        warmup: steps before the first check.
        maturation_age: steps until a neuron is mature.
        max_steps: length of the run; None: unknown, as in your own loop.
    """

    check_every: int
    cooldown: int
    warmup: int
    maturation_age: int
    max_steps: int | None

    @classmethod
    def of(cls, options: GrowthOptions, *, max_steps: int | None) -> Timing:
        """Return the schedule that options imply for a run of `max_steps` steps."""
        part = 1.0 if max_steps is None else min(1.0, max_steps / _REFERENCE_STEPS)

        def scaled(value: int | None, usual: int) -> int:
            return max(1, ceil(usual * part)) if value is None else value

        warmup = options.warmup_steps
        if warmup is None:
            warmup = ceil(_WARMUP_SHARE * (max_steps or _REFERENCE_STEPS))
        return cls(
            check_every=scaled(options.check_every, _CHECK_EVERY),
            cooldown=scaled(options.growth_cooldown, _COOLDOWN),
            warmup=warmup,
            maturation_age=scaled(options.maturation_age, _MATURATION_AGE),
            max_steps=max_steps,
        )


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """The data that a trigger decides from.

    Args:
        step: optimizer steps taken.
        pressures: float64 [L], current pressure of each layer: moving average of the mean gradient
            norm of its neurons, relative to the norm of the whole gradient.
        neuron_pressures: for each layer float32 [F], the gradient norms of its neurons.
        history: float64 [n, L], the pressures at earlier checks.
        losses: losses of recent steps in nats per token, the latest last; only if `needs_losses`.
        neuron_parameters: parameters of one neuron, for each layer.
        neuron_flops: FLOPs that one neuron adds until the end of the run; 0 if not counted.
        new_parameters: parameters that growth has added so far.
        extra_flops: FLOPs that growth has added so far.
        num_events: number of steps after which the model grew.
        parameters: current number of parameters of the model.
        options: the options of `growth`.
        timing: the schedule.
    """

    step: int
    pressures: Tensor
    neuron_pressures: Sequence[Tensor]
    history: Tensor
    losses: Sequence[float]
    neuron_parameters: Sequence[int]
    neuron_flops: Sequence[float]
    new_parameters: int
    extra_flops: float
    num_events: int
    parameters: int
    options: GrowthOptions
    timing: Timing

    @property
    def highest(self) -> int:
        """Index of the layer with the highest pressure."""
        return int(self.pressures.argmax())

    def is_plateau(self, threshold: float) -> bool:
        """Return True if the mean loss of a window's halves differs by less than `threshold`.

        The window has `growth.plateau_steps` steps; before it is full there is no plateau. The
        difference is relative to the first half.
        """
        import torch

        count = self.options.plateau_steps
        if len(self.losses) < count:
            return False
        losses = torch.tensor(list(self.losses)[-count:], dtype=torch.float64)
        before, after = losses[: count // 2].mean(), losses[count // 2 :].mean()
        return bool((before - after).abs() < threshold * before)

    def affordable(self, layer: int, *, new_parameters: int, extra_flops: float) -> int | None:
        """Return the number of neurons that the budgets permit in a layer; None without one.

        Args:
            new_parameters: parameters that growth has added so far.
            extra_flops: FLOPs that growth has added so far.
        """
        options, limits = self.options, []
        if options.max_new_parameters is not None:
            free = options.max_new_parameters - new_parameters
            limits.append(free // self.neuron_parameters[layer])
        if options.max_extra_flops is not None and self.neuron_flops[layer]:
            limits.append(int((options.max_extra_flops - extra_flops) / self.neuron_flops[layer]))
        return max(0, min(limits)) if limits else None


@options
class Trigger(ABC):
    """Base class of triggers; subclass it as a record of options to add your own."""

    name: ClassVar[str] = ""  # key in `TRIGGERS` of built-in triggers
    advice: ClassVar[str] = ""  # what to change if nothing grew
    needs_losses: ClassVar[bool] = False
    needs_end: ClassVar[bool] = False  # True if it needs the number of steps

    def problems(self, options: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        """Yield reasons why it can't work in a run of `max_steps` steps, for any model."""
        yield from ()

    def is_due(self, step: int, timing: Timing) -> bool:
        """Return True if the trigger is evaluated after step `step`."""
        return step >= timing.warmup and step % timing.check_every == 0

    def has_cooldown(self) -> bool:
        """Return True if the cooldown applies to it."""
        return True

    def inactivity_reason(self, options: GrowthOptions, *, num_checks: int, num_layers: int) -> str:
        """Return the reason if it can never fire in a run with `num_checks` checks, else ''.

        Args:
            num_checks: number of checks before the last step.
        """
        return ""

    @abstractmethod
    def decide(self, view: View) -> Mapping[int, int]:
        """Return {layer: number of new neurons}; empty: the model is unchanged."""


@options
class Percentile(Trigger):
    """Grow layers whose pressure is in the top percentile of all layers at earlier checks.

    For exchangeable pressures, growth occurs at a known fraction of the checks: the rank of a new
    value among n old ones is uniform.
    """

    name: ClassVar[str] = "percentile"
    advice: ClassVar[str] = "a lower growth.gradient_percentile"

    def decide(self, view: View) -> Mapping[int, int]:
        old = view.history.flatten()
        rank = _rank(len(old), view.options.gradient_percentile)
        if not rank:
            return {}
        chosen = (view.pressures > old.topk(rank).values[-1]).nonzero().squeeze(1).tolist()
        return dict.fromkeys(chosen, view.options.max_growth_per_step)

    def inactivity_reason(self, options: GrowthOptions, *, num_checks: int, num_layers: int) -> str:
        known = min(options.history_checks, num_checks - 1) * num_layers
        if _rank(known, options.gradient_percentile):
            return ""
        return (
            f"there are {max(known, 0)} earlier pressures for comparison (checks: {num_checks}, "
            f"layers: {num_layers}), too few for growth.gradient_percentile = "
            f"{options.gradient_percentile:g}; check more often (growth.check_every), or keep more "
            "of them (growth.history_checks)"
        )


@options
class WithinLayer(Trigger):
    """Grow neurons above a percentile within their own layer.

    Some neurons always are, so every layer grows whenever the cooldown permits.
    """

    name: ClassVar[str] = "within_layer"

    def decide(self, view: View) -> Mapping[int, int]:
        import torch

        found = {}
        for layer, pressures in enumerate(view.neuron_pressures):
            threshold = torch.quantile(pressures.float(), view.options.gradient_percentile / 100)
            found[layer] = min(int((pressures > threshold).sum()), view.options.max_growth_per_step)
        return {layer: count for layer, count in found.items() if count}


@options
class Plateau(Trigger):
    """Grow the layer of the highest pressure when the loss stops falling.

    Args:
        threshold: relative change of the loss within `growth.plateau_steps` below which it grows.
    """

    name: ClassVar[str] = "plateau"
    advice: ClassVar[str] = "a higher threshold of growth.trigger"
    needs_losses: ClassVar[bool] = True

    threshold: Annotated[float, Field(gt=0)] = 0.01

    def problems(self, options: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        if options.plateau_steps >= max_steps:
            reason = f"nothing could grow: must be below training.max_steps = {max_steps}"
            yield Problem("growth.plateau_steps", options.plateau_steps, reason=reason)

    def decide(self, view: View) -> Mapping[int, int]:
        if not view.is_plateau(self.threshold):
            return {}
        return {view.highest: view.options.max_growth_per_step}


@options
class Scheduled(Trigger):
    """Grow all layers after given steps, or whenever the cooldown permits.

    Args:
        at: steps of growth, regardless of the cooldown; None: at each check.
    """

    name: ClassVar[str] = "schedule"

    at: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None

    def problems(self, options: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        if late := [step for step in self.at or () if step >= max_steps]:
            reason = f"must be below training.max_steps = {max_steps}"
            yield Problem("growth.trigger.at", late, reason=reason)

    def has_cooldown(self) -> bool:
        return self.at is None

    def is_due(self, step: int, timing: Timing) -> bool:
        return Trigger.is_due(self, step, timing) if self.at is None else step in self.at

    def decide(self, view: View) -> Mapping[int, int]:
        return dict.fromkeys(range(len(view.pressures)), view.options.max_growth_per_step)


@options
class Budget(Trigger):
    """Spend a budget evenly over a run, each time in the layer of the highest pressure.

    The budget is `growth.max_new_parameters` or `growth.max_extra_flops`. The cooldown determines
    how often it grows, and `max_growth_per_step` permitted each event.
    """

    name: ClassVar[str] = "budget"
    needs_end: ClassVar[bool] = True

    def problems(self, options: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        if not (options.max_new_parameters or options.max_extra_flops):
            reason = "requires growth.max_new_parameters or growth.max_extra_flops"
            yield Problem("growth.trigger", self.name, reason=reason)

    def decide(self, view: View) -> Mapping[int, int]:
        timing, options = view.timing, view.options
        assert timing.max_steps is not None, "a budget needs the number of steps"
        every = -(-timing.cooldown // timing.check_every) * timing.check_every
        times = max(1, (timing.max_steps - 1 - view.step) // every + 1)
        layer = view.highest
        permitted = view.affordable(
            layer, new_parameters=view.new_parameters, extra_flops=view.extra_flops
        )
        assert permitted is not None, "requests without a budget are refused"
        return {layer: min(options.max_growth_per_step, -(-permitted // times))}


def _rank(num_old: int, percentile: float) -> int:
    """Return k such that a new value exceeds the k-th largest of n old ones at the wanted rate."""
    return int((1 - percentile / 100) * (num_old + 1) + 1e-9)


# Grow when the expected gain of the small model falls below that of a larger one.
#
# The losses of a run at a constant learning rate are fitted by E + B·s^-β over its steps s. A
# larger model has a lower floor, E·(N'/N)^-0.076 (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5,
# for parameters of a well-trained model), the same B and β, and steps that cost N'/N as much.
# Growth preserves the function, so the larger model continues from the step of its own curve that
# has the current loss.


@dataclass(frozen=True, slots=True)
class _Curve:
    """E + B·s^-β, in nats per token, after s steps."""

    floor: float
    scale: float
    exponent: float

    def loss(self, step: float) -> float:
        return self.floor + self.scale * step**-self.exponent

    def step(self, loss: float) -> float:
        """Return the number of steps after which the curve reaches a loss above its floor."""
        return ((loss - self.floor) / self.scale) ** (-1 / self.exponent)

    def best_step(self, *, step: int, max_steps: int, ratio: float) -> int | None:
        """Return the step at which growth leads to the lowest final loss; None if it never pays.

        All alternatives have the FLOPs of `max_steps` steps of the small model.

        Args:
            step: the first candidate step.
            ratio: parameters of the grown model divided by those of the small one.
        """
        larger = _Curve(self.floor * ratio**-_SIZE_EXPONENT, self.scale, self.exponent)
        best, at = self.loss(max_steps), None
        for number in range(_MOMENTS):
            moment = step + number * (max_steps - step) // _MOMENTS
            start = larger.step(self.loss(moment))
            end = larger.loss(start + (max_steps - moment) / ratio)
            if end < best:
                best, at = end, moment
        return at


def _fit_curve(losses: Sequence[float], *, first_step: int) -> _Curve | None:
    """Return the curve fitted to the losses of consecutive steps; None if no fit is possible.

    Least squares over bin means. Bins widen with the step, so that the many late steps do not
    dominate.
    """
    import torch

    if len(losses) < _MIN_STEPS:
        return None
    steps = torch.arange(first_step, first_step + len(losses), dtype=torch.float64)
    edges = torch.logspace(
        float(steps[0].log10()), float(steps[-1].log10()), _BINS + 1, dtype=torch.float64
    )
    bin_of_step = torch.bucketize(steps, edges[1:-1])
    count = torch.bincount(bin_of_step, minlength=_BINS).double()
    is_filled = count > 0
    values = torch.tensor(losses, dtype=torch.float64)
    means, at = (
        torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bin_of_step, each)[is_filled]
        / count[is_filled]
        for each in (values, steps)
    )
    best: tuple[float, _Curve] | None = None
    for exponent in torch.linspace(0.05, 1.5, 59, dtype=torch.float64).tolist():
        powers = torch.stack([torch.ones_like(at), at**-exponent], dim=1)
        solution = torch.linalg.lstsq(powers, means[:, None]).solution.squeeze(1)
        error = float((powers @ solution - means).square().sum())
        curve = _Curve(float(solution[0]), float(solution[1]), exponent)
        if curve.floor > 0 and curve.scale > 0 and (best is None or error < best[0]):
            best = error, curve
    return None if best is None else best[1]


@options
class ScalingLaw(Trigger):
    """Grow all layers once, at the step that is predicted to give the lowest final loss.

    Use it with `training.schedule=constant` or the flat part of `wsd`: a decaying learning rate
    distorts the curve. Each layer grows by `growth.max_growth_per_step` neurons.

    Args:
        times: maximum number of growth events.
    """

    name: ClassVar[str] = "scaling_law"
    needs_losses: ClassVar[bool] = True
    needs_end: ClassVar[bool] = True

    times: Annotated[int, Field(ge=1, le=100)] = 1

    def problems(self, options: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        if max_steps <= _MIN_STEPS:
            reason = f"nothing could grow: scaling_law needs more than {_MIN_STEPS} steps"
            yield Problem("training.max_steps", max_steps, reason=reason)

    def decide(self, view: View) -> Mapping[int, int]:
        timing, count = view.timing, view.options.max_growth_per_step
        if timing.max_steps is None or view.num_events >= self.times:
            return {}
        since = view.step - len(view.losses) + 1
        settled = max(timing.warmup, since) - since
        curve = _fit_curve(view.losses[settled:], first_step=since + settled)
        ratio = 1 + count * sum(view.neuron_parameters) / view.parameters
        if curve is None:
            return {}
        best = curve.best_step(step=view.step, max_steps=timing.max_steps, ratio=ratio)
        if best is None or best > view.step:
            return {}
        return dict.fromkeys(range(len(view.pressures)), count)


TRIGGERS: Mapping[str, type[Trigger]] = {
    kind.name: kind for kind in (Percentile, Plateau, Scheduled, Budget, ScalingLaw, WithinLayer)
}


@options
class GrowthOptions:
    """The options of `growth`, and keyword arguments of growable modules.

    A growable module has no `max_extra_flops`, and only a language model `freeze_attention`. Its
    `check_every` is 1 and its `warmup_steps` 0 unless given.

    Args:
        trigger: a name or component, see `tritter.options.read_part`.
        initialiser: a name or component, see `tritter.options.read_part`.
        gradient_percentile: percentile of the pressures of all layers at earlier checks.
        pressure_decay: decay of the moving average of gradient norms.
        history_checks: number of earlier checks that count.
        check_every: steps between checks. None: 100, or less in proportion for runs below 2,000
            steps.
        growth_cooldown: steps before the first event and between events. None: 200, or less in
            proportion.
        warmup_steps: steps before the first check. None: a twentieth of the run.
        max_growth_per_step: maximum neurons per layer and event.
        maturation_age: steps until a neuron is mature. None: 500, or less in proportion.
        maturation_factor: multiplies the updates of young neurons.
        plateau_threshold: growth waits until the relative change of the loss is smaller; None:
            growth does not wait for a plateau.
        plateau_steps: window of steps for that change.
        max_new_parameters: limit on added parameters per run; None: no limit.
        max_extra_flops: limit on the FLOPs that new neurons add to a run; None: no limit.
        enable_replacement: reinitialise dead neurons before adding others.
        dead_quantile: a mature neuron is dead if its Wanda score is below this quantile of all
            layers' scores.
        freeze_attention: train only the FFNs.
    """

    trigger: Annotated[Trigger, *part_field("growth.trigger", TRIGGERS, base=Trigger)]
    initialiser: Annotated[
        Initialiser, *part_field("growth.initialiser", INITIALISERS, base=Initialiser)
    ]
    gradient_percentile: _Percent = 90.0
    pressure_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    history_checks: Count = 100
    check_every: Count | None = None
    growth_cooldown: Count | None = None
    warmup_steps: WholeNumber | None = None
    max_growth_per_step: Count = 10
    maturation_age: WholeNumber | None = None
    maturation_factor: Annotated[float, Field(gt=0)] = 2.0
    plateau_threshold: Annotated[float, Field(gt=0)] | None = None
    plateau_steps: Annotated[int, Field(ge=2, le=100_000)] = 100
    max_new_parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)] | None = None
    max_extra_flops: Annotated[float, Field(gt=0)] | None = None
    enable_replacement: bool = False
    dead_quantile: _Share = 0.01
    freeze_attention: bool = False

    @property
    def name(self) -> str:
        """Names of the trigger and the initialiser, as in reports."""
        parts = (type(self.trigger), type(self.initialiser))
        return "+".join(kind.name or kind.__name__ for kind in parts)

    def inactivity_reason(self, *, max_steps: int, num_layers: int) -> str:
        """Return the reason if nothing can grow in `max_steps` steps, else ''."""
        timing = Timing.of(self, max_steps=max_steps)
        due = [n for n in range(1, max_steps) if self.trigger.is_due(n, timing)]
        cool = [n for n in due if n >= timing.cooldown or not self.trigger.has_cooldown()]
        if not cool:
            return (
                f"with training.max_steps = {max_steps} nothing could grow: checks run every "
                f"{timing.check_every} steps after step {timing.warmup}, and growth is excluded in "
                f"the first {timing.cooldown} steps (growth.check_every, .warmup_steps, "
                ".growth_cooldown) and after the last"
            )
        return self.trigger.inactivity_reason(self, num_checks=len(due), num_layers=num_layers)
