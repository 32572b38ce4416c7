"""One stage, one Trainer: fit a module on batches under the run's settings."""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from rich.console import Console
from torch import Tensor, nn

from tritter.data.batches import BatchStream
from tritter.training.callbacks import (
    FiniteGuard,
    ForgettingCallback,
    Performance,
    StepProgress,
    TokenCount,
)
from tritter.training.forgetting_method import Task
from tritter.training.module import BaseModule, ExpandedModule


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What Lightning's Trainer is given, in its own words.

    Args:
        max_non_finite_steps: refused steps in a row that are borne.
        progress: `auto`, `on` or `off`.
    """

    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "bf16-mixed"
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    max_non_finite_steps: int = 10
    progress: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a training did.

    Args:
        steps: optimiser steps taken, refused ones included.
        num_tokens: tokens seen.
        seconds: wall time of the fit.
        refused_steps: steps with a loss or gradient that was not finite.
        stopped_because: why it ended early; None when it ran to its end.
        update_norms: top-level part of the model → norm of (weights after − before) relative to
            the norm before; shows what moved.
    """

    steps: int
    num_tokens: int
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
    flops_per_token: int,
    console: Console,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> FitResult:
    """Train `module` for the steps of its schedule.

    Args:
        folder: where `metrics.csv` of this stage is written.
        label: what the progress bar calls it.
        flops_per_token: of a training step, for the performance metrics.
        task: what methods against forgetting are told; needed by an ExpandedModule.
        loggers: besides the CSV.
    """
    max_steps = module.schedule.max_steps
    guard = FiniteGuard(max_consecutive=settings.max_non_finite_steps)
    tokens = TokenCount()
    callbacks: list[Callback] = [tokens, Performance(flops_per_token=flops_per_token)]
    if isinstance(module, ExpandedModule) and task is not None:
        for method in module.methods:
            batches = method.mix(batches, task)
        callbacks.append(ForgettingCallback(task))
    callbacks += [
        guard,
        StepProgress(label=label, max_steps=max_steps, mode=settings.progress, console=console),
    ]
    before = _snapshot(module.model)
    since = time.perf_counter()
    with _quiet_lightning():
        all_loggers = [CSVLogger(folder, name="", version=""), *loggers]
        trainer = _trainer(settings, callbacks, max_steps, loggers=all_loggers)
        module.train()
        trainer.fit(module, train_dataloaders=batches)
    module.model.to("cpu")
    return FitResult(
        steps=trainer.global_step,
        num_tokens=tokens.count,
        seconds=time.perf_counter() - since,
        refused_steps=guard.refused_steps,
        stopped_because=guard.stopped_because,
        update_norms=_update_norms(before, module.model),
    )


def _trainer(
    settings: TrainerSettings,
    callbacks: list[Callback],
    max_steps: int,
    *,
    loggers: list[Logger],
) -> Trainer:
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
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
    )


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
