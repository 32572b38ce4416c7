"""What growth may be asked, and how its schedules fit a training."""

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any

from pydantic import Field

from tritter.limits import MAX_PARAMETERS
from tritter.options import Count, WholeNumber, options

REFERENCE_STEPS = 2_000  # of a training that the README's numbers are for
COOLDOWN, CHECK_EVERY, MATURATION_AGE = 200, 100, 500  # the README's
WARMUP_SHARE = 0.05  # of a training; its first gradients say little

_Percent = Annotated[float, Field(gt=0, lt=100)]
_Share = Annotated[float, Field(gt=0, lt=1)]


@options
class GrowthOptions:
    """The keys of `growth`.

    Args:
        trigger: a name of ours (`tritter.growth.triggers`), or `_target_` and options of a class
            from outside; `initialiser` likewise.
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
        at: steps of the trigger `schedule`, whatever the cooldown; None: at each check.
        enable_replacement: dead neurons are used again, before others are added.
        dead_quantile: of all layers' Wanda scores, below which a mature neuron is dead.
        freeze_attention: the FFNs alone are trained.
    """

    trigger: str | dict[str, Any]
    initialiser: str | dict[str, Any]
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
    at: Annotated[tuple[Count, ...], Field(min_length=1)] | None
    enable_replacement: bool
    dead_quantile: _Share
    freeze_attention: bool


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
    def of(cls, asked: GrowthOptions, *, max_steps: int | None) -> "Timing":
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
