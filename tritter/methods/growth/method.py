"""Neuron growth in a run: its options, its rules, and its callbacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from tritter.core.families import Model
from tritter.errors import Problem
from tritter.methods.growth.blocks import freeze_all_but_ffns
from tritter.methods.growth.triggers import GrowthOptions, Timing
from tritter.options import RunRequest, Start
from tritter.targets import dotted
from tritter.training.method import Method, Setting, Trainee

if TYPE_CHECKING:
    from tritter.checkpoints import ExpansionRecord


class NeuronGrowth(Method):
    """The component that a config selects by `_target_` in the group `growth`."""

    Options = GrowthOptions
    whole_weights = (
        "growth needs whole weights, and each process holds only a shard; expand between "
        "training runs (growth=none expansion=width)"
    )
    last_weights = "the best weights may have fewer neurons"
    seed = 0  # of the random numbers for new neurons

    @classmethod
    def problems(cls, options: GrowthOptions, run: RunRequest) -> Iterator[Problem]:
        """Yield problems of combining growth with other settings of a run."""
        doing = "growth maps the two moments of Adam to the new shapes"
        yield from run.optimizer.adam_problems(doing=doing)
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
        if reason := options.inactivity_reason(max_steps=steps, num_layers=layers):
            name = options.trigger.name or dotted(type(options.trigger))
            yield Problem("growth.trigger", name, reason=reason)
        if limit := options.max_new_parameters:
            model = model.widened
            widths = model.ffn_sizes or [model.sizes.intermediate_size] * layers
            larger = model.with_ffn_sizes([width + 1 for width in widths])
            cost = (larger.num_parameters - model.num_parameters) // layers
            if limit < cost:
                reason = f"nothing could grow: a neuron has {cost:,} parameters"
                yield Problem("growth.max_new_parameters", limit, reason=reason)

    @classmethod
    def num_frozen(
        cls, options: GrowthOptions, trained: Model, before: Model, run: RunRequest
    ) -> int:
        if not options.freeze_attention:
            return 0
        model = trained.widened
        neurons = (each.name for each in model.tensors if model.family.ffn_part(each))
        return model.num_parameters - sum(prod(model.shapes[name]) for name in neurons)

    def attach(self, trainee: Trainee, setting: Setting) -> None:
        """Freeze what does not grow, and add the callbacks that read gradients and grow neurons."""
        from tritter.methods.growth.callback import GradientPressure, NeuronGrowthCallback
        from tritter.methods.growth.grower import Grower

        if self.options.freeze_attention:
            freeze_all_but_ffns(trainee.model)
        self.seed = setting.seed("growth")
        grower = Grower(
            self.options,
            timing=Timing.of(self.options, max_steps=setting.max_steps),
            seed=self.seed,
            tokens_per_step=setting.tokens_per_step,
        )
        trainee.observers += (GradientPressure(grower),)
        trainee.surgery_callbacks += (NeuronGrowthCallback(grower, new=setting.new_units),)

    def lineage_records(
        self, before: Model, after: Model, reports: Mapping[str, Any]
    ) -> list[ExpansionRecord]:
        from tritter.methods.growth.grower import Grower

        report = reports[Grower.reason]
        if not report["events"]:
            return []
        record = Grower.lineage_record(
            before,
            after,
            options=self.plain(),
            seed=self.seed,
            digest=report["map_digest"],
            is_exact=report["is_exact"],
            function_change=report["function_change"],
        )
        return [record]

    def summary(self, fits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `growth` of summary.json; steps and FLOPs are cumulative."""
        from tritter.methods.growth.grower import Grower

        reports = [fit["reports"][Grower.reason] for fit in fits]
        first, last, steps_before, flops_before = reports[0], reports[-1], 0, 0.0
        events, steps = [], []
        for number, (fit, report) in enumerate(zip(fits, reports, strict=True)):
            for event in report["events"]:
                spent = event["flops"] + flops_before
                task = {"task": number} if len(fits) > 1 else {}
                events.append(event | task | {"step": event["step"] + steps_before, "flops": spent})
            steps += [step + steps_before for step in report["map"]["steps"]]
            steps_before += fit["steps"]
            flops_before += report["flops"]
        return {
            "options": {**self.plain(), **first["timing"]},
            "advice": self.options.trigger.advice,
            "events": events,
            **{
                name: sum(report[name] for report in reports)
                for name in ("born", "replaced", "died", "checks", "extra_flops")
            },
            **{
                name: {"before": first[name]["before"], "after": last[name]["after"]}
                for name in ("neurons", "parameters")
            },
            "young": last["young"],
            "map": {
                "steps": steps,
                **{
                    name: [row for report in reports for row in report["map"][name]]
                    for name in ("neurons", "pressure")
                },
            },
            "function_change": max(report["function_change"] for report in reports),
            "update_norms": last["update_norms"],
        }
