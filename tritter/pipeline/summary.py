"""summary.json of a run, assembled from its ledger and the scores on disk."""

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps, loads
from typing import Any

from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import ExpansionFound, TrainingFound
from tritter.pipeline.run import Run
from tritter.pipeline.stages.baseline import BaselineFound
from tritter.pipeline.stages.evaluate import EvaluationFound
from tritter.pipeline.stages.importance import Importance
from tritter.pipeline.verdict import Candidate, GateFound, PublishedFound
from tritter.pipeline.windows import LongWindows
from tritter.planning.strategy import TOLERANCE, planned_rounds
from tritter.report.summary import (
    Attempt,
    Check,
    Domains,
    ExpertsRecord,
    GrowthRecord,
    Jump,
    Matrix,
    MoeRecord,
    Packing,
    Sample,
    Score,
    Scores,
    Summary,
    Target,
    TaskRecord,
)
from tritter.storage.records import validate_record

_SECTIONS: dict[str, Any] = {"growth": GrowthRecord, "experts": ExpertsRecord}


def summary_record(
    run: Run, candidates: Sequence[Candidate], *, control: Candidate, control_gate: GateFound | None
) -> Summary:
    """Return the contents of summary.json; top-level values are those of the last round or attempt.

    Args:
        candidates: the rounds or attempts that ran.
        control: the control (not grown); it has no branches if it was not requested.
        control_gate: the gate's verdict on the control, if any.
    """
    branches = candidates[-1].branches
    first, last = branches[0], branches[-1]
    records = [_attempt_record(each) for each in candidates]
    attempt = records[-1]
    locations = {"baseline": "baseline", "final": "checkpoint"}
    models = {name: run.source(location).model for name, location in locations.items()}
    is_kept = attempt.status != "rolled_back"
    evaluated = run.ledger.found(f"{last.name}.evaluate", EvaluationFound)
    own = candidates[-1].run
    later = (
        note
        for each in (*candidates, control)
        for branch in each.branches
        for note in (
            *Importance().notes(each.run, branch),
            *each.run.ledger.training(branch.name).notes,
        )
    )
    return Summary(
        format_version=1,
        status=candidates[-1].status,
        domains=Domains(old=list(run.data.old_domains), new=list(run.data.new_domains)),
        data={name: domain.counts for name, domain in run.data.corpus.domains.items()},
        expansion=[n for each in (records if last.is_round else [attempt]) for n in each.expansion],
        forgetting=attempt.forgetting,
        seed=run.config.seed,
        baseline=_scores(run, "baseline"),
        expanded=attempt.expanded,
        final=attempt.final if is_kept else _scores(run, first.start_scores),
        gate=attempt.gate,
        attempts=[attempt] if last.is_round else records,
        tasks=attempt.tasks,
        jump=attempt.jump,
        flops=run.ledger.flops(),
        seconds=run.ledger.seconds(),
        parameters={name: model.num_parameters for name, model in models.items()},
        parameters_on_disk={name: m.on_disk.num_parameters for name, m in models.items()},
        disk=run.ledger.disk_use(),
        checkpoint="checkpoint",
        lineage=asdict(run.ledger.found("publish", PublishedFound)),
        samples=[Sample(**each) for each in evaluated.samples],
        notes=[*run.notes, *dict.fromkeys(later)],
        **_known(
            matrix=attempt.matrix,
            moe=moe_record(own, branches),
            windows=LongWindows(own, first).record(last),
            **_of_methods(own, branches),
            stages=attempt.stages or None,
            rounds=records if last.is_round else None,
            target=_target(candidates[-1]) if last.is_round else None,
            control=None
            if control_gate is None
            else Attempt(**_branch_record(control.run, control.branches, control_gate)),
        ),
    )


def _known(**parts: Any) -> dict[str, Any]:
    """Return the parts that are not None; a summary omits the others."""
    return {name: part for name, part in parts.items() if part is not None}


def _of_methods(run: Run, branches: Sequence[Branch]) -> dict[str, Any]:
    """Return the sections of growth and experts, and `methods`: results of all other methods."""
    fits = []
    for branch in branches:
        fit = run.ledger.training(branch.name)
        usage = run.ledger.found(f"{branch.name}.evaluate", EvaluationFound).experts or {}
        fits.append({"steps": fit.steps, "reports": fit.reports, "usage": usage})
    sections, others = dict[str, Any](), dict[str, Any]()
    for group, one in run.config.methods():
        method = one.kind(**one.arguments)
        if group in _SECTIONS:
            what = f"summary.json: {group}"
            sections[group] = validate_record(method.summary(fits), _SECTIONS[group], what=what)
            continue
        try:
            part = loads(dumps(method.summary(fits), allow_nan=False))
        except Exception as error:  # of third-party code, after all training
            part = {"error": f"{type(error).__name__}: {error}"}
        others |= {one.name: part} if part else {}
    return {**sections, "methods": others or None}


