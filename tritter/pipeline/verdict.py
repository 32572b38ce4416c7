"""The end of a run: the gate's checks, and the checkpoint that follows from them."""

import shutil
from dataclasses import replace
from typing import Any

from tritter.checkpoint import Lineage, lineage_of, write_lineage
from tritter.evaluation.gate import (
    Check,
    new_capability_check,
    preservation_check,
    retention_check,
    training_check,
)
from tritter.evaluation.jump import Jump
from tritter.evaluation.statistics import performance_delta
from tritter.models import read_config
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.moe import start_folder
from tritter.storage.atomic import atomic_folder


def checks(context: RunContext, arm: Arm) -> list[Check]:
    """Hold an arm against the gate's questions."""
    gate = context.config.gate
    before = context.read_scores(arm.start_scores)
    after = context.read_scores(f"{arm.name}-trained")
    fitted, expanded = (context.ledger[f"{arm.name}.{stage}"] for stage in ("fit", "expand"))
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


def complete(context: RunContext, arm: Arm) -> Lineage:
    """Write into a kept round's own folder what its training made of it: the next starts there."""
    folder = context.folder / arm.name / "trained"
    lineage = lineage_of(folder)
    completed = replace(_completed(context, arm, lineage), parent_path=lineage.parent_path)
    write_lineage(folder, completed, read_config(folder))
    return completed


def publish(context: RunContext, arm: Arm, *, keep: bool) -> Lineage:
    """Put what was kept at `checkpoint/`: the trained model, or after a rollback its start."""
    source = context.folder / (f"{arm.name}/trained" if keep else arm.start)
    target = context.folder / "checkpoint"
    lineage = lineage_of(source)
    if keep:
        lineage = _completed(context, arm, lineage)
    elif arm.follows:
        lineage = replace(lineage, parent_path=f"../{arm.follows}/expanded")
    with atomic_folder(target, overwrite=True) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        write_lineage(temporary, lineage, read_config(source))
    return lineage_of(target)


def _completed(context: RunContext, arm: Arm, lineage: Lineage) -> Lineage:
    """Return a lineage whose newest expansion records say what the training made of them."""
    before = context.read_scores(arm.start_scores)
    after = context.read_scores(f"{arm.name}-trained")
    delta = {d: performance_delta(before[d], after[d]) for d in context.domains}
    history = list(lineage.expansion_history)
    for position in range(len(history) - len(arm.specs), len(history)):
        history[position] = replace(
            history[position], continued_training_steps=lineage.step, performance_delta=delta
        )
    means = {name: scores.mean() for name, scores in after.items()}
    return replace(
        lineage,
        expansion_history=tuple(history),
        benchmark_scores=means,
        best_loss=sum(means[d] for d in context.new_domains) / len(context.new_domains),
        parent_path=f"../{start_folder(context, arm).relative_to(context.folder)}",
    )


def _jump(plain: dict[str, Any]) -> Jump:
    nan = float("nan")
    values = {key: nan if value is None else value for key, value in plain.items()}
    return Jump(**values)
