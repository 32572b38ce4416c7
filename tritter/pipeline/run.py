"""Runs a pipeline from its config to a summary, a table and a published checkpoint."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lightning.pytorch.loggers import Logger

from tritter.checkpoints.run_text import DEFAULT_FRACTION
from tritter.config.fallbacks import RETRYING, with_fallback
from tritter.config.overrides import command, tool_command, tritter_command
from tritter.config.run_folder import read_status
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.core.expansions import EXPANSIONS, vocab_place
from tritter.data.chat import TEMPLATE_FILE
from tritter.errors import RequestError
from tritter.evaluation.gate import Status
from tritter.pipeline import (
    costs,
    disk,
    importance,
    moe,
    stages,
    streams,
    verdict,
    vocabulary,
    windows,
)
from tritter.pipeline.base import check_source
from tritter.pipeline.branch import Branch, tasks_of
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import (
    BaselineFound,
    ChoiceFound,
    Ledger,
    TrainingFound,
    VocabularyFound,
)
from tritter.pipeline.metrics import (
    BEFORE,
    before_metrics,
    first_step,
    join_rows,
    log_result_to_wandb,
    num_steps,
    open_loggers,
    score_metrics,
    wandb_finished,
    write_metrics,
)
from tritter.pipeline.scoring import BenchmarkTask
from tritter.pipeline.summary import summary_record
from tritter.pipeline.verdict import Candidate
from tritter.planning.strategy import planned_rounds
from tritter.report.plots import curves_of, plot_run
from tritter.report.summary import Summary
from tritter.report.tables import print_summary
from tritter.storage.atomic import write_text_atomic
from tritter.terminal import Console
from tritter.training import metrics_files

_SUMMARY_NAME = "summary.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a run.

    Args:
        status: kept, rolled_back, undecided or ungated (`gate=off`).
        metric: mean loss over old and new domains of the last trained model, kept or not, in nats
            per byte; a sweeper minimises it. NaN if training diverged.
        summary_path: path of summary.json.
        leaves: outputs that identify the run as finished, relative to its folder.
    """

    status: Status
    metric: float
    summary_path: Path
    leaves: tuple[str, ...]


def run_pipeline(config: RunConfig, *, run_folder: Path) -> Outcome:
    """Run all stages that are not in the ledger, and write the files of a run.

    Raises:
        RequestError: the request is invalid (for example, the cache is not writable).
        TritterError: a stage failed; the ledger keeps finished stages.
    """
    context = RunContext(
        config=config, folder=run_folder, console=Console(), ledger=Ledger(run_folder)
    )
    with wandb_finished(context):
        for message in context.ledger.verify_outputs():
            context.say("run", message)
        check_source(context)
        _announce(context)
        run_baseline(context)
        candidates = _run_candidates(context)
        last, status = candidates[-1], candidates[-1].status
        control = _run_control(last, num_rounds=len(candidates) if last.branches[0].is_round else 1)
        is_kept = status != "rolled_back"
        with context.waiting("writing the published model"):
            context.stage(
                "publish",
                lambda: verdict.publish(last.context, last.branches, keep=is_kept),
                label="publish",
            )
        disk.remove_unneeded(
            context, *(branch for each in (*candidates, control) for branch in each.branches)
        )
        return _report(context, candidates, control)


