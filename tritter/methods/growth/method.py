"""Neuron growth as a choice of a run: its options, its rules, and what it adds to a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.core.families import Config, family_of
from tritter.errors import Problem
from tritter.methods.growth.blocks import freeze_all_but_ffns
from tritter.methods.growth.triggers import GrowthOptions, Timing
from tritter.options import RunRequest, Start
from tritter.targets import dotted
from tritter.training.optimizer import adam_problems

_GROWING = ("ffn.gate", "ffn.up", "ffn.down")  # what is trained under growth.freeze_attention

if TYPE_CHECKING:
    from torch import Tensor, nn


class NeuronGrowth:
    """What a config names by `_target_` in the group `growth`.

    Args:
        asked: its options.
    """

    Options: ClassVar[type[GrowthOptions]] = GrowthOptions
    whole_weights: ClassVar[str] = (  # why it can't train with trainer=fsdp
        "neurons grow in whole weights, and each process holds a part of them; expand between "
        "trainings (growth=none expansion=width)"
    )

    def __init__(self, asked: GrowthOptions) -> None:
        self.asked = asked

    @classmethod
    def problems(cls, asked: GrowthOptions, run: RunRequest) -> Iterator[Problem]:
        """Yield what of a run does not go together with growth."""
        doing = "growth maps Adam's two moments to the new shapes"
        yield from adam_problems(run.optimizer, doing=doing)
        if run.pipeline.target_params is not None:
            reason = "its plan of expansions counts every parameter; with growth=none it is kept"
            yield Problem("pipeline.target_params", run.pipeline.target_params, reason=reason)
        if any(spec.new_blocks_only for spec in run.expansion):
            reason = "with new_blocks_only old FFNs are frozen, and would grow without training"
            yield Problem("growth", dotted(cls), reason=reason)
        if run.trainer.accelerator == "mps":
            reason = (
                "new neurons are made in float64, which Apple's GPUs have not; with growth use "
                "trainer=cpu"
            )
            yield Problem("trainer.accelerator", run.trainer.accelerator, reason=reason)
        yield from asked.trigger.problems(asked, max_steps=run.training.max_steps)

    @classmethod
    def start_problems(
        cls, asked: GrowthOptions, run: RunRequest, start: Start
    ) -> Iterator[Problem]:
        """Yield why the model that is trained can't grow."""
        grown = start.trained[-1]
        family, reason = family_of(grown), ""
        if family.has_experts:
            reason = (
                f"{grown['model_type']} has experts, and neurons grow in dense FFNs only; choose "
                "an expansion without experts, or growth=none"
            )
        elif family.has_stacked_ffn:
            reason = (
                f"in {grown['model_type']} gate and up are one tensor, and neurons grow in FFNs in "
                "which they are two; choose expansion=width, or growth=none"
            )
        if reason:
            yield Problem("growth", cls.__name__, reason=reason)
            return
        layers, steps = family.dimensions(grown).num_hidden_layers, run.training.max_steps
        if reason := cls(asked).why_never(max_steps=steps, num_layers=layers):
            name = asked.trigger.name or dotted(type(asked.trigger))
            yield Problem("growth.trigger", name, reason=reason)

    @classmethod
    def num_frozen(cls, asked: GrowthOptions, trained: Config) -> int:
        """Return how many parameters of a model growth leaves untrained to the end."""
        if not asked.freeze_attention:
            return 0
        family = family_of(trained)
        tensors = family.logical_tensors(trained)
        sizes = (prod(family.shape(each, trained)) for each in tensors if each.kind in _GROWING)
        return family.count_parameters(trained) - sum(sizes)

    def why_never(self, *, max_steps: int, num_layers: int) -> str:
        """Return why nothing can grow in a training of so many steps; empty: something can."""
        asked, timing = self.asked, Timing.of(self.asked, max_steps=max_steps)
        due = [n for n in range(1, max_steps) if asked.trigger.is_due(n, timing)]
        cool = [n for n in due if n >= timing.cooldown or not asked.trigger.waits()]
        if not cool:
            return (
                f"in a training of {max_steps} steps nothing could grow: checks come every "
                f"{timing.check_every} steps after {timing.warmup}, and nothing grows in the first "
                f"{timing.cooldown} (growth.check_every, .warmup_steps, .growth_cooldown) or after "
                "the last"
            )
        return asked.trigger.why_never(asked, num_checks=len(due), num_layers=num_layers)

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
        from tritter.methods.growth.callback import GradientPressure, NeuronGrowthCallback
        from tritter.methods.growth.grower import Grower

        grower = Grower(
            self.asked,
            timing=Timing.of(self.asked, max_steps=max_steps),
            seed=seed,
            tokens_per_step=tokens_per_step,
        )
        return GradientPressure(grower), NeuronGrowthCallback(grower, new=new)
