"""Callbacks of every training.

They count what its steps take, drive methods against forgetting, refuse steps, keep the random
state, show progress, evaluate on the way, save states, and see whether the training ends.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed

from tritter.checkpoints.state import write_state
from tritter.core.families import Flops
from tritter.data.batches import this_rank
from tritter.data.datamodule import ValidationSubset
from tritter.data.packing import document_mask_of, lengths_read
from tritter.errors import TritterError
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream
from tritter.terminal import Console, shows_bar
from tritter.training import surgery
from tritter.training.checkpoint_io import random_state, restore_random_state
from tritter.training.forgetting_method import ForgettingMethod, Task
from tritter.training.module import BaseModule, base_of
from tritter.training.parameters import StepFlops, disk_values, whole
from tritter.transform import Change


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
        self.tokens, self.padding = 0, 0
        self.lengths = Counter[int]()
        self.flops = 0.0
        self._step: tuple[object, StepFlops | None] = (None, None)  # what is trained, its FLOPs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = base_of(pl_module)
        input_ids: Tensor = batch["input_ids"]
        lengths = {input_ids.shape[1]: len(input_ids) * trainer.world_size}
        if document_mask_of(module.model) is not None:
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

    def parameters_changed(self, change: Change) -> None:
        """Count the next step anew."""
        self.count_anew()

    def count_anew(self) -> None:
        """Count what the next step takes, which another way of computing may change too."""
        self._step = (None, None)

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
        fraction = self.padding / (self.tokens + self.padding)
        return {
            "padding_fraction": fraction,
            "packed_sequence_length_histogram": dict(histogram),
        }

    def state_dict(self) -> dict[str, Any]:
        documents = {"padding": self.padding, "lengths": dict(self.lengths)}
        return {"tokens": self.tokens, "flops": self.flops, **documents}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.flops = int(state_dict["tokens"]), float(state_dict["flops"])
        self.padding, self.lengths = int(state_dict["padding"]), Counter(state_dict["lengths"])


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


class ForgettingCallback(Callback):
    """Drive the methods of a module, and keep their state in checkpoints.

    Args:
        folder: where rank 0 leaves, as its `state/`, what the methods leave for the next training;
            replaced whole.
        work: counts what looking at the model takes.
    """

    def __init__(
        self, methods: Sequence[ForgettingMethod], task: Task, folder: Path, *, work: WorkCount
    ) -> None:
        self._methods = tuple(methods)
        self._task = task
        self._folder = folder
        self._work = work
        self._restored: Mapping[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._task.teacher is not None:
            self._task.teacher.to(pl_module.device)
        for method in self._methods:
            method.begin_task(base_of(pl_module).model, self._task)
            if self._restored is not None:  # it goes on: what began it was of earlier weights
                method.load_state_dict(self._restored[method.name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.global_step:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if ends_step(trainer, batch_idx):
            self._look(trainer, pl_module)
            module = base_of(pl_module)
            if names := self._still_frozen(module, trainer.global_step):
                surgery.thaw(trainer, module, names)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Before the optimizer is built, which is to hold what the saved one held
        module = base_of(pl_module)
        for name in self._still_frozen(module, checkpoint["global_step"]):
            module.model.get_parameter(name).requires_grad_(True)

    def _still_frozen(self, module: BaseModule, step: int) -> list[str]:
        """Return the parameters that thaw at a step, or thawed before, and need no gradient yet."""
        names = {name for method in self._methods for name in method.thawed(step)}
        return [n for n, p in module.model.named_parameters() if n in names and not p.requires_grad]

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for method in self._methods:
            self._work.flops += method.look(base_of(pl_module).model, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = base_of(pl_module).model
        left = {k: v for method in self._methods for k, v in method.end_task(model).items()}
        if left and trainer.is_global_zero:
            kinds = {kind: TensorStream.of(disk_values(model, left[kind])) for kind in left}
            with atomic_folder(self._folder, overwrite=True) as temporary:
                write_state(temporary, kinds, step=trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        module = base_of(pl_module)
        module.apply_methods_to_gradients()
        if _is_logged(trainer):
            for method in module.methods:
                value = method.logged_loss(module.model)
                if value is not None:
                    pl_module.log(f"forgetting/{method.name}/loss", value)

    def state_dict(self) -> dict[str, Any]:
        return {method.name: method.state_dict() for method in self._methods}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads callbacks before on_fit_start, where methods find the model on its device
        self._restored = state_dict


class FiniteGuard(Callback):
    """Refuse steps whose loss or gradient is not finite; stop after too many in a row.

    A refused step has its gradients taken away, so that neither weights nor moments move. Of
    several processes all refuse it, or none.

    Args:
        max_consecutive: refused steps in a row after which the training ends.
    """

    def __init__(self, *, max_consecutive: int) -> None:
        self._max_consecutive = max_consecutive
        self._consecutive = 0
        self.refused_steps = 0
        self.stopped_because: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stopped_because = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if _is_logged(trainer):
            rate = float(optimizer.param_groups[0]["lr"])
            pl_module.log_dict({"train/gradient_norm": norm, "train/learning_rate": rate})
        loss = trainer.callback_metrics.get("train/loss")
        is_finite = bool(torch.isfinite(norm)) and (loss is None or bool(torch.isfinite(loss)))
        if trainer.strategy.reduce_boolean_decision(is_finite):
            self._consecutive = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.refused_steps += 1
        self._consecutive += 1
        if self._consecutive > self._max_consecutive:
            shown = "unknown" if loss is None else f"{float(loss):.4g}"
            self.stopped_because = (
                f"{self._consecutive} steps in a row were not finite (at step "
                f"{trainer.global_step}: loss {shown}, gradient norm {float(norm):.4g})"
            )
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "consecutive": self._consecutive,
            "refused_steps": self.refused_steps,
            "stopped_because": self.stopped_because,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._consecutive = int(state_dict["consecutive"])
        self.refused_steps = int(state_dict["refused_steps"])
        self.stopped_because = state_dict["stopped_because"]


class RandomState(Callback):
    """Keep the global random state of every process in checkpoints, and go on from it.

    It is set before the first batch, not earlier: making the loader's iterator draws from it.

    Args:
        seed: of the run; None: it begins as it is found, of all processes but the first elsewhere.
        label: of the training, each of which begins from its own.
    """

    def __init__(self, seed: int | None = None, *, label: str = "") -> None:
        self._seed = None if seed is None else derived_seed(seed, label)
        self._restored: Mapping[str, Any] | None = None
        self._has_begun = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        if self._restored is not None:
            restore_random_state(self._restored)
            self._restored = None
        elif self._seed is not None or trainer.global_rank:
            start = torch.initial_seed() if self._seed is None else self._seed
            # Or all processes would drop out the same units
            torch.manual_seed(derived_seed(start, "rank", trainer.global_rank))

    def state_dict(self) -> dict[str, Any]:
        rank, own = this_rank(), random_state()
        states = [own] * rank.count
        if rank.count > 1:
            distributed.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, states = this_rank(), state_dict["ranks"]
        if len(states) != rank.count:
            raise TritterError(
                f"trainer.devices = {rank.count}: the saved state is of {len(states)} processes; "
                f"go on with trainer.devices={len(states)}."
            )
        self._restored = states[rank.index]


class StepProgress(Callback):
    """One bar with loss, speed and the time left; a line now and then where there is no terminal.

    Args:
        label: what is being trained.
        max_steps: steps in all.
        mode: `on`, `off`, or `auto` (a bar on a terminal, lines elsewhere).
        console: where to write.
    """

    def __init__(self, *, label: str, max_steps: int, mode: str, console: Console) -> None:
        self._max_steps = max_steps
        self._label = label
        self._mode = mode
        self._console = console
        self._use_bar = shows_bar(mode, console)
        self._use_lines = mode == "auto" and not console.is_terminal
        self._since = 0.0
        self._first = 0
        self._bar: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A console holds locks; a process that is spawned makes one of its own
        return {**self.__dict__, "_console": self._console.quiet}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._console = Console(quiet=state["_console"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
        self._first = trainer.global_step
        self._use_bar = self._use_bar and trainer.is_global_zero
        self._use_lines = self._use_lines and trainer.is_global_zero
        if self._first and (self._use_bar or self._use_lines):
            text = f"  {self._label}: goes on from step {self._first}/{self._max_steps}"
            self._console.print(text, highlight=False)
        if self._use_bar:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:>4.0f}/{task.total:.0f}  {task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._label, total=self._max_steps, completed=self._first, note="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        every = max(1, self._max_steps // 5) if self._use_lines else 5
        is_due = ends_step(trainer, batch_idx) and (not step % every or step == self._max_steps)
        if not (is_due and (self._use_bar or self._use_lines)):
            return
        elapsed = time.perf_counter() - self._since
        batches = (step - self._first) * trainer.accumulate_grad_batches
        tokens = batches * batch["input_ids"].numel() * trainer.world_size
        rate = tokens / elapsed
        loss = trainer.callback_metrics.get("train/loss", torch.tensor(float("nan")))
        note = f"loss {float(loss):.3f}  {rate_text(rate)} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note)
        else:
            left = elapsed / (step - self._first) * (self._max_steps - step)
            self._console.print(
                f"  {self._label}: step {step}/{self._max_steps}  {note}  {left:.0f} s left",
                highlight=False,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()


def rate_text(rate: float) -> str:
    """Return how many per second: 1.5k, 37, 0.42."""
    return f"{rate / 1000:.1f}k" if rate >= 999.5 else f"{rate:.2g}" if rate < 1 else f"{rate:.0f}"


def _is_logged(trainer: Trainer) -> bool:
    """Return whether the step that is about to be taken is logged."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_DIE = 10.0


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked this training to stop.

    The first signal is noted and passed on to worker processes, the second ends the training at
    once. Workers only take note: who started them decides.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._process = os.getpid()

    @property
    def is_asked(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside.

        Raises:
            Stopped: a second signal came.
        """
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _SIGNALS if is_main}
        try:
            self.listen()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Take signals from now on; Lightning sets handlers of its own when a fit begins."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take)

    def note(self, number: int) -> None:
        """Take note of a signal; the first one counts."""
        if self.signal_number is None:
            self.signal_number = number

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_worker = os.getpid() != self._process
        if is_worker or not self.is_asked:
            self.note(number)
            if not is_worker:
                for worker in multiprocessing.active_children():
                    worker.terminate()  # which it takes as this process took its signal
            return
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()
        for worker in workers:  # none of them writes any more when this one says it is over
            worker.join(_SECONDS_TO_DIE)
        raise Stopped(number)


class SaveState(Checkpoint):
    """Save what the training needs to go on, every so many steps and when it is to end early.

    Stands last among the callbacks, behind all that write checkpoints, so that it sees what the
    others did in the step, and in its evaluation if there is one. A training ends where
    a step does: whoever asks for it between two batches of a step is heard at its end. Of several
    processes all end at the same step.

    Args:
        path: of the checkpoint folder, which is replaced whole.
        every_n_steps: 0 saves only when the training is to end early.
        stop: whether it is asked to stop, to go on later.
        guard: whether it is broken off.

    Attributes:
        ended_early: which callback ended the training before its last step, and why. One that is
            resumed after that does not train on.
    """

    def __init__(
        self, path: Path, *, every_n_steps: int, stop: StopRequest, guard: FiniteGuard
    ) -> None:
        self._path = path
        self._every_n_steps = every_n_steps
        self._stop = stop
        self._guard = guard
        self._is_to_end = False
        self.has_trained = False
        self.ended_early: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop.listen()
        if self.ended_early is not None:
            trainer.should_stop = True
        for callback in trainer.checkpoint_callbacks:
            if hasattr(callback, "_last_global_step_saved"):
                # Else it would save the step it is resumed from again, in the midst of the next
                callback._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.has_trained = True
        self._is_to_end |= trainer.should_stop
        trainer.should_stop = False
        if not ends_step(trainer, batch_idx):
            return
        agree = trainer.strategy.reduce_boolean_decision
        trainer.should_stop = agree(self._is_to_end or self._stop.is_asked, all=False)
        is_stopped = trainer.should_stop and agree(self._stop.is_asked, all=False)
        if is_stopped:
            self._stop.note(signal.SIGTERM)  # another process was asked
        every = self._every_n_steps
        is_due = is_stopped or bool(every and trainer.global_step % every == 0)
        is_ours = self._stop.is_asked or self._guard.stopped_because is not None
        if trainer.should_stop and not is_ours and trainer.global_step < trainer.max_steps:
            self.ended_early = "a callback asked the training to stop"
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if reason := getattr(callback, "stopping_reason_message", None):
                    reason = reason.removesuffix(" Signaling Trainer to stop.")
                    self.ended_early = f"{type(callback).__name__}: {reason}"
                    break
        if is_due or self.ended_early is not None:
            trainer.save_checkpoint(self._path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"ended_early": self.ended_early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ended_early = state_dict["ended_early"]


class EndOfTraining(Callback):
    """Let callbacks end a training that is resumed from its last step, which Lightning passes over.

    Stands first, so that what they leave then is there for those that write it when the fit ends.
    """

    def __init__(self) -> None:
        self._has_ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._has_ended:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_end(trainer, pl_module)


# When a training is evaluated on its way: at its beginning, every so many steps, at its end.
#
# Lightning's own validation loop does it, so that loggers and other people's callbacks meet what
# they know. It is started here: Lightning counts batches instead of steps, would start it behind
# the saving of a state (a training that goes on from there would miss it), and at step 0 not at
# all. Weights are the bits of a training without: the loop sets the modes of all modules back,
# and what is drawn from the random generators is undone.


class Validation(Callback):
    """Start the evaluations of a training, and count their FLOPs and this process's seconds.

    Stands before the callback that saves states, so that a saved state has its evaluation.

    Args:
        text: what it is evaluated on.
        stop: a training that is asked to stop is not evaluated at its end.
    """

    def __init__(self, text: ValidationSubset, *, stop: StopRequest) -> None:
        self._text = text
        self._stop = stop
        self._last: int | None = None  # the step of the last evaluation
        self._has_begun = False
        self.flops, self.seconds = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_begun = True
        if trainer.global_step == 0:
            self._validate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_due = step % self._text.every_n_steps == 0 or step == trainer.max_steps
        if is_due and ends_step(trainer, batch_idx):
            self._validate(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of one that ends early; what had nothing left to train was evaluated before
        if trainer.global_step == self._last or not self._has_begun:
            return
        if not trainer.strategy.reduce_boolean_decision(self._stop.is_asked, all=False):
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        """Run the validation loop as the training loop does, and leave no trace in the training."""
        since = time.perf_counter()
        loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        random, is_first = random_state(), connector._first_loop_iter
        loop.restarting = False  # a training that was resumed would leave batches out
        trainer.validating = True
        loop.run()
        trainer.training = True
        connector._first_loop_iter = is_first
        restore_random_state(random)
        self.seconds += time.perf_counter() - since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = trainer.global_step
        self.flops += evaluation_flops(base_of(pl_module).reading_flops(), self._text)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "flops": self.flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last, self.flops = state_dict["last"], float(state_dict["flops"])


def evaluation_flops(reading: Flops, text: ValidationSubset) -> float:
    """Count the FLOPs of one evaluation; padding is not counted.

    Args:
        reading: of a sequence.
    """
    return sum(reading.of(length) for length in text.lengths)
