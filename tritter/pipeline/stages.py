"""What the stages do; each reads what earlier ones left on disk, so a run can stop between."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from tritter.adaptation import redraw_rows
from tritter.checkpoint import Lineage, read_lineage, record_step0_error
from tritter.checkpoint.state import read_state, state_tensors, write_state
from tritter.config.schema import EWCOptions
from tritter.evaluation.jump import logit_jump
from tritter.evaluation.samples import sample_text
from tritter.expand import (
    carried_masks,
    expand,
    plan_expansion,
    state_stream,
)
from tritter.expansion import build_steps
from tritter.families import family_of
from tritter.forgetting import build_methods
from tritter.forgetting.ewc import mean_importance
from tritter.forgetting.fisher import diagonal_fisher
from tritter.models import disk_tensors, live_tensors, load_model, read_config
from tritter.pipeline import experts
from tritter.pipeline.arm import Arm
from tritter.pipeline.base import obtain_base
from tritter.pipeline.context import RunContext, schedule_of
from tritter.pipeline.given import copy_given
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.trained import recorded_options, write_trained
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream
from tritter.training import ExpandedModule, FitResult, Task, discard_saved, fit

JUMP_SEQUENCES = 8
SAMPLE_PROMPT_TOKENS = 24


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
            shutil.copytree(base.folder, temporary, dirs_exist_ok=True)
    config = read_config(folder)
    context.score(load_model(folder), "baseline")
    lineage = read_lineage(folder)
    assert lineage is not None
    return StageResult(
        found={
            "parameters": family_of(config).count_parameters(config),
            "model_hash": lineage.model_hash,
            "corpus": context.corpus.digest,
        },
        flops={**_pretraining_flops(lineage), "baseline": context.scoring_flops(config)},
        seconds=seconds,
    )


def _pretraining_flops(lineage: Lineage) -> dict[str, float]:
    """Return what the base's pretraining cost, where its lineage states it."""
    stated = lineage.training_config.get("flops")
    return {} if stated is None else {"pretraining": float(stated)}


def importance(context: RunContext, arm: Arm) -> StageResult:
    """Estimate, at the weights an arm starts from, how much each matters to the old domains."""
    options = _ewc_options(context)
    assert options is not None
    folder = context.folder / arm.start
    model = load_model(folder).to(context.device)
    sequences = context.training_sequences(context.old_domains)
    order = torch.Generator().manual_seed(context.seed("fisher", *arm.purpose))
    chosen = sequences[torch.randperm(len(sequences), generator=order)[: options.num_sequences]]
    context.say("importance", f"Fisher of {len(chosen)} sequences of {_names(context.old_domains)}")
    fisher = diagonal_fisher(
        model,
        chosen,
        estimator="true" if options.estimator == "true" else "empirical",
        seed=context.seed("fisher", "labels", *arm.purpose),
    )
    config = read_config(folder)
    held = disk_tensors(config, {name: value.cpu() for name, value in fisher.items()})
    with atomic_folder(_importance_folder(context, arm), overwrite=True) as temporary:
        write_state(temporary, {"fisher": TensorStream.of(held.items())}, step=0)
    # The gradients of a training step, and no update
    flops = 3 * context.flops_per_token(config) * chosen.numel()
    return StageResult(found={"sequences": len(chosen)}, flops={"importance": float(flops)})


def expansion(context: RunContext, arm: Arm) -> StageResult:
    """Expand what the arm starts from, measure the jump and score the result."""
    source, folder = context.folder / arm.start, context.folder / arm.name / "expanded"
    if not arm.specs:
        return StageResult(found={"parameters": _parameters(source), "notes": []})
    # In float32 whatever the source is stored in: an exact map is exact only before rounding
    result = expand(
        source,
        folder,
        arm.specs,
        seed=context.seed("expansion", *arm.purpose),
        dtype=torch.float32,
        overwrite=True,
    )
    notes = [f"{step.spec.name}: {note}" for step in result.steps for note in step.notes]
    notes += [
        _layer_note(step.parameter_map.layer_sources, step.spec.name) for step in result.steps
    ]
    context.say(
        "expand",
        f"{' then '.join(spec.name for spec in arm.specs)}: {result.parameters_before:,} → "
        f"{result.parameters_after:,} parameters",
    )
    for note in filter(None, notes):
        context.say("", note)
    before, after = load_model(source), load_model(folder)
    jump = logit_jump(before, after, _jump_tokens(context))
    config = read_config(folder)
    error = jump.to_dict()["relative_to_std"]
    record_step0_error(folder, error, config, num_new=len(arm.specs))
    context.score(after, f"{arm.name}-expanded")
    return StageResult(
        found={
            "parameters": result.parameters_after,
            "notes": [note for note in notes if note],
            "jump": jump.to_dict(),
        },
        flops={"expand": context.scoring_flops(config)},
    )


