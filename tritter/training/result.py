"""The result of a training run, and the callback that writes the trained model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tritter.errors import TritterError
from tritter.training.callbacks import (
    FiniteGuard,
    ForgettingCallback,
    SaveState,
    StopRequest,
    Validation,
    WorkCount,
    ends_step,
    find_callback,
)
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.forgetting_method import ForgettingMethod
from tritter.training.gradient_flow import GradientFlow
from tritter.training.module import BaseModule, base_of
from tritter.training.parameters import live_layout


class MemoryMeter(Callback):
    """Measure the memory of parameters, gradients and optimizer state on their device.

    It measures after the first step, and after each change of the trainable parameters.

    Attributes:
        memory: Bytes of `parameters`, `gradients`, `optimizer` and, on a GPU, the `peak` including
            activations. `trained` has pairs of a parameter size and the number of parameters of
            that size, by the shapes of the family. Empty before the first step.
    """

    def __init__(self) -> None:
        self._trained: tuple[bool, ...] = ()
        self.memory: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model = base_of(pl_module).model
        parameters = list(model.parameters())
        trained = tuple(parameter.requires_grad for parameter in parameters)
        if trained == self._trained or not ends_step(trainer, batch_idx):
            return
        gradients = [each.grad for each in parameters if each.grad is not None]
        if not gradients:
            return  # the step was skipped
        self._trained = trained
        (optimizer,) = trainer.optimizers
        states = (value for state in optimizer.state.values() for value in state.values())
        shapes = {stored.name: stored.shape for stored in live_layout(model)}
        named = model.named_parameters()
        sizes = (prod(shapes.get(name, each.shape)) for name, each in named if each.requires_grad)
        self.memory = {
            "parameters": _bytes(parameters),
            "gradients": _bytes(gradients),
            "optimizer": _bytes(value for value in states if isinstance(value, Tensor)),
            "trained": sorted(map(list, Counter(sizes).items())),
        }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.memory and pl_module.device.type == "cuda":
            self.memory["peak"] = torch.cuda.max_memory_allocated()

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memory = dict(state_dict["held"])

    def parameters_changed(self, change: object) -> None:
        """Measure again after the next step."""
        self._trained = ()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of tensors over all processes, counting each storage once."""
    sizes = {}
    for t in tensors:
        shard = t.to_local() if isinstance(t, DTensor) else t  # of this process
        sizes[shard.data_ptr(), t.numel()] = t.numel() * t.element_size()
    return sum(sizes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The result of a training run.

    Args:
        steps: Number of optimizer steps, including skipped ones.
        num_tokens: Number of training tokens over all processes.
        flops: Model FLOPs of all steps, including the routing probe of `moe_routing.hold_old`. See
            `tritter.core.families.flops` for the operations that are counted.
        seconds: Wall time of the fit; 0 until it has ended.
        evaluation_flops: Model FLOPs of validation during training.
        evaluation_seconds: Wall time of validation, which is part of `seconds`.
        refused_steps: Number of steps skipped because the loss or gradient was not finite.
        stopped_because: Reason why the run was aborted, or None.
        ended_early: Name and reason of the callback that ended the run before its last step, or
            None.
        best_step: Step of the weights of the result, if they are the best instead of the last ones.
        last_rate: Learning rate of the last step, or 0 without steps.
        flow: Parameters without a gradient (`without_gradient`), experts without a token
            (`without_tokens`) and the number of monitored steps (`steps`).
        packing: `padding_fraction` and `packed_sequence_length_histogram` of packed documents;
            empty for a stream.
        memory: Bytes of parameters, gradients and optimizer state from `MemoryMeter`.
        reports: `report_name` → plain data of callbacks with a report.
        notes: What streamed data left out, a sentence each.
        update_norms: Top-level part of the model → norm of (weights after − before) relative to
            the norm before.
    """

    steps: int
    num_tokens: int
    flops: float
    evaluation_flops: float = 0.0
    seconds: float = 0.0
    evaluation_seconds: float = field(default=0.0, compare=False)
    refused_steps: int
    stopped_because: str | None
    ended_early: str | None
    best_step: int | None = None
    last_rate: float = 0.0
    update_norms: dict[str, float]
    flow: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def weights_step(self) -> int:
        """The number of optimizer steps of the weights of the result."""
        return self.steps if self.best_step is None else self.best_step


class WriteResult(Protocol):
    """Writes a trained model; called once, on rank 0, in the process that trained.

    It must be picklable for spawned processes: a module-level function, a partial of one, or a
    frozen record.
    """

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        """Write the trained model, which is on the CPU; a failed write is a TritterError."""


class BestWeights(Callback):
    """At the end of a fit, load the weights that the run's ModelCheckpoint saved as its best.

    The states of forgetting methods of that step are loaded with them, and those of callbacks with
    `is_of_weights`. It must precede all callbacks that write at the end of a fit.

    Args:
        methods: Forgetting methods of the run.
        stop: Stop request; nothing is loaded in a stopped run.

    Attributes:
        step: Optimizer steps of the loaded weights.
    """

    def __init__(self, methods: Sequence[ForgettingMethod], *, stop: StopRequest) -> None:
        self._methods, self._stop = tuple(methods), stop
        self.step: int | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stop.is_requested:
            return
        saver = find_callback(trainer, ModelCheckpoint)
        assert saver is not None
        path = Path(saver.best_model_path)
        if not saver.best_model_path or not path.is_dir():
            raise TritterError(
                f"pipeline.publish = best: {saver.dirpath} has no checkpoint with a value of "
                f"{saver.monitor}. To publish the last weights, resume the run with "
                "pipeline.publish=last."
            )
        saved = SafetensorsCheckpointIO().load_checkpoint(path)
        base_of(pl_module).load_state_dict(saved["state_dict"])
        states = saved["callbacks"].get(ForgettingCallback.__qualname__, {})
        for method in self._methods:
            method.load_state_dict(states[method.name])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = saved["callbacks"].get(callback.state_key)
            if state and getattr(callback, "is_of_weights", False):
                callback.load_state_dict(state)
        self.step = int(saved["global_step"])


class Conclusion(Callback):
    """Collect the result at the end of a fit, and write the trained model on rank 0.

    It must follow all callbacks that contribute to the result. The other ranks wait until the
    write has succeeded or failed. Nothing is written for a stopped run.

    Args:
        stop: Stop request by a signal.
        write: Writer of the trained model, if any.

    Attributes:
        result: Result of the run, None before its end. With worker processes, `load_result` sets it
            in the main process.
    """

    def __init__(self, *, stop: StopRequest, write: WriteResult | None) -> None:
        self._stop, self._write = stop, write
        self._before: dict[str, Tensor] = {}
        self.result: FitResult | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before a saved state is loaded: update norms cover the whole run
        if trainer.is_global_zero:
            parameters = base_of(pl_module).model.named_parameters()
            self._before = {n: p.detach().to("cpu", copy=True) for n, p in parameters}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After Lightning's own and before the first validation, which theirs would interrupt
        self._stop.install_handlers()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error: TritterError | None = None
        module = base_of(pl_module)
        module.gather(is_kept=trainer.is_global_zero)
        if trainer.is_global_zero:
            self.result = self._build_result(trainer, module)
            self._before = {}  # the writer may need the memory
            try:
                if self._write is not None and not self._stop.is_requested:
                    self._write(module.model, self.result)
            except TritterError as raised:
                error = raised
            except OSError as raised:
                error = TritterError(f"the trained model could not be written: {raised}.")
        trainer.strategy.reduce_boolean_decision(error is None)
        if error is not None:
            raise error

    def export_result(self) -> dict[str, Any]:
        """Return the result as plain data for `load_result` in the main process."""
        assert self.result is not None
        return {"result": asdict(self.result), "stopped_by": self._stop.signal_number}

    def load_result(self, exported: Mapping[str, Any]) -> None:
        """Adopt the result of rank 0, and its stop signal, which this process may have missed."""
        self.result = FitResult(**exported["result"])
        if exported["stopped_by"] is not None:
            self._stop.note(exported["stopped_by"])

    def _build_result(self, trainer: Trainer, module: BaseModule) -> FitResult:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        work, guard = find_callback(trainer, WorkCount), find_callback(trainer, FiniteGuard)
        flow, memory = find_callback(trainer, GradientFlow), find_callback(trainer, MemoryMeter)
        saving, best = find_callback(trainer, SaveState), find_callback(trainer, BestWeights)
        validation = find_callback(trainer, Validation)
        assert work and guard and flow and memory and saving
        return FitResult(
            steps=trainer.global_step,
            num_tokens=work.tokens,
            flops=work.flops + sum(side.flops for side in module.side_losses),
            evaluation_flops=0.0 if validation is None else validation.flops,
            evaluation_seconds=0.0 if validation is None else validation.seconds,
            refused_steps=guard.refused_steps,
            stopped_because=guard.stopped_because,
            ended_early=saving.ended_early,
            best_step=None if best is None else best.step,
            last_rate=module.schedule.rate(trainer.global_step - 1) if trainer.global_step else 0.0,
            update_norms=_update_norms(self._before, module.model),
            flow=flow.report(module.model),
            memory=memory.memory,
            packing=work.packing(),
            reports={c.report_name: c.report() for c in callbacks if hasattr(c, "report_name")},
            notes=tuple(getattr(trainer.train_dataloader, "notes", ())),
        )


def _update_norms(before: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Return the relative update norms of parameters with an unchanged shape."""
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for stored in live_layout(model):
        part = stored.name.split(".")[-2] if stored.layer is None else f"layers.{stored.layer}"
        parameter = model.get_parameter(stored.name).detach()
        old = before.get(stored.name)
        if old is None or old.shape != parameter.shape:
            continue
        moved[part] = moved.get(part, 0.0) + (parameter - old).double().norm().item() ** 2
        size[part] = size.get(part, 0.0) + old.double().norm().item() ** 2
    return {part: (moved[part] / max(size[part], 1e-30)) ** 0.5 for part in moved}
