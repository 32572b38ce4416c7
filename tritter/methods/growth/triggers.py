"""When a model grows, and in which of its layers.

A trigger is asked at each check and decides by what it is shown, which is saved with the training:
it has no state of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tritter.errors import Problem
from tritter.limits import MAX_PARAMETERS
from tritter.methods.growth.initialisers import GradMax, Initialiser, Random, SourceNoise, Split
from tritter.options import Count, WholeNumber, options, part_field

REFERENCE_STEPS = 2_000  # of a training that the README's numbers are for
COOLDOWN, CHECK_EVERY, MATURATION_AGE = 200, 100, 500  # the README's
WARMUP_SHARE = 0.05  # of a training; its first gradients say little


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The schedules of growth in steps of one training.

    Args:
        max_steps: of the training; None: not known, as in a loop of one's own.
    """

    check_every: int
    cooldown: int
    warmup: int
    maturation_age: int
    max_steps: int | None

    @classmethod
    def of(cls, asked: GrowthOptions, *, max_steps: int | None) -> Timing:
        """Return what `asked` means in a training of so many steps."""
        part = 1.0 if max_steps is None else min(1.0, max_steps / REFERENCE_STEPS)

        def scaled(value: int | None, usual: int) -> int:
            return max(1, ceil(usual * part)) if value is None else value

        warmup = asked.warmup_steps
        if warmup is None:
            warmup = ceil(WARMUP_SHARE * (max_steps or REFERENCE_STEPS))
        return cls(
            check_every=scaled(asked.check_every, CHECK_EVERY),
            cooldown=scaled(asked.growth_cooldown, COOLDOWN),
            warmup=warmup,
            maturation_age=scaled(asked.maturation_age, MATURATION_AGE),
            max_steps=max_steps,
        )


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """What a trigger is shown at a check.

    Args:
        step: optimizer steps taken.
        pressures: float64 [L], of each layer now: the mean norm of its neurons' gradients, as a
            moving average, in proportion to the norm of the whole gradient.
        neuron_pressures: of each layer float32 [F], its neurons' own.
        history: float64 [n, L], the pressures of earlier checks.
        losses: of the last steps, nats per token, the latest last; kept where `needs_losses`.
        neuron_parameters: that one more neuron of each layer is made of.
        neuron_flops: that it adds to the rest of the training; 0 where nobody counts them.
        new_parameters: that growth has added so far; `extra_flops` likewise.
        num_events: steps after which something grew.
        parameters: of the model now.
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
        """The layer of the highest pressure."""
        return int(self.pressures.argmax())


@options
class Trigger(ABC):
    """Decides at a check; from outside, a record of options with this base."""

    name: ClassVar[str] = ""  # of ours, in `TRIGGERS`
    advice: ClassVar[str] = ""  # what to try where nothing grew
    needs_losses: ClassVar[bool] = False
    needs_end: ClassVar[bool] = False  # it has to know where the training ends

    def problems(self, asked: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        """Yield why it can't decide in a training of so many steps, whatever the model."""
        yield from ()

    def is_due(self, step: int, timing: Timing) -> bool:
        """Say whether the trigger is asked after so many steps."""
        return step >= timing.warmup and step % timing.check_every == 0

    def waits(self) -> bool:
        """Say whether the cooldown holds for it."""
        return True

    def why_never(self, asked: GrowthOptions, *, num_checks: int, num_layers: int) -> str:
        """Return why it can't decide for growth in a training with so many checks; empty: it can.

        Args:
            num_checks: before the last step.
        """
        return ""

    @abstractmethod
    def decide(self, view: View) -> Mapping[int, int]:
        """Return layer → how many neurons it gets; nothing: the model stays as it is."""