def _report(context: RunContext, candidates: Sequence[Candidate], control: Candidate) -> Outcome:
    """Write the summary, metrics and plots of a run, and print its table and next commands."""
    last = candidates[-1]
    gate, control_rows = None, []
    if control.branches:
        gate = verdict.judge(control)
        control_rows = write_metrics(context, control.branches, of="control")
    summary = summary_record(context, candidates, control=control, control_gate=gate)
    path = context.folder / _SUMMARY_NAME
    write_text_atomic(path, summary.text())
    rows = write_metrics(context, last.branches)
    before = [each for each in candidates[:-1] if each.branches[0].is_round]
    if before:
        write_metrics(
            context, [branch for each in candidates for branch in each.branches], of="rounds"
        )
    plots = plot_run(
        summary,
        curves_of(rows),
        context.folder / "plots",
        earlier=[curves_of(join_rows(context, each.branches)) for each in before],
        control=curves_of(control_rows),
    )
    own = [
        branch.name
        for candidate in candidates
        for branch in candidate.branches
        if branch.part is None
    ]
    step = sum(num_steps(context, name) for name in own)
    log_result_to_wandb(context, summary, plots, step=step)
    print_summary(summary, console=context.console, folder=context.folder)
    context.say("disk", disk.report(summary.disk))
    context.console.print()
    for plot in plots:
        context.say("plot", str(plot))
    context.say("summary", str(path))
    overrides = read_status(context.folder).overrides
    if retried := summary.last_attempt.overrides:
        overrides = [
            override
            for override in with_fallback(overrides, retried)
            if not override.lstrip("+").startswith(RETRYING)
        ]
    context.console.print("\nNext:", highlight=False)
    for line in next_commands(
        last.context.config, summary, overrides=overrides, folder=context.folder
    ):
        context.console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    # Of the trained model: after a rollback, the published model is the initial one
    final = summary.last_attempt.final
    losses = [final[name].loss_per_byte for name in (*summary.domains.old, *summary.domains.new)]
    known = [loss for loss in losses if loss is not None]
    return Outcome(
        status=last.status,
        metric=math.nan if len(known) < len(losses) else sum(known) / len(known),
        summary_path=path,
        leaves=(_SUMMARY_NAME, "checkpoint", "scores"),
    )


def _run_candidates(context: RunContext) -> list[Candidate]:
    """Run rounds until one is rolled back, or attempts until one is not rolled back.

    Returns:
        The rounds or attempts that ran.
    """
    planned = planned_candidates(context)
    run: list[Candidate] = []
    for number, each in enumerate(planned, start=1):
        first, is_last = each.branches[0], number == len(planned)
        if first.attempt > 1:
            overrides = " ".join(each.overrides)
            context.say("attempt", f"{number} of {len(planned)}, from the baseline: {overrides}")
        so_far = (
            [branch for candidate in run for branch in candidate.branches] if first.is_round else []
        )
        candidate = replace(each, branches=_run_tasks(each.context, each.branches, so_far=so_far))
        run.append(candidate)
        candidate.context.stage(first.key("gate"), partial(verdict.gate, candidate), label="gate")
        if len(planned) > 1:
            context.say("gate", f"{first.name}: {candidate.status}")
        if (candidate.status == "rolled_back") == first.is_round:
            break
        if first.is_round and not is_last:
            kept = partial(verdict.complete, context, first)
            context.stage(first.key("keep"), kept, label="publish")
            if first.follows:
                disk.remove(context, f"{first.follows}/trained")
        elif not is_last:
            disk.remove(context, f"{candidate.branches[-1].name}/trained")
    return run


def planned_candidates(context: RunContext) -> list[Candidate]:
    """Return the attempts of the run (each is the next fallback), or its rounds.

    The baseline stage must be finished.

    Raises:
        RequestError: the target size can't be reached from the baseline's shape.
    """
    config, candidates = context.config, []
    if config.pipeline.target_params is None:
        for number, own in enumerate(config.attempts, start=1):
            has_same_methods = [one.forgetting == own.forgetting for one in config.attempts]
            prepared_by = 1 + has_same_methods.index(True)
            name = f"attempt_{number}"
            first = Branch(name, own.expansion, attempt=number, prepared_by=prepared_by)
            branches = tasks_of(first, len(context.text.tasks))
            candidates.append(
                Candidate(context.of_attempt(number), branches, own.fallback_overrides)
            )
        return candidates
    shapes = planned_rounds(config, context.source("baseline").model)
    counts = " → ".join(f"{shape.parameters:,}" for shape in shapes)
    context.say("plan", f"{len(shapes)} rounds to {counts} parameters")
    for number, shape in enumerate(shapes, start=1):
        branch = Branch(
            f"round_{number}",
            (shape.spec,),
            follows=f"round_{number - 1}" if number > 1 else None,
            is_round=True,
            is_final=number == len(shapes),
        )
        candidates.append(Candidate(context, (branch,)))
    return candidates


