"""One stage, one Trainer: fit a module on batches under the run's settings."""

import csv
import gc
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn

from tritter.data.batches import BatchStream
from tritter.errors import TritterError
from tritter.stopping import Stopped
from tritter.terminal import Console
from tritter.training.callbacks import (
    FiniteGuard,
    ForgettingCallback,
    Performance,
    RandomState,
    SaveState,
    StepProgress,
    WorkCount,
)
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.forgetting_method import Task
from tritter.training.metrics import METRICS_NAME, set_metrics_aside
from tritter.training.module import BaseModule, ExpandedModule
from tritter.training.processes import (
    Returned,
    WorkerCheckpointIO,
    WorkerStrategy,
    worker_processes,
)
from tritter.training.routing_callbacks import RoutingCallback
from tritter.training.stop_request import StopRequest

SAVED_NAME = "saved"  # what a killed training goes on from
RETURNED_NAME = "returned"  # what worker processes leave for the one that started them


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What Lightning's Trainer is given, in its own words.

    Args:
        strategy: `auto`, one process; or `ddp`, one for each of `devices`.
        max_non_finite_steps: refused steps in a row that are borne.
        save_every_n_steps: steps between two states that a killed run goes on from; 0: none.
        progress: `auto`, `on` or `off`.
    """

    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "bf16-mixed"
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    max_non_finite_steps: int = 10
    save_every_n_steps: int = 50
    progress: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a training did.

    Args:
        steps: optimiser steps taken, refused ones included.
        num_tokens: tokens seen, by all processes.
        flops: model FLOPs of all steps, and of a look at the routing that they hold; what is
            counted stands in `tritter.families.flops`.
        seconds: wall time of the fit.
        refused_steps: steps with a loss or gradient that was not finite.
        stopped_because: why it ended early; None when it ran to its end.
        update_norms: top-level part of the model → norm of (weights after − before) relative to
            the norm before; shows what moved.
    """

    steps: int
    num_tokens: int
    flops: float
    seconds: float
    refused_steps: int
    stopped_because: str | None
    update_norms: dict[str, float]


def fit(
    module: BaseModule,
    batches: BatchStream,
    *,
    settings: TrainerSettings,
    folder: Path,
    label: str,
    console: Console,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
    observers: Sequence[Callback] = (),
    controls: Sequence[Callback] = (),
) -> FitResult:
    """Train `module` for the steps of its schedule, from where a killed training left off.

    What it left is in `folder`; `discard_saved` removes it once the result is safe. With several
    processes only the fit runs in them: `module` comes back trained, the methods as they were.

    Args:
        folder: where `metrics.csv` of this stage is written.
        label: what the progress bar calls it.
        task: what methods against forgetting are told; needed by an ExpandedModule.
        loggers: besides the CSV; with several processes they get its rows when the fit has ended.
        observers: callbacks that read the gradients of the task before any method changes them.
            With several processes they stay behind: what they found, rank 0 writes to a file.
        controls: callbacks that set what the model may do before each batch, as a function of
            the step alone.

    Raises:
        TritterError: what the training would go on from is damaged, or a process was killed.
        Stopped: by a signal; its state was saved at the end of the step, unless one came twice.
    """
    guard, work = FiniteGuard(max_consecutive=settings.max_non_finite_steps), WorkCount()
    callbacks = [*observers, *controls, work, Performance(work)]
    callbacks += _callbacks_of(module, task)
    max_steps, mode, stop = module.schedule.max_steps, settings.progress, StopRequest()
    callbacks += [
        guard,
        StepProgress(label=label, max_steps=max_steps, mode=mode, console=console),
        RandomState(),
        SaveState(folder / SAVED_NAME, every_n_steps=settings.save_every_n_steps, stop=stop),
    ]
    _release_earlier()
    before, since = _snapshot(module.model), time.perf_counter()
    with _told(stop, label):
        mixed = _mixed(module, batches, task)
        steps = _run(module, mixed, settings, callbacks, folder=folder, loggers=loggers, stop=stop)
    _end_if_asked(stop, f"at step {steps} of {max_steps} of the {label}, which goes on from there")
    module.model.to("cpu")
    return FitResult(
        steps=steps,
        num_tokens=work.tokens,
        flops=work.flops + (module.routing.looked_flops if module.routing else 0.0),
        seconds=time.perf_counter() - since,
        refused_steps=guard.refused_steps,
        stopped_because=guard.stopped_because,
        update_norms=_update_norms(before, module.model),
    )


def _mixed(module: BaseModule, batches: BatchStream, task: Task | None) -> BatchStream:
    """Return batches as the methods against forgetting mix them."""
    if not isinstance(module, ExpandedModule) or task is None:
        return batches
    return reduce(lambda mixed, method: method.mix(mixed, task), module.methods, batches)


def _end_if_asked(stop: StopRequest, where: str) -> None:
    if stop.signal_number is not None:
        raise Stopped(stop.signal_number, where=where)


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


