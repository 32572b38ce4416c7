"""The training of a branch."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from lightning import Callback
from torch import nn

from tritter.checkpoints import Lineage, Source
from tritter.config.schema import RunConfig
from tritter.core.families import forward_flops
from tritter.data.datamodule import ValidationSubset
from tritter.data.packing import lengths_of
from tritter.errors import RequestError
from tritter.methods.forgetting import build_methods
from tritter.methods.whole import reading_flops_of
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult, TrainingFound
from tritter.pipeline.moe import NewExperts
from tritter.pipeline.run import Run
from tritter.pipeline.samples import SampleLog
from tritter.pipeline.stage import Stage
from tritter.pipeline.stages import importance
from tritter.pipeline.trained import TrainedWriter
from tritter.report.table import count_text
from tritter.storage.atomic import remove_folder
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    Method,
    Schedule,
    Setting,
    Task,
    Trainee,
    WriteResult,
    discard_saved,
    fit,
    metrics_files,
    read_metrics,
)
from tritter.training.forgetting_method import replayed_share
from tritter.training.options import callbacks_of

_ROUTING = "routing"  # folder of the routers' biases, while they are measured
_EARLIER = ("adapt", "distill")  # stages that train a branch before its main training run


class Fit(Stage):
    """Continue training on the new domains with the selected forgetting mitigation."""

    name = "fit"
    found = TrainingFound

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Train the model, write it to `branch.trained`, and report what happened."""
        start, text = run.source(branch.location), run.data.validation_subset
        folder, location = run.folder / branch.name, branch.trained
        result, write = BranchTraining(run, branch).fit()
        run.accept(location)
        run.ledger.watch_disk()
        flops = result.flops + _measuring_flops(run, write, location)
        ending = _report(run, branch, result)
        if write.after_write is not None:
            run.say("", "scores with the selection bias, which is not saved:")
            biased = NewExperts.load_with_routing(run.source(location), folder / _ROUTING)
            run.score(biased, f"{branch.name}-biased")
            flops += run.data.scoring.flops(forward_flops(start.model))
            shutil.rmtree(folder / _ROUTING)
        found = TrainingFound.of(result)
        spent, eval_mode = {branch.label("fit"): flops}, branch.label("validation")
        if result.evaluation_flops:  # the control has a single entry
            spent[eval_mode] = spent.get(eval_mode, 0.0) + result.evaluation_flops
        metrics = [path.relative_to(run.folder).as_posix() for path in metrics_files(folder)]
        return StageResult(
            _with_earlier(run, branch, replace(found, notes=(*found.notes, *ending))),
            flops=spent,
            seconds={eval_mode: result.evaluation_seconds} if text else {},
            leaves=(location, *metrics),
        )

    def finish(self, run: Run, branch: Branch) -> Branch:
        """Remove the saved state, and checkpoints before the training that no stage reads."""
        discard_saved(run.folder / branch.name)  # only now: the ledger has the result
        if not run.keeps_start:
            run.remove_before_fit(branch)
        return branch


