"""Fit a module on batches with one Trainer per stage, in this process or in workers."""

import csv
import gc
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.launchers.multiprocessing import (
    _MultiProcessingLauncher,
    _WorkerOutput,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tritter.core.models import checkpoint_activations, convert
from tritter.data.batches import BatchStream
from tritter.data.datamodule import Batches, TextDataModule, ValidationSubset
from tritter.errors import Problem, RequestError, TritterError
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
    find_callback,
    same_random_state,
)
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.forgetting_method import Task
from tritter.training.gradient_flow import GradientFlow
from tritter.training.metrics import metrics_files, rotate_metrics
from tritter.training.module import BaseModule, CompiledModel
from tritter.training.optimizer import OptimizerSettings, Schedule
from tritter.training.options import TrainerSettings
from tritter.training.parameters import WHOLE
from tritter.training.ranks import Ranks
from tritter.training.result import BestWeights, Conclusion, FitResult, MemoryMeter, WriteResult

_CHECKPOINTS_NAME = "checkpoints"  # folder of a ModelCheckpoint, inside that of the training run
LEFTOVERS_NAME = "left"  # state of continual-learning methods for the next training run
_PORT = "MASTER_PORT"
_NO_VALUES = "The ``compute`` method of metric"  # a process may have no replayed sequences
_PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
_NEVER = 2**40  # epochs
_PAGING_WARNING = "Paged optimizers are not supported on CPU"  # Tritter prints its own note


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
    flow = GradientFlow({} if task is None else task.new_units)
    best = BestWeights(module.methods, stop=stop) if publishes_best else None
    conclusion = Conclusion(stop=stop, write=write_result)
    callbacks = [flow, *observers, *controls, work, MemoryMeter(), Performance(work)]
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
    processes = _worker_processes() if has_workers else nullcontext()
    with again or nullcontext(), processes, _preserve_process_settings():
        trainer = _build_trainer(settings, callbacks, module.schedule.max_steps, loggers=own)
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
        with metrics_files(folder)[-1].open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                values = {name: float(row[name]) for name in row if name != "step" and row[name]}
                for logger in loggers:
                    logger.log_metrics(values, step=int(row["step"]))


# A fit in several worker processes (DDP).
#
# Only the fit runs in workers. Each computes its rows of every batch with the same weights. Rank 0
# writes the trained model. The main process receives the result and errors as plain data.


class _OwnWorkers(ParallelStrategy):
    """Worker processes that the main process starts and that die with it."""

    method: Literal["fork", "spawn"]

    def setup_environment(self) -> None:
        _begin_worker(self.method)
        super().setup_environment()

    def _configure_launcher(self) -> None:
        alone = _WorkerLauncher(self, start_method=self.method)
        self._launcher = alone if Ranks.leading() is None else _JoinLauncher()


class _WorkerStrategy(_OwnWorkers, DDPStrategy):
    """DDP with worker processes of ours."""

    def __init__(self, accelerator: str) -> None:
        self.method = start_method(accelerator)
        # Explicit: a cluster environment would run the stages around the fit in every process
        super().__init__(cluster_environment=LightningEnvironment(), start_method=self.method)


def _begin_worker(method: str) -> None:
    """Initialise a worker process before it connects to the others."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=_NO_VALUES)
    # A worker ends immediately when its parent ends, even by a kill. Torch sends an interrupt,
    # which background processes ignore. Such a worker would continue to write into the folder of a
    # restarted run.
    if (parent := multiprocessing.parent_process()) is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            multiprocessing.connection.wait([sentinel])
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    if method == "fork":
        # A fork inherits OpenMP's pool without its threads, and would wait for them forever
        torch.set_num_threads(1)


def start_method(accelerator: str) -> Literal["fork", "spawn"]:
    """Return `fork`, which is faster, where it is safe (Linux without a GPU), else `spawn`."""
    is_safe = sys.platform == "linux" and not torch.cuda.is_available()
    return "fork" if accelerator == "cpu" and is_safe else "spawn"


def _for_main_process(error: TritterError | OSError) -> TritterError:
    """Return an error of a worker process without what can't be pickled."""
    if isinstance(error, OSError):
        return TritterError(f"the training run failed with a system error: {error}.")
    if isinstance(error, RequestError):
        text, key = str(error), error.problems[0].key
        return RequestError(text, problems=[Problem(key, reason=text)])
    return TritterError(str(error))


