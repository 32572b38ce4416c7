"""The end of a run: the checks of the gate, and the published checkpoint."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from tritter.checkpoints import Lineage, Source, write_checkpoint, write_lineage
from tritter.data.answers import scored_text
from tritter.evaluation.gate import (
    Check,
    GateResult,
    Status,
    new_capability_check,
    new_task_check,
    retention_check,
)
from tritter.evaluation.jump import Jump
from tritter.evaluation.statistics import PairedScores, finite_or_none
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import ExpansionFound, StageResult
from tritter.pipeline.run import Run
from tritter.pipeline.trained import fitting_dtype
from tritter.pipeline.windows import LongWindows
from tritter.planning.memory import TrainingSetup, states_bytes
from tritter.planning.strategy import planned_rounds
from tritter.storage.atomic import atomic_folder, copy_tree
from tritter.storage.records import record


@record
class GateFound:
    """Verdict and checks of the gate."""

    status: Status
    checks: tuple[Mapping[str, Any], ...]


@record
class KeptFound:
    """The model that a round keeps."""

    model_hash: str


@record
class PublishedFound:
    """The model that a run keeps.

    Args:
        model_hash: hash of the published model.
        parent_hash: hash of its parent.
        base_model_hash: hash of the first model of its lineage.
        expansions: applied methods, oldest first.
    """

    model_hash: str
    parent_hash: str | None
    base_model_hash: str
    expansions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A round or an attempt that the gate evaluates.

    Args:
        run: the attempt.
        branches: trained branches in the order of tasks.
        overrides: overrides of a retry.
    """

    run: Run
    branches: tuple[Branch, ...]
    overrides: tuple[str, ...] = ()

    @classmethod
    def planned(cls, run: Run) -> "list[Candidate]":
        """Return the attempts of the run (each is the next fallback), or its rounds.

        The baseline stage must be finished.
        """
        config, candidates = run.config, list[Candidate]()
        if config.pipeline.target_params is None:
            methods, trainings = list[object](), list[object]()
            for number, own in enumerate(config.attempts, start=1):
                methods.append(own.forgetting)
                trainings.append((own.forgetting, own.expansion, own.training))
                if trainings[-1] in trainings[:-1]:
                    run.say("", f"attempt {number} would repeat an earlier one, and is left out")
                    continue
                prepared_by = 1 + methods.index(own.forgetting)
                name = f"attempt_{number}"
                first = Branch(name, own.expansion, attempt=number, prepared_by=prepared_by)
                branches = first.for_tasks(len(run.data.text.tasks))
                candidates.append(cls(run.of_attempt(number), branches, own.fallback_overrides))
            return candidates
        shapes = planned_rounds(config, run.source("baseline").model)
        counts = " → ".join(f"{shape.parameters:,}" for shape in shapes)
        run.say("plan", f"{len(shapes)} rounds to {counts} parameters")
        for number, shape in enumerate(shapes, start=1):
            branch = Branch(
                f"round_{number}",
                (shape.spec,),
                follows=f"round_{number - 1}" if number > 1 else None,
                is_round=True,
                is_final=number == len(shapes),
            )
            candidates.append(cls(run, (branch,)))
        return candidates

    @property
    def status(self) -> Status:
        """The verdict of the gate."""
        return self.run.ledger.found(self.branches[0].key("gate"), GateFound).status

    def judge(self) -> GateFound:
        """Return the gate's verdict and checks."""
        results = self.checks()
        status = GateResult.of(results).status if self.run.config.gate.enabled else "ungated"
        return GateFound(status=status, checks=tuple(check.to_dict() for check in results))

    def gate(self) -> StageResult:
        """Run the gate as a stage of the run."""
        return StageResult(self.judge())

    def checks(self) -> list[Check]:
        """Return the checks of the gate.

        Old domains are compared with the start of the attempt, domains of earlier tasks with their
        scores after that task.
        """
        run, branches = self.run, self.branches
        gate, first = run.config.gate, branches[0]
        before = run.read_scores(first.start_scores)
        after = run.read_scores(f"{branches[-1].name}-trained")
        fits = [run.ledger.training(branch.name) for branch in branches]
        reasons = (fit.stopped_because for fit in fits)
        results = [
            Check.of_training(
                sum(fit.refused_steps for fit in fits),
                aborted_reason=next(filter(None, reasons), None),
            )
        ]
        results += _training_checks(run, branches)
        if (jump := run.ledger.found(f"{first.name}.expand", ExpansionFound).jump) is not None:
            values = {key: math.nan if value is None else value for key, value in jump.items()}
            results.append(
                Check.of_preservation(Jump(**values), claims_exact=run.planned(first).is_exact)
            )
        bounds = {"bound": gate.retention, "confidence": gate.confidence}
        for subject in run.data.subjects_of([*run.data.old_domains, None]):
            results.append(retention_check(subject, before[subject], after[subject], **bounds))
        learned: dict[str, PairedScores] = {}  # scores of each task's domains right after it
        for branch in branches:
            scores = run.read_scores(f"{branch.name}-trained")
            learned |= {
                name: scores[name] for name in run.data.subjects_of(run.data.new_domains_of(branch))
            }
        # Old domains have a check above; domains of the last task are new
        checked = run.data.subjects_of(
            (*run.data.old_domains, *run.data.new_domains_of(branches[-1]))
        )
        for subject in (name for name in learned if name not in checked):
            kept = retention_check(subject, learned[subject], after[subject], **bounds)
            results.append(replace(kept, detail=f"since its task: {kept.detail}"))
        for subject in run.data.subjects_of(run.data.new_domains):
            check = new_capability_check if before[subject].unit == "nats" else new_task_check
            results.append(
                check(subject, before[subject], after[subject], confidence=gate.confidence)
            )
        scored = {n: scored_text(each) for n, each in run.data.scored.items()}
        results = [replace(each, scored=scored.get(each.subject) or None) for each in results]
        results += LongWindows(run, first).checks(branches[-1])
        return results if gate.enabled else [each.reported() for each in results]

    def complete(self) -> StageResult:
        """Add the training result to the lineage of a kept round, where the next round starts."""
        run, location = self.run, self.branches[-1].trained
        trained = run.source(location)
        lineage = trained.own_lineage
        completed = replace(self._completed(lineage), parent_path=lineage.parent_path)
        completed = write_lineage(trained.folder, completed, trained.config)
        run.sources[location] = replace(trained, lineage=completed)
        return StageResult(KeptFound(model_hash=completed.model_hash))

    def publish(self, *, keep: bool) -> StageResult:
        """Write `checkpoint/`: the trained model, or after a rollback the initial model.

        Weights that already have the run's dtype are hard-linked; others are converted.

        Args:
            keep: publish the trained model.
        """
        run, first, last = self.run, self.branches[0], self.branches[-1]
        source = run.source(last.trained if keep else first.start)
        target = run.folder / "checkpoint"
        lineage = source.own_lineage
        if keep:
            lineage = self._completed(lineage)
        elif first.follows:
            parent = os.path.normpath(f"{first.start}/{lineage.parent_path}")
            lineage = replace(lineage, parent_path=f"../{parent}")
        config, dtype = source.config, run.published_dtype
        is_ready = last.is_final if keep else first.follows is None
        if is_ready or source.tensors.main_dtype == dtype:
            with atomic_folder(target, overwrite=True) as temporary:
                copy_tree(source.folder, temporary)
                written = write_lineage(temporary, lineage, config)
        else:
            dtype = fitting_dtype((source.read_stored(each.name) for each in source.stored), dtype)
            config = {**config, "dtype": dtype}
            rounded = getattr(torch, dtype)
            unrounded = source.model.family.unrounded(config, rounded)
            written = write_checkpoint(
                target,
                config=config,
                tensors=source.stream().to(rounded, unrounded=unrounded),
                lineage=lambda: lineage,
                artifacts=source.artifacts(),
                overwrite=True,
            )
        run.sources["checkpoint"] = Source.written(target, source.model.changed(config), written)
        found = PublishedFound(
            model_hash=written.model_hash,
            parent_hash=written.parent_hash,
            base_model_hash=written.base_model_hash,
            expansions=tuple(record.method for record in written.expansion_history),
        )
        return StageResult(found, leaves=("checkpoint",))

    def _completed(self, lineage: Lineage) -> Lineage:
        """Return a lineage whose newest expansion records contain the results of training."""
        run, branches = self.run, self.branches
        first, last = branches[0], branches[-1]
        before = run.read_scores(first.start_scores)
        after = run.read_scores(f"{last.name}-trained")
        # Without a gate, a model whose losses are not finite is kept too: it has no scores
        means = {
            name: mean for name, scores in after.items() if math.isfinite(mean := scores.mean())
        }
        scored = [d for d in run.data.domains if d in means and math.isfinite(before[d].mean())]
        delta = {d: before[d].performance_delta(after[d]) for d in scored}
        history = list(lineage.expansion_history)
        made = run.source(first.start).own_lineage.expansion_history
        start, steps_before = len(made), 0
        while start and not made[start - 1].continued_training_steps:
            start -= 1  # by a command before this run
        for branch in branches:  # each may have added experts or neurons
            trained = run.source(branch.trained).own_lineage
            for position in range(start, len(trained.expansion_history)):
                history[position] = replace(
                    history[position],
                    continued_training_steps=lineage.step - steps_before,
                    performance_delta=delta,
                )
            start, steps_before = len(trained.expansion_history), trained.step
        losses = [means.get(domain, math.nan) for domain in run.data.new_domains_of(last)]
        return replace(
            lineage,
            expansion_history=tuple(history),
            benchmark_scores=means,
            best_loss=finite_or_none(fmean(losses)),
            parent_path=f"../{last.location}",
        )