def adaptation(context: RunContext, arm: Arm) -> StageResult:
    """Train the routers alone to send the new domains to the experts that were appended."""
    start, folder = experts.before_routers(context, arm), context.folder / arm.name / "router"
    options, steps = context.config.adaptation, experts.router_steps(context, arm)
    added = experts.appended(context, arm)
    assert added is not None
    model = load_model(start)
    if options.router_update == "retrain":
        redraw_rows(model, added.experts, seed=context.seed("router", *arm.purpose))
    context.say("adapt", f"{steps} steps of the routers on {_names(context.new_domains)}")
    with experts.ready_for_routers(context, arm, model) as setup:
        module = ExpandedModule(
            model,
            schedule=experts.router_schedule(context, arm),
            optimiser=replace(context.optimiser_settings, weight_decay=0.0),
            methods=build_methods(context.config.forgetting),
            routing=setup.routing,
        )
        result = _fit(context, arm, module, setup, folder=folder, label="router")
    target = context.folder / arm.name / "adapted"
    write_trained(
        context,
        module.model,
        start=start,
        target=target,
        steps=result.steps,
        stage="router adaptation",
        added=experts.opened(context, arm, result.steps),
        options=recorded_options(start, is_adapted=True),
    )
    discard_saved(folder)
    flops = result.num_tokens * 3 * context.flops_per_token(read_config(start))
    return StageResult(found=_fit_found(result), flops={arm.label("adapt"): float(flops)})


def training(context: RunContext, arm: Arm, *, loggers: Sequence[Logger]) -> StageResult:
    """Continue on the new domains under the methods against forgetting."""
    start = experts.start_folder(context, arm)
    settings = context.config.training
    settings = replace(settings, max_steps=settings.max_steps * arm.num_trainings)
    model = load_model(start)
    if any(spec.new_blocks_only for spec in arm.specs):
        carried = _carried(context, arm)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not bool(carried[name].any()))
    methods = build_methods(context.config.forgetting)
    protection = " and ".join(method.name for method in methods) or "nothing"
    domains = _names(context.new_domains)
    context.say("train", f"{settings.max_steps} steps on {domains}, protected by {protection}")
    with experts.ready_for_training(context, arm, model) as setup:
        module = ExpandedModule(
            model,
            schedule=schedule_of(settings),
            optimiser=context.optimiser_settings,
            methods=methods,
            routing=setup.routing,
        )
        folder = context.folder / arm.name
        result = _fit(context, arm, module, setup, folder=folder, label="training", loggers=loggers)
    if result.stopped_because is not None:
        context.say("", f"training was broken off: {result.stopped_because}")
    if context.config.routing.bias_update_rate and setup.routing is not None:
        context.say("", "with the selection bias, which is not saved:")
        context.score(model, f"{arm.name}-biased")
    steps = experts.router_steps(context, arm) + result.steps
    write_trained(
        context,
        model,
        start=start,
        target=context.folder / arm.name / "trained",
        steps=steps,
        stage="continued training",
        added=experts.opened(context, arm, steps),
        options=recorded_options(start, is_adapted=bool(experts.appended(context, arm))),
    )
    discard_saved(context.folder / arm.name)
    flops = result.num_tokens * 3 * context.flops_per_token(read_config(start))
    adapted = context.ledger.get(f"{arm.name}.adapt")
    found = _fit_found(result)
    if adapted is not None:
        found["refused_steps"] += adapted.found["refused_steps"]
        found["stopped_because"] = adapted.found["stopped_because"] or result.stopped_because
    return StageResult(found=found, flops={arm.label("fit"): float(flops)})


def _fit(
    context: RunContext,
    arm: Arm,
    module: ExpandedModule,
    setup: experts.Setup,
    *,
    folder: Path,
    label: str,
    loggers: Sequence[Logger] = (),
) -> FitResult:
    """Train an arm's module on the new domains."""
    max_steps = module.schedule.max_steps
    importance = _importance(context, arm)
    config = read_config(experts.expanded_folder(context, arm))
    return fit(
        module,
        context.batches(
            context.new_domains, purpose="-".join((label, *arm.purpose)), max_steps=max_steps
        ),
        settings=context.trainer_settings,
        folder=folder,
        label=label,
        flops_per_token=3 * context.flops_per_token(config),
        console=context.console,
        task=Task(
            carried=setup.follow(_carried(context, arm)),
            old_sequences=context.training_sequences(context.old_domains),
            seed=context.seed("forgetting", *arm.purpose),
            importance={k: setup.follow(values) for k, values in importance.values.items()},
            mean_importance=importance.means,
        ),
        loggers=loggers,
        controls=setup.controls,
    )


