"""Neuron growth in a run: its options, its rules, and its callbacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.core.families import Model
from tritter.errors import Problem
from tritter.methods.growth.blocks import freeze_all_but_ffns
from tritter.methods.growth.triggers import GrowthOptions, Timing
from tritter.options import RunRequest, Start
from tritter.targets import dotted
from tritter.training.optimizer import adam_problems

if TYPE_CHECKING:
    from torch import Tensor, nn


class NeuronGrowth:
    """The component that a config selects by `_target_` in the group `growth`.

    Args:
        options: the options of the group.
    """

    Options: ClassVar[type[GrowthOptions]] = GrowthOptions
    whole_weights: ClassVar[str] = (  # the reason to refuse trainer=fsdp
        "growth needs whole weights, and each process holds only a shard; expand between "
        "training runs (growth=none expansion=width)"
    )

    def __init__(self, options: GrowthOptions) -> None:
        self.options = options

    @classmethod
    def problems(cls, options: GrowthOptions, run: RunRequest) -> Iterator[Problem]:
        """Yield problems of combining growth with other settings of a run."""
        doing = "growth maps the two moments of Adam to the new shapes"
        yield from adam_problems(run.optimizer, doing=doing)
        if run.pipeline.target_params is not None:
            reason = "can't be met exactly while neurons grow; use growth=none"
            yield Problem("pipeline.target_params", run.pipeline.target_params, reason=reason)
        if any(spec.new_blocks_only for spec in run.expansion):
            reason = "new_blocks_only freezes the old FFNs, whose neurons would grow untrained"
            yield Problem("growth", dotted(cls), reason=reason)
        if run.trainer.accelerator == "mps":
            reason = (
                "new neurons are computed in float64, which Apple GPUs lack; use trainer=cpu "
                "with growth"
            )
            yield Problem("trainer.accelerator", run.trainer.accelerator, reason=reason)
        yield from options.trigger.problems(options, max_steps=run.training.max_steps)

    @classmethod
    def start_problems(
        cls, options: GrowthOptions, run: RunRequest, start: Start
    ) -> Iterator[Problem]:
        """Yield the reasons why the trained model can't grow."""
        model = start.trained[-1]
        if reason := model.fixed_neurons:
            yield Problem("growth", cls.__name__, reason=f"{reason}, or growth=none")
            return
        layers, steps = model.sizes.num_hidden_layers, run.training.max_steps
        if reason := cls(options).inactivity_reason(max_steps=steps, num_layers=layers):
            name = options.trigger.name or dotted(type(options.trigger))
            yield Problem("growth.trigger", name, reason=reason)

    @classmethod
    def num_frozen(cls, options: GrowthOptions, trained: Model) -> int:
        """Return the number of parameters that growth freezes until the end of training."""
        if not options.freeze_attention:
            return 0
        model = trained.widened
        neurons = (each.name for each in model.tensors if model.family.ffn_part(each))
        return model.num_parameters - sum(prod(model.shapes[name]) for name in neurons)

    def inactivity_reason(self, *, max_steps: int, num_layers: int) -> str:
        """Return the reason if nothing can grow in `max_steps` steps, else ''."""
        options, timing = self.options, Timing.of(self.options, max_steps=max_steps)
        due = [n for n in range(1, max_steps) if options.trigger.is_due(n, timing)]
        cool = [n for n in due if n >= timing.cooldown or not options.trigger.has_cooldown()]
        if not cool:
            return (
                f"with training.max_steps = {max_steps} nothing could grow: checks run every "
                f"{timing.check_every} steps after step {timing.warmup}, and growth is excluded in "
                f"the first {timing.cooldown} steps (growth.check_every, .warmup_steps, "
                ".growth_cooldown) and after the last"
            )
        return options.trigger.inactivity_reason(
            options, num_checks=len(due), num_layers=num_layers
        )

    def freeze(self, model: nn.Module) -> None:
        """Freeze everything except the FFNs, if `freeze_attention` is set."""
        if self.options.freeze_attention:
            freeze_all_but_ffns(model)

    def callbacks(
        self,
        *,
        max_steps: int,
        tokens_per_step: int,
        seed: int,
        new: Mapping[str, tuple[Tensor | None, ...]],
    ) -> tuple[Any, Any]:
        """Return the callback that reads gradients and the callback that grows the model.

        Args:
            tokens_per_step: tokens of all processes.
            seed: seed of the random numbers for new neurons.
            new: parameter name → by dimension, the coordinates that an expansion added.
        """
        from tritter.methods.growth.callback import GradientPressure, NeuronGrowthCallback
        from tritter.methods.growth.grower import Grower

        grower = Grower(
            self.options,
            timing=Timing.of(self.options, max_steps=max_steps),
            seed=seed,
            tokens_per_step=tokens_per_step,
        )
        return GradientPressure(grower), NeuronGrowthCallback(grower, new=new)
