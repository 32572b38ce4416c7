"""One stage, one Trainer: fit a module on batches under the run's settings."""

import csv
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

from tritter.core.models import activations_recomputed
from tritter.data.batches import BatchStream
from tritter.data.datamodule import Batches, TextDataModule, ValidationSubset
from tritter.errors import TritterError
from tritter.stopping import Stopped
from tritter.storage.atomic import remove_folder
from tritter.targets import Component
from tritter.terminal import Console
from tritter.training.callbacks import (
    EndOfTraining,
    FiniteGuard,
    ForgettingCallback,
    Performance,
    RandomState,
    SaveState,
    StepProgress,
    StopRequest,
    Validation,
    WorkCount,
)
from tritter.training.forgetting_method import Task
from tritter.training.gradient_flow import GradientFlow
from tritter.training.metrics import METRICS_NAME, set_metrics_aside
from tritter.training.module import BaseModule, CompiledModel, module_callbacks
from tritter.training.options import TrainerSettings
from tritter.training.result import Conclusion, FitResult, MemoryMeter, WriteResult
from tritter.training.trainer import (
    build_trainer,
    settings_kept,
    worker_processes,
)

SAVED_NAME = "saved"  # what a killed training goes on from
LEFTOVERS_NAME = "left"  # what methods against forgetting leave for the next training


def fit(
    module: BaseModule,
    batches: Batches,
    *,
    settings: TrainerSettings,
    folder: Path,
    label: str,
    console: Console,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
    observers: Sequence[Callback] = (),
    controls: Sequence[Callback] = (),
    changers: Sequence[Callback] = (),
    theirs: Sequence[Component] = (),
    write_result: WriteResult | None = None,
    evaluation: ValidationSubset | None = None,
) -> FitResult:
    """Train `module` for the steps of its schedule, from where a killed training left off.

    What it left is in `folder`; `discard_saved` removes it once the result is safe. With several
    processes only the fit runs in them; `module` and the methods stay in this one as they were.

    Args:
        folder: where `metrics.csv` of this stage is written.
        label: what the progress bar calls it.
        task: what methods against forgetting are told, where the module has some.
        loggers: besides the CSV; with several processes they get its rows when the fit has ended.
        observers: callbacks that read the gradients of the task before any method changes them.
        controls: callbacks that set what the model may do in a batch, by the step alone.
        changers: callbacks that change the model between two steps, by `surgery`.
        theirs: callbacks that the run is asked for, which stand behind all of ours.
        write_result: writes what the training leaves, unless it is asked to stop.
        evaluation: text on which `eval/<domain>/loss` is measured on the way.

    Raises:
        TritterError: what it would go on from is damaged, a process was killed, or nothing written.
        Stopped: by a signal; its state was saved at the end of the step, unless one came twice.
    """
    guard, work = FiniteGuard(max_consecutive=settings.max_non_finite_steps), WorkCount()
    max_steps, mode, stop = module.schedule.max_steps, settings.progress, StopRequest()
    bar = StepProgress(label=label, max_steps=max_steps, mode=mode, console=console)
    saved, every = folder / SAVED_NAME, settings.save_every_n_steps
    saving = SaveState(saved, every_n_steps=every, stop=stop, guard=guard)
    validation = None if evaluation is None else Validation(evaluation, stop=stop)
    flow, held = GradientFlow({} if task is None else task.new_units), MemoryMeter()
    conclusion = Conclusion(
        guard=guard,
        work=work,
        flow=flow,
        held=held,
        validation=validation,
        saving=saving,
        stop=stop,
        write=write_result,
    )
    callbacks = [EndOfTraining(), flow, *observers, *controls, work, held, Performance(work)]
    ours = [guard, bar, RandomState(settings.seed, label=label), *changers, conclusion, validation]
    callbacks += [callback for side in module.side_losses for callback in side.callbacks()]
    if task is not None:
        callbacks.append(
            ForgettingCallback(module.methods, task, folder / LEFTOVERS_NAME, work=work)
        )
        assert isinstance(batches, BatchStream)
        for method in module.methods:
            batches = method.mix(batches, task)
    callbacks += filter(None, ours)
    module.module_callbacks = partial(module_callbacks, theirs, folder=folder, last=saving)
    gc.collect()  # an earlier trainer, its module and callbacks hold each other, moments too
    since = time.perf_counter()
    with _told(stop, label):
        data = TextDataModule(batches, evaluation)
        _run(module, data, settings, callbacks, saving=saving, folder=folder, loggers=loggers)
    result = conclusion.result
    assert result is not None
    if stop.signal_number is not None:
        where = f"at step {result.steps} of {max_steps} of the {label}, which goes on from there"
        raise Stopped(stop.signal_number, where=where)
    return replace(result, seconds=time.perf_counter() - since)


@contextmanager
def _told(stop: StopRequest, label: str) -> Iterator[None]:
    """Take signals inside; say of an end without a saved step where the training goes on.

    Raises:
        Stopped: a second signal came, or the first before there was anything to save.
    """
    where = f"during the {label}, which goes on from the last state it saved"
    try:
        with stop.listening():
            yield
    except Stopped as stopped:
        stopped.where = where
        raise
    except TritterError as error:
        if stop.signal_number is None:
            raise
        raise Stopped(stop.signal_number, where=where) from error  # workers that hardly began


def discard_saved(folder: Path) -> None:
    """Remove what a training would go on from, after its result was written elsewhere."""
    for name in (SAVED_NAME, LEFTOVERS_NAME):
        remove_folder(folder / name)


def _run(
    module: BaseModule,
    data: TextDataModule,
    settings: TrainerSettings,
    callbacks: list[Callback],
    *,
    saving: SaveState,
    folder: Path,
    loggers: Sequence[Logger],
) -> None:
    """Run one Trainer, from the saved state if there is one, here or in processes of its own."""
    saved, has_workers = folder / SAVED_NAME, settings.has_workers
    start = str(saved) if saved.exists() else None
    if start is not None:
        set_metrics_aside(folder)
    module.train()
    module.compiled = CompiledModel(module.model) if settings.compile else None
    again = activations_recomputed(module.model) if settings.activation_checkpointing else None
    own = [CSVLogger(folder, name="", version=""), *([] if has_workers else loggers)]
    processes = worker_processes() if has_workers else nullcontext()
    with again or nullcontext(), processes, settings_kept():
        trainer = build_trainer(settings, callbacks, module.schedule.max_steps, loggers=own)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, TritterError) or saving.has_trained or start is None:
                raise
            # It ended before its first step: the state is whole, and not that of this training
            raise TritterError(
                f"the training can't go on from the saved state {start}: {error}\n"
                f"Delete {start}, and it starts again from its beginning."
            ) from error
    if has_workers and loggers:  # which worker processes can't share
        with (folder / METRICS_NAME).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                values = {name: float(row[name]) for name in row if name != "step" and row[name]}
                for logger in loggers:
                    logger.log_metrics(values, step=int(row["step"]))
