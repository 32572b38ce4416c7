"""Stages of appended experts before they are opened: which to clone, what a teacher says."""

from itertools import islice

from tritter.adaptation import best_experts, distill_experts
from tritter.families import family_of, forward_flops, training_flops
from tritter.models import load_model, locate, read_config
from tritter.pipeline import experts, moments
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.trained import recorded_options, write_trained


def choice(context: RunContext, arm: Arm) -> StageResult:
    """Choose the expert of each layer that the new domains' text moves most."""
    folder = context.folder / arm.start
    sequences = experts.spread(context, context.new_domains, experts.UTILITY_SEQUENCES)
    chosen = best_experts(load_model(folder).to(context.device), sequences)
    context.say("choose", f"experts to clone, layer by layer: {' '.join(map(str, chosen))}")
    config = read_config(folder)
    flops = training_flops(
        family_of(config), config, is_trained=lambda tensor: tensor.is_per_expert
    )
    return StageResult(
        found={"clone_from": list(chosen)},
        flops={"choose": len(sequences) * flops.of(sequences.shape[1])},
    )


def distillation(context: RunContext, arm: Arm) -> StageResult:
    """Let the new experts learn from the teacher on the new domains, behind their closed door."""
    options, place = context.config.adaptation, experts.teacher_of(arm)
    start = experts.expanded_folder(context, arm)
    added = experts.appended(context, arm)
    assert place is not None and added is not None
    teacher_folder = locate(place)
    model = load_model(start).to(context.device)
    context.say("distill", f"{options.distill_steps} steps of the new experts, after {place}")
    batches = context.batches(
        context.new_domains, purpose="distill", max_steps=options.distill_steps
    )
    distill_experts(
        model,
        load_model(teacher_folder),
        added.experts,
        islice(batches, options.distill_steps),
        temperature=options.distill_temperature,
        auxiliary_loss=context.config.routing.auxiliary_loss,
        learning_rate=context.config.training.learning_rate,
        weight_decay=context.config.optimizer.weight_decay,
    )
    write_trained(
        context,
        model.to("cpu"),
        start=start,
        target=context.folder / arm.name / "distilled",
        steps=options.distill_steps,
        stage="distillation of new experts",
        added=added,
        options=recorded_options(start, is_adapted=True),
        write_moments=moments.passed_on(
            context, start, is_trained=lambda tensor: tensor.expert in added.experts
        ),
    )
    data, config, taught_by = context.config.data, read_config(start), read_config(teacher_folder)
    flops = forward_flops(family_of(taught_by), taught_by) + training_flops(
        family_of(config),
        config,
        is_trained=lambda tensor: tensor.expert in added.experts,
        routed_to=added.experts,
    )
    sequences = options.distill_steps * data.batch_size
    return StageResult(
        flops={arm.label("distill"): sequences * flops.of(data.sequence_length)},
        leaves=(f"{arm.name}/distilled",),
    )
