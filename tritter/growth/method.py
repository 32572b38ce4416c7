"""Neuron growth as a choice of a run: what is asked of it, and what it puts into a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.growth.initialisers import Initialiser
from tritter.growth.options import GrowthOptions, Timing
from tritter.growth.places import freeze_all_but_ffns
from tritter.growth.triggers import INITIALISERS, TRIGGERS, Trigger

if TYPE_CHECKING:
    from torch import Tensor, nn


class NeuronGrowth:
    """What a config names by `_target_` in the group `growth`.

    Args:
        asked: its options.
        trigger: chosen by `growth.trigger`; `initialiser` likewise.
    """

    Options: ClassVar[type[GrowthOptions]] = GrowthOptions
    # Key → what its words stand for, and what a class from outside has to be made from
    PARTS: ClassVar[Mapping[str, tuple[Mapping[str, type[Any]], type[Any]]]] = {
        "trigger": (TRIGGERS, Trigger),
        "initialiser": (INITIALISERS, Initialiser),
    }

    def __init__(self, asked: GrowthOptions, trigger: Trigger, initialiser: Initialiser) -> None:
        self.asked, self.trigger, self.initialiser = asked, trigger, initialiser

    def why_never(self, *, max_steps: int, num_layers: int) -> str:
        """Return why nothing can grow in a training of so many steps; empty: something can."""
        asked, timing = self.asked, Timing.of(self.asked, max_steps=max_steps)
        due = [n for n in range(1, max_steps) if self.trigger.is_due(n, timing, asked)]
        cool = [n for n in due if n >= timing.cooldown or not self.trigger.waits(asked)]
        if not cool:
            return (
                f"in a training of {max_steps} steps nothing could grow: checks come every "
                f"{timing.check_every} steps after {timing.warmup}, and nothing grows in the first "
                f"{timing.cooldown} (growth.check_every, .warmup_steps, .growth_cooldown) or after "
                "the last"
            )
        return self.trigger.why_never(asked, num_checks=len(due), num_layers=num_layers)

    def freeze(self, model: nn.Module) -> None:
        """Let the FFNs alone be trained, where it is asked for."""
        if self.asked.freeze_attention:
            freeze_all_but_ffns(model)

    def callbacks(
        self,
        *,
        max_steps: int,
        tokens_per_step: int,
        seed: int,
        new: Mapping[str, tuple[Tensor | None, ...]],
    ) -> tuple[Any, Any]:
        """Return what reads the gradients of a training, and what changes its model.

        Args:
            tokens_per_step: of all processes.
            seed: of what new neurons are drawn from.
            new: along which dimensions of which parameters an expansion set new coordinates.
        """
        from tritter.growth.callback import GradientPressure, NeuronGrowthCallback
        from tritter.growth.grower import Grower

        grower = Grower(
            self.asked,
            self.trigger,
            self.initialiser,
            timing=Timing.of(self.asked, max_steps=max_steps),
            seed=seed,
            tokens_per_step=tokens_per_step,
        )
        return GradientPressure(grower), NeuronGrowthCallback(grower, new=new)
