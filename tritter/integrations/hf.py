"""Forgetting mitigation in `transformers.Trainer`, TRL's `SFTTrainer` and their subclasses.

`with_forgetting` returns a subclass that runs the same method objects as Tritter's own loop:

- `compute_loss` adds losses that need the batch (distillation);
- `training_step` lets methods observe the gradients of a finished optimizer step, then adds the
  gradients of penalties (EWC, L2-SP, SI), once per step and before clipping;
- `get_train_dataloader` mixes old rows into the batches (replay);
- `save_model` and `train` write the methods' state into `checkpoint-N` and read it again;
- a callback notifies methods after each step, and runs the gate at the end of training.

Callbacks alone cannot do this: they do not see the loss, and their hook on gradients comes after
clipping. Only public methods of the Trainer are overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from tritter.checkpoints.state import State, write_state
from tritter.core.models import backbone_of, head_of, load_model, model_of
from tritter.data.batches import BatchStream, num_ranks
from tritter.data.chat import Chat
from tritter.data.mixed_rows import OldData, PackedText, check_old_data, mixed_loader
from tritter.data.packing import MarkedText
from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.evaluation.gate import GateResult, retention_check
from tritter.evaluation.losses import document_losses
from tritter.evaluation.statistics import PairedScores
from tritter.methods.forgetting import (
    EWC,
    L2SP,
    SI,
    Distill,
    OnlineEWC,
    Replay,
    SelfReplay,
    build_methods,
    needs_of,
)
from tritter.options import checked
from tritter.seeds import derived_seed
from tritter.storage.atomic import remove_folder
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.hub import locate
from tritter.storage.writer import TensorStream
from tritter.targets import Component
from tritter.training import ForgettingMethod, Preparation, Task, Values
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.forgetting_method import WRITTEN, replayed_share
from tritter.training.parameters import disk_values

_NAMED = {kind.name: kind for kind in (EWC, OnlineEWC, L2SP, SI, Distill, Replay, SelfReplay)}
_FORGETTING_FOLDER = "forgetting"  # of a checkpoint-N
_GATE_CONFIDENCE = 0.95
_PARALLEL = {"NO", "MULTI_GPU", "MULTI_CPU"}  # accelerate's names: one process, or DDP
_logger = logging.get_logger(__name__)


def with_forgetting(
    trainer_class: type[Any], methods: Sequence[str | ForgettingMethod]
) -> type[Any]:
    """Return a subclass of a Hugging Face trainer with forgetting mitigation.

    The subclass takes the arguments of `trainer_class` and, by keyword, those of
    `ForgettingMixin`.

    Args:
        trainer_class: `transformers.Trainer`, `trl.SFTTrainer` or another subclass of Trainer.
        methods: names for default options, or objects such as `EWC(ewc_lambda=1e3)`. Each trainer
            builds its own instances.

    Raises:
        RequestError: a method is unknown or has invalid options, two methods can't be combined, or
            `trainer_class` is not a Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        reason = "must be transformers.Trainer or a subclass of it"
        raise RequestError(Problem("trainer_class", repr(trainer_class), reason=reason))
    components = tuple(map(_component, [methods] if isinstance(methods, str) else methods))
    raise_problems(list(_method_problems(components)))
    own = {"forgetting_components": components, "__doc__": ForgettingMixin.__doc__}
    return type(f"Forgetting{trainer_class.__name__}", (ForgettingMixin, trainer_class), own)


def _component(method: str | ForgettingMethod) -> Component:
    if isinstance(method, ForgettingMethod):
        raise_problems(checked(method.options, prefix=f"methods.{method.name}"))
        return Component(name=method.name, kind=type(method), options=method.options)
    if kind := _NAMED.get(str(method)):
        return Component(name=kind.name, kind=kind, options=kind.Options())
    reason = f"must be one of {', '.join(_NAMED)}, or a method such as EWC(ewc_lambda=1e3)"
    near = nearest(str(method), _NAMED)
    raise RequestError(Problem("methods", str(method), reason=reason, nearest=near))