def _training_checks(run: Run, branches: Sequence[Branch]) -> Iterator[Check]:
    """Yield the gradient-flow and memory checks of an attempt.

    With several tasks, a parameter needs a gradient in only one of them, and the memory check uses
    the task with the largest deviation from the estimate.
    """
    fits = [run.ledger.training(branch.name) for branch in branches]
    added = run.source(branches[0].expanded).added
    watched = [fit.flow for fit in fits if fit.flow]
    flow: dict[str, Any] = {}  # parameters without gradient in all training runs
    if watched:
        flow["steps"] = sum(each["steps"] for each in watched)
        for kind in ("without_gradient", "without_tokens"):
            first, *others = (each[kind] for each in watched)
            flow[kind] = [name for name in first if all(name in other for other in others)]
    check = Check.of_gradient_flow(flow, new_experts=() if added is None else added.experts)
    if check is not None and (run.config.experts is None or branches[0].is_control):
        yield check  # not meaningful for experts, which alternate
    optimizer, trainer = run.config.optimizer, run.config.trainer
    setup = TrainingSetup(
        precision=trainer.precision,
        optimizer="adamw8bit" if "8bit" in optimizer.target else "adamw",
    )
    results = []
    for branch, fit in zip(branches, fits, strict=True):
        if fit.held and (run.config.experts is None or branch.is_control):
            expected = states_bytes(
                run.source(branch.trained).model,
                setup,
                trained=[(size, count) for size, count in fit.held["trained"]],
                kept_per_parameter=optimizer.kept_per_parameter(),
            )
            results.append(Check.of_memory(fit.held, expected=expected))
    if results:
        yield max(results, key=lambda check: abs(check.value or 0.0))
