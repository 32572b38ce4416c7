"""Callbacks of every training run.

They count tokens and FLOPs, drive continual-learning methods, skip steps that are not finite, keep
the random state, show progress, run validation, save states and stop the run.
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
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed

from tritter.checkpoints.state import write_state
from tritter.core.families import Flops
from tritter.data.batches import num_ranks, this_rank
from tritter.data.datamodule import ValidationSubset
from tritter.data.packing import DocumentMask, lengths_read
from tritter.errors import TritterError
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream
from tritter.terminal import Console
from tritter.training import surgery
from tritter.training.forgetting_method import ForgettingMethod, Task
from tritter.training.module import BaseModule, base_of
from tritter.training.parameters import disk_values, full_tensor
from tritter.transform import Change

_LINE_SECONDS = 10.0  # until the first line of a slow training run
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_DIE = 10.0
_Kind = TypeVar("_Kind", bound=Callback)


def find_callback(trainer: Trainer, kind: type[_Kind]) -> _Kind | None:
    """Return the first callback of a class in a training run, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, kind)), None)


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return True for the last batch of an accumulated optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class WorkCount(Callback):
    """Count training tokens and FLOPs over all processes.

    Attributes:
        tokens: Number of tokens without padding.
        padding: Number of padding tokens.
        lengths: Length → number of documents, if documents are masked from each other.
        flops: Model FLOPs.
    """

    def __init__(self) -> None:
        self.tokens, self.padding = 0, 0
        self.lengths = Counter[int]()
        self.flops = 0.0
        self._flags: object = None  # which parameters are trained
        self._flops, self._side_flops = Flops(), 0.0  # of a sequence; of the side losses of a step

    @classmethod
    def of(cls, trainer: Trainer) -> "WorkCount":
        """Return the counter of a trainer."""
        return next(c for c in trainer.callbacks if isinstance(c, cls))  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = base_of(pl_module)
        input_ids: Tensor = batch["input_ids"]
        lengths = {input_ids.shape[1]: len(input_ids) * trainer.world_size}
        if DocumentMask.of(module.model) is not None:
            lengths = lengths_read(module.model, input_ids)
            self.lengths.update(lengths)
        tokens = sum(length * number for length, number in lengths.items())
        self.tokens += tokens
        self.padding += input_ids.numel() * trainer.world_size - tokens
        flags = tuple(parameter.requires_grad for parameter in module.model.parameters())
        if self._flags != flags:
            self._flags, self._flops = flags, module.step_flops()
            self._side_flops = sum(side.step_flops(module.model) for side in module.side_losses)
        self.flops += self._flops.of_all(lengths) + self._side_flops

    def parameters_changed(self, change: Change) -> None:
        """Recompute the FLOPs of a step after a change of the model."""
        self.reset_step_flops()

    def reset_step_flops(self) -> None:
        """Recompute the FLOPs of a step, after any change of how the model computes."""
        self._flags = None

    def packing(self) -> dict[str, Any]:
        """Return padding fraction and length histogram of packed documents; empty for a stream.

        The histogram has powers of two. It counts documents and pieces of long documents, each
        including the end-of-text token that it starts with.
        """
        histogram = Counter[str]()
        for length, number in sorted(self.lengths.items()):
            if length > 1:  # the last end-of-text token starts no document
                low = 1 << (length.bit_length() - 1)
                histogram[f"{low}-{2 * low - 1}"] += number
        if not self.lengths:
            return {}
        fraction = self.padding / (self.tokens + self.padding)
        return {"padding_fraction": fraction, "packed_sequence_length_histogram": dict(histogram)}

    def state_dict(self) -> dict[str, Any]:
        documents = {"padding": self.padding, "lengths": dict(self.lengths)}
        return {"tokens": self.tokens, "flops": self.flops, **documents}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.flops = int(state_dict["tokens"]), float(state_dict["flops"])
        self.padding, self.lengths = int(state_dict["padding"]), Counter(state_dict["lengths"])


class Performance(Callback):
    """Log tokens, steps and FLOPs per second, seconds per step and peak memory.

    The time of validation is excluded.

    Args:
        work: Counter of tokens and FLOPs; must precede this callback.
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
        base_of(pl_module).log_finished_steps()  # before a callback names a file by them
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
                "performance/peak_memory_bytes": float(_peak_memory_bytes()),
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


def _peak_memory_bytes() -> int:
    """Return the peak memory of this process: GPU memory with CUDA, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class ForgettingCallback(Callback):
    """Drive the continual-learning methods of a module, and keep their state in checkpoints.

    Args:
        methods: Methods in their order.
        task: Data and state for the methods.
        folder: Folder whose `state/` rank 0 replaces with the state for the next training run.
        work: Counter to add the FLOPs of the methods to.
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
            if self._restored is not None:  # resumed: replace state of the initial weights
                method.load_state_dict(self._restored[method.name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.global_step:
            self._observe_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            self._observe_step(trainer, pl_module)
            module = base_of(pl_module)
            if names := self._still_frozen(module, trainer.global_step):
                surgery.set_trained(trainer, module, names, is_trained=True)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Before the optimizer is built: it must hold the same parameters as the saved one
        module = base_of(pl_module)
        for name in self._still_frozen(module, checkpoint["global_step"]):
            module.model.get_parameter(name).requires_grad_(True)

    def _still_frozen(self, module: BaseModule, step: int) -> list[str]:
        """Return the frozen parameters that should be trainable at a step."""
        names = {name for method in self._methods for name in method.thawed(step)}
        return [n for n, p in module.model.named_parameters() if n in names and not p.requires_grad]

    def _observe_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for method in self._methods:
            self._work.flops += method.observe_step(base_of(pl_module).model, trainer.global_step)

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
    """Skip steps whose loss or gradient is not finite; stop after too many in a row.

    A skipped step has no gradients, so neither weights nor moments change. All processes skip the
    same steps.

    Args:
        max_consecutive: Maximum number of consecutive skipped steps.
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
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
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