def _callbacks_of(module: BaseModule, task: Task | None) -> list[Callback]:
    """Return what drives a module's routers and its methods against forgetting."""
    callbacks: list[Callback] = []
    if module.routing is not None:
        callbacks.append(RoutingCallback(module.routing))
    if isinstance(module, ExpandedModule) and task is not None:
        callbacks.append(ForgettingCallback(module.methods, task))
    return callbacks


def discard_saved(folder: Path) -> None:
    """Remove what a training would go on from, after its result was written elsewhere."""
    shutil.rmtree(folder / SAVED_NAME, ignore_errors=True)


def _run(
    module: BaseModule,
    batches: BatchStream,
    settings: TrainerSettings,
    callbacks: list[Callback],
    *,
    folder: Path,
    loggers: Sequence[Logger],
    stop: StopRequest,
) -> int:
    module.train()
    run = partial(_fit_in_processes, stop=stop) if settings.strategy == "ddp" else _fit
    return run(module, batches, settings, callbacks, folder=folder, loggers=loggers)


def _fit(
    module: BaseModule,
    batches: BatchStream,
    settings: TrainerSettings,
    callbacks: list[Callback],
    *,
    folder: Path,
    loggers: Sequence[Logger] = (),
) -> int:
    """Run one Trainer, from the saved state if there is one, and return its steps."""
    saved = folder / SAVED_NAME
    start = str(saved) if saved.exists() else None
    if start is not None:
        set_metrics_aside(folder)
    all_loggers = [CSVLogger(folder, name="", version=""), *loggers]
    with _quiet_lightning():
        trainer = _trainer(settings, callbacks, module.schedule.max_steps, loggers=all_loggers)
        with _taken_up(saved, callbacks):
            trainer.fit(module, train_dataloaders=batches, ckpt_path=start)
    return trainer.global_step


@contextmanager
def _taken_up(saved: Path, callbacks: Sequence[Callback]) -> Iterator[None]:
    """Say of a training that ends before its first step that it is the saved state's doing.

    Raises:
        TritterError: the state is whole, and not that of this training.
    """
    is_resumed = saved.exists()
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        has_trained = any(isinstance(one, SaveState) and one.has_trained for one in callbacks)
        if isinstance(error, TritterError) or has_trained or not is_resumed:
            raise
        raise TritterError(
            f"the training can't go on from the saved state {saved}: {error}\n"
            f"Delete {saved}, and it starts again from its beginning."
        ) from error


def _fit_in_processes(
    module: BaseModule,
    batches: BatchStream,
    settings: TrainerSettings,
    callbacks: list[Callback],
    *,
    folder: Path,
    stop: StopRequest,
    loggers: Sequence[Logger] = (),
) -> int:
    """Do the same in processes of their own; the weights and what was counted come back."""
    kinds = FiniteGuard | WorkCount | RoutingCallback
    counts = {type(c).__name__: c for c in callbacks if isinstance(c, kinds)}
    returned = Returned(folder / RETURNED_NAME, counts, stop)
    with worker_processes():
        _fit(module, batches, settings, [*callbacks, returned], folder=folder)
    _forward_metrics(folder, loggers)
    return returned.take()


def _forward_metrics(folder: Path, loggers: Sequence[Logger]) -> None:
    """Give loggers, which worker processes can't share, what the CSV holds of this part."""
    if not loggers:
        return
    with (folder / METRICS_NAME).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(row[name]) for name in row if name != "step" and row[name]}
            for logger in loggers:
                logger.log_metrics(values, step=int(row["step"]))


def _trainer(
    settings: TrainerSettings,
    callbacks: list[Callback],
    max_steps: int,
    *,
    loggers: list[Logger],
) -> Trainer:
    is_ddp = settings.strategy == "ddp"
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=WorkerStrategy(settings.accelerator) if is_ddp else "auto",
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_clip_val=settings.gradient_clip_val,
        max_steps=max_steps,
        max_epochs=-1,
        log_every_n_steps=min(settings.log_every_n_steps, max_steps),
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[WorkerCheckpointIO() if is_ddp else SafetensorsCheckpointIO()],
    )


def _release_earlier() -> None:
    """Free an earlier training: its trainer, module and callbacks hold each other, moments too."""
    gc.collect()


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def _update_norms(before: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part, old = _part(name), before[name]
        change = (parameter.detach().cpu() - old).double().norm().item()
        moved[part] = moved.get(part, 0.0) + change**2
        size[part] = size.get(part, 0.0) + old.double().norm().item() ** 2
    return {part: (moved[part] / max(size[part], 1e-30)) ** 0.5 for part in moved}


def _part(name: str) -> str:
    """Return layer number, or the module's name for what stands outside the layers."""
    pieces = name.split(".")
    if "layers" in pieces:
        return "layers." + pieces[pieces.index("layers") + 1]
    return pieces[-2]


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices of what devices it found, and advice that does not apply, away."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