class _WorkerLauncher(_MultiProcessingLauncher):
    """Start worker processes and return their result or error, but no weights.

    Lightning would load the weights into the module of the main process. That silently drops new
    parameters, and grown ones do not fit.
    """

    def launch(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._failures = multiprocessing.get_context(self._start_method).SimpleQueue()
        try:
            return super().launch(function, *args, **options)
        except (ProcessRaisedException, ProcessExitedException) as error:
            if self._failures.empty():
                raise
            raise self._failures.get() from error

    def _wrapping_function(self, process_idx: int, *args: Any) -> None:
        try:
            super()._wrapping_function(process_idx, *args)
        except (TritterError, OSError) as error:
            self._failures.put(_for_main_process(error))
            raise

    def _collect_rank_zero_results(self, trainer: Trainer, results: Any) -> _WorkerOutput | None:
        if not trainer.is_global_zero:
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        return _WorkerOutput(best, None, trainer.state, results, self.get_extra_results(trainer))

    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        extra = super().get_extra_results(trainer)
        return {**extra, "conclusion": _conclusion(trainer).export_result()}

    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        _conclusion(trainer).load_result(extra["conclusion"])


class _JoinLauncher(_Launcher):
    """Have the processes that torchrun or srun started join a fit of the first one."""

    is_interactive_compatible = False

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **options: Any
    ) -> Any:
        ranks = Ranks.leading()
        assert ranks is not None
        return ranks.call(function, *args, **options)

    def kill(self, signum: Any) -> None:
        """Leave them to the program that started them."""


def _conclusion(trainer: Trainer) -> Conclusion:
    found = find_callback(trainer, Conclusion)
    assert found is not None
    return found


@contextmanager
def _worker_processes() -> Iterator[None]:
    """Prepare for starting worker processes inside the block, and report killed ones."""
    port, sharing = os.environ.get(_PORT), get_sharing_strategy()
    set_sharing_strategy("file_system")  # the other one opens a file for every tensor
    try:
        yield
    except ProcessExitedException as error:
        raise TritterError(
            f"training process {error.error_index} ended unexpectedly ({error.signal_name or error}"
            "); rerun the command to resume from the last saved state."
        ) from error
    finally:
        set_sharing_strategy(sharing)
        os.environ.pop(_PORT, None)  # the next fit finds a free port
        if port is not None:
            os.environ[_PORT] = port


def _build_trainer(
    settings: TrainerSettings, callbacks: list[Callback], max_steps: int, *, loggers: list[Logger]
) -> Trainer:
    """Return the Trainer of one stage, with the fixed settings that saving and resuming need.

    Args:
        settings: Settings of the Trainer.
        callbacks: Callbacks in their order.
        max_steps: Number of optimizer steps.
        loggers: Loggers of the stage; the first one is in its folder.
    """
    arguments = {"enable_model_summary": False, **settings.arguments}
    if isinstance(name := arguments.get("profiler"), str):
        arguments["profiler"] = _PROFILERS[name](filename="profile")  # next to the metrics
    strategy: Strategy | str = "auto"
    plugins, ranks = list[Any]([SafetensorsCheckpointIO()]), Ranks.leading()
    num_nodes = ranks.launch.num_nodes if ranks is not None and settings.has_workers else 1
    if settings.precision == "bf16-true":
        plugins.append(_HalfPrecision(settings.precision))
    elif settings.precision == "64-true":
        plugins.append(_DoublePrecision())
    if not settings.has_workers:  # without it, SLURM's variables would count
        plugins.append(LightningEnvironment())
    if settings.strategy == "ddp":
        strategy = _WorkerStrategy(settings.accelerator)
    elif settings.strategy == "fsdp":
        assert isinstance(settings.devices, int)
        strategy = _ShardedStrategy(settings.accelerator, devices=num_nodes * settings.devices)
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices if settings.device_index is None else [settings.device_index],
        num_nodes=num_nodes,
        strategy=strategy,
        precision=settings.precision if settings.precision.endswith("-mixed") else None,
        gradient_clip_val=settings.gradient_clip_val,
        max_steps=max_steps,
        max_epochs=-1,
        log_every_n_steps=min(settings.log_every_n_steps, max_steps),
        check_val_every_n_epoch=_NEVER,  # the Validation callback runs validation
        inference_mode=False,  # tensors cached in validation may later need a gradient
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=loggers[0].save_dir if loggers else os.devnull,  # hpc_ckpt_* of SLURM
        **arguments,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        plugins=plugins,
    )