def _run_tasks(
    context: RunContext, branches: Sequence[Branch], *, so_far: Sequence[Branch] = ()
) -> tuple[Branch, ...]:
    """Train consecutive branches until one stops early, and return the trained ones.

    Args:
        so_far: branches of earlier rounds, whose steps precede in loggers.
    """
    row, trained = [*so_far, *branches], list[Branch]()
    for branch in branches:
        # The control starts like the attempt, whose preparation it uses
        is_prepared = branch.is_control and not branch.follows
        if importance.is_needed(context) and not is_prepared:
            prepare = partial(importance.prepare, context.reading(branch.start), branch)
            context.stage(importance.key(branch), prepare, label=branch.label("importance"))
        step = first_step(context, row, branch)
        trained.append(run_branch(context, branch, first_step=step))
        if context.ledger.found(f"{branch.name}.fit", TrainingFound).stopped_because is not None:
            break
    return tuple(trained)


def _run_control(last: Candidate, *, num_rounds: int) -> Candidate:
    """Train the control like the last attempt, if requested; otherwise it has no branches."""
    context = last.context
    if not context.config.control:
        return replace(last, branches=())
    context.say("control", "control (not grown), trained in the same way")
    prepared_by = last.branches[0].prepared_by
    first = Branch(
        "control", (), is_control=True, num_trainings=num_rounds, prepared_by=prepared_by
    )
    branches = _run_tasks(context, tasks_of(first, len(context.text.tasks)))
    disk.remove(context, f"{branches[-1].name}/trained")
    return replace(last, branches=branches)


def run_baseline(context: RunContext) -> None:
    """Create the initial model of the run."""
    is_finished = context.ledger.get("baseline") is not None
    context.stage("baseline", lambda: stages.baseline(context), label="baseline")
    if is_finished:
        _check_start(context)


def _check_start(context: RunContext) -> None:
    """Refuse a run of an earlier version of Tritter, which began texts in another way."""
    for scores in context.read_scores("baseline").values():
        if scores.unit == "nats" and scores.start != context.bounds.start:
            raise RequestError(
                f"resume = {context.folder}: an earlier version scored texts that begin with the "
                "end of text; this one begins them as the tokenizer does. Start in another folder."
            )


def run_branch(context: RunContext, branch: Branch, *, first_step: int = 0) -> Branch:
    """Expand, train and score a branch; return it with the experts selected by its data.

    Args:
        first_step: number of earlier steps in loggers.
    """
    branch = prepare_branch(context, branch)
    context = context.reading(moe.expanded_folder(branch))
    key, label = branch.name, branch.label
    opened: AbstractContextManager[list[Logger]] = nullcontext([])
    if context.ledger.get(f"{key}.evaluate") is None:
        opened = open_loggers(context, branch.part, first_step=first_step)
    with opened as loggers:
        if before := before_metrics(context, key):
            for logger in loggers if not metrics_files(context.folder / key) else ():
                logger.log_metrics(before, step=BEFORE)
        context.stage(
            f"{key}.fit",
            lambda: stages.training(context, branch, loggers=loggers),
            label=label("fit"),
        )
        disk.remove_before_fit(context, branch)
        context.stage(
            f"{key}.evaluate", lambda: stages.evaluation(context, branch), label=label("evaluate")
        )
        for logger in loggers:
            logger.log_metrics(score_metrics(context, key), step=num_steps(context, key))
    return branch


def prepare_branch(context: RunContext, branch: Branch) -> Branch:
    """Expand a branch up to its training; return it with the experts selected by its data."""
    key, label = branch.name, branch.label
    context = context.reading(branch.start)
    if vocabulary.is_learned(branch):
        stage = f"{key}.vocabulary"
        context.stage(stage, partial(vocabulary.learning, context, branch), label="vocabulary")
        branch = vocabulary.with_merges(branch, context.ledger.found(stage, VocabularyFound).merges)
    if moe.selects_experts_by_data(branch):
        stage = f"{key}.choose"
        context.stage(stage, partial(stages.choice, context, branch), label="choose")
        branch = moe.with_choice(branch, context.ledger.found(stage, ChoiceFound).clone_from)
    expand = partial(stages.expansion, context, branch)
    context.stage(f"{key}.expand", expand, label=label("expand"))
    context = context.reading(moe.expanded_folder(branch))
    if moe.teacher_of(branch) is not None:
        context.stage(
            f"{key}.distill", lambda: stages.distillation(context, branch), label="distill"
        )
    if moe.router_steps(context, branch):
        context.stage(
            f"{key}.adapt", lambda: stages.adaptation(context, branch), label=label("adapt")
        )
    return branch


