"""The protocol of what acts in a training run: forgetting mitigation, neuron growth, LoRA experts.

This module does not import torch, so that the options of a method are checked fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.errors import Problem
from tritter.options import RunRequest, Start, options
from tritter.targets import Component

if TYPE_CHECKING:
    from lightning import Callback
    from torch import Tensor, nn

    from tritter.checkpoints import ExpansionRecord, Source
    from tritter.core.families import Model
    from tritter.data.tokens import TextBounds

Values = Mapping[str, "Tensor"]  # by parameter name


class SideLoss:
    """Base class of losses that are added to the task loss.

    Attributes:
        forward_options: Additional arguments of the model in the task's forward pass.
        flops: Model FLOPs before the first step.
    """

    forward_options: Mapping[str, bool] = {}
    flops = 0.0

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to add, and its terms by metric name.

        Args:
            model: Model in training.
            batch: Batch of the task's forward pass, which has just run.
            step: Number of finished optimizer steps of this training run.
        """
        raise NotImplementedError

    def step_flops(self, model: nn.Module) -> float:
        """Return the FLOPs of a step in addition to those of the task, over all processes."""
        return 0.0

    def callbacks(self) -> tuple[Callback, ...]:
        """Return the callbacks that drive the loss."""
        return ()


@dataclass(slots=True, eq=False)
class Trainee:
    """A model that is going to be trained, and what `Method.attach` adds to it.

    Args:
        model: Model.
        make_module: Builds the module, given the options of `BaseModule`; None: a `BaseModule`.
            One method at most may set it.
        side_losses: Further terms of the loss.
        observers: Callbacks that read the task gradients before any method changes them.
        controls: Callbacks that configure the model for a batch, depending on the step only.
        surgery_callbacks: Callbacks that change the model between two steps.
        follow: Maps values by parameter name to the names used during training; only for routers.
    """

    model: nn.Module
    make_module: Callable[..., Any] | None = None
    side_losses: tuple[SideLoss, ...] = ()
    observers: tuple[Callback, ...] = ()
    controls: tuple[Callback, ...] = ()
    surgery_callbacks: tuple[Callback, ...] = ()
    follow: Callable[[Values], Values] = field(default=lambda values: values)


@options
class _NoOptions:
    """Options of a method without options."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """The training run to which `Method.attach` adds a method; not for use after that call.

    Args:
        start: Checkpoint that is trained.
        task: Number of the task, from 0; a later task continues from the one before.
        domains: New domains, which are trained on.
        base_sequences: Returns domain → training sequences of `data.old`, int [N, T]. Those of
            earlier tasks, saved and generated ones are in `Task.old_sequences`.
        bounds: Start and end of a text.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per batch.
        tokens_per_step: Tokens of all processes and accumulated batches.
        max_steps: Optimizer steps.
        new_units: As in `Task`.
        seed: Labels → seed for the randomness of the method.
        log: Prints a line, given its label and text.
    """

    start: Source
    task: int
    domains: tuple[str, ...]
    base_sequences: Callable[[], Mapping[str, Tensor]]
    bounds: TextBounds
    sequence_length: int
    batch_size: int
    tokens_per_step: int
    max_steps: int
    new_units: Mapping[str, tuple[Tensor | None, ...]]
    seed: Callable[..., int]
    log: Callable[[str, str], None]


class Method:
    """Base class of what acts in a training run. Hooks do nothing by default.

    Args:
        arguments: Fields of `Options`.
    """

    name = ""
    Options: ClassVar[type[Any]] = _NoOptions
    whole_weights: ClassVar[str] = ""  # the reason to refuse trainer=fsdp, if there is one
    last_weights: ClassVar[str] = ""  # the reason to refuse pipeline.publish=best

    def __init__(self, **arguments: Any) -> None:
        self.options = self.Options(**arguments)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        """Yield problems of the method with the options of a run."""
        yield from ()

    @classmethod
    def start_problems(cls, options: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        """Yield problems of the method with the models of a run."""
        yield from ()

    @classmethod
    def num_frozen(cls, options: Any, trained: Model, before: Model, run: RunRequest) -> int:
        """Return the maximum number of parameters that stay out of the optimizer until the end.

        The optimizer holds partly frozen parameters completely.

        Args:
            trained: Trained model.
            before: Model before the expansion.
        """
        return 0

    def plain(self) -> dict[str, Any]:
        """Return the options as the lineage and summary.json record them."""
        return Component(name=self.name, kind=type(self), options=self.options).plain()

    def peak_rate(self, configured: float, base: Model) -> float:
        """Return the peak learning rate of the training.

        Args:
            configured: That of `training`.
            base: Initial model of the run.
        """
        return configured

    def load(self, source: Source) -> nn.Module:
        """Load a checkpoint in float32 on the CPU: the start of the training, and its result.

        Training writes the weights of the loaded model under their names.
        """
        from tritter.core.models import load_model

        return load_model(source.folder, model=source.model)

    def attach(self, trainee: Trainee, setting: Setting) -> None:
        """Add loss terms and callbacks to a model, freeze weights, or wrap it in another module.

        Called in the main process, before the module and its optimizer are built. The control has
        forgetting mitigation, but neither growth nor experts. The router stage of appended experts
        calls the other hooks of a method without this one.
        """

    def lineage_records(
        self, before: Model, after: Model, reports: Mapping[str, Any]
    ) -> Sequence[ExpansionRecord]:
        """Return records of what the method changed in the model, for the published lineage.

        Args:
            before: The model at the start of the training run.
            after: The model at its end.
            reports: `report_name` → report of the callbacks that have one.
        """
        return ()

    def summary(self, fits: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the work of the method in a branch as plain data, for `methods` of summary.json.

        Called on a new instance, which has no more than its options.

        Args:
            fits: Of each training run, in order: its `steps`, the `reports` of its callbacks by
                `report_name`, and the measured `usage` of LoRA experts.
        """
        return {}
