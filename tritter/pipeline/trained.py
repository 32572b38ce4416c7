"""Writes the results of training to the run folder."""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.checkpoints import Lineage, Source, write_checkpoint
from tritter.checkpoints.folder import Artifact, copy_small_files
from tritter.checkpoints.state import KeptSequences, State
from tritter.core.families import Config, Model
from tritter.core.models import model_of, uninitialised_model
from tritter.evaluation.losses import sequence_losses
from tritter.methods.whole import experts_writer, is_of_experts
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.pipeline.stages.importance import kept_sequences_of
from tritter.storage.tensors import is_finite
from tritter.storage.writer import TensorStream
from tritter.targets import plain
from tritter.training import FitResult, Method
from tritter.training.fitting import LEFTOVERS_NAME
from tritter.training.parameters import whole_state


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWriter:
    """Writes a trained model as the child of the checkpoint from which its training started.

    It is a picklable record, because it is sent to the training processes.

    Args:
        start: folder of the initial checkpoint.
        start_model: its model.
        target: folder to write.
        lineage: lineage of the child without the steps; tensor checksums and FFN widths are those
            of the initial checkpoint.
        dtype: dtype of the weights. Training is in float32; only published weights are converted.
        frees_start: delete the initial weights before writing, because they can be recreated.
        steps_before: optimizer steps of the branch before this training run.
        earlier_steps: optimizer steps of earlier tasks since the last expansion.
        offset_after: number of steps of the branch → writer of the router offset of appended
            experts, or None once they are fully open; None without them.
        work: folder of the training run, if it leaves state of methods.
        after_write: called with the model after it is written.
        kept_sequences: sequences to store with the model.
        methods: what acted in the training run, for the lineage.
        has_frozen_base: only LoRA experts were trained, so the base is written unchanged.
    """

    start: Path
    start_model: Model
    target: Path
    lineage: Lineage
    dtype: str = "float32"
    frees_start: bool = False
    steps_before: int = 0
    earlier_steps: int = 0
    offset_after: Callable[[int], Artifact | None] | None = None
    work: Path | None = None
    after_write: Callable[[nn.Module], None] | None = None
    kept_sequences: KeptSequences = field(default_factory=KeptSequences)
    methods: tuple[Method, ...] = ()
    has_frozen_base: bool = False

    @classmethod
    def of_stage(
        cls,
        run: Run,
        branch: Branch,
        start: Source,
        location: str,
        *,
        stage: str,
        offset_after: Callable[[int], Artifact | None] | None,
    ) -> "TrainedWriter":
        """Return the writer for the result of one training run of a branch.

        Args:
            location: folder of the result, relative to the run folder.
            stage: name of the training run in the lineage.
            offset_after: see the class.
        """
        config, parent, target = run.config, start.own_lineage, run.folder / location
        sections: tuple[str, ...] = ()
        if start.model.family.has_experts:
            sections = ("moe_routing",) if offset_after is None else ("moe_routing", "adaptation")
        lineage = replace(
            parent,
            parent_hash=parent.model_hash,
            parent_path=os.path.relpath(start.folder, target),
            training_config={
                "stage": stage,
                "training": asdict(config.training),
                **{name: asdict(getattr(config, name)) for name in sections},
                "forgetting": [
                    {"name": one.name, **plain(one.arguments)} for one in config.forgetting
                ],
                "old": run.data.source_records(run.data.old_domains_of(branch)),
                "new": run.data.source_records(run.data.new_domains_of(branch)),
                **run.data.split_record(),
            },
            split=run.data.text.split,
            domains=run.data.learned(
                (*run.data.old_domains_of(branch), *run.data.new_domains_of(branch))
            ),
        )
        return cls(
            start=start.folder,
            start_model=start.model,
            target=target,
            lineage=lineage,
            offset_after=offset_after,
        )

    @classmethod
    def of_branch(
        cls,
        run: Run,
        branch: Branch,
        *,
        offset_after: Callable[[int], Artifact | None] | None,
    ) -> "TrainedWriter":
        """Return the writer for the trained model of a branch."""
        start, stage = run.source(branch.location), "continued training"
        has_frozen_base = run.config.experts is not None and not branch.is_control
        dtype = run.published_dtype
        if not branch.is_final:  # later training runs start from float32
            dtype = start.tensors.main_dtype if has_frozen_base else "float32"
        return replace(
            cls.of_stage(
                run, branch, start, branch.trained, stage=stage, offset_after=offset_after
            ),
            dtype=dtype,
            earlier_steps=start.own_lineage.step if branch.task else 0,
            work=run.folder / branch.name,
            kept_sequences=kept_sequences_of(run, branch),
            has_frozen_base=has_frozen_base,
        )

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        """Write `model` after this training run."""
        steps, start = self.steps_before + result.weights_step, self.start_model
        offset = None if self.offset_after is None else self.offset_after(steps)
        if self.frees_start:
            _unlink_weights(self.start, model)
        config, base = start.config, Source.written(self.start, start, self.lineage)
        tensors: TensorStream | Callable[[Path], dict[str, str]]
        if not self.has_frozen_base:
            config = _config_after(config, model)
            trained = dict(start.changed(config).disk_tensors(whole_state(model)))
            dtype = fitting_dtype(trained.values(), self.dtype)
            config["dtype"] = dtype
            tensors = _rounded(TensorStream.of(trained.items()), start, dtype)
        elif base.tensors.main_dtype == self.dtype:
            tensors = base.link_into
        else:
            tensors = _rounded(base.stream(), start, self.dtype)
            config = {**config, "dtype": self.dtype}
        after = start.changed(config)
        records = (each.lineage_records(start, after, result.reports) for each in self.methods)
        lineage = replace(
            self.lineage,
            step=self.earlier_steps + steps,
            stock_loadable="yes" if offset is None else "after adaptation",
            expansion_history=(*self.lineage.expansion_history, *chain(*records)),
            training_config={**self.lineage.training_config, "last_rate": result.last_rate},
        )
        losses = dict(self.kept_sequences.losses)
        for name in self.kept_sequences.sequences.keys() - losses.keys():
            losses[name] = sequence_losses(model, self.kept_sequences.sequences[name])
        write_checkpoint(
            self.target,
            config=config,
            tensors=tensors,
            lineage=lambda: lineage,
            artifacts=(
                partial(copy_small_files, self.start),
                offset,
                None if self.work is None else partial(write_states, self.work),
                replace(self.kept_sequences, losses=losses).write,
                experts_writer(model),
            ),
            overwrite=True,
        )
        if self.after_write is not None:
            self.after_write(model)


