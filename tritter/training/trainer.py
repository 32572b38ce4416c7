"""Lightning's Trainer, made from the settings of a run."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import Strategy

from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.processes import WorkerStrategy
from tritter.training.sharded_strategy import ShardedStrategy

PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
NEVER = 2**40  # epochs
_SAID_OF_PAGES = "Paged optimizers are not supported on CPU"  # which is a note of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What Lightning's Trainer is given, in its own words.

    Args:
        devices: how many, or which ones by their numbers.
        strategy: `auto`, one process; or one for each of `devices`, by `ddp` with whole weights, by
            `fsdp` with parts of them.
        max_non_finite_steps: refused steps in a row that are borne.
        save_every_n_steps: steps between two states that a killed run goes on from; 0: none.
        progress: `auto`, `on` or `off`.
        activation_checkpointing: layers compute again what the backward pass needs of them.
        compile: the forward and backward pass of a step go through torch.compile.
        seed: of what layers draw in training, as for dropout; None: as torch's generators stand.
        arguments: further ones of Lightning's Trainer, checked before.
    """

    accelerator: str = "cpu"
    devices: int | list[int] = 1
    strategy: str = "auto"
    precision: str = "bf16-mixed"
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    max_non_finite_steps: int = 10
    save_every_n_steps: int = 50
    progress: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_workers(self) -> bool:
        """Whether a fit runs in processes of its own."""
        return self.strategy in ("ddp", "fsdp")

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches whose gradients are gathered for one step."""
        return int(self.arguments.get("accumulate_grad_batches", 1))


def build_trainer(
    settings: TrainerSettings,
    callbacks: list[Callback],
    max_steps: int,
    *,
    loggers: list[Logger],
) -> Trainer:
    """Return the trainer of one stage; what saving and resuming rest on is fixed here."""
    arguments = {"enable_model_summary": False, **settings.arguments}
    if isinstance(name := arguments.get("profiler"), str):
        arguments["profiler"] = PROFILERS[name](filename="profile")  # beside the metrics
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=_strategy(settings),
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_clip_val=settings.gradient_clip_val,
        max_steps=max_steps,
        max_epochs=-1,
        log_every_n_steps=min(settings.log_every_n_steps, max_steps),
        check_val_every_n_epoch=NEVER,  # a callback of ours starts evaluations
        inference_mode=False,  # what a model keeps from an evaluation may meet a gradient
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **arguments,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        plugins=[SafetensorsCheckpointIO()],
    )


def _strategy(settings: TrainerSettings) -> Strategy | str:
    if settings.strategy == "fsdp":
        assert isinstance(settings.devices, int)
        return ShardedStrategy(settings.accelerator, devices=settings.devices)
    return WorkerStrategy(settings.accelerator) if settings.strategy == "ddp" else "auto"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices of what devices it found, and advice that does not apply, away."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=_SAID_OF_PAGES)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Set back what `deterministic` and `benchmark` set for the whole process."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    is_benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
        torch.backends.cudnn.benchmark = is_benchmark
