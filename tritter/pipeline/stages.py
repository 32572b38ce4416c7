"""What the stages do; each reads what earlier ones left on disk, so a run can stop between."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from tritter.checkpoint import Lineage, lineage_of, record_step0_error
from tritter.data.datamodule import EvaluationText
from tritter.errors import RequestError
from tritter.evaluation.jump import logit_jump
from tritter.families import count_parameters, forward_flops
from tritter.forgetting import build_methods
from tritter.forgetting.freeze import hold_still
from tritter.models import load_model, read_config
from tritter.moe_routing import is_router, redraw_rows
from tritter.pipeline import experts, growth, importance, moe, moments
from tritter.pipeline.arm import Arm
from tritter.pipeline.base import obtain_base
from tritter.pipeline.baseline_scores import score_baseline
from tritter.pipeline.context import RunContext
from tritter.pipeline.disk import release_start, write_expanded
from tritter.pipeline.given import copy_given
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.samples import said
from tritter.pipeline.schedules import last_rate, schedule_of
from tritter.pipeline.scoring import score_file
from tritter.pipeline.trained import (
    TrainedWriter,
    accept,
    arm_writer,
    child_of,
    measuring_flops,
    round_weights,
    with_routing,
)
from tritter.storage.atomic import atomic_folder, copy_tree
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    Task,
    WriteResult,
    discard_saved,
    fit,
    metrics_files,
)
from tritter.training.before import losses_before
from tritter.training.validation import evaluation_flops

JUMP_SEQUENCES = 8
_EARLIER = ("adapt", "distill")  # trainings of an arm before the one that its checks are of


def baseline(context: RunContext) -> StageResult:
    """Get the base model into the run folder and score it."""
    folder = context.folder / "baseline"
    seconds = {}
    if context.given is not None:
        context.say("baseline", f"the checkpoint {context.given}; pretraining does not apply")
        copy_given(context, folder)
    else:
        base = obtain_base(context)
        seconds["pretraining"] = base.seconds
        with atomic_folder(folder, overwrite=True) as temporary:
            copy_tree(base.folder, temporary)
    score_baseline(context, folder)
    lineage, reading = lineage_of(folder), experts.reading_flops_of(context, folder)
    return StageResult(
        found={
            "parameters": count_parameters(read_config(folder)),
            "model_hash": lineage.model_hash,
            "corpus": context.corpus.digest,
        },
        flops={**_pretraining_flops(lineage), "baseline": context.scoring_flops(reading)},
        seconds=seconds,
        leaves=("baseline", score_file("baseline")),
    )


def _pretraining_flops(lineage: Lineage) -> dict[str, float]:
    """Return what the base's pretraining cost, where its lineage states it."""
    stated = lineage.training_config.get("flops")
    return {} if stated is None else {"pretraining": float(stated)}


def expansion(context: RunContext, arm: Arm) -> StageResult:
    """Expand what the arm starts from, measure the jump and score the result."""
    source, folder = context.folder / arm.start, context.folder / arm.name / "expanded"
    if not arm.specs:
        return StageResult(found={"parameters": count_parameters(read_config(source)), "notes": []})
    plan = context.planned(arm)
    write_expanded(context, arm, folder)
    notes = [f"{step.spec.name}: {note}" for step in plan.steps for note in step.notes]
    notes += [_layer_note(step.parameter_map.layer_sources, step.spec.name) for step in plan.steps]
    context.say(
        "expand",
        f"{' then '.join(spec.name for spec in arm.specs)}: {plan.parameters_before:,} → "
        f"{plan.parameters_after:,} parameters",
    )
    for note in filter(None, notes):
        context.say("", note)
    before, after, tokens = load_model(source), load_model(folder), _jump_tokens(context)
    jump = logit_jump(before, after, tokens)
    config = read_config(folder)
    error = jump.to_dict()["relative_to_std"]
    record_step0_error(folder, error, config, num_new=len(arm.specs))
    context.score(after, f"{arm.name}-expanded")
    evaluated, flops = _before(context, before)
    flops["expand"] = context.scoring_flops(forward_flops(config))
    flops["expand"] += _jump_flops(source, folder, tokens)
    return StageResult(
        found={
            "parameters": plan.parameters_after,
            "notes": [note for note in notes if note],
            "jump": jump.to_dict(),
            "before": evaluated,
        },
        flops=flops,
        leaves=(f"{arm.name}/expanded", score_file(f"{arm.name}-expanded")),
    )


