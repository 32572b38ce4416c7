"""Lightning's Trainer, made from the settings of a run."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tritter.data.datamodule import EvaluationText, TextModule
from tritter.training.checkpoint_io import (
    SafetensorsCheckpointIO,
    random_state,
    restore_random_state,
)
from tritter.training.module import BaseModule
from tritter.training.optimizer import OptimizerSettings, Schedule
from tritter.training.options import TrainerSettings
from tritter.training.processes import WorkerLauncher, WorkerStrategy, begin_worker, start_method
from tritter.training.sharded import WHOLE

PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
NEVER = 2**40  # epochs
_SAID_OF_PAGES = "Paged optimizers are not supported on CPU"  # which is a note of the run


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
        devices=settings.devices if settings.device_index is None else [settings.device_index],
        strategy=_strategy(settings),
        precision=settings.precision,
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


def losses_before(
    model: nn.Module, text: EvaluationText, settings: TrainerSettings
) -> dict[str, float]:
    """Return `eval/<domain>/…` of a model as its training would log them.

    By the same loop in the same precision, in one process. One that is not finite is left out.
    No random generator moves; the model comes back on the CPU, in that precision.
    """
    arguments = {name: value for name, value in settings.arguments.items() if name != "profiler"}
    alone = replace(settings, strategy="auto", devices=1, arguments=arguments)
    never = Schedule.constant(0.0, max_steps=1)
    module = BaseModule(model, schedule=never, optimizer=OptimizerSettings())
    random = random_state()
    with quiet_lightning(), torch_settings_kept():
        trainer = build_trainer(alone, [], never.max_steps, loggers=[])
        trainer.validate(module, datamodule=TextModule((), text), verbose=False)
    restore_random_state(random)
    model.to("cpu")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        name: value
        for name, value in logged.items()
        if name.startswith("eval/") and math.isfinite(value)
    }


# A fit whose weights, gradients and moments lie in parts on several processes.
#
# What is saved and what is written are whole tensors, the same as of one process.


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose processes are started by, and die with, the one that calls fit.

    Rank 0 writes states of whole tensors; every rank reads them when the training goes on.

    Args:
        devices: how many processes share the weights.
    """

    def __init__(self, accelerator: str, *, devices: int) -> None:
        self.method = start_method(accelerator)
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        self.cluster_environment = LightningEnvironment()

    def setup_environment(self) -> None:
        begin_worker(self.method)
        super().setup_environment()

    def _configure_launcher(self) -> None:
        self._launcher = WorkerLauncher(self, start_method=self.method)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state by names of parameters, whole; on other ranks than 0 nothing."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.model is not None
        return get_optimizer_state_dict(self.model, optimizer, options=WHOLE)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a state, and take each process's part of weights and moments from it."""
        checkpoint = self.checkpoint_io.load_checkpoint(Path(checkpoint_path))
        assert self.model is not None
        # What torch reads of them it takes out
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=WHOLE)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, dict(state), options=WHOLE)
        return checkpoint
