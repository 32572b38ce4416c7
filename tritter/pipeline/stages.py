"""What the stages do; each reads what earlier ones left on disk, so a run can stop between."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from tritter.checkpoint import Lineage, read_lineage, write_checkpoint, write_lineage
from tritter.evaluation.gate import (
    Check,
    new_capability_check,
    preservation_check,
    retention_check,
    training_check,
)
from tritter.evaluation.jump import Jump, logit_jump
from tritter.evaluation.samples import sample_text
from tritter.evaluation.statistics import relative_change
from tritter.expand import carried_masks, copy_tokenizer, expand
from tritter.expansion import ExpansionSpec, build_steps
from tritter.families import family_of
from tritter.forgetting import build_methods
from tritter.models import load_model, named_tensors, read_config
from tritter.pipeline.base import obtain_base
from tritter.pipeline.context import RunContext, Scores, schedule_of
from tritter.pipeline.ledger import StageResult
from tritter.storage.atomic import atomic_folder
from tritter.training import ExpandedModule, FitResult, Task, fit

JUMP_SEQUENCES = 8
SAMPLE_PROMPT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of continuing from the baseline: the expansion asked for, or none as the control.

    Args:
        name: of the arm's folder, scores and stages.
        specs: its expansions in order.
        is_control: it stands beside the attempt, for comparison.
    """

    name: str
    specs: tuple[ExpansionSpec, ...]
    is_control: bool = False

    @property
    def claims_exact(self) -> bool:
        return all(spec.is_exact for spec in self.specs)

    def label(self, stage: str) -> str:
        """Return what reports call a stage of this arm: everything of the control is one."""
        return "control" if self.is_control else stage


def baseline(context: RunContext) -> StageResult:
    """Get the base model into the run folder and score it."""
    base = obtain_base(context)
    folder = context.folder / "baseline"
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
        },
        flops={
            "pretraining": lineage.training_config["flops"],
            "baseline": context.scoring_flops(config),
        },
        seconds={"pretraining": base.seconds},
    )


def expansion(context: RunContext, arm: Arm) -> StageResult:
    """Expand the baseline, measure the jump and score the result."""
    source, folder = context.folder / "baseline", context.folder / arm.name / "expanded"
    if not arm.specs:
        return StageResult(found={"parameters": _parameters(source), "notes": []})
    result = expand(source, folder, arm.specs, seed=context.seed("expansion"), overwrite=True)
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
    _record_jump(folder, jump, num_new=len(arm.specs))
    context.score(after, f"{arm.name}-expanded")
    config = read_config(folder)
    return StageResult(
        found={
            "parameters": result.parameters_after,
            "notes": [note for note in notes if note],
            "jump": jump.to_dict(),
        },
        flops={"expand": context.scoring_flops(config)},
    )


def training(context: RunContext, arm: Arm, *, loggers: Sequence[Logger]) -> StageResult:
    """Continue on the new domains under the methods against forgetting."""
    start = start_folder(context, arm)
    config = read_config(start)
    settings = context.config.training
    model = load_model(start)
    steps = build_steps(
        read_config(context.folder / "baseline"), arm.specs, seed=context.seed("expansion")
    )
    if any(spec.new_blocks_only for spec in arm.specs):
        _freeze_old(model, {t.disk_name for t in _new_tensors(config, steps)})
    methods = build_methods(context.config.forgetting)
    module = ExpandedModule(
        model,
        schedule=schedule_of(settings),
        optimiser=context.optimiser_settings,
        methods=methods,
    )
    names = " and ".join(method.name for method in methods) or "nothing"
    context.say(
        "train",
        f"{settings.max_steps} steps on {', '.join(context.new_domains)}, protected by {names}",
    )
    family = family_of(config)
    result = fit(
        module,
        context.batches(context.new_domains, purpose="training", max_steps=settings.max_steps),
        settings=context.trainer_settings,
        folder=context.folder / arm.name,
        label="training",
        flops_per_token=3 * context.flops_per_token(config),
        console=context.console,
        task=Task(
            carried=carried_masks(family, read_config(context.folder / "baseline"), steps),
            old_sequences=context.training_sequences(context.old_domains),
            seed=context.seed("forgetting"),
        ),
        loggers=loggers,
    )
    if result.stopped_because is not None:
        context.say("", f"training was broken off: {result.stopped_because}")
    _write_trained(context, arm, module, result, start)
    return StageResult(
        found={
            "steps": result.steps,
            "refused_steps": result.refused_steps,
            "stopped_because": result.stopped_because,
            "update_norms": result.update_norms,
        },
        flops={arm.label("fit"): float(result.num_tokens * 3 * context.flops_per_token(config))},
    )


def evaluation(context: RunContext, arm: Arm) -> StageResult:
    """Score the trained model, and let both models say something."""
    trained = load_model(context.folder / arm.name / "trained")
    context.say("evaluate", f"{arm.name.replace('_', ' ')} on {', '.join(context.domains)}")
    context.score(trained, f"{arm.name}-trained")
    config = read_config(context.folder / arm.name / "trained")
    samples = []
    if not arm.is_control and context.config.evaluation.sample_tokens:
        before = load_model(context.folder / "baseline")
        samples = [_sample(context, domain, before, trained) for domain in context.domains]
    return StageResult(
        found={"samples": samples}, flops={arm.label("evaluate"): context.scoring_flops(config)}
    )


