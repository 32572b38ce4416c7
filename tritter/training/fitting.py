"""Fit a module on batches with one Trainer per stage."""

import csv
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from tritter.core.models import checkpoint_activations
from tritter.data.batches import BatchStream
from tritter.data.datamodule import Batches, TextDataModule, ValidationSubset
from tritter.errors import TritterError
from tritter.stopping import Stopped
from tritter.storage.atomic import remove_folder
from tritter.storage.reading import SAVED_NAME
from tritter.targets import Component, instantiate
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
from tritter.training.metrics import METRICS_NAME, rotate_metrics
from tritter.training.module import BaseModule, CompiledModel
from tritter.training.options import TrainerSettings
from tritter.training.result import BestWeights, Conclusion, FitResult, MemoryMeter, WriteResult
from tritter.training.trainer import build_trainer, preserve_process_settings, worker_processes

_CHECKPOINTS_NAME = "checkpoints"  # folder of a ModelCheckpoint, inside that of the training run
LEFTOVERS_NAME = "left"  # state of continual-learning methods for the next training run


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
    surgery_callbacks: Sequence[Callback] = (),
    user_callbacks: Sequence[Component] = (),
    write_result: WriteResult | None = None,
    evaluation: ValidationSubset | None = None,
    publishes_best: bool = False,
) -> FitResult:
    """Train `module` for the steps of its schedule, resuming from a saved state in `folder`.

    With several processes, `module` and its methods in this process do not change.

    Args:
        module: Module to train.
        batches: Training batches.
        folder: Folder for `metrics.csv` and the saved state of this stage.
        label: Label in the progress bar.
        task: Data and state for continual-learning methods, if the module has any.
        loggers: Loggers in addition to the CSV; with several processes, written after the fit.
        observers: Callbacks that read the task gradients before any method changes them.
        controls: Callbacks that configure the model for a batch, depending on the step only.
        surgery_callbacks: Callbacks that change the model between two steps with `surgery`.
        user_callbacks: Callbacks of the user, which run after Tritter's own.
        write_result: Writes the trained model, unless the run was stopped.
        evaluation: Validation subset for `eval/<domain>/loss` during training.
        publishes_best: End with the best weights of the ModelCheckpoint in `user_callbacks`.

    Raises:
        TritterError: The saved state is damaged, a process was killed, or a write failed.
        Stopped: A signal stopped the run, with its state saved unless a second signal arrived.
    """
    guard, work = FiniteGuard(max_consecutive=settings.max_non_finite_steps), WorkCount()
    max_steps, stop, saved = module.schedule.max_steps, StopRequest(), folder / SAVED_NAME
    bar = StepProgress(label=label, max_steps=max_steps, mode=settings.progress, console=console)
    saving = SaveState(saved, every_n_steps=settings.save_every_n_steps, stop=stop, guard=guard)
    validation = None if evaluation is None else Validation(evaluation, stop=stop)
    flow, memory = GradientFlow({} if task is None else task.new_units), MemoryMeter()
    best = BestWeights(module.methods, stop=stop) if publishes_best else None
    conclusion = Conclusion(
        guard=guard,
        work=work,
        flow=flow,
        memory_meter=memory,
        validation=validation,
        saving=saving,
        stop=stop,
        best=best,
        write=write_result,
    )
    callbacks = [flow, *observers, *controls, work, memory, Performance(work)]
    ours = [guard, bar, RandomState(settings.seed, label=label), *surgery_callbacks]
    callbacks += [callback for side in module.side_losses for callback in side.callbacks()]
    if task is not None:
        left = folder / LEFTOVERS_NAME
        callbacks.append(ForgettingCallback(module.methods, task, left, work=work))
        assert isinstance(batches, BatchStream)
        for method in module.methods:
            batches = method.mix(batches, task)
    callbacks = [*filter(None, [EndOfTraining(), best, *callbacks, *ours, conclusion, validation])]
    module.module_callbacks = partial(_module_callbacks, user_callbacks, folder=folder, last=saving)
    gc.collect()  # an earlier trainer, see `discard_saved`
    since, data = time.perf_counter(), TextDataModule(batches, evaluation)
    with _stoppable(stop, label):
        _run(module, data, settings, callbacks, saving=saving, folder=folder, loggers=loggers)
    result = conclusion.result
    assert result is not None
    if stop.signal_number is not None:
        location = f"at step {result.steps} of {max_steps} of the {label}, which can be resumed"
        raise Stopped(stop.signal_number, location=location)
    return replace(result, seconds=time.perf_counter() - since)


def _module_callbacks(
    options: Sequence[Component], *, folder: Path, last: Callback
) -> list[Callback]:
    """Build the callbacks that a LightningModule adds to its Trainer when the fit begins.

    Args:
        options: Callbacks in the requested order.
        folder: Folder of the training run.
        last: Callback to append after all others, including those that write checkpoints.
    """
    callbacks: list[Callback] = []
    for one in options:
        body = dict(one.options)
        if issubclass(one.kind, ModelCheckpoint):  # its default is the working directory
            body["dirpath"] = str(folder / (body.get("dirpath") or _CHECKPOINTS_NAME))
        callback = instantiate(body)
        assert isinstance(callback, Callback)
        callbacks.append(callback)
    return [*callbacks, last]


@contextmanager
def _stoppable(stop: StopRequest, label: str) -> Iterator[None]:
    """Handle signals inside the block; report from where a run resumes that could not be saved."""
    location = f"during the {label}, which resumes from its last saved state"
    try:
        with stop.handle_signals():
            yield
    except Stopped as stopped:
        stopped.location = location
        raise
    except TritterError as error:
        if stop.signal_number is None:
            raise
        raise Stopped(
            stop.signal_number, location=location
        ) from error  # the workers were just starting


def discard_saved(folder: Path) -> None:
    """Remove the saved state of a training run after its result was written elsewhere."""
    gc.collect()  # its trainer, module and callbacks are a reference cycle with moments
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
    """Run one Trainer from the saved state, if any, in this process or in worker processes."""
    saved, has_workers = folder / SAVED_NAME, settings.has_workers
    start = str(saved) if saved.exists() else None
    if start is not None:
        rotate_metrics(folder)
    module.train()
    module.compiled = CompiledModel(module.model) if settings.compile else None
    again = checkpoint_activations(module.model) if settings.activation_checkpointing else None
    own = [CSVLogger(folder, name="", version=""), *([] if has_workers else loggers)]
    processes = worker_processes() if has_workers else nullcontext()
    with again or nullcontext(), processes, preserve_process_settings():
        trainer = build_trainer(settings, callbacks, module.schedule.max_steps, loggers=own)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, TritterError) or saving.has_trained or start is None:
                raise
            # It failed before its first step: the state is intact but belongs to another run
            raise TritterError(
                f"the training run cannot resume from the saved state {start}: {error}\n"
                f"Delete {start} to restart it from the beginning."
            ) from error
    if has_workers and loggers:  # worker processes cannot share them
        with (folder / METRICS_NAME).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                values = {name: float(row[name]) for name in row if name != "step" and row[name]}
                for logger in loggers:
                    logger.log_metrics(values, step=int(row["step"]))
