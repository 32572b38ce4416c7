"""What the steps of a training took: tokens, FLOPs, seconds and memory."""

import sys
import time
from collections import Counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tritter.data.packing import apart_of, lengths_read
from tritter.expand import Change
from tritter.training.module import base_of
from tritter.training.parameters import StepFlops


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Say whether a batch is the last of those whose gradients are gathered for one step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def work_of(trainer: Trainer) -> "WorkCount":
    """Return what counts the work of a training."""
    return next(c for c in trainer.callbacks if isinstance(c, WorkCount))  # type: ignore[attr-defined]


class WorkCount(Callback):
    """Count the tokens that were trained on, and the FLOPs of it, by all processes.

    Attributes:
        tokens: padding left out.
        padding: tokens of it.
        lengths: of documents that were read apart, by length how many.
    """

    def __init__(self) -> None:
        self.tokens, self.padding, self.flops = 0, 0, 0.0
        self.lengths = Counter[int]()
        self._step: tuple[object, StepFlops | None] = (None, None)  # what is trained, its FLOPs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = base_of(pl_module)
        input_ids: Tensor = batch["input_ids"]
        lengths = {input_ids.shape[1]: len(input_ids) * trainer.world_size}
        if apart_of(module.model) is not None:
            lengths = lengths_read(module.model, input_ids)
            self.lengths.update(lengths)
        tokens = sum(length * number for length, number in lengths.items())
        self.tokens += tokens
        self.padding += input_ids.numel() * trainer.world_size - tokens
        flags = tuple(parameter.requires_grad for parameter in module.model.parameters())
        known, flops = self._step
        if flops is None or known != flags:
            flops = module.step_flops()
            self._step = (flags, flops)
        self.flops += flops.of(lengths)

    def count_anew(self, change: Change | None = None) -> None:
        """Count what the next step takes, which another way of computing may change too."""
        self._step = (None, None)

    parameters_changed = count_anew

    def packing(self) -> dict[str, Any]:
        """Return how full sequences of documents were; nothing of a stream, which is always full.

        The lengths, as powers of two, are those of documents and of the pieces of long ones, with
        the end of text that each begins at.
        """
        histogram = Counter[str]()
        for length, number in sorted(self.lengths.items()):
            if length > 1:  # the end of text behind the last document is none
                low = 1 << (length.bit_length() - 1)
                histogram[f"{low}-{2 * low - 1}"] += number
        if not self.lengths:
            return {}
        return {
            "padding_fraction": self.padding / (self.tokens + self.padding),
            "packed_sequence_length_histogram": dict(histogram),
        }

    def state_dict(self) -> dict[str, Any]:
        documents = {"padding": self.padding, "lengths": dict(self.lengths)}
        return {"tokens": self.tokens, "flops": self.flops, **documents}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.flops = int(state_dict["tokens"]), float(state_dict["flops"])
        self.padding = int(state_dict["padding"])
        self.lengths = Counter({int(n): int(number) for n, number in state_dict["lengths"].items()})


class Performance(Callback):
    """Log tokens, steps and FLOPs per second, seconds per step and peak memory.

    Evaluations on the way are left out of the time.

    Args:
        work: counts them; stands before this callback.
    """

    def __init__(self, work: WorkCount) -> None:
        self._work = work
        self._paused = 0.0
        self._begin()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += time.perf_counter() - self._paused

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        self._steps += 1
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        seconds = time.perf_counter() - self._since
        pl_module.log_dict(
            {
                "performance/tokens_per_second": (self._work.tokens - self._tokens) / seconds,
                "performance/steps_per_second": self._steps / seconds,
                "performance/step_seconds": seconds / self._steps,
                "performance/flops": (self._work.flops - self._flops) / seconds,
                "performance/peak_memory_bytes": float(peak_memory_bytes()),
            }
        )
        if self._work.lengths:
            padding, tokens = self._work.padding - self._padding, self._work.tokens - self._tokens
            pl_module.log("performance/padding_fraction", padding / (padding + tokens))
        self._begin()

    def _begin(self) -> None:
        self._tokens, self._flops = self._work.tokens, self._work.flops
        self._padding = self._work.padding
        self._steps, self._since = 0, time.perf_counter()


def peak_memory_bytes() -> int:
    """Return the peak of this process: of the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
