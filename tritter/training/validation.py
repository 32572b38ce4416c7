"""When a training is evaluated on its way: at its beginning, every so many steps, at its end.

Lightning's own validation loop does it, so that loggers and other people's callbacks meet what
they know. It is started here: Lightning counts batches instead of steps, would start it behind the
saving of a state (a training that goes on from there would miss it), and at step 0 not at all.
Weights are the bits of a training without: the loop sets the modes of all modules back, and what
is drawn from the random generators is undone.
"""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from tritter.data.datamodule import EvaluationText
from tritter.families import Flops
from tritter.training.checkpoint_io import random_state, restore_random_state
from tritter.training.module import base_of
from tritter.training.save_state import StopRequest
from tritter.training.work import ends_step


class Validation(Callback):
    """Start the evaluations of a training, and count their FLOPs and this process's seconds.

    Stands before the callback that saves states, so that a saved state has its evaluation.

    Args:
        text: what it is evaluated on.
        stop: a training that is asked to stop is not evaluated at its end.
    """

    def __init__(self, text: EvaluationText, *, stop: StopRequest) -> None:
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


def evaluation_flops(reading: Flops, text: EvaluationText) -> float:
    """Count the FLOPs of one evaluation; padding is not counted.

    Args:
        reading: of a sequence.
    """
    return sum(reading.of(length) for length in text.lengths)