@options
class Percentile(Trigger):
    """The layers whose pressure is among the highest of all layers at all checks so far.

    For pressures that come in no particular order a layer grows at `rate` of the checks: the rank
    of a new value among n old ones is uniform.
    """

    name: ClassVar[str] = "percentile"
    advice: ClassVar[str] = "a lower growth.gradient_percentile"

    def decide(self, view: View) -> Mapping[int, int]:
        old = view.history.flatten()
        rank = _rank(len(old), view.options.gradient_percentile)
        if not rank:
            return {}
        threshold = old.topk(rank).values[-1]
        chosen = (view.pressures > threshold).nonzero().squeeze(1).tolist()
        return dict.fromkeys(chosen, view.options.max_growth_per_step)

    def why_never(self, asked: GrowthOptions, *, num_checks: int, num_layers: int) -> str:
        known = min(asked.history_checks, num_checks - 1) * num_layers
        if _rank(known, asked.gradient_percentile):
            return ""
        return (
            f"{num_checks} checks of {num_layers} layers leave {max(known, 0)} earlier pressures "
            f"to compare with, too few for growth.gradient_percentile = "
            f"{asked.gradient_percentile:g}; check more often (growth.check_every), or keep more "
            "(growth.history_checks)"
        )

    @staticmethod
    def rate(num_old: int, num_layers: int, percentile: float) -> float:
        """Return the chance that any layer grows at a check, of exchangeable pressures.

        None of L new values exceeds the k-th largest of n old ones if the k largest of all n + L
        are old: C(n, k) / C(n + L, k).
        """
        rank = _rank(num_old, percentile)
        return 1 - prod((num_old - i) / (num_old + num_layers - i) for i in range(rank))


@options
class WithinLayer(Trigger):
    """The README's to the letter: neurons above a percentile of their own layer.

    There are always some, so every layer grows whenever the cooldown allows it.
    """

    name: ClassVar[str] = "within_layer"

    def decide(self, view: View) -> Mapping[int, int]:
        import torch

        found = {}
        for layer, pressures in enumerate(view.neuron_pressures):
            threshold = torch.quantile(pressures.float(), view.options.gradient_percentile / 100)
            count = int((pressures > threshold).sum())
            found[layer] = min(count, view.options.max_growth_per_step)
        return {layer: count for layer, count in found.items() if count}


@options
class Plateau(Trigger):
    """The layer of the highest pressure, when the loss falls no longer.

    Args:
        threshold: relative change of the loss within `growth.plateau_steps`, below which it grows.
    """

    name: ClassVar[str] = "plateau"
    advice: ClassVar[str] = "a higher threshold of growth.trigger"
    needs_losses: ClassVar[bool] = True

    threshold: Annotated[float, Field(gt=0)] = 0.01

    def decide(self, view: View) -> Mapping[int, int]:
        if not is_plateau(view, self.threshold):
            return {}
        return {view.highest: view.options.max_growth_per_step}