def _announce_costs(context: RunContext) -> None:
    """Print what the run will cost, before its first stage."""
    first, *others = costs.cost_lines(context)
    context.say("cost", first)
    for line in others:
        context.say("", line)
    with context.waiting("timing a batch"):
        line = costs.time_line(context)
    if line:
        context.say("", line)


def _announce(context: RunContext) -> None:
    """Print the inputs of the run."""
    config = context.config
    chosen = {
        "expansion": ", ".join(spec.name for spec in config.expansion) or "none",
        "forgetting": ", ".join(options.name for options in config.forgetting) or "none",
    }
    if config.growth is not None:
        chosen["growth"] = config.growth.name
    if config.experts is not None:
        chosen["experts"] = config.experts.name
    choices = "  ".join(f"{key}={value}" for key, value in chosen.items())
    context.say("tritter", f"{choices}  seed={config.seed}")
    parts = [
        f"{source.name} ({source.num_documents:,} documents, {source.num_bytes / 1e6:.2g} MB)"
        for source in context.corpus.sources.values()
    ]
    origins = dict.fromkeys(source.origin for source in context.corpus.sources.values())
    context.say("data", f"{', '.join(parts)}; {', '.join(origins)}")
    for note in context.notes:
        context.say("", note)
    if len(tasks := context.text.tasks) > 1:
        named = (" and ".join(domains) for domains in tasks)
        context.say("tasks", f"{', then '.join(named)}; {config.training.max_steps} steps each")
    if not context.old_domains:
        kept = ", ".join(task.name for task in context.tasks if task.domain is None)
        what = f"measured on {kept} only" if kept else "neither measured nor gated"
        context.say("", f"no old data (data.old): forgetting is {what}")
    context.check_text()
    vocabulary.check(context)
    windows.check(context)
    if context.tasks:
        names = (t.label if isinstance(t, BenchmarkTask) else t.name for t in context.tasks)
        context.say("answers", f"accuracy is measured on {', '.join(names)}")
    streams.check(context)
    if context.ledger.get("baseline") is None:
        _announce_costs(context)
        return
    if context.ledger.found("baseline", BaselineFound).corpus != context.corpus.digest:
        raise RequestError(
            f"data: the data has changed since the run in {context.folder} began; restore it, "
            "or start another run."
        )


_WITH_BODY = ("expansion", "experts")
_MAX_FRACTION = 0.5  # of replayed or validation data; more would starve the rest


def next_commands(
    config: RunConfig, summary: Summary, *, overrides: Sequence[str], folder: Path
) -> list[str]:
    """Return commands that suit the verdict, each with a comment.

    Args:
        overrides: overrides of the run, in Hydra's syntax.
        folder: run folder.
    """
    advice = {"rolled_back": _after_rollback, "undecided": _after_undecided}
    changes = advice.get(summary.status, _after_kept)(config, summary)
    typed = [
        override for override in overrides if override.partition("=")[0].lstrip("+") != "resume"
    ]
    lines = []
    for change, why in changes:
        # Options of a replaced method are removed with it
        bodies = tuple(f"{key}." for key in change if key in _WITH_BODY)
        kept = [
            override
            for override in typed
            if override.lstrip("+~").partition("=")[0] not in change
            and not override.lstrip("+~").startswith(bodies)
        ]
        changed = command([*kept, *(f"{key}={value}" for key, value in change.items())])
        lines.append(f"{changed}   # {why}")
    checkpoint = str(folder / "checkpoint")
    trained = folder / f"attempt_{len(summary.attempts)}" / "trained"
    if summary.status != "rolled_back":
        chat = ["--chat"] if Path(checkpoint, TEMPLATE_FILE).is_file() else []
        asking = ["generate", "--checkpoint", checkpoint, *chat, "--prompt", "TEXT"]
        lines.append(tritter_command(asking))
    elif any(trained.glob("*.safetensors")):
        inspection = tritter_command(["inspect", str(trained)])
        lines.append(f"{inspection}   # the trained model, which was not kept")
    lines.append(tritter_command(["history", checkpoint, "--verify"]))
    wandb = config.logger.wandb
    if wandb is not None and wandb.mode == "offline":
        runs = tool_command("wandb", ["sync", str(folder / "wandb")])
        lines.append(
            f"{runs}/offline-run-*   # upload to W&B"
        )  # unquoted, so that the shell expands it
    return lines