def _before(context: RunContext, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is evaluated of a model before its expansion, by metric, and the FLOPs of it."""
    text = context.evaluation_text
    if text is None:
        return {}, {}
    losses = losses_before(model, text, context.trainer_settings)
    return losses, {"validation": evaluation_flops(experts.reading_flops(model), text)}


def adaptation(context: RunContext, arm: Arm) -> StageResult:
    """Train the routers alone to send the new domains to the experts that were appended."""
    start, folder = moe.before_routers(context, arm), context.folder / arm.name / "router"
    options, steps = context.config.adaptation, moe.router_steps(context, arm)
    added = moe.appended(context, arm)
    assert added is not None
    model = context.reading(load_model(start))
    if options.router_update == "retrain":
        redraw_rows(model, added.experts, seed=context.seed("router", *arm.purpose))
    target = context.folder / arm.name / "adapted"
    write = TrainedWriter(
        start=start,
        target=target,
        lineage=child_of(context, arm, start, target, stage="router adaptation", is_adapted=True),
        added=added,
        anneal_steps=moe.anneal_steps(context, arm, added),
        moments=moments.passed_on(context, start, is_trained=is_router),
    )
    context.say("adapt", f"{steps} steps of the routers on {', '.join(context.new_of(arm))}")
    with moe.ready_for_routers(context, arm, model) as setup:
        module = BaseModule(
            model,
            schedule=moe.router_schedule(context, arm),
            optimizer=replace(context.optimizer_settings, weight_decay=0.0),
            methods=build_methods(context.config.forgetting),
            side_losses=setup.side_losses,
        )
        task = importance.task(context, arm, follow=setup.follow)
        result = _fit(
            context, arm, module, setup, task, folder=folder, label="router", write_result=write
        )
    accept(target)
    context.ledger.watch_disk()
    discard_saved(folder)
    return StageResult(
        found=fit_found(result),
        flops={arm.label("adapt"): result.flops},
        leaves=(f"{arm.name}/adapted",),
    )


def training(context: RunContext, arm: Arm, *, loggers: Sequence[Logger]) -> StageResult:
    """Continue on the new domains under the methods against forgetting."""
    frees_start = release_start(context, arm)
    start = moe.start_folder(context, arm)
    asked = experts.training_of(context, arm)
    settings = replace(asked, max_steps=asked.max_steps * arm.num_trainings)
    model = context.reading(experts.load_start(context, arm, start))
    _hold_old(context, arm, model)
    methods = build_methods(context.config.forgetting)
    _announce(context, arm, methods, max_steps=settings.max_steps)
    with moe.ready_for_training(context, arm, model) as setup:
        task = importance.task(context, arm, follow=setup.follow)
        observers, changers = growth.begin(context, arm, model, max_steps=settings.max_steps)
        trainee = experts.begin(context, arm, model, max_steps=settings.max_steps)
        _freeze(model, methods, task, max_steps=settings.max_steps)
        module = trainee.module(
            schedule=schedule_of(settings, start_rate=last_rate(context, arm)),
            optimizer=context.optimizer_settings,
            methods=methods,
            side_losses=setup.side_losses,
            moments=moments.carried(context, start, model),
        )
        folder, text = context.folder / arm.name, context.evaluation_text
        is_routed = bool(setup.side_losses)
        write = arm_writer(context, arm, is_routed=is_routed, frees_start=frees_start)
        result = _fit(
            context,
            arm,
            module,
            setup,
            task,
            folder=folder,
            label="training",
            loggers=loggers,
            write_result=write,
            evaluation=text,
            observers=observers,
            changers=(*changers, *trainee.changers),
        )
    accept(write.target)
    context.ledger.watch_disk()
    flops = result.flops + measuring_flops(context, write)
    if result.stopped_because is not None:
        context.say("", f"training was broken off: {result.stopped_because}")
    if result.ended_early is not None:
        context.say("", f"training ended early, at step {result.steps}: {result.ended_early}")
    if write.routing_state is not None:
        context.say("", "with the selection bias, which is not saved:")
        context.score(with_routing(write.target, write.routing_state), f"{arm.name}-biased")
        flops += context.scoring_flops(forward_flops(read_config(start)))
        shutil.rmtree(write.routing_state)
    discard_saved(folder)
    moments.discard_left(folder)
    found = fit_found(result)
    for earlier in filter(None, (context.ledger.get(f"{arm.name}.{s}") for s in _EARLIER)):
        found["refused_steps"] += earlier.found["refused_steps"]
        found["stopped_because"] = earlier.found["stopped_because"] or found["stopped_because"]
    metrics = [path.relative_to(context.folder).as_posix() for path in metrics_files(folder)]
    return StageResult(
        found=found,
        flops=_fit_flops(arm, flops, result.evaluation_flops),
        seconds={arm.label("validation"): result.evaluation_seconds} if text else {},
        leaves=(f"{arm.name}/trained", *metrics),
    )


def _announce(
    context: RunContext, arm: Arm, methods: Sequence[ForgettingMethod], *, max_steps: int
) -> None:
    has_frozen_base = context.config.experts is not None and not arm.is_control
    names = ["the frozen base"] if has_frozen_base else []
    names += [method.name for method in methods]
    protection = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nothing"
    domains, tasks = ", ".join(context.new_of(arm)), len(context.text.tasks)
    place = f" (task {arm.task + 1} of {tasks})" if tasks > 1 else ""
    context.say("train", f"{max_steps} steps on {domains}{place}, protected by {protection}")


def _fit_flops(arm: Arm, training: float, evaluations: float) -> dict[str, float]:
    """Return FLOPs by what reports call them; all of the control's are one."""
    labels = arm.label("fit"), arm.label("validation")
    if labels[0] == labels[1] or not evaluations:
        return {labels[0]: training + evaluations}
    return {labels[0]: training, labels[1]: evaluations}


def _hold_old(context: RunContext, arm: Arm, model: nn.Module) -> None:
    """Hold all that is old, where an expansion asks for its new blocks alone to be trained."""
    if any(spec.new_blocks_only for spec in arm.specs):
        carried = context.planned(arm).change.masks()
        hold_still(model, lambda name: bool(carried[name].any()))


def _freeze(
    model: nn.Module, methods: Sequence[ForgettingMethod], task: Task, *, max_steps: int
) -> None:
    """Let methods freeze what they do.

    Raises:
        RequestError: nothing is left to train.
    """
    for method in methods:
        method.freeze(model, task, max_steps=max_steps)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = " and ".join(method.name for method in methods)
        raise RequestError(
            f"forgetting = {names}: all of the model is frozen, and nothing is left to train; "
            "an expansion that only copies adds nothing that is new."
        )


def _fit(
    context: RunContext,
    arm: Arm,
    module: BaseModule,
    setup: moe.Setup,
    task: Task,
    *,
    folder: Path,
    label: str,
    write_result: WriteResult,
    evaluation: EvaluationText | None = None,
    loggers: Sequence[Logger] = (),
    observers: Sequence[Callback] = (),
    changers: Sequence[Callback] = (),
) -> FitResult:
    """Train an arm's module on the new domains."""
    max_steps = module.schedule.max_steps
    return fit(
        module,
        context.batches(
            context.new_of(arm), purpose="-".join((label, *arm.purpose)), max_steps=max_steps
        ),
        settings=context.trainer_settings,
        folder=folder,
        label=label,
        console=context.console,
        task=task,
        loggers=loggers,
        # What starts from moments leaves its own; the stages of routers do neither
        observers=[*(moments.keepers(context, folder) if module.moments else ()), *observers],
        controls=setup.controls,
        changers=changers,
        theirs=context.config.callbacks if label == "training" else (),
        write_result=write_result,
        evaluation=evaluation,
    )


def fit_found(result: FitResult) -> dict[str, Any]:
    """Return what the ledger keeps of a training."""
    taken = ["steps", "refused_steps", "stopped_because", "ended_early", "update_norms"]
    taken += ["flow", "held", "packing", "reports"]
    return {name: getattr(result, name) for name in taken}


def evaluation(context: RunContext, arm: Arm) -> StageResult:
    """Score the trained model, and let both models say something."""
    trained = context.reading(
        experts.load_start(context, arm, context.folder / arm.name / "trained")
    )
    if not arm.is_final:
        round_weights(trained, context.published_dtype)
    who = "the control" if arm.is_control else "the trained model"
    context.say("evaluate", f"{who} on {', '.join(context.domains)}")
    context.score(trained, f"{arm.name}-trained")
    config = read_config(context.folder / arm.name / "trained")
    samples, flops = [], context.scoring_flops(experts.reading_flops(trained))
    flops += moe.usage_flops(context, config) + experts.usage_flops(context, trained)
    is_last = arm.task == len(context.text.tasks) - 1
    if is_last and not arm.is_control and context.config.evaluation.sample_tokens:
        start = "baseline" if arm.task else arm.start
        before = experts.load_start(context, arm, context.folder / start)
        samples = [said(context, domain, before, trained) for domain in context.domains]
        flops += sum(sample.flops for sample in samples)
    return StageResult(
        found={
            "samples": [sample.texts for sample in samples],
            "moe": moe.usage(context, trained),
            "experts": experts.usage(context, trained),
        },
        flops={arm.label("evaluate"): flops},
        leaves=(score_file(f"{arm.name}-trained"),),
    )


def _jump_tokens(context: RunContext) -> Tensor:
    """Return real text of every domain, int64 [B, T]."""
    sequences = context.training_sequences(context.domains).values()
    return torch.cat([each[:JUMP_SEQUENCES] for each in sequences]).long()


def _jump_flops(before: Path, after: Path, tokens: Tensor) -> float:
    passes = [forward_flops(read_config(folder)) for folder in (before, after)]
    return len(tokens) * sum(flops.of(tokens.shape[1]) for flops in passes)


def _layer_note(sources: tuple[int, ...], name: str) -> str:
    if sources == tuple(range(len(sources))):
        return ""
    return f"{name}: layers from {' '.join(map(str, sources))}"