def _rounded(stream: TensorStream, model: Model, dtype: str) -> TensorStream:
    rounded = getattr(torch, dtype)
    return stream.to(rounded, unrounded=model.family.unrounded(model.config, rounded))


def fitting_dtype(values: Iterable[Tensor], dtype: str) -> str:
    """Return `dtype`, or float32 if a value overflows in float16."""
    if dtype == "float16" and not all(is_finite(value.detach().half()) for value in values):
        return "float32"
    return dtype


@torch.no_grad()
def round_weights(model: nn.Module, dtype: str) -> None:
    """Round a model's weights to the published dtype; computation keeps its dtype.

    LoRA experts are published unrounded.
    """
    rounded, whole = getattr(torch, fitting_dtype(model.parameters(), dtype)), model_of(model)
    unrounded = whole.family.unrounded(whole.config, rounded)
    for name, parameter in model.named_parameters():
        is_kept = is_of_experts(name) or name in unrounded
        if not is_kept and parameter.is_floating_point():
            parameter.copy_(parameter.to(rounded))


def _unlink_weights(folder: Path, model: nn.Module) -> None:
    """Remove the weights that a model was loaded from.

    safetensors maps files into memory; disk space is freed only after the last mapping ends.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _config_after(config: Config, model: nn.Module) -> Config:
    """Return the config of the initial checkpoint, updated by changes of the live model."""
    before, after = model_of(uninitialised_model(config)).config, model_of(model).config
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    return {key: config[key] for key in config if key in after or key not in before} | changed


def write_states(work: Path, folder: Path) -> None:
    """Write the state of methods that a training run left in its folder next to its model."""
    if (state := State.read(work / LEFTOVERS_NAME)) is not None:
        state.write(folder)