Advice = Iterator[tuple[dict[str, str], str]]


def _after_kept(config: RunConfig, summary: Summary) -> Advice:
    if not config.control and config.expansion:
        yield {"control": "true"}, "compare with the control (not grown)"
    if not isinstance(config.model, CheckpointModelConfig):
        yield {"seed": str(config.seed + 1)}, "check with another seed"
    is_dynamic = config.experts is not None and config.experts.kind.is_dynamic
    if is_dynamic and not isinstance(config.model, CheckpointModelConfig):
        yield {"experts": "single_lora"}, "compare with a single adapter"
    elif not isinstance(config.model, CheckpointModelConfig) and config.experts is None:
        used = {spec.name for spec in config.expansion}
        used |= {"layers", "moe_add"}  # they need a table, or a model with experts
        other = next(name for name in [*EXPANSIONS, "none"] if name not in used)
        yield {"expansion": other}, "another expansion"


def _after_rollback(config: RunConfig, summary: Summary) -> Advice:
    failed = {check.check for check in summary.gate if check.verdict == "failed"}
    names = [options.name for options in config.forgetting]
    if failed & {"retention", "long_windows"}:
        replay = next((one for one in config.forgetting if one.kind.needs(one.options).mixes), None)
        if replay is None:
            yield {"forgetting": _override_value([*names, "replay"])}, "mix in old data"
        elif (fraction := getattr(replay.options, "fraction", 1.0)) < _MAX_FRACTION:
            more = min(_MAX_FRACTION, 2 * fraction)
            yield {f"forgetting.{replay.name}.fraction": f"{more:g}"}, "mix in more old data"
        # Best combination with replay: experiments/2026-11-21_forgetting_methods
        has_tokens = vocab_place(config.expansion) is not None  # which no teacher knows
        if "distill" not in names and config.experts is None and not has_tokens:
            methods = ["distill", *names] if names else ["distill", "replay"]
            yield {"forgetting": _override_value(methods)}, "also distill from the old model"
    if "new_capability" in failed:
        yield _twice_as_long(config), "more steps"
    if failed & {"retention", "long_windows", "training"}:
        options = config.training if config.experts is None else config.experts.options
        group = "training" if config.experts is None else "experts"
        yield {f"{group}.learning_rate": f"{options.learning_rate / 2:g}"}, "lower learning rate"


def _twice_as_long(config: RunConfig) -> dict[str, str]:
    """Return the override that doubles the length of training."""
    training = config.training
    if training.max_tokens is not None:
        return {"training.max_tokens": str(2 * training.max_tokens)}
    return {"training.max_steps": str(2 * training.max_steps)}


def _after_undecided(config: RunConfig, summary: Summary) -> Advice:
    undecided = [check for check in summary.gate if check.verdict == "undecided"]
    for check in undecided:
        upper = check.bounds[1]
        # If the whole interval is below the bound, only documents are missing
        is_below = upper is not None and check.bound is not None and upper < check.bound
        if check.check == "new_capability" and not is_below:
            yield _twice_as_long(config), "more steps"
            break
    needs = [
        (check.documents_needed / check.n, check)
        for check in undecided
        if check.documents_needed and check.n
    ]
    if not needs:
        return
    factor, check = max(needs, key=lambda need: need[0])
    fraction = factor * (config.data.validation_fraction or DEFAULT_FRACTION)
    advice = f"{check.documents_needed} validation documents of {check.subject} are needed"
    held_out = summary.data.get(check.subject, {}).get("validation", 0)
    if factor > 1 and check.n < held_out:
        needed = min(check.documents_needed or held_out, held_out)
        yield {"evaluation.max_documents": str(needed)}, advice
    elif isinstance(config.model, CheckpointModelConfig):
        return  # it keeps the split of its lineage
    elif factor > 1 and fraction <= _MAX_FRACTION:
        yield {"data.validation_fraction": f"{fraction + 0.005:.2f}"}, advice


def _override_value(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"
