"""What a training did, and the writing of what it leaves, where it was trained."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.errors import TritterError
from tritter.training.callbacks import (
    FiniteGuard,
    SaveState,
    StopRequest,
    Validation,
    WorkCount,
    ends_step,
)
from tritter.training.gradient_flow import GradientFlow
from tritter.training.module import BaseModule, base_of
from tritter.training.parameters import gather, is_sharded, live_layout, own_part


class MemoryMeter(Callback):
    """Add up parameters, gradients and the optimizer's state, where they lie.

    At the end of the first step, and of each after which something else is trained.

    Attributes:
        held: in bytes `parameters`, `gradients`, `optimizer`, and of a GPU the `peak`, activations
            included; in `trained` pairs of a parameter's size and how many have it, by the shapes
            that the family says. Empty before the first step.
    """

    def __init__(self) -> None:
        self._trained: tuple[bool, ...] = ()
        self.held: dict[str, Any] = {}

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
            return  # the step was refused
        self._trained = trained
        (optimizer,) = trainer.optimizers
        states = (value for state in optimizer.state.values() for value in state.values())
        shapes = {stored.name: stored.shape for stored in live_layout(model)}
        named = model.named_parameters()
        sizes = (prod(shapes.get(name, each.shape)) for name, each in named if each.requires_grad)
        self.held = {
            "parameters": _bytes(parameters),
            "gradients": _bytes(gradients),
            "optimizer": _bytes(value for value in states if isinstance(value, Tensor)),
            "trained": sorted(map(list, Counter(sizes).items())),
        }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.held and pl_module.device.type == "cuda":
            self.held["peak"] = torch.cuda.max_memory_allocated()

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = dict(state_dict["held"])

    def parameters_changed(self, change: object) -> None:
        """Add up the next step anew."""
        self._trained = ()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage once, in all processes that share them."""
    by_place = {(own_part(t).data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
    return sum(by_place.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a training did.

    Args:
        steps: optimizer steps taken, refused ones included.
        num_tokens: tokens seen, by all processes.
        flops: model FLOPs of all steps, and of a look at the routing that they hold; what is
            counted stands in `tritter.core.families.flops`.
        seconds: wall time of the fit; 0 while it is not over.
        evaluation_flops: model FLOPs of the evaluations on its way; `evaluation_seconds` are part
            of `seconds`.
        refused_steps: steps with a loss or gradient that was not finite.
        stopped_because: why it was broken off; None when it was not.
        ended_early: which callback ended it before its last step, and why; None when none did.
        last_rate: learning rate of the last step that was taken; 0 where none was.
        flow: what got no gradient (`without_gradient`), which experts no token (`without_tokens`),
            and the number of steps in which that was looked at (`steps`).
        packing: `padding_fraction` and `packed_sequence_length_histogram` of documents that were
            read apart; empty of a stream.
        held: bytes of parameters, gradients and optimizer, as `MemoryMeter` found them.
        reports: what callbacks say that they did, by their `report_name`; plain data.
        update_norms: top-level part of the model → norm of (weights after − before) relative to
            the norm before; shows what moved.
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
    last_rate: float = 0.0
    update_norms: dict[str, float]
    flow: dict[str, Any] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Reports(Protocol):
    """A callback that says at the end of a training what it did."""

    report_name: str

    def report(self) -> dict[str, Any]:
        """Return plain data, for summary.json."""


class WriteResult(Protocol):
    """Writes what a training leaves; called once, on rank 0, in the process that trained.

    It may be sent to a process that is spawned: a module-level function or a frozen record.
    """

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        """Write `model`, as trained and on the CPU.

        Raises:
            TritterError: it could not; OSErrors are told as one.
        """


class Conclusion(Callback):
    """Take stock at the end of a fit, and let rank 0 write what it leaves.

    Stands behind those that leave something. The other ranks wait until
    it is written, or was not; nobody writes for a training that was asked to stop.

    Args:
        guard: counts refused steps.
        work: counts tokens and FLOPs.
        flow: knows what got no gradient.
        held: counts bytes.
        validation: counts FLOPs and seconds of evaluations, if there are any.
        saving: knows whether it ended early.
        stop: whether the training is asked to stop.
        write: None: nothing is left.

    Attributes:
        result: None before the end; in the process that started others it comes back by `take`.
    """

    def __init__(
        self,
        *,
        guard: FiniteGuard,
        work: WorkCount,
        flow: GradientFlow,
        held: MemoryMeter,
        validation: Validation | None,
        saving: SaveState,
        stop: StopRequest,
        write: WriteResult | None,
    ) -> None:
        self._guard, self._work, self._flow, self._held = guard, work, flow, held
        self._validation, self._saving, self._stop, self._write = validation, saving, stop, write
        self._before: dict[str, Tensor] = {}
        self.result: FitResult | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A saved state is not loaded yet: what moved is told of the whole training
        if trainer.is_global_zero:
            parameters = base_of(pl_module).model.named_parameters()
            self._before = {n: p.detach().to("cpu", copy=True) for n, p in parameters}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error: TritterError | None = None
        module = base_of(pl_module)
        if is_sharded(module.model):
            gather(module.model, is_kept=trainer.is_global_zero)
        elif trainer.is_global_zero:
            module.model.to("cpu")
        if trainer.is_global_zero:
            self.result = self._taken_stock(trainer, module)
            self._before = {}  # the writer may need the memory
            try:
                if self._write is not None and not self._stop.is_asked:
                    self._write(module.model, self.result)
            except TritterError as raised:
                error = raised
            except OSError as raised:
                error = TritterError(f"what was trained could not be written: {raised}.")
        trainer.strategy.reduce_boolean_decision(error is None)
        if error is not None:
            raise error

    def given(self) -> dict[str, Any]:
        """Return what `take` needs in the process that started this one, as plain data."""
        assert self.result is not None
        return {"result": asdict(self.result), "stopped_by": self._stop.signal_number}

    def take(self, given: Mapping[str, Any]) -> None:
        """Take what rank 0 found; the processes may have been asked to stop, and this one not."""
        self.result = FitResult(**given["result"])
        if given["stopped_by"] is not None:
            self._stop.note(given["stopped_by"])

    def _taken_stock(self, trainer: Trainer, module: BaseModule) -> FitResult:
        validation, callbacks = self._validation, trainer.callbacks  # type: ignore[attr-defined]
        return FitResult(
            steps=trainer.global_step,
            num_tokens=self._work.tokens,
            flops=self._work.flops + sum(side.flops for side in module.side_losses),
            evaluation_flops=0.0 if validation is None else validation.flops,
            evaluation_seconds=0.0 if validation is None else validation.seconds,
            refused_steps=self._guard.refused_steps,
            stopped_because=self._guard.stopped_because,
            ended_early=self._saving.ended_early,
            last_rate=module.schedule.rate(trainer.global_step - 1) if trainer.global_step else 0.0,
            update_norms=_update_norms(self._before, module.model),
            flow=self._flow.found(module.model),
            held=self._held.held,
            packing=self._work.packing(),
            reports={c.report_name: c.report() for c in callbacks if isinstance(c, Reports)},
        )


def _update_norms(before: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Compare parameters that have kept their shape."""
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for stored in live_layout(model):
        outside = stored.name.split(".")[-2]
        part = outside if stored.layer is None else f"layers.{stored.layer}"
        parameter = model.get_parameter(stored.name).detach()
        old = before.get(stored.name)
        if old is None or old.shape != parameter.shape:
            continue
        moved[part] = moved.get(part, 0.0) + (parameter - old).double().norm().item() ** 2
        size[part] = size.get(part, 0.0) + old.double().norm().item() ** 2
    return {part: (moved[part] / max(size[part], 1e-30)) ** 0.5 for part in moved}
