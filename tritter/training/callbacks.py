"""Callbacks of every training: methods against forgetting, refused steps, progress."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed

from tritter.checkpoint.state import write_state
from tritter.data.batches import this_rank
from tritter.errors import TritterError
from tritter.seeds import derived_seed
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream
from tritter.terminal import Console, shows_bar
from tritter.training import surgery
from tritter.training.checkpoint_io import random_state, restore_random_state
from tritter.training.forgetting_method import ForgettingMethod, Task
from tritter.training.module import BaseModule, base_of
from tritter.training.parameters import disk_values
from tritter.training.sharded import whole
from tritter.training.work import WorkCount, ends_step


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
            self._stop(trainer, norm, loss)

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

    def _stop(self, trainer: Trainer, norm: Tensor, loss: Tensor | None) -> None:
        shown = "unknown" if loss is None else f"{float(loss):.4g}"
        self.stopped_because = (
            f"{self._consecutive} steps in a row were not finite (at step "
            f"{trainer.global_step}: loss {shown}, gradient norm {float(norm):.4g})"
        )
        trainer.should_stop = True


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
            self._bar = _progress_bar(self._console)
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


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>4.0f}/{task.total:.0f}  {task.fields[note]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )


def _is_logged(trainer: Trainer) -> bool:
    """Return whether the step that is about to be taken is logged."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
