"""When a model grows, and in which of its layers.

A trigger is asked at each check and decides by what it is shown, which is saved with the training:
it has no state of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tritter.growth.options import GrowthOptions, Timing
from tritter.options import options


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

    needs_losses: ClassVar[bool] = False
    needs_budget: ClassVar[bool] = False
    takes_steps: ClassVar[bool] = False  # `growth.at`

    def is_due(self, step: int, timing: Timing, asked: GrowthOptions) -> bool:
        """Say whether the trigger is asked after so many steps."""
        return step >= timing.warmup and step % timing.check_every == 0

    def waits(self, asked: GrowthOptions) -> bool:
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

    def decide(self, view: View) -> Mapping[int, int]:
        found = {}
        for layer, pressures in enumerate(view.neuron_pressures):
            threshold = torch.quantile(pressures.float(), view.options.gradient_percentile / 100)
            count = int((pressures > threshold).sum())
            found[layer] = min(count, view.options.max_growth_per_step)
        return {layer: count for layer, count in found.items() if count}


@options
class Plateau(Trigger):
    """The layer of the highest pressure, when the loss falls no longer."""

    needs_losses: ClassVar[bool] = True

    def decide(self, view: View) -> Mapping[int, int]:
        if not is_plateau(view, view.options.plateau_threshold or 0.01):
            return {}
        return {view.highest: view.options.max_growth_per_step}


@options
class Scheduled(Trigger):
    """All layers, after the steps of `growth.at`, or whenever the cooldown allows it."""

    takes_steps: ClassVar[bool] = True

    def waits(self, asked: GrowthOptions) -> bool:
        return asked.at is None

    def is_due(self, step: int, timing: Timing, asked: GrowthOptions) -> bool:
        if asked.at is not None:
            return step in asked.at
        return Trigger.is_due(self, step, timing, asked)

    def decide(self, view: View) -> Mapping[int, int]:
        return dict.fromkeys(range(len(view.pressures)), view.options.max_growth_per_step)


@options
class Budget(Trigger):
    """Spends a budget evenly over a training, each time in the layer of the highest pressure.

    The budget is `growth.max_new_parameters` or `growth.max_extra_flops`; the cooldown says how
    often, and `max_growth_per_step` how much at most in one event.
    """

    needs_budget: ClassVar[bool] = True

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
