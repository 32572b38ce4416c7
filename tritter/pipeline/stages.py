"""What the stages do; each reads what earlier ones left on disk, so a run can stop between."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from tritter.adaptation import redraw_rows
from tritter.checkpoint import Lineage, read_lineage, record_step0_error
from tritter.evaluation.jump import logit_jump
from tritter.evaluation.samples import prompt_in_words, sample_text
from tritter.expand import carried_masks, expand
from tritter.expansion import build_steps
from tritter.families import Flops, family_of, forward_flops
from tritter.forgetting import build_methods
from tritter.models import config_of, load_model, read_config
from tritter.pipeline import experts, importance, moments
from tritter.pipeline.arm import Arm
from tritter.pipeline.base import obtain_base
from tritter.pipeline.baseline_scores import score_baseline
from tritter.pipeline.context import RunContext, schedule_of, score_file
from tritter.pipeline.given import copy_given
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.trained import recorded_options, write_trained
from tritter.storage.atomic import atomic_folder
from tritter.training import ExpandedModule, FitResult, Task, discard_saved, fit, metrics_files

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
    score_baseline(context, folder)
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
        return StageResult(found={"parameters": _parameters(source), "notes": []})
    # In float32 whatever the source is stored in: an exact map is exact only before rounding
    result = expand(
        source,
        folder,
        arm.specs,
        seed=context.seed("expansion", *arm.purpose),
        dtype=torch.float32,
        moments="carry" if context.config.optimizer.carry else "zero",
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
    before, after, tokens = load_model(source), load_model(folder), _jump_tokens(context)
    jump = logit_jump(before, after, tokens)
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
        flops={"expand": context.scoring_flops(config) + _jump_flops(source, folder, tokens)},
        leaves=(f"{arm.name}/expanded", score_file(f"{arm.name}-expanded")),
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
        write_moments=moments.passed_on(
            context, start, is_trained=lambda tensor: tensor.name.endswith(".router")
        ),
    )
    discard_saved(folder)
    return StageResult(
        found=_fit_found(result),
        flops={arm.label("adapt"): result.flops},
        leaves=(f"{arm.name}/adapted",),
    )


def training(context: RunContext, arm: Arm, *, loggers: Sequence[Logger]) -> StageResult:
    """Continue on the new domains under the methods against forgetting."""
    start = experts.start_folder(context, arm)
    settings = context.config.training
    settings = replace(settings, max_steps=settings.max_steps * arm.num_trainings)
    model = load_model(start)
    _freeze(context, arm, model)
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
            moments=moments.carried(context, start, model),
        )
        folder = context.folder / arm.name
        result = _fit(context, arm, module, setup, folder=folder, label="training", loggers=loggers)
    flops = result.flops
    if result.stopped_because is not None:
        context.say("", f"training was broken off: {result.stopped_because}")
    if context.config.routing.bias_update_rate and setup.routing is not None:
        context.say("", "with the selection bias, which is not saved:")
        context.score(model, f"{arm.name}-biased")
        flops += context.scoring_flops(read_config(start))
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
        write_moments=moments.left(context, folder),
    )
    discard_saved(folder)
    moments.discard_left(folder)
    adapted = context.ledger.get(f"{arm.name}.adapt")
    found = _fit_found(result)
    if adapted is not None:
        found["refused_steps"] += adapted.found["refused_steps"]
        found["stopped_because"] = adapted.found["stopped_because"] or result.stopped_because
    metrics = [path.relative_to(context.folder).as_posix() for path in metrics_files(folder)]
    return StageResult(
        found=found,
        flops={arm.label("fit"): flops},
        leaves=(f"{arm.name}/trained", *metrics),
    )


def _freeze(context: RunContext, arm: Arm, model: nn.Module) -> None:
    """Hold all that is old, where an expansion asks for its new blocks alone to be trained."""
    if any(spec.new_blocks_only for spec in arm.specs):
        carried = _carried(context, arm)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not bool(carried[name].any()))


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
    known = importance.carried_importance(context, arm)
    return fit(
        module,
        context.batches(
            context.new_domains, purpose="-".join((label, *arm.purpose)), max_steps=max_steps
        ),
        settings=context.trainer_settings,
        folder=folder,
        label=label,
        console=context.console,
        task=Task(
            carried=setup.follow(_carried(context, arm)),
            old_sequences=context.training_sequences(context.old_domains),
            seed=context.seed("forgetting", *arm.purpose),
            importance={k: setup.follow(values) for k, values in known.values.items()},
            mean_importance=known.means,
        ),
        loggers=loggers,
        # What starts from moments leaves its own; the stages of routers do neither
        observers=moments.keepers(context, folder) if module.moments else (),
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
    samples, flops = [], context.scoring_flops(config) + experts.usage_flops(context, config)
    if not arm.is_control and context.config.evaluation.sample_tokens:
        before = load_model(context.folder / arm.start)
        samples = [_sample(context, domain, before, trained) for domain in context.domains]
        flops += sum(sample.flops for sample in samples)
    return StageResult(
        found={
            "samples": [sample.texts for sample in samples],
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
    configs = map(read_config, (before, after))
    return sum(_flops_of(forward_flops(family_of(c), c), tokens) for c in configs)


def _flops_of(flops: Flops, sequences: Tensor) -> float:
    """Return the FLOPs of a pass over sequences [N, T]."""
    return len(sequences) * flops.of(sequences.shape[1])


def _layer_note(sources: tuple[int, ...], name: str) -> str:
    if sources == tuple(range(len(sources))):
        return ""
    return f"{name}: layers from {' '.join(map(str, sources))}"


def _parameters(folder: Path) -> int:
    config = read_config(folder)
    return family_of(config).count_parameters(config)


def _names(domains: Sequence[str]) -> str:
    return ", ".join(domains)


def _carried(context: RunContext, arm: Arm) -> dict[str, Tensor]:
    """Return, by parameter name, which entries hold what was known before the expansion."""
    config = read_config(context.folder / arm.start)
    steps = build_steps(config, arm.specs, seed=context.seed("expansion", *arm.purpose))
    return carried_masks(config, steps)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What two models say to one prompt, as in summary.json, and the FLOPs of it."""

    texts: dict[str, str]
    flops: float


def _sample(context: RunContext, domain: str, before: Any, after: Any) -> _Sample:
    document = context.corpus.domains[domain].validation.document(0)
    # Documents begin with headings and imports, which show less than what comes after them.
    tokenizer, max_new = context.corpus.tokenizer, context.config.evaluation.sample_tokens
    prompt = prompt_in_words(
        document[: 4 * SAMPLE_PROMPT_TOKENS].tolist(),
        tokenizer.decode,
        skipped_tokens=SAMPLE_PROMPT_TOKENS,
        max_tokens=SAMPLE_PROMPT_TOKENS,
    )
    texts, flops = {}, 0.0
    for name, model in (("before", before), ("after", after)):
        tokens = sample_text(
            model,
            prompt_ids=prompt,
            max_new_tokens=max_new,
            end_of_text_id=context.end_of_text_id,
        )
        texts[name] = str(tokenizer.decode(tokens))
        # End of text, the prompt and what was said; the last token is not read any more
        config, said = config_of(model), min(len(tokens), max_new - 1)
        flops += forward_flops(family_of(config), config).of(1 + len(prompt) + said)
    record = {"domain": domain, "prompt": str(tokenizer.decode(prompt)), **texts}
    return _Sample(record, flops)
