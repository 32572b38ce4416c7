"""Stages of appended experts before they are opened: which to clone, what a teacher says."""

from tritter.data.apart import apart_of, lengths_of
from tritter.families import training_flops
from tritter.models import load_model, read_config
from tritter.moe_routing import DistillationModule, best_experts, only_new_experts
from tritter.pipeline import moe, moments
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.stages import fit_found
from tritter.pipeline.trained import TrainedWriter, accept, child_of
from tritter.storage.hub import locate
from tritter.training import Schedule, discard_saved, fit


def choice(context: RunContext, arm: Arm) -> StageResult:
    """Choose the expert of each layer that the new domains' text moves most."""
    folder = context.folder / arm.start
    sequences = moe.spread(context, context.new_of(arm), moe.UTILITY_SEQUENCES)
    model = context.reading(load_model(folder)).to(context.device)
    chosen = best_experts(model, sequences)
    context.say("choose", f"experts to clone, layer by layer: {' '.join(map(str, chosen))}")
    config = read_config(folder)
    flops = training_flops(config, is_trained=lambda tensor: tensor.is_per_expert)
    return StageResult(
        found={"clone_from": list(chosen)},
        flops={"choose": flops.of_all(lengths_of(apart_of(model), sequences))},
    )


def distillation(context: RunContext, arm: Arm) -> StageResult:
    """Let the new experts learn from the teacher on the new domains, while no token meets them."""
    options, place = context.config.adaptation, moe.teacher_of(arm)
    start = moe.expanded_folder(context, arm)
    added = moe.appended(context, arm)
    assert place is not None and added is not None
    model, folder = context.reading(load_model(start)), context.folder / arm.name / "distill"
    target, steps = context.folder / arm.name / "distilled", options.distill_steps
    write = TrainedWriter(
        start=start,
        target=target,
        lineage=child_of(
            context, arm, start, target, stage="distillation of new experts", is_adapted=True
        ),
        added=added,
        moments=moments.passed_on(
            context, start, is_trained=lambda tensor: tensor.expert in added.experts
        ),
    )
    context.say("distill", f"{steps} steps of the new experts, after {place}")
    with only_new_experts(model, added.experts):
        module = DistillationModule(
            model,
            context.reading(load_model(locate(place))),
            new_experts=added.experts,
            temperature=options.distill_temperature,
            auxiliary_loss=context.config.moe_routing.auxiliary_loss,
            schedule=Schedule.constant(context.config.training.learning_rate, max_steps=steps),
            optimizer=context.optimizer_settings,
        )
        result = fit(
            module,
            context.batches(context.new_of(arm), purpose="distill", max_steps=steps),
            settings=context.trainer_settings,
            folder=folder,
            label="distill",
            console=context.console,
            write_result=write,
        )
    accept(target)
    context.ledger.watch_disk()
    discard_saved(folder)
    return StageResult(
        found=fit_found(result),
        flops={arm.label("distill"): result.flops},
        leaves=(f"{arm.name}/distilled",),
    )
