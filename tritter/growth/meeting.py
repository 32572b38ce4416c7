"""Grow where the small model's curve is about to gain less than a larger one's would.

The loss of a training at a constant rate is fitted by E + B·s^-β over its steps s. A larger model
has a lower floor, E·(N'/N)^-0.076 (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5: of a well trained
model's parameters), the same B and β, and steps that cost N'/N as much. Growth keeps the function,
so it goes on from the step of its own curve at which that has the present loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tritter.growth.triggers import Trigger, View
from tritter.options import options

SIZE_EXPONENT = 0.076
_EXPONENTS = torch.linspace(0.05, 1.5, 59, dtype=torch.float64)
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
    for exponent in _EXPONENTS.tolist():
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
class Meeting(Trigger):
    """Once, in all layers: at the step from which growth is predicted to end best.

    Meant for `training.schedule=constant` or the flat part of `wsd`; a rate that falls bends the
    curve. `growth.max_growth_per_step` neurons a layer are what is grown.

    Args:
        times: how often it may grow.
    """

    needs_losses: ClassVar[bool] = True

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