def _fit_found(result: FitResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "refused_steps": result.refused_steps,
        "stopped_because": result.stopped_because,
        "update_norms": result.update_norms,
    }


def evaluation(context: RunContext, arm: Arm) -> StageResult:
    """Score the trained model, and let both models say something."""
    trained = load_model(context.folder / arm.name / "trained")
    who = "the control" if arm.is_control else "the trained model"
    context.say("evaluate", f"{who} on {_names(context.domains)}")
    context.score(trained, f"{arm.name}-trained")
    config = read_config(context.folder / arm.name / "trained")
    samples = []
    if not arm.is_control and context.config.evaluation.sample_tokens:
        before = load_model(context.folder / arm.start)
        samples = [_sample(context, domain, before, trained) for domain in context.domains]
    return StageResult(
        found={"samples": samples, "experts": experts.usage(context, trained)},
        flops={arm.label("evaluate"): context.scoring_flops(config)},
    )


def _jump_tokens(context: RunContext) -> Tensor:
    """Return real text of every domain, int64 [B, T]."""
    per_domain = [context.training_sequences([name])[:JUMP_SEQUENCES] for name in context.domains]
    return torch.cat(per_domain).long()


def _layer_note(sources: tuple[int, ...], name: str) -> str:
    if sources == tuple(range(len(sources))):
        return ""
    return f"{name}: layers from {' '.join(map(str, sources))}"


def _parameters(folder: Path) -> int:
    config = read_config(folder)
    return family_of(config).count_parameters(config)


def needs_importance(context: RunContext) -> bool:
    """Say whether a method of the run needs the importance stage."""
    return _ewc_options(context) is not None


def _ewc_options(context: RunContext) -> EWCOptions | None:
    return next((o for o in context.config.forgetting if isinstance(o, EWCOptions)), None)


def _importance_folder(context: RunContext, arm: Arm) -> Path:
    return context.folder / (f"{arm.follows}/importance" if arm.follows else "importance")


@dataclass(frozen=True, slots=True, eq=False)
class _Importance:
    """What `Task` is told of importances, by kind, and their means before the expansion."""

    values: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)


def _importance(context: RunContext, arm: Arm) -> _Importance:
    """Return the importances that the arm's stage left, carried through the arm's maps."""
    options, state = _ewc_options(context), read_state(_importance_folder(context, arm))
    if options is None or state is None:
        return _Importance()
    baseline_folder = context.folder / arm.start
    fisher = state.kinds["fisher"]
    means = {}
    if options.normalise == "mean":
        means["fisher"] = mean_importance(state_tensors(fisher))
    if not arm.specs:
        config = read_config(baseline_folder)
        return _Importance({"fisher": live_tensors(config, state_tensors(fisher))}, means)
    plan = plan_expansion(baseline_folder, arm.specs, seed=context.seed("expansion", *arm.purpose))
    kind = "fisher_penalty" if options.carry == "penalty_preserving" else "fisher"
    carried = dict(state_stream(plan, kind, fisher, moments="carry").tensors)
    return _Importance({"fisher": live_tensors(plan.target_config, carried)}, means)


def _names(domains: Sequence[str]) -> str:
    return ", ".join(domains)


def _carried(context: RunContext, arm: Arm) -> dict[str, Tensor]:
    """Return, by parameter name, which entries hold what was known before the expansion."""
    config = read_config(context.folder / arm.start)
    steps = build_steps(config, arm.specs, seed=context.seed("expansion", *arm.purpose))
    return carried_masks(config, steps)


def _sample(context: RunContext, domain: str, before: Any, after: Any) -> dict[str, str]:
    document = context.corpus.domains[domain].validation.document(0)
    # Documents begin with headings and imports, which show less than what comes after them.
    prompt = document[SAMPLE_PROMPT_TOKENS:][:SAMPLE_PROMPT_TOKENS].tolist()
    tokenizer = context.corpus.tokenizer

    def continued(model: Any) -> str:
        tokens = sample_text(
            model,
            prompt_ids=prompt,
            max_new_tokens=context.config.evaluation.sample_tokens,
            end_of_text_id=context.end_of_text_id,
        )
        return str(tokenizer.decode(tokens))

    return {
        "domain": domain,
        "prompt": str(tokenizer.decode(prompt)),
        "before": continued(before),
        "after": continued(after),
    }