def _random_state() -> dict[str, Any]:
    """Return the state of torch's global generators, including the current GPU."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    """Set torch's global generators to a state from `_random_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def same_random_state() -> Iterator[None]:
    """Restore torch's global generators, including the current GPU, after the block."""
    state = _random_state()
    try:
        yield
    finally:
        _restore_random_state(state)


class RandomState(Callback):
    """Save the global random state of every process in checkpoints, and restore it on resume.

    The state is set right before the first batch, because creating the loader's iterator draws
    from it.

    Args:
        seed: Seed of the run. None keeps the current state on rank 0 and derives the others.
        label: Label of the training run; each label has a different initial state.
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
            _restore_random_state(self._restored)
            self._restored = None
        elif self._seed is not None or trainer.global_rank:
            start = torch.initial_seed() if self._seed is None else self._seed
            # Otherwise all processes would drop the same units
            torch.manual_seed(derived_seed(start, "rank", trainer.global_rank))

    def state_dict(self) -> dict[str, Any]:
        own = _random_state()
        states = [own] * num_ranks()
        if len(states) > 1:
            distributed.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["ranks"]
        if len(states) != num_ranks():
            raise TritterError(
                f"trainer.devices = {num_ranks()}: the saved state has {len(states)} processes; "
                f"resume with trainer.devices={len(states)}."
            )
        self._restored = states[this_rank()]


class StepProgress(Callback):
    """Progress bar with loss, speed and remaining time; without a terminal, occasional lines.

    Args:
        label: Label of the training run.
        max_steps: Total number of steps.
        mode: `on`, `off`, or `auto` (a bar on a terminal, lines elsewhere).
        console: Console to print to.
    """

    def __init__(self, *, label: str, max_steps: int, mode: str, console: Console) -> None:
        self._max_steps = max_steps
        self._label = label
        self._mode = mode
        self._console = console
        self._use_bar = console.shows_bar(mode)
        self._use_lines = mode == "auto" and not console.is_terminal
        self._since = self._line_due = 0.0
        self._first = 0
        self._bar: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A console has locks, so a spawned process creates its own
        return {**self.__dict__, "_console": self._console.quiet}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._console = Console(quiet=state["_console"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
        self._line_due = self._since + _LINE_SECONDS
        self._first = trainer.global_step
        self._use_bar = self._use_bar and trainer.is_global_zero
        self._use_lines = self._use_lines and trainer.is_global_zero
        if self._first and (self._use_bar or self._use_lines):
            text = f"  {self._label}: resuming from step {self._first}/{self._max_steps}"
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
        is_late = self._use_lines and time.perf_counter() > self._line_due
        is_due = not step % every or step == self._max_steps or is_late
        is_due = is_due and ends_step(trainer, batch_idx)
        if not (is_due and (self._use_bar or self._use_lines)):
            return
        elapsed = time.perf_counter() - self._since
        self._line_due = self._since + max(_LINE_SECONDS, 2 * elapsed)
        batches = (step - self._first) * trainer.accumulate_grad_batches
        tokens = batches * batch["input_ids"].numel() * trainer.world_size
        rate, loss = tokens / elapsed, trainer.callback_metrics.get("train/loss", torch.nan)
        note = f"loss {float(loss):.3f}  {_rate_text(rate)} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note)
        else:
            remaining = elapsed / (step - self._first) * (self._max_steps - step)
            self._console.print(
                f"  {self._label}: step {step}/{self._max_steps}  {note}  {remaining:.0f} s left",
                highlight=False,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rate_text(rate: float) -> str:
    """Return a number per second in short form: 1.5k, 37, 0.42."""
    return f"{rate / 1000:.1f}k" if rate >= 999.5 else f"{rate:.2g}" if rate < 1 else f"{rate:.0f}"


def _is_logged(trainer: Trainer) -> bool:
    """Return True if the upcoming step is logged."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