def checks(context: RunContext, arm: Arm) -> list[Check]:
    """Hold an arm against the gate's questions."""
    gate = context.config.gate
    before, after = context.read_scores("baseline"), context.read_scores(f"{arm.name}-trained")
    fitted = context.ledger.get(f"{arm.name}.fit")
    expanded = context.ledger.get(f"{arm.name}.expand")
    assert fitted is not None and expanded is not None
    made = [
        training_check(
            fitted.found["refused_steps"], aborted_reason=fitted.found["stopped_because"]
        )
    ]
    if (jump := expanded.found.get("jump")) is not None:
        made.append(preservation_check(_jump(jump), claims_exact=arm.claims_exact))
    for domain in context.old_domains:
        made.append(
            retention_check(
                domain,
                before[domain],
                after[domain],
                bound=gate.retention,
                confidence=gate.confidence,
            )
        )
    for domain in context.new_domains:
        made.append(
            new_capability_check(domain, before[domain], after[domain], confidence=gate.confidence)
        )
    return made


def publish(context: RunContext, arm: Arm, *, keep: bool) -> Lineage:
    """Put what was kept at `checkpoint/`: the trained model, or after a rollback the baseline."""
    source = context.folder / arm.name / "trained" if keep else context.folder / "baseline"
    target = context.folder / "checkpoint"
    lineage = read_lineage(source)
    assert lineage is not None
    if keep:
        before = context.read_scores("baseline")
        after = context.read_scores(f"{arm.name}-trained")
        lineage = _completed(context, arm, lineage, before, after)
    with atomic_folder(target, overwrite=True) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        write_lineage(temporary, lineage, read_config(source))
    written = read_lineage(target)
    assert written is not None
    return written


def start_folder(context: RunContext, arm: Arm) -> Path:
    """Return the checkpoint that an arm's training starts from."""
    return context.folder / arm.name / "expanded" if arm.specs else context.folder / "baseline"


def _write_trained(
    context: RunContext, arm: Arm, module: ExpandedModule, result: FitResult, start: Path
) -> None:
    parent = read_lineage(start)
    assert parent is not None
    target = context.folder / arm.name / "trained"
    config = read_config(start)
    write_checkpoint(
        target,
        config=config,
        tensors=named_tensors(module.model, config),
        lineage=replace(
            parent,
            parent_hash=parent.model_hash,
            parent_path=os.path.relpath(start, target),
            step=result.steps,
            training_config=_training_config(context),
        ),
        write_extras=lambda folder: copy_tokenizer(start, folder),
        overwrite=True,
    )


def _training_config(context: RunContext) -> dict[str, Any]:
    return {
        "stage": "continued training",
        "training": asdict(context.config.training),
        "forgetting": [{"name": o.name, **asdict(o)} for o in context.config.forgetting],
        "old": {n: asdict(context.corpus.sources[n]) for n in context.old_domains},
        "new": {n: asdict(context.corpus.sources[n]) for n in context.new_domains},
        "seed": context.config.seed,
    }


def _completed(
    context: RunContext, arm: Arm, lineage: Lineage, before: Scores, after: Scores
) -> Lineage:
    """Return a lineage whose newest expansion records say what the training made of them."""
    delta = {d: relative_change(before[d], after[d]).value for d in context.domains}
    history = list(lineage.expansion_history)
    for position in range(len(history) - len(arm.specs), len(history)):
        history[position] = replace(
            history[position], continued_training_steps=lineage.step, performance_delta=delta
        )
    loss = {d: float(a.nats.sum() / a.num_tokens.sum()) for d, a in after.items()}
    return replace(
        lineage,
        expansion_history=tuple(history),
        benchmark_scores=loss,
        best_loss=sum(loss[d] for d in context.new_domains) / len(context.new_domains),
        parent_path=f"../{arm.name}/expanded" if arm.specs else "../baseline",
    )


def _record_jump(folder: Path, jump: Jump, *, num_new: int) -> None:
    """Write the measured error of the whole expansion into its newest records."""
    lineage = read_lineage(folder)
    assert lineage is not None
    error = jump.to_dict()["relative_to_std"]
    old, new = lineage.expansion_history[:-num_new], lineage.expansion_history[-num_new:]
    history = (*old, *(replace(record, step0_error=error) for record in new))
    write_lineage(folder, replace(lineage, expansion_history=history), read_config(folder))


def _jump(plain: dict[str, Any]) -> Jump:
    nan = float("nan")
    values = {key: nan if value is None else value for key, value in plain.items()}
    return Jump(**values)


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


def _new_tensors(config: Any, steps: Any) -> list[Any]:
    fresh = {
        name
        for name, tensor_map in steps[-1].parameter_map.tensors.items()
        if tensor_map.state == "fresh"
    }
    return [t for t in family_of(config).logical_tensors(config) if t.name in fresh]


def _freeze_old(model: torch.nn.Module, new_names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new_names)


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
