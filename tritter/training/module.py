"""LightningModules around stock transformers models."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from tritter.core.families import Flops, forward_flops
from tritter.core.models import config_of
from tritter.data.batches import this_rank
from tritter.data.packing import IGNORED, labels_of
from tritter.errors import RequestError
from tritter.evaluation.losses import nats_per_row
from tritter.targets import Component, built
from tritter.training.forgetting_method import ForgettingMethod
from tritter.training.moments import Moments, start_from
from tritter.training.optimizer import OptimizerSettings, Schedule, build_optimizer
from tritter.training.parameters import (
    Entry,
    StepFlops,
    flops_of_sequence,
    is_sharded,
    let_go,
    replay,
    shard,
)

_SUMMED = ("nats", "right", "tokens")  # of a domain's windows in an evaluation


class SideLoss:
    """Base of all of them; the LightningModule holds them as a list.

    Args:
        forward_options: what the model is called with besides, in the forward pass of the task.
        flops: model FLOPs that it took before the first step.
    """

    forward_options: Mapping[str, bool] = {}
    flops = 0.0

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what is added to the loss, and its terms by the names of their metrics.

        Args:
            batch: what the task's forward pass was of, which lies right behind.
            step: optimizer steps of this training so far.
        """
        raise NotImplementedError

    def step_flops(self, model: nn.Module) -> float:
        """Count the FLOPs of a step besides those of the task, of all processes together."""
        return 0.0

    def callbacks(self) -> tuple[Callback, ...]:
        """Return what drives it."""
        return ()


@dataclass(frozen=True, slots=True, eq=False)
class TaskLoss:
    """The loss of the task, and the logits [B, T, V] of the forward pass that it is of."""

    value: Tensor
    logits: Tensor


class BaseModule(LightningModule):
    """Next-token training of a causal language model, with methods that keep it from forgetting.

    Args:
        model: a stock transformers model.
        schedule: learning rate over the steps.
        optimizer: everything else of the optimizer.
        methods: in the order in which they were asked for.
        side_losses: what is added to the loss of the task.
        moments: of Adam, that the optimizer starts from, by the model's parameter names; those
            of a training that is resumed take their place.

    Attributes:
        journal: what changed the model during the training; `tritter.training.surgery` writes it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        optimizer: OptimizerSettings,
        methods: Sequence[ForgettingMethod] = (),
        side_losses: Sequence[SideLoss] = (),
        moments: Mapping[str, Moments] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.optimizer_settings = optimizer
        self.methods = tuple(methods)
        self.side_losses = tuple(side_losses)
        self.moments = moments or {}
        self.journal: list[Entry] = []
        self.module_callbacks: Callable[[], list[Callback]] = list  # set for the time of a fit
        self.compiled: CompiledModel | None = None  # the same

    def configure_model(self) -> None:
        """Keep a part of the weights alone, in a process of several that share them."""
        if self.device_mesh is not None and not is_sharded(self.model):
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        """Return what stands behind Tritter's own callbacks, built in the process that trains."""
        return self.module_callbacks()

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Return the loss of the task, of side losses and of the methods; each is logged alone."""
        if not self.is_task_alone:
            for method in self.methods:
                method.observe_batch(self.model, batch)
        task = self.task_loss(batch)
        loss = task.value
        self.log("train/loss", loss.detach(), sync_dist=True)
        for side in self.side_losses:
            extra, terms = side.loss(self.model, batch, step=self.global_step)
            self.log_dict({n: term.detach() for n, term in terms.items()}, sync_dist=True)
            loss = loss + extra
        for method in self.methods:
            added = method.extra_loss(self.model, batch, task.logits)
            if added is not None:
                self.log(f"forgetting/{method.name}/loss", added.detach(), sync_dist=True)
                loss = loss + added
        return loss

    @property
    def is_task_alone(self) -> bool:
        """Say whether the loss is that of the next tokens of new text, and of nothing else."""
        return not self.side_losses and not any(one.is_in_gradients() for one in self.methods)

    def task_loss(self, batch: Mapping[str, Tensor]) -> TaskLoss:
        """Return the mean next-token loss of a batch, nats per token that is to be predicted.

        Where padding makes the numbers of these differ, it is the mean over those of all processes
        once their gradients are averaged.
        """
        input_ids = batch["input_ids"]  # [B, T]
        options: dict[str, Any] = {}
        for side in self.side_losses:
            options.update(side.forward_options)
        labels = labels_of(self.model, input_ids)
        if labels is not input_ids:
            # How many there are, as a mean over processes, and at least one among all
            count, ranks = (labels[:, 1:] != IGNORED).sum(), this_rank().count
            if ranks > 1:
                distributed.all_reduce(count)
            options["num_items_in_batch"] = count.clamp(min=1) / ranks
        model = self.compiled or self.model
        said = model(input_ids=input_ids, labels=labels, use_cache=False, **options)
        return TaskLoss(said.loss, said.logits)

    def on_validation_epoch_start(self) -> None:
        domains = self.trainer.datamodule.evaluation.domains  # type: ignore[attr-defined]
        # Apple's GPUs have no float64
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._sums = {
            domain: {name: _sum().set_dtype(dtype).to(self.device) for name in _SUMMED}
            for domain in domains
        }

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Add up nats, right predictions and tokens of a domain's windows."""
        targets, sums = batch["targets"], self._sums[batch["domain"]]  # [B, T]
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits  # [B, T, V]
        sums["nats"].update(nats_per_row(logits, targets).sum())
        sums["right"].update((logits.argmax(-1) == targets).sum())
        sums["tokens"].update((targets != IGNORED).sum())

    def on_validation_epoch_end(self) -> None:
        """Log each domain's mean next-token loss in nats, perplexity and accuracy.

        They are means over the tokens of all processes, which torchmetrics adds up.
        """
        let_go(self.model)
        for domain, sums in self._sums.items():
            nats, right, tokens = (float(sums[name].compute()) for name in _SUMMED)
            self.log(f"eval/{domain}/loss", nats / tokens)
            self.log(f"eval/{domain}/perplexity", math.exp(min(nats / tokens, 700)))
            self.log(f"eval/{domain}/accuracy", right / tokens)
        self._log_finished_steps()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._log_finished_steps()

    def _log_finished_steps(self) -> None:
        """Let loggers count finished steps, in training and evaluation alike.

        Lightning takes a metric of this name; its own count is one step behind in training.
        """
        self.log("step", float(self.global_step))

    def step_flops(self) -> StepFlops:
        """Count the model FLOPs of a step, with what needs a gradient now."""
        besides = sum(side.step_flops(self.model) for side in self.side_losses)
        return StepFlops(flops_of_sequence(self.model), besides)

    def reading_flops(self) -> Flops:
        """Count the model FLOPs of reading a sequence, as evaluations do."""
        return forward_flops(config_of(self.model))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the journal, which stands in every checkpoint beside the weights."""
        return {"journal": [dict(entry) for entry in self.journal]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Make the shapes of a journal; torch calls this before it loads the weights."""
        journal = [dict(entry) for entry in state["journal"]]
        if len(journal) > len(self.journal):
            replay(self.model, journal)
            self.journal, self.moments = journal, {}

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer that has not taken a step over what is trained now."""
        return build_optimizer(
            self.named_parameters(),
            self.optimizer_settings,
            learning_rate=self.schedule.learning_rate,
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        start_from(optimizer, self.model, self.moments)
        # A plain function, which the scheduler's state leaves out; the step is all there is to save
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "learning_rate"},
        }

    def apply_methods_to_gradients(self) -> None:
        """Let every method read the task's gradients before any method changes them."""
        with torch.no_grad():
            for method in self.methods:
                method.observe_gradients(self.model)
            for method in self.methods:
                method.add_to_gradients(self.model)