class StopRequest:
    """A request to stop the training run by Ctrl-C or SIGTERM.

    The first signal is recorded and forwarded to worker processes. The second one ends the run at
    once. Workers only record signals; their parent process decides.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._process = os.getpid()

    @property
    def is_requested(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals inside the block."""
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _SIGNALS if is_main}
        try:
            self.install_handlers()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def install_handlers(self) -> None:
        """Install the signal handlers, again after Lightning has installed its own in a fit."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle_signal)

    def note(self, number: int) -> None:
        """Record a signal; the first one counts."""
        if self.signal_number is None:
            self.signal_number = number

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        is_worker = os.getpid() != self._process
        if is_worker or not self.is_requested:
            self.note(number)
            if not is_worker:
                for worker in multiprocessing.active_children():
                    worker.terminate()  # which it records as this process did
            return
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()
        for worker in workers:  # none of them may write after this process has reported the end
            worker.join(_SECONDS_TO_DIE)
        raise Stopped(number)


class SaveState(Checkpoint):
    """Save the training state every few steps, and before the run ends early.

    It must be the last callback, after all that write checkpoints: the state then includes the
    work of all others in the step, including its validation.

    A run only ends after a complete optimizer step, even if a stop is requested between two of
    its batches. All processes end at the same step.

    Args:
        path: Checkpoint folder, which is replaced.
        every_n_steps: Interval in steps. 0 saves only before the run ends early.
        stop: Stop request by a signal, after which the run can be resumed.
        guard: Guard that may abort the run.

    Attributes:
        ended_early: Name and reason of the callback that ended the run before its last step.
            Resuming such a run does not continue training.
        has_trained: Whether a batch was trained since the fit began.
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

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and callback.dirpath and state:
                _place_inside(state, Path(callback.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ended_early is not None:
            trainer.should_stop = True
        for callback in trainer.checkpoint_callbacks:
            if hasattr(callback, "_last_global_step_saved"):
                # Otherwise it would save the resumed step again, within the next step
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
        trainer.should_stop = agree(self._is_to_end or self._stop.is_requested, all=False)
        is_stopped = trainer.should_stop and agree(self._stop.is_requested, all=False)
        if is_stopped:
            self._stop.note(signal.SIGTERM)  # another process received a signal
        every = self._every_n_steps
        is_due = is_stopped or bool(every and trainer.global_step % every == 0)
        is_ours = self._stop.is_requested or self._guard.stopped_because is not None
        if trainer.should_stop and not is_ours and trainer.global_step < trainer.max_steps:
            self.ended_early = "a callback stopped the training run"
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


def _place_inside(state: dict[str, Any], folder: Path) -> None:
    """Place the paths in a saved state of a ModelCheckpoint inside its folder.

    Lightning would ignore the best values of a run folder that was moved, and delete what the state
    names elsewhere.
    """
    old = Path(state["dirpath"])

    def inside(path: str) -> str:
        is_below = Path(path).is_relative_to(old) and ".." not in Path(path).parts
        name = Path(path).relative_to(old) if is_below else Path(path).name
        return str(folder / name) if path else ""

    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = inside(state[key])
    kept = state["best_k_models"].items()
    state |= {"dirpath": str(folder), "best_k_models": {inside(path): v for path, v in kept}}


class EndOfTraining(Callback):
    """Call `on_train_end` for a run resumed from its last step, where Lightning skips it.

    It must be the first callback: the others write their results when the fit ends.
    """

    def __init__(self) -> None:
        self._has_ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._has_ended:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_end(trainer, pl_module)


# Validation during training: at the beginning, every few steps and at the end.
#
# It uses Lightning's validation loop, so that loggers and third-party callbacks work as usual. The
# loop is started here for three reasons. Lightning counts batches instead of steps. It would
# validate after a state is saved, so a resumed run would miss the validation. And it would not
# validate at step 0. Validation does not change the weights of the run: the loop restores the modes
# of all modules, and the random state is restored afterwards.


class Validation(Callback):
    """Run validation, and count its FLOPs and the seconds of this process.

    It must precede the callback that saves states, so that a saved state includes its validation.

    Args:
        text: Validation subset.
        stop: Stop request; a stopped run is not validated at its end.
    """

    def __init__(self, text: ValidationSubset, *, stop: StopRequest) -> None:
        self._text = text
        self._stop = stop
        self._last: int | None = None  # step of the last validation
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
        # For a run that ends early; one with no steps to train was validated before
        if trainer.global_step == self._last or not self._has_begun:
            return
        if not trainer.strategy.reduce_boolean_decision(self._stop.is_requested, all=False):
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        """Run the validation loop as the training loop does, without side effects on training."""
        since = time.perf_counter()
        loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        is_first = connector._first_loop_iter
        loop.restarting = False  # otherwise a resumed run would skip batches
        with same_random_state():
            trainer.validating = True
            loop.run()
            trainer.training = True
        connector._first_loop_iter = is_first
        self.seconds += time.perf_counter() - since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = trainer.global_step
        self.flops += sum(map(base_of(pl_module).reading_flops().of, self._text.lengths))

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "flops": self.flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last, self.flops = state_dict["last"], float(state_dict["flops"])
