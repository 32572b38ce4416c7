"""LightningModules around stock transformers models."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from tritter.core.families import Flops, forward_flops
from tritter.core.models import layers_of, model_of, set_parameter
from tritter.data.batches import num_ranks
from tritter.data.packing import IGNORED, inputs_for, labels_of
from tritter.evaluation.losses import nats_per_row
from tritter.training.forgetting_method import ForgettingMethod
from tritter.training.method import SideLoss, Trainee
from tritter.training.optimizer import OptimizerSettings, Schedule
from tritter.training.parameters import WHOLE, Journal, flops_of_sequence

_SUMMED = ("nats", "right", "tokens")  # per domain, over the windows of a validation
_BACKEND = "inductor"
# It propagates NaN. MeanMetric would lose its weights with this setting (torchmetrics 1.9).
_sum = partial(SumMetric, nan_strategy="disable")


class BaseModule(LightningModule):
    """Next-token training of a causal language model, with continual-learning methods.

    Args:
        model: A stock transformers model.
        schedule: Learning-rate schedule.
        optimizer: All other settings of the optimizer.
        methods: Continual-learning methods in the requested order.
        side_losses: Losses that are added to the task loss.

    Attributes:
        journal: Changes of the model during training, recorded by `tritter.training.surgery`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        optimizer: OptimizerSettings,
        methods: Sequence[ForgettingMethod] = (),
        side_losses: Sequence[SideLoss] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.optimizer_settings = optimizer
        self.methods = tuple(methods)
        self.side_losses = tuple(side_losses)
        self.journal = Journal()
        self.module_callbacks: Callable[[], list[Callback]] = list  # set during a fit
        self.compiled: CompiledModel | None = None  # set during a fit
        self._step_losses: dict[str, list[Tensor]] = {}  # of the batches of a step so far

    @classmethod
    def of(cls, trainee: Trainee, **options: Any) -> "BaseModule":
        """Return the module that trains a trainee, given the other options."""
        make: Callable[..., BaseModule] = trainee.make_module or partial(cls, trainee.model)
        return make(side_losses=trainee.side_losses, **options)

    def configure_model(self) -> None:
        """Shard the weights if several processes share them, decoder layer by decoder layer.

        A layer is gathered before it computes and freed afterwards, so a process holds its shards
        of all layers and one whole layer. Parameters outside of the layers, such as tied
        embeddings, are gathered together.
        """
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for part in (*layers_of(self.model), self.model):
                fully_shard(part, mesh=mesh)

    def gather(self, *, is_kept: bool) -> None:
        """Move the weights to the CPU after training, whole ones if they were sharded.

        All processes must call it.

        Args:
            is_kept: Whether this process receives the weights.
        """
        model = self.model
        if not isinstance(model, FSDPModule):
            if is_kept:
                model.to("cpu")
            return
        names = [name for name, _ in model.named_parameters()]
        whole: Mapping[str, Any] = get_model_state_dict(model, options=WHOLE)
        if not is_kept:
            return
        for name in names:
            set_parameter(model, name, whole[name])
        model.tie_weights()  # type: ignore[operator]
        for module in model.modules():  # `to` would move the old shards
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.cpu())

    def configure_callbacks(self) -> list[Callback]:
        """Build the callbacks that run after Tritter's own, in the process that trains."""
        return self.module_callbacks()

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> Tensor:
        """Return the sum of task loss, side losses and losses of methods; each one is logged."""
        if not self.is_task_alone:
            for method in self.methods:
                method.observe_batch(self.model, batch)
        loss, logits = self.task_loss(batch)
        self.log_step_mean("train/loss", loss)
        for side in self.side_losses:
            extra, terms = side.loss(self.model, batch, step=self.global_step)
            for name, term in terms.items():
                self.log_step_mean(name, term)
            loss = loss + extra
        for method in self.methods:
            added = method.extra_loss(self.model, batch, logits)
            if added is not None:
                self.log_step_mean(f"forgetting/{method.name}/loss", added)
                loss = loss + added
        return loss

    def log_step_mean(self, name: str, value: Tensor) -> None:
        """Log a loss as its mean over the batches of the step so far, and over all processes."""
        values = self._step_losses.setdefault(name, [])
        values.append(value.detach().to(torch.promote_types(value.dtype, torch.float32)))
        self.log(name, torch.stack(values).mean(), sync_dist=True)

    @property
    def is_task_alone(self) -> bool:
        """Whether the loss is the next-token loss of new data only."""
        return not self.side_losses and not any(one.is_in_gradients() for one in self.methods)

    def task_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the mean next-token loss of a batch in nats per predicted token, and its logits.

        With padding or prompts, batches have different numbers of predicted tokens. The loss is
        scaled so that the averaged gradients of a step are those of the mean over the predicted
        tokens of all its batches and processes.
        """
        input_ids = batch["input_ids"]  # [B, T]
        options: dict[str, Any] = {}
        for side in self.side_losses:
            options.update(side.forward_options)
        labels = labels_of(self.model, input_ids)
        if labels is not input_ids:
            # Mean number of predicted tokens per batch and process, with at least one in a step
            window, ranks = batch.get("window", [batch]), num_ranks()
            ids = torch.cat([each["input_ids"] for each in window])
            count = (labels_of(self.model, ids)[:, 1:] != IGNORED).sum()
            if ranks > 1:
                distributed.all_reduce(count)
            options["num_items_in_batch"] = count.clamp(min=1) / (ranks * len(window))
        model = self.compiled or self.model
        output = model(input_ids=input_ids, labels=labels, use_cache=False, **options)
        return output.loss, output.logits

    def on_validation_epoch_start(self) -> None:
        domains = self.trainer.datamodule.evaluation.domains  # type: ignore[attr-defined]
        # Apple's GPUs have no float64
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._sums = {
            domain: {name: _sum().set_dtype(dtype).to(self.device) for name in _SUMMED}
            for domain in domains
        }

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Add up nats, correct predictions and tokens of a domain's windows."""
        targets, sums = batch["targets"], self._sums[batch["domain"]]  # [B, T]
        input_ids = inputs_for(self.model, batch["input_ids"])
        logits = self.model(input_ids=input_ids, use_cache=False).logits  # [B, T, V]
        sums["nats"].update(nats_per_row(logits, targets).sum())
        sums["right"].update((logits.argmax(-1) == targets).sum())
        sums["tokens"].update((targets != IGNORED).sum())

    def on_validation_epoch_end(self) -> None:
        """Log each domain's mean next-token loss in nats, perplexity and accuracy.

        These are means over the tokens of all processes, synchronised by torchmetrics.
        """
        if isinstance(self.model, FSDPModule):  # frees what passes without a backward gathered
            self.model.reshard()
        for domain, sums in self._sums.items():
            nats, right, tokens = (float(sums[name].compute()) for name in _SUMMED)
            self.log(f"eval/{domain}/loss", nats / tokens)
            self.log(f"eval/{domain}/perplexity", math.exp(min(nats / tokens, 700)))
            self.log(f"eval/{domain}/accuracy", right / tokens)
        self.log_finished_steps()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            self._step_losses = {}
        self.log_finished_steps()

    def log_finished_steps(self) -> None:
        """Make loggers use the number of finished steps, in training and validation.

        Lightning uses a metric of this name; its own count lags by one step in training.
        """
        self.log("step", float(self.global_step))

    def step_flops(self) -> Flops:
        """Return the model FLOPs of a sequence in a step, without those of side losses.

        The current trainable parameters count.
        """
        return flops_of_sequence(self.model)

    def reading_flops(self) -> Flops:
        """Return the model FLOPs of a forward pass, as in validation."""
        return forward_flops(model_of(self.model))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the journal, which every checkpoint contains in addition to the weights."""
        return {"journal": [dict(entry) for entry in self.journal]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replay a journal to restore parameter shapes; torch calls this before loading weights."""
        journal = Journal.of(state["journal"])
        if len(journal) > len(self.journal):
            journal.replay(self.model)
            self.journal = journal

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer for the current trainable parameters."""
        return self.optimizer_settings.build(
            self.named_parameters(), learning_rate=self.schedule.learning_rate
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        # The scheduler's state excludes plain functions, so it contains only the step
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "learning_rate"},
        }

    def apply_methods_to_gradients(self) -> None:
        """Let all methods read the task gradients, then let them change the gradients."""
        with torch.no_grad():
            for method in self.methods:
                method.observe_gradients(self.model)
            for method in self.methods:
                method.add_to_gradients(self.model)


def base_of(module: LightningModule) -> BaseModule:
    """Return the module of a callback hook as a `BaseModule`."""
    assert isinstance(module, BaseModule)
    return module


class CompiledModel:
    """A torch.compile wrapper that keeps the modules, parameters and names of the model.

    The model is compiled at the first call, in the process that trains. Validation uses the model
    itself, because each of its shapes would be compiled too.

    Args:
        model: Model to compile; it is not changed.

    Attributes:
        is_watched: Whether submodules have hooks, which compiled code would skip. If so, calls use
            the uncompiled model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: Callable[..., Any] | None = None
        self.is_watched = False

    def __call__(self, **inputs: Any) -> Any:
        if self.is_watched:
            return self._model(**inputs)
        if self._compiled is None:
            self._compiled = torch.compile(self._model, backend=_BACKEND)
        return self._compiled(**inputs)

    def forget(self) -> None:
        """Compile the model again at the next call.

        torch does this a few times on its own, and then never compiles the model again.
        """
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()
