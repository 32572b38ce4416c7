"""Stages of appended experts before they are opened: which to clone, what a teacher says."""

from itertools import islice

from tritter.adaptation import best_experts, distill_experts
from tritter.models import load_model, locate, read_config
from tritter.pipeline import experts
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
    flops = 3 * context.flops_per_token(read_config(folder)) * sequences.numel()
    return StageResult(found={"clone_from": list(chosen)}, flops={"choose": float(flops)})


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
    )
    config = context.config.data
    tokens = options.distill_steps * config.batch_size * config.sequence_length
    per_token = 3 * context.flops_per_token(read_config(start))
    per_token += context.flops_per_token(read_config(teacher_folder))
    return StageResult(flops={arm.label("distill"): float(tokens * per_token)})