def _method_problems(components: Sequence[Component]) -> Iterator[Problem]:
    """Yield problems of the methods and their combination."""
    names = [one.name for one in components]
    mixing = [one for one in components if one.kind.needs(one.options).mixes]
    for one in components:
        if names.count(one.name) > 1:
            yield Problem("methods", one.name, reason="a method may occur only once")
            return
        reason = "not available in the Hugging Face Trainer; "
        if one.kind.freezes:
            yield Problem("methods", one.name, reason=f"{reason}call requires_grad_(False) instead")
        for hook in ("peak_rate", "load", "attach"):
            if _overrides(one.kind, hook):
                yield Problem("methods", one.name, reason=f"{reason}its hook {hook} needs train.py")
        if isinstance(one.options, Distill.Options) and one.options.rows == "old" and not mixing:
            yield Problem("methods.distill.rows", "old", reason="no method replays old rows")
    if (share := replayed_share(mixing)) >= 1:
        keys = [f"methods.{one.name}.fraction" for one in mixing]
        yield Problem(" + ".join(keys), float(share), reason="the sum must be below 1")


class ForgettingMixin(Trainer):  # in front of the trainer class
    """A Hugging Face trainer with forgetting mitigation.

    Args:
        old_data: data of earlier training: a list of texts, a tokenised `datasets.Dataset`, or a
            mapping of domains to these.
        sequence_length: sequence length for packing old texts. Default: the longest of the first
            256 training rows.
        gate_documents: domain → texts that the gate scores before and after training.
        retention: maximum relative increase of the loss on a domain of `gate_documents`.

    Attributes:
        gate: result of the gate; None before the end of training, or without `gate_documents`.

    Raises:
        RequestError: a setting of the trainer can't be combined with the methods.
    """

    forgetting_components: tuple[Component, ...] = ()

    def __init__(
        self,
        *args: Any,
        old_data: Mapping[str, OldData] | OldData | None = None,
        sequence_length: int | None = None,
        gate_documents: Mapping[str, Sequence[str]] | None = None,
        retention: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        raise_problems(list(_trainer_problems(self, self.forgetting_components)))
        if old_data is not None and not isinstance(old_data, Mapping):
            old_data = {"old": old_data}
        self.forgetting = _Forgetting(
            self,
            old_data=old_data or {},
            sequence_length=sequence_length,
            gate_documents=gate_documents or {},
            retention=retention,
        )
        self.gate: GateResult | None = None
        self.add_callback(_AfterSteps(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train. A resumed run restores the methods' state from the checkpoint.

        Raises:
            RequestError: the checkpoint has no state of these methods.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                reason = f"{self.args.output_dir} has no checkpoint to resume from"
                raise RequestError(Problem("resume_from_checkpoint", True, reason=reason))
        with _stock_forward(self.model):  # an earlier training run may have patched it
            self.forgetting.begin(Path(checkpoint) / _FORGETTING_FOLDER if checkpoint else None)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self.forgetting.is_running = False

    def get_train_dataloader(self) -> Any:
        """Return the trainer's loader, with old rows mixed in if a method replays them."""
        return self.forgetting.mix_loader(super().get_train_dataloader())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step; each has all, since losses are averaged over them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.forgetting.adds_losses and len(batches) > 1:
            names = ("input_ids", "attention_mask", "is_replay")
            window = [{n: each[n] for n in names if n in each} for each in batches]
            batches = [{**each, "window": window} for each in batches]
        return batches, num_items

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the trainer's loss plus the losses of methods that need the batch.

        The added losses are scaled to be averaged over the micro-batches of an optimizer step,
        whether or not the trainer divides the loss by their number later.
        """
        inputs = dict(inputs)
        is_replay, window = (inputs.pop(name, None) for name in ("is_replay", "window"))
        arguments = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        running = self.forgetting
        is_read = running.adds_losses or running.observes_batches
        if not (is_read and running.is_running and self.model.training):
            return super().compute_loss(model, inputs, **arguments)
        batch = _method_batch(inputs, is_replay)
        if window is not None:
            batch["window"] = window
        with self.accelerator.autocast():
            running.observe_batch(self.model, batch)
        with _capture_logits(self.model, should_capture=running.adds_losses) as logits:
            result = super().compute_loss(model, inputs, **arguments)
        if not running.adds_losses:
            return result
        scale = 1.0
        if self._is_loss_averaged(num_items_in_batch):
            scale = 1 / self.current_gradient_accumulation_steps
        with self.accelerator.autocast():
            extra = running.extra_loss(self.model, batch, logits(), scale=scale)
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    def _is_loss_averaged(self, num_items_in_batch: Any) -> bool:
        """Return True if the loss is already averaged over the whole step."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # former trainers have none
        if is_scaled is not None:
            return bool(is_scaled)
        has_count = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(has_count or self.compute_loss_func is not None)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch; after the last of a step, apply the methods to the gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.forgetting.apply_to_gradients(self.model)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log `forgetting/<method>/loss` in addition to the training loss."""
        if "loss" in logs and self.forgetting.is_running:
            logs = {**logs, **self.forgetting.losses(self.model)}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and the state of the methods.

        During training, the state is in `forgetting/`, from which `train` resumes. After training,
        it is in `state/`, which later training runs use.
        """
        super().save_model(output_dir, _internal_call=_internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if not self.forgetting.is_running:
            self.forgetting.write_end(folder)
        elif not self.args.save_only_model:
            self.forgetting.save(folder / _FORGETTING_FOLDER)


class _AfterSteps(TrainerCallback):
    """Notify methods after each step and at the end of training."""

    def __init__(self, trainer: ForgettingMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.forgetting.after_step(self._trainer.model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer  # with the weights of the best step, if there is one
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        step = state.global_step if best is None else int(best.rpartition("-")[2])
        trainer.forgetting.end(trainer.model, step, best)
        trainer.gate = trainer.forgetting.run_gate()
        if trainer.gate is not None:
            changes = {f"gate/{c.subject}/change": c.value for c in trainer.gate.checks}
            trainer.log({name: value for name, value in changes.items() if value is not None})
            level = "info" if trainer.gate.status == "kept" else "warning"
            getattr(_logger, level)("gate: %s", trainer.gate.status)


def _trainer_problems(trainer: Trainer, components: Sequence[Component]) -> Iterator[Problem]:
    """Yield settings of a trainer that can't be combined with the methods."""
    args, kinds = trainer.args, [one.kind for one in components]
    kind = getattr(trainer.accelerator.distributed_type, "value", "NO")
    if (
        kind not in _PARALLEL
        or trainer.is_model_parallel
        or args.n_gpu > 1
        or getattr(trainer, "is_distributed_loading_by_transformers", False)
    ):
        reason = "the methods do not support weights that are sharded or replicated this way"
        advice = "use one device, or DDP by torchrun or accelerate launch"
        yield Problem("args.parallel_mode", kind, reason=f"{reason}; {advice}")
    if trainer.model_init is not None:
        yield Problem("model_init", reason="model_init would replace the model; pass model=")
    if args.load_best_model_at_end and args.save_only_model:
        for one in components:
            if one.kind.needs(one.options).leaves:
                reason = f"the state of {one.name} at the best step would not be saved; use False"
                yield Problem("args.save_only_model", True, reason=reason)
    if args.auto_find_batch_size:
        reason = "a retried step would count twice; set per_device_train_batch_size"
        yield Problem("args.auto_find_batch_size", True, reason=reason)
    if any(_overrides(k, "observe_gradients") or _overrides(k, "add_to_gradients") for k in kinds):
        optimizer = str(getattr(args.optim, "value", args.optim))
        if "layerwise" in optimizer or "lomo" in optimizer:
            reason = "it steps within the backward pass, before a penalty can be added"
            yield Problem("args.optim", optimizer, reason=reason)
        if args.fp16:
            reason = "penalties would be added to scaled gradients; use bf16=True"
            yield Problem("args.fp16", True, reason=reason)
    if any(each.uses_weights for each in kinds):
        if args.use_liger_kernel:
            reason = "its kernels do not compute the per-sequence gradients that methods need"
            yield Problem("args.use_liger_kernel", True, reason=reason)
        _ = model_of(trainer.model).family  # refuses PEFT models and unknown architectures
    if args.torch_compile and Distill in kinds:
        reason = "distillation reads hidden states with a hook; remove one of the two"
        yield Problem("args.torch_compile", True, reason=reason)


def _method_batch(inputs: Mapping[str, Any], is_replay: Tensor | None) -> dict[str, Any]:
    """Return a batch for the methods, with `is_replay` for each row."""
    rows = inputs["input_ids"]
    if is_replay is None:
        is_replay = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    elif len(is_replay) != len(rows):
        reason = "distill and si need its rows apart; use False and packing_strategy=wrapped"
        raise RequestError(Problem("args.padding_free", True, reason=reason))
    return {**inputs, "is_replay": is_replay}


@contextmanager
def _capture_logits(model: nn.Module, *, should_capture: bool) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that returns the logits [B, T, V] of the task's forward pass.

    They are computed from the last hidden states if TRL's fused head skipped them.
    """
    captured: dict[str, Tensor] = {}
    handles = []

    def capture(module: nn.Module, arguments: Any, output: Any) -> None:
        for name in ("logits", "last_hidden_state"):
            value = getattr(output, name, None)
            if isinstance(value, Tensor) and value.requires_grad:
                captured[name] = value

    def logits() -> Tensor:
        if "logits" in captured:
            return captured["logits"]
        if not captured:
            raise RequestError("methods: the model's forward pass returned no logits to distill.")
        head = head_of(model)
        if head is None:
            reason = "the fused loss gives no logits of this model type; use transformers.Trainer"
            raise RequestError(f"methods: {reason}.")
        return head(captured["last_hidden_state"])

    if should_capture:
        handles = [each.register_forward_hook(capture) for each in (model, backbone_of(model))]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


class _Forgetting:
    """The methods of one trainer with their data and state, and the gate.

    Args:
        trainer: the trainer with model, arguments, data and tokenizer.
        old_data: domain → texts or tokenised rows.
        sequence_length, gate_documents, retention: see `ForgettingMixin`.
    """

    def __init__(
        self,
        trainer: ForgettingMixin,
        *,
        old_data: Mapping[str, OldData],
        sequence_length: int | None,
        gate_documents: Mapping[str, Sequence[str]],
        retention: float,
    ) -> None:
        self._trainer = trainer
        self._components = trainer.forgetting_components
        self._needs = needs_of(self._components)
        self._old = {name: check_old_data(name, data) for name, data in old_data.items()}
        self._packing = PackedText(
            trainer.processing_class,
            config=trainer.model.config,
            generation=getattr(trainer.model, "generation_config", None),
            rows=trainer.train_dataset,
            sequence_length=sequence_length,
        )
        self._gate_documents, self._retention = gate_documents, retention
        self.methods: tuple[ForgettingMethod, ...] = ()
        self.is_running = False
        self._task = Task(seed=self._seed())
        self._kinds: tuple[str, ...] = ()  # of state that the methods began with
        self._teacher_hash: str | None = None
        self._before: dict[str, Tensor] = {}  # gate domain → nats of its documents
        self._added: dict[str, Tensor] = {}  # method → sum of what it added to the loss
        self._steps_added = 0
        self._leftovers: dict[str, Values] = {}
        raise_problems(list(self._data_problems()))

    def _data_problems(self) -> Iterator[Problem]:
        if WRITTEN in self._old and any(needs.writes for needs in self._needs):
            reason = "the name of the text that the model generates; rename this domain"
            yield Problem("old_data", WRITTEN, reason=reason)
        for one, needs in zip(self._components, self._needs, strict=True):
            is_known = self._old or self._has_saved_state(needs.instead)
            if needs.old_text and not (is_known or any(map(needs.can_read_text_of, self._needs))):
                reason = f"{one.name} needs old_data: texts or tokenised rows; "
                reason += "without old data use l2sp, distill or self_replay"
                yield Problem("old_data", None, reason=reason)
            for name in getattr(one.options, "weights", None) or {}:
                if name not in self._old:
                    reason = f"unknown domain of old_data; must be one of {', '.join(self._old)}"
                    near = nearest(name, self._old)
                    yield Problem(f"methods.{one.name}.weights", name, reason=reason, nearest=near)
            if needs.mixes and self._trainer.args.train_sampling_strategy != "random":
                value = self._trainer.args.train_sampling_strategy
                reason = f"{one.name} sets the order of the rows; must be random"
                yield Problem("args.train_sampling_strategy", value, reason=reason)

    # Old data

    def _seed(self) -> int:
        args = self._trainer.args
        return derived_seed(args.seed if args.data_seed is None else args.data_seed, "forgetting")

    @cached_property
    def _sequences(self) -> dict[str, Tensor]:
        """Old domain → int [N, T]: texts and rows packed into training sequences."""
        return {name: self._packing.sequences(name, data) for name, data in self._old.items()}

    def mix_loader(self, loader: Any) -> Any:
        """Return a loader with old rows mixed in if a method replays them."""
        mixing = [needs for needs in self._needs if needs.mixes]
        if not (self.is_running and mixing):
            return loader
        args, seed = self._trainer.args, self._task.seed
        old: dict[str, Any] = {}
        if any(needs.old_text for needs in mixing):
            for name, data in self._old.items():  # only texts are packed
                old[name] = self._sequences[name] if isinstance(data, tuple) else data
        if self._task.written is not None:
            old[WRITTEN] = self._task.written

        def mix(stream: BatchStream, numbers: Mapping[str, Tensor]) -> BatchStream:
            rows = {name: each for name, each in numbers.items() if name != WRITTEN} or numbers
            task = Task(seed=seed, old_sequences=rows, written=numbers.get(WRITTEN))
            for method in sorted(self.methods, key=lambda method: method.name):
                stream = method.mix(stream, task)
            return stream

        return mixed_loader(
            loader,
            old,
            mix=mix,
            fraction=replayed_share(self._components),
            batch_size=args.train_batch_size * args.world_size,
            seed=seed,
            is_floored=args.dataloader_drop_last,
        )

    # Begin, and resume

    def begin(self, folder: Path | None) -> None:
        """Begin a training run, or resume one.

        Args:
            folder: folder with the methods' state in a checkpoint; None for a new run.
        """
        model, seed = self._trainer.model, self._seed()
        if any(one.kind.uses_weights for one in self._components):
            model.to(self._trainer.args.device)
        teacher = self._teacher()
        saved = None if folder is None else self._read(folder)
        if saved is None:
            with MarkedText(self._packing.bounds).attached(model):
                state, written = self._prepare_methods()
        else:  # the loaded state below already includes the first state
            ones = {name: value.float() for name, value in _all_old(model).items()}
            state, written = dict.fromkeys(saved["kinds"], ones), saved["written"]
        self._kinds = tuple(state)
        old = self._old_sequences(written)
        self._task = Task(
            seed=seed,
            old_sequences=old,
            written=written,
            latest=tuple(old),
            carried=_all_old(model),
            state=state,
            state_before=state,
            teacher=teacher,
        )
        self.methods = build_methods(self._components)
        for method in self.methods:
            with MarkedText(self._packing.bounds).attached(model):
                method.begin_task(model, self._task)
            if saved is not None:
                method.load_state_dict(saved["methods"][method.name])
        self._leftovers, self._added = {}, {}
        self.is_running = True
        if saved is None:
            self._before = {name: each.values for name, each in self._scores().items()}
            self.after_step(model, 0)
        else:
            self._before = saved["gate"]

    def _old_sequences(self, written: Tensor | None) -> dict[str, Tensor]:
        """Return the old sequences that methods other than replay read."""
        reads = any(needs.old_text and not needs.mixes for needs in self._needs)
        if self._old:
            return self._sequences if reads else {}
        return {} if written is None else {WRITTEN: written}

    def _prepare_methods(self) -> tuple[dict[str, Values], Tensor | None]:
        """Return the initial state of the methods, and the text that the model generated."""
        model, outer = self._trainer.model, self._trainer.processing_class
        state, written = self._earlier_state(), None
        methods = zip(build_methods(self._components), self._needs, strict=True)
        for method, needs in sorted(methods, key=lambda each: not each[1].writes):
            if not (needs.prepares or needs.writes):
                continue
            old = self._old_sequences(written)
            drawing = Task(seed=self._seed(), old_sequences=old)
            prepared = method.prepare(
                Preparation(
                    model=model,
                    domains=tuple(old),
                    draw=drawing.draw,
                    sequence_length=self._packing.sequence_length,
                    bounds=self._packing.bounds,
                    turns=Chat(getattr(outer, "tokenizer", outer)).turns() if needs.writes else (),
                    seed=partial(derived_seed, self._seed()),
                    state=state,
                    log=_logger.info,
                )
            )
            written = prepared.written if needs.writes else written
            state |= {kind: dict(prepared.state[kind]) for kind in needs.prepares}
        if num_ranks() > 1:  # bitwise identical in every process
            tensors = chain.from_iterable(values.values() for values in state.values())
            for tensor in (*tensors, *([] if written is None else [written])):
                sent = tensor.to(self._trainer.args.device)
                distributed.broadcast(sent, 0)
                tensor.copy_(sent)
        return state, written

    def _earlier_state(self) -> dict[str, Values]:
        """Return the state in the model's checkpoint that methods need."""
        wanted = {kind for needs in self._needs for kind in needs.state}
        found = State.read(self._model_folder) if wanted and self._model_folder else None
        if found is None:
            return {}
        model = self._trainer.model
        own_model, device = model_of(model), self._trainer.args.device
        return {
            kind: {n: v.to(device) for n, v in own_model.live_tensors(own).items()}
            for kind, own in found.kinds.items()
            if kind in wanted
        }

    @cached_property
    def _model_folder(self) -> Path | None:
        """The folder that the model was loaded from, if it is on disk."""
        name = str(getattr(self._trainer.model, "name_or_path", "") or "")
        return Path(name) if name and Path(name).is_dir() else None

    def _has_saved_state(self, kinds: Sequence[str]) -> bool:
        found = State.read(self._model_folder) if kinds and self._model_folder else None
        return found is not None and set(kinds) <= found.kinds.keys()

    def _teacher(self) -> nn.Module | None:
        """Return the model to distill from: another checkpoint, or a copy of this model."""
        folders = [needs.teacher_folder for needs in self._needs if needs.teacher]
        if not folders:
            return None
        model = self._trainer.model
        teacher = (
            deepcopy(model) if folders[0] is None else load_model(locate(folders[0], key="teacher"))
        )
        teacher = teacher.to(self._trainer.args.device).eval().requires_grad_(False)
        self._teacher_hash = merkle_hash(
            {n: tensor_digest(n, p) for n, p in _named_parameters(teacher)}
        )
        return teacher

    # During training

    @cached_property
    def adds_losses(self) -> bool:
        """True if a method needs the logits of the task."""
        return any(_overrides(one.kind, "extra_loss") for one in self._components)

    @cached_property
    def observes_batches(self) -> bool:
        """True if a method computes the loss of only the new rows."""
        is_task_alone = not any(one.kind.is_in_gradients() for one in self._components)
        observing = any(_overrides(one.kind, "observe_batch") for one in self._components)
        return observing and not is_task_alone

    def observe_batch(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Let methods see a batch before its loss is computed."""
        if self.observes_batches:
            for method in self.methods:
                method.observe_batch(model, batch)

    def extra_loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor, *, scale: float
    ) -> Tensor:
        """Return the sum of the methods' loss terms for a micro-batch, times `scale`."""
        total = logits.new_zeros((), dtype=torch.float32)
        for method in self.methods:
            extra = method.extra_loss(model, batch, logits)
            if extra is not None:
                share = extra.detach() / self._trainer.current_gradient_accumulation_steps
                self._added[method.name] = self._added.get(method.name, 0.0) + share
                total = total + scale * extra
        return total

    def apply_to_gradients(self, model: nn.Module) -> None:
        """Let every method read the task's gradients before any method changes them."""
        self._steps_added += 1
        with torch.no_grad():
            for method in self.methods:
                method.observe_gradients(model)
            for method in self.methods:
                method.add_to_gradients(model)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Let methods see the model after an optimizer step; step 0 is before the first."""
        with _stock_forward(model), MarkedText(self._packing.bounds).attached(model):
            for method in self.methods:
                method.observe_step(model, step)

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Return the current penalties, and the mean of added losses since the last call.

        All processes must call it together.
        """
        found = {}
        for method in self.methods:
            value = method.logged_loss(model)
            if method.name in self._added:
                mean = self._added[method.name] / max(1, self._steps_added)
                value = float(self._trainer.accelerator.reduce(mean, "mean"))
            if value is not None:
                found[f"forgetting/{method.name}/loss"] = value
        self._added, self._steps_added = {}, 0
        return found

    # The end, and files

    def end(self, model: nn.Module, step: int, best: str | None) -> None:
        """Collect the methods' state of the last step, or of the best one's checkpoint."""
        self._end_step = step
        if best is not None and any(needs.leaves for needs in self._needs):
            saved = self._read(Path(best) / _FORGETTING_FOLDER)
            for method in self.methods:
                method.load_state_dict(saved["methods"][method.name])
        self._leftovers = {
            kind: values
            for method in self.methods
            for kind, values in method.end_task(model).items()
        }

    def run_gate(self) -> GateResult | None:
        """Score the gate's documents again and compare."""
        limits = {"bound": self._retention, "confidence": _GATE_CONFIDENCE}
        checks = [
            retention_check(name, replace(after, values=self._before[name]), after, **limits)
            for name, after in self._scores().items()
        ]
        return GateResult.of(checks) if checks else None

    def _scores(self) -> dict[str, PairedScores]:
        with self._trainer.accelerator.autocast():
            return {
                name: document_losses(
                    self._trainer.model,
                    self._packing.tokenise_texts(texts),
                    sequence_length=self._packing.sequence_length,
                    bounds=self._packing.bounds,
                    batch_size=self._trainer.args.eval_batch_size,
                )
                for name, texts in self._gate_documents.items()
            }

    def _setup(self) -> dict[str, Any]:
        """Return the settings that must be equal when a run is resumed."""
        return {
            "methods": {one.name: one.plain() for one in self._components},
            "old_data": {name: len(data) for name, data in self._old.items()},
            "gate_documents": {name: len(texts) for name, texts in self._gate_documents.items()},
            "teacher": self._teacher_hash,
        }

    def save(self, folder: Path) -> None:
        """Write the methods' state, as safetensors and JSON."""
        content = {
            "setup": self._setup(),
            "kinds": list(self._kinds),
            "written": self._task.written,
            "gate": self._before,
            "methods": {method.name: method.state_dict() for method in self.methods},
        }
        SafetensorsCheckpointIO().save_checkpoint(content, folder)

    def _read(self, folder: Path) -> dict[str, Any]:
        """Return the state that `save` wrote."""
        key = "resume_from_checkpoint"
        if not folder.is_dir():
            reason = (
                f"it has no {_FORGETTING_FOLDER}/ folder; a trainer without these methods saved it"
            )
            raise RequestError(Problem(key, str(folder.parent), reason=reason))
        saved = SafetensorsCheckpointIO().load_checkpoint(folder)
        for name, value in self._setup().items():
            if (before := saved["setup"][name]) != value:
                reason = f"it was saved with {name} = {before}, and the trainer has {value}"
                if name == "teacher":
                    reason = "it was saved with another teacher; create the trainer with the "
                    reason += "model that training started with"
                raise RequestError(Problem(key, str(folder.parent), reason=reason))
        return saved

    def write_end(self, folder: Path) -> None:
        """Write the methods' state for later training runs into a trained model's folder."""
        if self._leftovers:
            model, left = self._trainer.model, self._leftovers.items()
            kinds = {kind: TensorStream.of(disk_values(model, values)) for kind, values in left}
            if (folder / State.FOLDER).exists():
                remove_folder(folder / State.FOLDER)
            write_state(folder, kinds, step=self._end_step)


@contextmanager
def _stock_forward(model: nn.Module) -> Iterator[None]:
    """Temporarily remove a trainer's patches of the forward pass: autocast, TRL's head, hooks.

    Per-sequence gradients can't be computed through them.
    """
    patched = model.__dict__.pop("forward", None)
    on_inputs = model.get_input_embeddings()._forward_hooks  # type: ignore[operator]
    hooks = dict(on_inputs)  # from gradient checkpointing and NEFTune
    on_inputs.clear()
    try:
        yield
    finally:
        on_inputs.update(hooks)
        if patched is not None:
            model.__dict__["forward"] = patched


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def _all_old(model: nn.Module) -> dict[str, Tensor]:
    """Return masks that mark every entry as old; expanded views, so they need no memory."""
    one = torch.ones((), dtype=torch.bool)
    return {
        name: one.to(value.device).expand(value.shape) for name, value in _named_parameters(model)
    }


def _overrides(kind: type[ForgettingMethod], hook: str) -> bool:
    return getattr(kind, hook) is not getattr(ForgettingMethod, hook)