class _HalfPrecision(HalfPrecision):
    """Weights in bfloat16; float32 for what stock models of bfloat16 have in float32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, BaseModule)
        convert(module.model, self._desired_input_dtype)
        return module


class _DoublePrecision(DoublePrecision):
    """Weights in float64; experts run one after the other."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, BaseModule)
        convert(module.model, torch.float64)
        return module


@contextmanager
def _preserve_process_settings() -> Iterator[None]:
    """Restore process-wide settings after a Trainer, and silence Lightning's log.

    `deterministic` and `benchmark` are process-wide. Lightning logs the devices that it found and
    advice that does not apply.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    is_benchmark = torch.backends.cudnn.benchmark
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=_PAGING_WARNING)
            yield
    finally:
        logger.setLevel(level)
        torch.use_deterministic_algorithms(is_deterministic)
        torch.backends.cudnn.benchmark = is_benchmark


def validation_metrics(
    model: nn.Module, text: ValidationSubset, settings: TrainerSettings
) -> dict[str, float]:
    """Return the metrics `eval/<domain>/…` of a model as its training run would log them.

    The same loop runs in the same precision in one process. Values that are not finite are
    omitted. Random states do not change. Afterwards, the model is on the CPU in that precision.

    Args:
        model: Model to validate.
        text: Validation subset.
        settings: Settings of the Trainer.
    """
    arguments = {name: value for name, value in settings.arguments.items() if name != "profiler"}
    alone = replace(settings, strategy="auto", devices=1, arguments=arguments)
    never = Schedule.constant(0.0, max_steps=1)
    module = BaseModule(model, schedule=never, optimizer=OptimizerSettings())
    with same_random_state(), _preserve_process_settings():
        trainer = _build_trainer(alone, [], never.max_steps, loggers=[])
        trainer.validate(module, datamodule=TextDataModule((), text), verbose=False)
    model.to("cpu")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    del trainer, module
    gc.collect()  # they are a reference cycle with the model, and the next one is loaded soon
    return {
        name: value
        for name, value in logged.items()
        if name.startswith("eval/") and math.isfinite(value)
    }


# A fit with sharded weights, gradients and moments (FSDP2).
#
# Saved states and trained models contain whole tensors, as with one process.


class _ShardedStrategy(_OwnWorkers, ModelParallelStrategy):
    """FSDP2 with worker processes of ours.

    Rank 0 writes states with whole tensors; every rank reads them when a run is resumed.

    Args:
        accelerator: Lightning accelerator.
        devices: Number of processes that share the weights, on all machines.
    """

    def __init__(self, accelerator: str, *, devices: int) -> None:
        self.method = start_method(accelerator)
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        self.cluster_environment = LightningEnvironment()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the whole state by parameter name on rank 0, and nothing on other ranks."""
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
        """Read a state and load the shards of weights and moments for this process."""
        checkpoint = self.checkpoint_io.load_checkpoint(Path(checkpoint_path))
        assert self.model is not None
        # Copies: torch removes the entries that it loads
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=WHOLE)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = self._by_name(optimizer, state)
            set_optimizer_state_dict(self.model, optimizer, own, options=WHOLE)
        return checkpoint

    def _by_name(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer by parameter name; ddp saves it by position."""
        assert self.model is not None
        if any(
            isinstance(each, str) for group in state["param_groups"] for each in group["params"]
        ):
            return dict(state)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        own = [names[id(each)] for group in optimizer.param_groups for each in group["params"]]
        groups = [
            {**group, "params": [own[number] for number in group["params"]]}
            for group in state["param_groups"]
        ]
        states = {own[number]: dict(values) for number, values in state["state"].items()}
        return {"state": states, "param_groups": groups}