class BranchTraining:
    """The training of a branch, with what acts in it: growth or experts, and forgetting methods.

    The control only has the latter. They come last: they unfreeze only weights that they froze.

    Args:
        run: the run, with the data as the branch reads it.
        branch: the branch.

    Attributes:
        forgetting: its forgetting methods.
        methods: all that acts in it.
    """

    def __init__(self, run: Run, branch: Branch) -> None:
        self._run, self._branch = run, branch
        one = None if branch.is_control else run.config.growth or run.config.experts
        others: tuple[Method, ...] = () if one is None else (one.kind(**one.arguments),)
        self.forgetting = build_methods(run.config.forgetting)
        self.methods = (*others, *self.forgetting)

    @cached_property
    def new_experts(self) -> NewExperts:
        """The experts that its expansion has appended, and the routers of its model."""
        return NewExperts(self._run, self._branch)

    @property
    def peak_rate(self) -> float:
        """The peak learning rate, which the methods may change."""
        rate = self._run.config.training.learning_rate
        for method in self.methods:
            rate = method.peak_rate(rate, self._run.data.model)
        return rate

    def load(self, source: Source) -> nn.Module:
        """Load a checkpoint of the branch as the methods load what they train."""
        loading = (m for m in self.methods if type(m).load is not Method.load)
        with self._run.waiting("loading the model"):
            return self._run.data.masked(next(loading, Method()).load(source))

    def fit(
        self, *, schedule: Schedule | None = None, observer: Callback | None = None
    ) -> tuple[FitResult, TrainedWriter]:
        """Train the branch; return the result and what wrote it.

        Args:
            schedule: of a test: nothing is validated or written, without callbacks of the user.
            observer: callback of a test.
        """
        run, branch, methods = self._run, self._branch, self.forgetting
        is_test, start = schedule is not None, run.source(branch.location)
        frees_start = _may_release_start(run, branch)
        options, rate = run.config.training, self.peak_rate
        max_steps = options.max_steps * branch.num_trainings
        settings = replace(options, max_steps=max_steps, learning_rate=rate)
        trainee = Trainee(self.load(start))
        model = trainee.model
        if any(spec.new_blocks_only for spec in branch.specs):
            mapped = run.planned(branch).change.masks()
            for name, parameter in model.named_parameters():
                parameter.requires_grad &= not bool(mapped[name].any())
        _announce(run, branch, schedule.max_steps if schedule else max_steps, rate)
        new, folder = self.new_experts, run.folder / branch.name
        with new.training_of_routers(trainee):
            has_bias = bool(trainee.side_losses) and run.has_unsaved_bias
            task = importance.task(run, branch, follow=trainee.follow)
            for one in run.config.forgetting if task.old_sequences else ():
                if times := one.kind.refreshes(one.options, max_steps):
                    much = f"{times} times, each from at most {one.options.num_sequences:,}"
                    run.say(
                        "", f"{one.name} estimates the importances again up to {much} sequences"
                    )
            _attach(run, branch, start, trainee, task, self.methods, max_steps=max_steps)
            _freeze(model, methods, task, max_steps=settings.max_steps)
            start_rate = _recorded_rate(run.source(branch.start).own_lineage)
            module = BaseModule.of(
                trainee,
                schedule=schedule or settings.rate_schedule(start_rate=start_rate),
                optimizer=run.config.optimizer,
                methods=methods,
            )
            text = run.data.validation_subset
            if observer is not None:
                trainee.observers += (observer,)
            elif text is not None:
                trainee.observers += SampleLog.of(run, model, folder)
            save = partial(new.save_routing, folder=folder / _ROUTING)
            write = replace(
                TrainedWriter.of_branch(run, branch, offset_after=new.offset_after()),
                frees_start=frees_start,
                methods=self.methods,
                steps_before=new.router_steps,
                after_write=save if has_bias else None,
            )
            result = fit_branch(
                run,
                branch,
                module,
                trainee=trainee,
                task=task,
                folder=folder,
                label="range test" if is_test else "training",
                write_result=None if is_test else write,
                evaluation=None if is_test else text,
            )
        return result, write


def _report(run: Run, branch: Branch, result: FitResult) -> list[str]:
    """Print how a training run ended, and return the lines for the report."""
    lines = []
    if result.stopped_because is not None:
        run.say("", f"training stopped: {result.stopped_because}")
    for note in result.notes:
        run.say("data", note)
    if result.ended_early is not None:
        lines.append(f"training ended early, at step {result.steps}: {result.ended_early}")
    if result.best_step is not None:
        lines.append(_best_weights(run.config, run.folder / branch.name, result))
    for line in lines:
        run.say("", line)
    return [f"{branch.name}: {line}" for line in lines]


def _with_earlier(run: Run, branch: Branch, found: TrainingFound) -> TrainingFound:
    """Add the refused steps and the early end of earlier training stages of a branch."""
    for stage in (f"{branch.name}.{each}" for each in _EARLIER):
        if run.ledger.get(stage) is not None:
            earlier = run.ledger.found(stage, TrainingFound)
            found = replace(
                found,
                refused_steps=found.refused_steps + earlier.refused_steps,
                stopped_because=earlier.stopped_because or found.stopped_because,
            )
    return found


def _may_release_start(run: Run, branch: Branch) -> bool:
    """Return True if the weights at the start of training may be removed before it ends.

    This holds for an expanded checkpoint: if the run is killed, the next call repeats the expansion
    from the same source and seed.
    """
    location = branch.expanded
    if not branch.specs or branch.location != location:
        return False
    folder = run.folder / location
    if run.ledger.is_incomplete(location):
        run.say("expand", f"the weights of {folder} were removed; expanding again")
        again = run.folder / branch.expanded_again
        run.write_expanded(branch, again)
        for path in sorted(again.glob("*.safetensors")):
            path.replace(folder / path.name)
        remove_folder(again)
        run.ledger.check_complete(location)
    if run.config.pipeline.keep_stages or run.config.experts is not None or run.keeps_start:
        return False
    run.ledger.mark_released(location)
    return True


def _attach(
    run: Run,
    branch: Branch,
    start: Source,
    trainee: Trainee,
    task: Task,
    methods: Sequence[Method],
    *,
    max_steps: int,
) -> None:
    """Attach the methods of a branch to the model that is going to be trained."""
    data, gathered = run.data, run.config.trainer.accumulate_grad_batches
    setting = Setting(
        start=start,
        task=branch.task,
        domains=data.new_domains_of(branch),
        base_sequences=lambda: data.training_sequences(data.old_domains),
        bounds=data.bounds,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        tokens_per_step=data.batch_size * data.sequence_length * gathered,
        max_steps=max_steps,
        new_units=task.new_units if branch.specs else {},
        seed=lambda *labels: run.seed(*labels, *branch.purpose),
        log=run.say,
    )
    for method in methods:
        made = trainee.make_module
        method.attach(trainee, setting)
        if made not in (None, trainee.make_module):
            reason = "only one method of a run can bring its own module; leave one out"
            raise RequestError(f"forgetting.{method.name}: {reason}.")