@options
class Scheduled(Trigger):
    """All layers, after certain steps, or whenever the cooldown allows it.

    Args:
        at: the steps, whatever the cooldown; None: at each check.
    """

    name: ClassVar[str] = "schedule"
    advice: ClassVar[str] = "steps of growth.trigger.at that the training reaches"

    at: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None

    def problems(self, asked: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        if late := [step for step in self.at or () if step >= max_steps]:
            reason = f"the training has training.max_steps = {max_steps}; allowed are steps before"
            yield Problem("growth.trigger.at", late, reason=reason)

    def waits(self) -> bool:
        return self.at is None

    def is_due(self, step: int, timing: Timing) -> bool:
        return Trigger.is_due(self, step, timing) if self.at is None else step in self.at

    def decide(self, view: View) -> Mapping[int, int]:
        return dict.fromkeys(range(len(view.pressures)), view.options.max_growth_per_step)


@options
class Budget(Trigger):
    """Spends a budget evenly over a training, each time in the layer of the highest pressure.

    The budget is `growth.max_new_parameters` or `growth.max_extra_flops`; the cooldown says how
    often, and `max_growth_per_step` how much at most in one event.
    """

    name: ClassVar[str] = "budget"
    advice: ClassVar[str] = "a larger budget"
    needs_end: ClassVar[bool] = True

    def problems(self, asked: GrowthOptions, *, max_steps: int) -> Iterator[Problem]:
        if not (asked.max_new_parameters or asked.max_extra_flops):
            reason = "say what it may spend: growth.max_new_parameters or growth.max_extra_flops"
            yield Problem("growth.trigger", self.name, reason=reason)

    def decide(self, view: View) -> Mapping[int, int]:
        timing, asked = view.timing, view.options
        assert timing.max_steps is not None, "a budget is of a training whose end is known"
        every = -(-timing.cooldown // timing.check_every) * timing.check_every
        times = max(1, (timing.max_steps - 1 - view.step) // every + 1)
        layer = view.highest
        left = affordable(
            view, layer, new_parameters=view.new_parameters, extra_flops=view.extra_flops
        )
        assert left is not None, "there is a budget, or the request would have been refused"
        return {layer: min(asked.max_growth_per_step, -(-left // times))}


def is_plateau(view: View, threshold: float) -> bool:
    """Say whether the loss changed by less than a part of it from one half of a window to the next.

    The window is `growth.plateau_steps` long; as long as it is not full there is no plateau.
    """
    import torch

    count = view.options.plateau_steps
    if len(view.losses) < count:
        return False
    losses = torch.tensor(list(view.losses)[-count:], dtype=torch.float64)
    before, after = losses[: count // 2].mean(), losses[count // 2 :].mean()
    return bool((before - after).abs() < threshold * before)


def affordable(view: View, layer: int, *, new_parameters: int, extra_flops: float) -> int | None:
    """Return how many neurons of a layer are left of the budgets; None where there are none.

    Args:
        new_parameters: that growth has added; `extra_flops` likewise.
    """
    asked, left = view.options, []
    if asked.max_new_parameters is not None:
        free = asked.max_new_parameters - new_parameters
        left.append(free // view.neuron_parameters[layer])
    if asked.max_extra_flops is not None and view.neuron_flops[layer]:
        left.append(int((asked.max_extra_flops - extra_flops) / view.neuron_flops[layer]))
    return max(0, min(left)) if left else None


def _rank(num_old: int, percentile: float) -> int:
    """Return the k for which a new value exceeds the k-th largest of n old ones often enough."""
    return int((1 - percentile / 100) * (num_old + 1) + 1e-9)


# Grow where the small model's curve is about to gain less than a larger one's would.
#
# The loss of a training at a constant rate is fitted by E + B·s^-β over its steps s. A larger
# model has a lower floor, E·(N'/N)^-0.076 (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5: of a
# well trained model's parameters), the same B and β, and steps that cost N'/N as much. Growth
# keeps the function, so it goes on from the step of its own curve at which that has the present
# loss.

SIZE_EXPONENT = 0.076
_LEAST_STEPS, _BINS, _MOMENTS = 40, 24, 64


@dataclass(frozen=True, slots=True)
class Curve:
    """E + B·s^-β, nats per token after s steps."""

    floor: float
    scale: float
    exponent: float

    def loss(self, step: float) -> float:
        return self.floor + self.scale * step**-self.exponent

    def step(self, loss: float) -> float:
        """Return after how many steps the curve has a loss above its floor."""
        return ((loss - self.floor) / self.scale) ** (-1 / self.exponent)


def fitted(losses: Sequence[float], *, first_step: int) -> Curve | None:
    """Return the curve of the losses of steps in a row; None where they tell none.

    By least squares over means of bins that grow with the step, so that late steps, of which there
    are many, do not decide alone.
    """
    import torch

    if len(losses) < _LEAST_STEPS:
        return None
    steps = torch.arange(first_step, first_step + len(losses), dtype=torch.float64)
    edges = torch.logspace(
        float(steps[0].log10()), float(steps[-1].log10()), _BINS + 1, dtype=torch.float64
    )
    place = torch.bucketize(steps, edges[1:-1])
    count = torch.bincount(place, minlength=_BINS).double()
    held = count > 0
    values = torch.tensor(losses, dtype=torch.float64)
    means = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, values)[held] / count[held]
    at = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, steps)[held] / count[held]
    best: tuple[float, Curve] | None = None
    for exponent in torch.linspace(0.05, 1.5, 59, dtype=torch.float64).tolist():
        powers = torch.stack([torch.ones_like(at), at**-exponent], dim=1)
        solution = torch.linalg.lstsq(powers, means[:, None]).solution.squeeze(1)
        error = float((powers @ solution - means).square().sum())
        curve = Curve(float(solution[0]), float(solution[1]), exponent)
        if curve.floor > 0 and curve.scale > 0 and (best is None or error < best[0]):
            best = error, curve
    return None if best is None else best[1]


def best_step(curve: Curve, *, step: int, max_steps: int, ratio: float) -> int | None:
    """Return after how many steps growth ends with the lowest loss; None: it pays at none.

    Each way has the FLOPs of `max_steps` steps of the small model.

    Args:
        step: the first that is left.
        ratio: parameters of the grown model over those of the small one.
    """
    larger = Curve(curve.floor * ratio**-SIZE_EXPONENT, curve.scale, curve.exponent)
    best, at = curve.loss(max_steps), None
    for number in range(_MOMENTS):
        moment = step + number * (max_steps - step) // _MOMENTS
        start = larger.step(curve.loss(moment))
        end = larger.loss(start + (max_steps - moment) / ratio)
        if end < best:
            best, at = end, moment
    return at


@options
class ScalingLaw(Trigger):
    """Once, in all layers: at the step from which growth is predicted to end best.

    Meant for `training.schedule=constant` or the flat part of `wsd`; a rate that falls bends the
    curve. `growth.max_growth_per_step` neurons a layer are what is grown.

    Args:
        times: how often it may grow.
    """

    name: ClassVar[str] = "scaling_law"
    needs_losses: ClassVar[bool] = True
    needs_end: ClassVar[bool] = True

    times: Annotated[int, Field(ge=1, le=100)] = 1

    def decide(self, view: View) -> Mapping[int, int]:
        timing, count = view.timing, view.options.max_growth_per_step
        if timing.max_steps is None or view.num_events >= self.times:
            return {}
        since = view.step - len(view.losses) + 1
        settled = max(timing.warmup, since) - since
        curve = fitted(view.losses[settled:], first_step=since + settled)
        added = count * sum(view.neuron_parameters)
        ratio = (view.parameters + added) / view.parameters
        if curve is None:
            return {}
        best = best_step(curve, step=view.step, max_steps=timing.max_steps, ratio=ratio)
        if best is None or best > view.step:
            return {}
        return dict.fromkeys(range(len(view.pressures)), count)


TRIGGERS: Mapping[str, type[Trigger]] = {
    kind.name: kind for kind in (Percentile, Plateau, Scheduled, Budget, ScalingLaw, WithinLayer)
}
INITIALISERS: Mapping[str, type[Initialiser]] = {
    kind.name: kind for kind in (GradMax, Split, SourceNoise, Random)
}

_Percent = Annotated[float, Field(gt=0, lt=100)]
_Share = Annotated[float, Field(gt=0, lt=1)]


@options
class GrowthOptions:
    """The keys of `growth`.

    Args:
        trigger: as `tritter.options.read_part` reads it; `initialiser` likewise.
        growth_cooldown: steps from the beginning, and between two events. None: 200, or in a
            training shorter than 2,000 steps in proportion less; `check_every` (100) and
            `maturation_age` (500) likewise.
        warmup_steps: None: a twentieth of the training.
        gradient_percentile: of the pressures of all layers at earlier checks.
        pressure_decay: of the moving average of gradients.
        history_checks: earlier checks that count.
        max_growth_per_step: neurons, of a layer in an event.
        maturation_factor: on the updates of young neurons.
        plateau_threshold: relative change of the loss below which growth waits no longer; None:
            growth does not wait for a plateau.
        plateau_steps: that the change is taken over.
        max_new_parameters: of a training; None: no limit.
        max_extra_flops: of what new neurons add to a training; None: no limit.
        enable_replacement: dead neurons are used again, before others are added.
        dead_quantile: of all layers' Wanda scores, below which a mature neuron is dead.
        freeze_attention: the FFNs alone are trained.
    """

    trigger: Annotated[Trigger, *part_field("growth.trigger", TRIGGERS, base=Trigger)]
    initialiser: Annotated[
        Initialiser, *part_field("growth.initialiser", INITIALISERS, base=Initialiser)
    ]
    gradient_percentile: _Percent
    pressure_decay: Annotated[float, Field(ge=0, lt=1)]
    history_checks: Count
    check_every: Count | None
    growth_cooldown: Count | None
    warmup_steps: WholeNumber | None
    max_growth_per_step: Count
    maturation_age: WholeNumber | None
    maturation_factor: Annotated[float, Field(gt=0)]
    plateau_threshold: Annotated[float, Field(gt=0)] | None
    plateau_steps: Annotated[int, Field(ge=2, le=100_000)]
    max_new_parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)] | None
    max_extra_flops: Annotated[float, Field(gt=0)] | None
    enable_replacement: bool
    dead_quantile: _Share
    freeze_attention: bool

    @property
    def name(self) -> str:
        """Its trigger and its initialiser, as reports name it."""
        parts = (type(self.trigger), type(self.initialiser))
        return "+".join(kind.name or kind.__name__ for kind in parts)