def _sum() -> SumMetric:
    """Return a sum that is NaN where a value is: torchmetrics would leave it out.

    MeanMetric is of no use here: with this setting it forgets its weights (torchmetrics 1.9).
    """
    return SumMetric(nan_strategy="disable")


def base_of(module: LightningModule) -> BaseModule:
    """Return a module that a callback of ours is called with, as what it is."""
    assert isinstance(module, BaseModule)
    return module


BACKEND = "inductor"


class CompiledModel:
    """Calls a model as torch.compile makes it: the same modules, parameters and names.

    Compiled at the first call, in the process that trains. Evaluations are better off with the
    model itself: each shape of theirs would be compiled too.

    Args:
        model: it stays as it is.

    Attributes:
        is_watched: hooks stand on modules inside, which compiled code would pass over: the model
            itself computes until they are gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: Callable[..., Any] | None = None
        self.is_watched = False

    def __call__(self, **inputs: Any) -> Any:
        if self.is_watched:
            return self._model(**inputs)
        if self._compiled is None:
            self._compiled = torch.compile(self._model, backend=BACKEND)
        return self._compiled(**inputs)

    def forget(self) -> None:
        """Compile at the next call what the model is then.

        By itself torch would do so a few times, and then never compile the model again.
        """
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()


CHECKPOINTS_NAME = "checkpoints"  # where a ModelCheckpoint writes, below the training's folder


def module_callbacks(
    options: Sequence[Component], *, folder: Path, last: Callback
) -> list[Callback]:
    """Return what a LightningModule adds to the callbacks of its Trainer, when the fit begins.

    Args:
        options: in the order in which they were asked for.
        folder: of the training.
        last: stands behind them all, those included that write checkpoints.

    Raises:
        RequestError: two of them save their state under one name.
    """
    callbacks: list[Callback] = []
    first: dict[str, str] = {}  # state → name of the callback that saves it
    for one in options:
        body = dict(one.options)
        if issubclass(one.kind, ModelCheckpoint):  # which would take it from the cwd
            body["dirpath"] = str(folder / (body.get("dirpath") or CHECKPOINTS_NAME))
        callback = built(body)
        assert isinstance(callback, Callback)
        other = first.setdefault(callback.state_key, one.name)
        if other != one.name and type(callback).state_dict is not Callback.state_dict:
            raise RequestError(
                f"callbacks.{one.name} and callbacks.{other} are both {callback.state_key}: "
                "nothing tells their saved states apart; let them differ in what they monitor, "
                "or leave one out."
            )
        callbacks.append(callback)
    return [*callbacks, last]
