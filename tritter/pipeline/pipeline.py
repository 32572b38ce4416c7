"""Runs a pipeline from its config to a summary, a table and a published checkpoint."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, takewhile
from pathlib import Path

from tritter.checkpoints.run_text import RunText
from tritter.config.fallbacks import with_fallback
from tritter.config.launch.composition import SweepInConfig, load_config
from tritter.config.overrides import command, tool_command
from tritter.config.run_folder import RunStatus
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.core.expansions import EXPANSIONS, vocab_place
from tritter.data.chat import TEMPLATE_FILE
from tritter.errors import RequestError, TritterError
from tritter.evaluation.gate import Status
from tritter.pipeline import costs, windows
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.metrics import (
    log_branch,
    log_result_to_wandb,
    wandb_finished,
    wandb_logger,
    write_metrics,
)
from tritter.pipeline.run import Run
from tritter.pipeline.scoring import BenchmarkTask
from tritter.pipeline.stage import Stage
from tritter.pipeline.stages import vocabulary
from tritter.pipeline.stages.appended import Adapt, Choose, Distill
from tritter.pipeline.stages.baseline import BaselineFound, check_source, run_baseline
from tritter.pipeline.stages.evaluate import Evaluate
from tritter.pipeline.stages.expand import Expand
from tritter.pipeline.stages.fit import BranchTraining, Fit
from tritter.pipeline.stages.importance import Importance
from tritter.pipeline.stages.vocabulary import LearnTokens
from tritter.pipeline.summary import summary_record
from tritter.pipeline.verdict import Candidate, GateFound, KeptFound, PublishedFound
from tritter.report.figures import plot_run
from tritter.report.runs import Curve
from tritter.report.summary import Summary
from tritter.report.table import ACCURACY
from tritter.report.tables import SummaryTables
from tritter.storage.atomic import clear_leftovers, write_text_atomic
from tritter.targets import instantiate
from tritter.terminal import Console
from tritter.training.forgetting_method import replayed_share
from tritter.transform import size_text

_SUMMARY_NAME = "summary.json"
_WITH_BODY = ("expansion", "experts")
_MAX_FRACTION = 0.5  # of replayed or validation data; more would starve the rest
_Advice = Iterator[tuple[dict[str, str], str]]
_STAGES: tuple[Stage, ...] = (
    Importance(),
    LearnTokens(),
    Choose(),
    Expand(),
    Distill(),
    Adapt(),
    Fit(),
    Evaluate(),
)


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
    clear_leftovers(run_folder)
    run = Run(config=config, folder=run_folder, console=Console(), ledger=Ledger(run_folder))
    run.ledger.check(_found(config))
    with wandb_finished(run):
        for message in run.ledger.verify_outputs():
            run.say("run", message)
        check_source(run)
        _announce(run)
        if config.model.model_type == "hf":  # a missing login fails before the baseline is scored
            wandb_logger(run)
        run_baseline(run)
        candidates = _run_candidates(run)
        last, status = candidates[-1], candidates[-1].status
        control = _run_control(last, num_rounds=len(candidates) if last.branches[0].is_round else 1)
        is_kept = status != "rolled_back"
        with run.waiting("writing the published model"):
            run.stage(
                "publish",
                partial(last.publish, keep=is_kept),
                label="publish",
            )
        for branch in (branch for each in (*candidates, control) for branch in each.branches):
            run.remove_before_fit(branch)
            run.remove(branch.trained, branch.preparation)
        return _report(run, candidates, control)


def _report(run: Run, candidates: Sequence[Candidate], control: Candidate) -> Outcome:
    """Write the summary, metrics and plots of a run, and print its table and next commands."""
    last = candidates[-1]
    gate, control_rows = None, []
    if control.branches:
        gate = control.judge()
        control_rows = write_metrics(run, control.branches, of="control")
    summary = summary_record(run, candidates, control=control, control_gate=gate)
    path = run.folder / _SUMMARY_NAME
    write_text_atomic(path, summary.text())
    rows = write_metrics(run, last.branches)
    branches = [branch for candidate in candidates for branch in candidate.branches]
    if last.branches[0].is_round and len(candidates) > 1:
        rows = write_metrics(run, branches, of="rounds")
    plots = plot_run(
        summary, Curve.of_rows(rows), run.folder / "plots", control=Curve.of_rows(control_rows)
    )
    steps = run.ledger.steps(branch for branch in branches if branch.part is None)
    log_result_to_wandb(run, summary, plots, step=steps)
    SummaryTables(summary).print(console=run.console, folder=run.folder)
    run.say("disk", _disk_text(summary.disk))
    run.console.print()
    for plot in plots:
        run.say("plot", str(plot))
    run.say("summary", str(path))
    overrides = RunStatus.read(run.folder).overrides
    if retried := summary.last_attempt.overrides:
        overrides = with_fallback(overrides, retried, retries=False)
    run.console.print("\nNext:", highlight=False)
    rate = BranchTraining(last.run, last.branches[-1]).peak_rate
    for line in next_commands(
        last.run.config, summary, overrides=overrides, folder=run.folder, rate=rate
    ):
        run.console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
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


def _disk_text(use: Mapping[str, Mapping[str, int]]) -> str:
    """Return one line about the disk use of a run."""
    weights, state = use["weights"], use["state"]
    return (
        f"weights {size_text(weights['end'])} (peak {size_text(weights['peak'])}; source "
        f"{size_text(weights['source'])}, result {size_text(weights['result'])}), training state "
        f"{size_text(state['end'])} (peak {size_text(state['peak'])})"
    )


def _run_candidates(run: Run) -> list[Candidate]:
    """Run rounds until one is rolled back, or attempts until one is not rolled back.

    Returns:
        The rounds or attempts that ran.
    """
    planned = Candidate.planned(run)
    tried: list[Candidate] = []
    for number, each in enumerate(planned, start=1):
        first, is_last = each.branches[0], number == len(planned)
        if first.attempt > 1:
            overrides = " ".join(each.overrides)
            run.say("attempt", f"{number} of {len(planned)}, from the baseline: {overrides}")
        so_far = [branch for before in tried if first.is_round for branch in before.branches]
        candidate = replace(each, branches=_run_tasks(each.run, each.branches, so_far=so_far))
        tried.append(candidate)
        candidate.run.stage(first.key("gate"), candidate.gate, label="gate")
        if len(planned) > 1:
            run.say("gate", f"{first.name}: {candidate.status}")
        if (candidate.status == "rolled_back") == first.is_round:
            break
        if first.is_round and not is_last:
            run.stage(first.key("keep"), candidate.complete, label="publish")
            if first.follows:
                run.remove(first.start)
        elif not is_last:
            run.remove(candidate.branches[-1].trained)
    return tried


def _run_tasks(
    run: Run, branches: Sequence[Branch], *, so_far: Sequence[Branch] = ()
) -> tuple[Branch, ...]:
    """Return the branches trained until one stops early; loggers count those `so_far` first."""
    trained = list[Branch]()
    for branch in branches:
        first_step = run.ledger.steps([*so_far, *trained])
        trained.append(run_branch(run, branch, first_step=first_step))
        if run.ledger.training(branch.name).stopped_because is not None:
            break
    return tuple(trained)


def _run_control(last: Candidate, *, num_rounds: int) -> Candidate:
    """Train the control like the last attempt, if requested; otherwise it has no branches."""
    run = last.run
    if not run.config.control:
        return replace(last, branches=())
    run.say("control", "control (not grown), trained in the same way")
    prepared = last.branches[0].prepared_by
    first = Branch("control", (), is_control=True, num_trainings=num_rounds, prepared_by=prepared)
    branches = _run_tasks(run, first.for_tasks(len(run.data.text.tasks)))
    run.remove(branches[-1].trained)
    return replace(last, branches=branches)


def stages_of(config: RunConfig) -> Iterator[Stage]:
    """Yield the stages of a branch in order, each with those of `stages` that follow it."""
    own = list[Stage]()
    for one in config.stages:
        stage: Stage = instantiate(one.options)
        stage.name = one.name
        own.append(stage)
    for shipped in _STAGES:
        yield shipped
        yield from (stage for stage in own if type(stage).after == shipped.name)


def _found(config: RunConfig) -> dict[str, type]:
    """Return stage → record of its result."""
    kinds = {stage.name: stage.found for stage in stages_of(config)}
    others = {"baseline": BaselineFound, "gate": GateFound, "keep": KeptFound}
    return {**kinds, **others, "publish": PublishedFound}


def prepare_branch(run: Run, branch: Branch) -> Branch:
    """Run the stages of a branch before its training."""
    for stage in takewhile(lambda each: not isinstance(each, Fit), stages_of(run.config)):
        branch = stage(run, branch)
    return branch


def run_branch(run: Run, branch: Branch, *, first_step: int = 0) -> Branch:
    """Run all stages of a branch; return it with what its data selected.

    Args:
        first_step: number of earlier steps in loggers.
    """
    branch = prepare_branch(run, branch)
    with log_branch(run, branch, first_step=first_step):
        for stage in dropwhile(lambda each: not isinstance(each, Fit), stages_of(run.config)):
            branch = stage(run, branch)
    run.remove_before_fit(branch)
    return branch


def _announce(run: Run) -> None:
    """Print the inputs of the run."""
    config = run.config
    chosen = {
        "expansion": ", ".join(spec.name for spec in config.expansion) or "none",
        "forgetting": ", ".join(options.name for options in config.forgetting) or "none",
    }
    if config.growth is not None:
        chosen["growth"] = config.growth.name
    if config.experts is not None:
        chosen["experts"] = config.experts.name
    choices = "  ".join(f"{key}={value}" for key, value in chosen.items())
    run.say("tritter", f"{choices}  seed={config.seed}")
    parts = [
        f"{domain.name} ({domain.num_documents:,} documents, {domain.num_bytes / 1e6:.2g} MB)"
        for domain in run.data.corpus.domains.values()
    ]
    origins = dict.fromkeys(domain.origin for domain in run.data.corpus.domains.values())
    run.say("data", f"{', '.join(parts)}; {', '.join(origins)}")
    for note in run.notes:
        run.say("", note)
    if len(tasks := run.data.text.tasks) > 1:
        named = (" and ".join(domains) for domains in tasks)
        run.say("tasks", f"{', then '.join(named)}; {config.training.max_steps} steps each")
    if not run.data.old_domains:
        kept = ", ".join(task.name for task in run.data.tasks if task.domain is None)
        what = f"measured on {kept} only" if kept else "neither measured nor gated"
        run.say("", f"no old data (data.old): forgetting is {what}")
    run.data.check_text()
    vocabulary.check(run)
    windows.check(run)
    if run.data.tasks:
        names = (t.label if isinstance(t, BenchmarkTask) else t.name for t in run.data.tasks)
        run.say("answers", f"accuracy is measured on {', '.join(names)}")
    run.data.check_streams(run.folder)
    if run.ledger.get("baseline") is None:
        costs.announce(run)
        return
    if run.ledger.found("baseline", BaselineFound).corpus != run.data.corpus.digest:
        raise RequestError(
            f"data: the data has changed since the run in {run.folder} began; restore it, "
            "or start another run."
        )


# The commands that a run suggests at its end; they suit the verdict.


def next_commands(
    config: RunConfig, summary: Summary, *, overrides: Sequence[str], folder: Path, rate: float
) -> list[str]:
    """Return valid commands that suit the verdict, each with a comment.

    Args:
        overrides: overrides of the run, in Hydra's syntax.
        folder: run folder.
        rate: peak learning rate of the run.
    """
    if summary.status == "rolled_back":
        changes = _after_rollback(config, summary, rate=rate)
    else:
        is_open = summary.status == "undecided"
        changes = (_after_undecided if is_open else _after_kept)(config, summary)
    typed = [each for each in overrides if each.partition("=")[0].lstrip("+") != "resume"]
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
        changed = [*kept, *(f"{key}={value}" for key, value in change.items())]
        with suppress(TritterError, OSError, SweepInConfig):  # other settings exclude it
            load_config(changed)
            lines.append(f"{command(changed)}   # {why}")
    checkpoint = str(folder / "checkpoint")
    trained = folder / f"attempt_{len(summary.attempts)}" / "trained"
    if summary.status != "rolled_back":
        chat = ["--chat"] if Path(checkpoint, TEMPLATE_FILE).is_file() else []
        asking = ["generate", "--checkpoint", checkpoint, *chat, "--prompt", "TEXT"]
        lines.append(tool_command("tritter", asking))
    elif any(trained.glob("*.safetensors")):
        inspection = tool_command("tritter", ["inspect", str(trained)])
        lines.append(f"{inspection}   # the trained model, which was not kept")
    lines.append(tool_command("tritter", ["history", checkpoint, "--verify"]))
    if (wandb := config.wandb) is not None and wandb.mode == "offline":
        runs = tool_command("wandb", ["sync", str(folder / "wandb")])
        lines.append(f"{runs}/offline-run-*   # upload to W&B")  # unquoted: the shell expands it
    return lines


def _after_kept(config: RunConfig, summary: Summary) -> _Advice:
    if not config.control and config.expansion:
        yield {"control": "true"}, "compare with the control (not grown)"
    if not isinstance(config.model, CheckpointModelConfig):
        yield {"seed": str(config.seed + 1)}, "check with another seed"
    is_dynamic = config.experts is not None and config.experts.kind.is_dynamic
    if is_dynamic and not isinstance(config.model, CheckpointModelConfig):
        yield {"experts": "single_lora"}, "compare with a single adapter"
    elif not isinstance(config.model, CheckpointModelConfig) and config.experts is None:
        used = {"layers", "moe_add"}  # they need a table, or a model with experts
        used |= {spec.name for spec in config.expansion}
        other = next(name for name in [*EXPANSIONS, "none"] if name not in used)
        yield {"expansion": other}, "another expansion"


def _after_rollback(config: RunConfig, summary: Summary, *, rate: float) -> _Advice:
    failed = {check.check for check in summary.gate if check.verdict == "failed"}
    names = [options.name for options in config.forgetting]
    replayed = "replay" if summary.domains.old else "self_replay"  # a benchmark was forgotten
    if failed & {"retention", "long_windows"}:
        mixing = [one for one in config.forgetting if one.kind.needs(one.options).mixes]
        room = _MAX_FRACTION - float(replayed_share(mixing))
        if not mixing:
            yield {"forgetting": _override_value([*names, replayed])}, "mix in replay data"
        elif room > 0:
            replay = max(mixing, key=lambda one: one.kind.needs(one.options).old_text)  # real data
            fraction = getattr(replay.options, "fraction", 0.0)
            more = f"{fraction + min(room, fraction):g}"
            yield {f"forgetting.{replay.name}.fraction": more}, "mix in more replay data"
        # Best combination with replay: experiments/2026-11-21_forgetting_methods
        has_tokens = vocab_place(config.expansion) is not None  # which no teacher knows
        if "distill" not in names and config.experts is None and not has_tokens:
            methods = ["distill", *names] if names else ["distill", replayed]
            yield {"forgetting": _override_value(methods)}, "also distill from the old model"
    if "new_capability" in failed:
        yield _twice_as_long(config), "more steps"
    if failed & {"retention", "long_windows", "training"}:
        group = "training" if config.experts is None else "experts"
        yield {f"{group}.learning_rate": f"{rate / 2:g}"}, "lower learning rate"


def _twice_as_long(config: RunConfig) -> dict[str, str]:
    """Return the override that doubles the length of training."""
    training = config.training
    key = "max_steps" if training.max_tokens is None else "max_tokens"
    return {f"training.{key}": str(2 * getattr(training, key))}


def _after_undecided(config: RunConfig, summary: Summary) -> _Advice:
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
        if check.documents_needed and check.n and not check.subject.endswith(ACCURACY)
    ]
    if not needs:
        return
    factor, check = max(needs, key=lambda need: need[0])
    fraction = factor * (config.data.validation_fraction or RunText.DEFAULT_FRACTION)
    advice = f"{check.documents_needed} validation documents of {check.subject} are needed"
    held_out = summary.data.get(check.subject, {}).get("validation", 0)
    if factor > 1 and check.n < held_out:
        needed = check.documents_needed or held_out
        advice += f"; there are {held_out}" if held_out < needed else ""
        yield {"evaluation.max_documents": str(min(needed, held_out))}, advice
    elif isinstance(config.model, CheckpointModelConfig):
        return  # it keeps the split of its lineage
    elif factor > 1 and fraction <= _MAX_FRACTION:
        # Which documents are held out is random: two standard deviations more
        fraction *= 1 + 2 / math.sqrt(check.documents_needed or 1)
        fraction = min(math.ceil(100 * fraction) / 100, _MAX_FRACTION)
        yield {"data.validation_fraction": f"{fraction:.2f}"}, advice


def _override_value(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"