def _announce(run: Run, branch: Branch, max_steps: int, rate: float) -> None:
    config, domains, tasks = run.config, run.data.new_domains_of(branch), len(run.data.text.tasks)
    experts, epochs = None if branch.is_control else config.experts, ""
    names = [*(["frozen base"] if experts else []), *(one.name for one in config.forgetting)]
    mitigation = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none"
    which = f" (task {branch.task + 1} of {tasks})" if tasks > 1 else ""
    weights = getattr(config.data, "weights", None) or {}
    if not {*domains} & {*run.data.streams, *weights}:  # each sequence is read equally often
        num_read = max_steps * run.data.batch_size * config.trainer.accumulate_grad_batches
        share = float(1 - replayed_share(config.forgetting))
        most = "at most " if experts and experts.arguments.get("rehearsal") else ""
        sizes = map(len, run.data.training_sequences(domains).values())
        epochs = f", {most}{count_text(share * num_read / sum(sizes))} epochs"
    text = f"{max_steps} steps on {', '.join(domains)}{which}{epochs}; learning rate {rate:.2g}; "
    run.say("train", f"{text}forgetting mitigation: {mitigation}")


def _freeze(
    model: nn.Module, methods: Sequence[ForgettingMethod], task: Task, *, max_steps: int
) -> None:
    """Freeze the weights that each method freezes."""
    for method in methods:
        method.freeze(model, task, max_steps=max_steps)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = " and ".join(method.name for method in methods)
        raise RequestError(
            f"forgetting = {names}: the whole model is frozen, so there is nothing to train; "
            "the expansion only copies layers and adds no new weights."
        )


def _recorded_rate(lineage: Lineage) -> float:
    """Return the final learning rate recorded in a lineage; 0 if it is not recorded.

    Older records lack it; then it is computed from the recorded schedule.
    """
    rate = lineage.training_config.get("last_rate")
    if isinstance(rate, int | float) and 0 <= rate < math.inf:
        return float(rate)
    try:
        training = lineage.training
        schedule = Schedule(
            learning_rate=float(training["learning_rate"]),
            max_steps=int(training["max_steps"]),
            warmup_ratio=float(training["warmup_ratio"]),
            shape=str(training["schedule"]),
            decay_ratio=float(training["decay_ratio"]),
            minimum_ratio=float(training["minimum_ratio"]),
        )
        return schedule.last_rate
    except (KeyError, TypeError, ValueError):  # a model of another tool, or a damaged record
        return 0.0


def fit_branch(
    run: Run,
    branch: Branch,
    module: BaseModule,
    *,
    folder: Path,
    label: str,
    write_result: WriteResult | None,
    trainee: Trainee | None = None,
    task: Task | None = None,
    evaluation: ValidationSubset | None = None,
) -> FitResult:
    """Train a branch's module on the new domains.

    Args:
        folder: working folder.
        label: name of the training run: of its bar, and of its random order of data.
        write_result: writes the result; None for a test.
        trainee: the model, with what else acts on it.
        task: inputs of the forgetting methods.
        evaluation: text for the validation during training.
    """
    max_steps, trainee = module.schedule.max_steps, trainee or Trainee(module.model)
    return fit(
        module,
        run.data.batches(
            run.data.new_domains_of(branch),
            purpose="-".join((label, *branch.purpose)),
            max_steps=max_steps,
        ),
        settings=run.config.trainer,
        folder=folder,
        label=label,
        console=run.console,
        task=task,
        loggers=run.loggers if label == "training" else (),
        observers=trainee.observers,
        controls=trainee.controls,
        surgery_callbacks=trainee.surgery_callbacks,
        user_callbacks=run.config.callbacks if label == "training" else (),
        write_result=write_result,
        evaluation=evaluation,
        publishes_best=label == "training" and run.config.pipeline.publish == "best",
    )


def _best_weights(config: RunConfig, folder: Path, result: FitResult) -> str:
    """Return which weights of a training are the best, and the start's value if it is better."""
    line = f"the best weights are those of step {result.best_step} of {result.steps}"
    (saver,) = callbacks_of("ModelCheckpoint", config)
    metric, sign = str(saver.options["monitor"]), -1 if saver.options.get("mode") == "max" else 1
    values = {int(row["step"]): row[metric] for row in read_metrics(folder) if row.get(metric)}
    start, best = (float(values.get(step, "nan")) for step in (0, result.best_step or 0))
    if sign * start < sign * best:  # not for a metric that the start does not have
        line += f"; {metric} was better before the first step: {start:.4g}, now {best:.4g}"
    return line


def _measuring_flops(run: Run, written: TrainedWriter, location: str) -> float:
    """Return the FLOPs of measuring the losses of a writer's kept sequences."""
    kept = written.kept_sequences
    measured = [rows for name, rows in kept.sequences.items() if name not in kept.losses]
    if not measured:
        return 0.0
    flops = reading_flops_of(run.source(location))
    return sum(flops.of_all(lengths_of(run.data.document_mask, rows)) for rows in measured)