def _of_stages(run: Run, branches: Sequence[Branch]) -> dict[str, Any] | None:
    """Return the result of each stage from outside, of the last branch that has it."""
    results = {
        stage.name: done.found
        for stage in run.config.stages
        for branch in branches
        if (done := run.ledger.get(f"{branch.name}.{stage.name}")) is not None
    }
    return results or None


def moe_record(run: Run, branches: Sequence[Branch]) -> MoeRecord | None:
    """Return `moe` of summary.json for evaluated branches; None for a dense model.

    Args:
        branches: branches of an attempt in the order of tasks.
    """
    first, last = branches[0], branches[-1]
    found = run.ledger.found(f"{last.name}.evaluate", EvaluationFound)
    if found.moe is None:
        return None
    record = dict(found.moe)
    added, key = run.source(first.expanded).added, f"{first.name}.adapt"
    if added is not None:
        has_stage = run.ledger.get(key) is not None
        record["new"] = list(added.experts)
        record["router_steps"] = run.ledger.found(key, TrainingFound).steps if has_stage else 0
        record["is_open"] = run.source(last.trained).added is None
    if run.has_unsaved_bias:
        biased, stock = (
            run.read_scores(f"{last.name}-{kind}").records() for kind in ("biased", "trained")
        )
        record["selection_bias"] = {
            domain: {"with": biased[domain]["loss"], "without": stock[domain]["loss"]}
            for domain in run.data.domains
        }
    return MoeRecord.model_construct(**record)


def _target(last: Candidate) -> Target:
    """Return the size after the last round of a run that grows to a target."""
    run, branch = last.run, last.branches[0]
    target = run.config.pipeline.target_params
    assert target is not None
    planned = planned_rounds(run.config, run.source("baseline").model)
    kept = branch.name if last.status != "rolled_back" else branch.follows
    if kept is None:
        parameters = run.ledger.found("baseline", BaselineFound).parameters
    else:
        parameters = run.ledger.found(f"{kept}.expand", ExpansionFound).parameters
    return Target(
        target_params=target,
        planned=[shape.parameters for shape in planned],
        reaches_target=abs(parameters / target - 1) <= TOLERANCE,
    )


def _attempt_record(candidate: Candidate) -> Attempt:
    run, branches = candidate.run, candidate.branches
    first = branches[0]
    jump = run.ledger.found(f"{first.name}.expand", ExpansionFound).jump
    gate = run.ledger.found(first.key("gate"), GateFound)
    expanded = f"{first.name}-expanded" if first.specs else first.start_scores
    return Attempt(
        **_branch_record(run, branches, gate),
        expanded=_scores(run, expanded),
        jump=None if jump is None else Jump.model_construct(**dict[str, Any](jump)),
        forgetting=[options.name for options in run.config.forgetting],
        overrides=list(candidate.overrides),
        **_known(baseline=_scores(run, first.start_scores) if first.follows else None),
    )


def _branch_record(run: Run, branches: Sequence[Branch], gate: GateFound) -> dict[str, Any]:
    """Return the fields shared by attempts and the control."""
    first, last = branches[0], branches[-1]
    grown = run.ledger.found(f"{first.name}.expand", ExpansionFound)
    tasks = [_task_record(run, branch) for branch in branches]
    parts: dict[str, Any] = {}
    if len(tasks) > 1:
        start = _scores(run, first.start_scores)
        parts["matrix"] = Matrix.of(start, tasks, learned_before=run.data.old_domains)
    return {
        "expansion": [spec.name for spec in first.specs],
        "status": gate.status,
        "final": tasks[-1].final,
        "gate": [Check.model_construct(**check) for check in gate.checks],
        "steps": sum(task.steps for task in tasks),
        "ended_early": next((task.ended_early for task in tasks if task.ended_early), None),
        "best_step": tasks[-1].best_step,
        "refused_steps": sum(task.refused_steps for task in tasks),
        "update_norms": tasks[-1].update_norms,
        "parameters": run.source(last.trained).model.num_parameters,
        "notes": list(grown.notes),
        "flops": sum(task.flops or 0.0 for task in tasks),
        "seconds": sum(task.seconds or 0.0 for task in tasks),
        "tasks": tasks,
        **_known(stages=_of_stages(run, branches)),
        **parts,
    }


def _task_record(run: Run, branch: Branch) -> TaskRecord:
    """Return the record of one task's training, with the scores of every domain after it."""
    fitted = run.ledger[f"{branch.name}.fit"]
    found = run.ledger.training(branch.name)
    return TaskRecord(
        domains=list(run.data.new_domains_of(branch)),
        final=_scores(run, f"{branch.name}-trained"),
        steps=found.steps,
        ended_early=found.ended_early,
        best_step=found.best_step,
        refused_steps=found.refused_steps,
        update_norms=dict(found.update_norms),
        flops=sum(fitted.flops.values()),
        seconds=sum(fitted.seconds.values()),
        **_known(packing=Packing(**found.packing) if found.packing else None),
    )


def _scores(run: Run, name: str) -> Scores:
    records = run.read_scores(name).records(run.data.tasks)
    return {subject: Score.model_construct(**record) for subject, record in records.items()}
