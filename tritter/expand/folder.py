"""Expand a checkpoint folder: source → maps → destination, one tensor in memory at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from tritter.checkpoint import (
    ExpansionRecord,
    Lineage,
    Source,
    lineage_of,
    write_checkpoint,
)
from tritter.checkpoint.expert_files import refuse_experts
from tritter.checkpoint.folder import Artifact
from tritter.checkpoint.kept_sequences import KeptSequences
from tritter.checkpoint.place import check_output, check_replaceable
from tritter.checkpoint.state import State, read_state, write_state
from tritter.checkpoint.tokenizer_files import TOKENIZER_FILES, TokenizerFiles
from tritter.errors import RequestError
from tritter.expand.change import Change
from tritter.expansion import (
    ExpansionSpec,
    ResolvedExpansion,
    build_steps,
    checked_specs,
    composed,
)
from tritter.expansion.moe_add import closed_experts
from tritter.families import (
    Config,
    LayoutKind,
    StoredTensor,
    count_parameters,
    family_of,
    layout,
)
from tritter.loadable import check_loadable
from tritter.models import read_config
from tritter.parameter_map import ParameterMap, TensorMap, rounded_weight
from tritter.parameter_map.carry import Policy, StateKind, followed, has_state
from tritter.stock_routers import AddedExperts
from tritter.storage.hashing import file_digest, merkle_hash
from tritter.storage.names import named_path
from tritter.storage.tensors import TensorFolder, is_finite
from tritter.storage.writer import TensorEntry, TensorStream

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedExpansion:
    """What an expansion would make.

    Args:
        config: config.json of the source.
        steps: the expansions in order, with their maps; none leave everything as it is.
        parameter_map: of all of them.
        seed: what random fills and choices are drawn from.
        parameters_before: counted from shapes, ties once.
        parameters_after: the same of the result.
        added_experts: those of the result that are not open yet, if any.
    """

    config: Config
    steps: tuple[ResolvedExpansion, ...]
    parameter_map: ParameterMap
    seed: int
    parameters_before: int
    parameters_after: int
    added_experts: AddedExperts | None = None

    @property
    def target_config(self) -> Config:
        return self.steps[-1].target_config if self.steps else self.config

    @property
    def change(self) -> Change:
        """The same by the names of parameters in memory."""
        return Change.of(self.parameter_map, self.config, self.target_config)


@dataclass(frozen=True, slots=True)
class Expanded:
    """What an expansion made: where it lies, the plan that was carried out, and its record."""

    folder: Path
    plan: PlannedExpansion
    lineage: Lineage

    @classmethod
    def of(cls, folder: Path, plan: PlannedExpansion) -> "Expanded":
        """Return what a plan made at `folder`."""
        return cls(folder, plan, lineage_of(folder))

    @property
    def steps(self) -> tuple[ResolvedExpansion, ...]:
        """The expansions in order, with their maps."""
        return self.plan.steps

    @property
    def parameters_before(self) -> int:
        """Parameters of the source, counted from shapes, ties once."""
        return self.plan.parameters_before

    @property
    def parameters_after(self) -> int:
        """The same of the result."""
        return self.plan.parameters_after


def plan_expansion(
    source: str | os.PathLike[str], specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PlannedExpansion:
    """Resolve `specs` against the checkpoint at `source`; reads no tensor.

    Raises:
        RequestError: no spec, unknown family, targets that cannot be had, a config that
            transformers can't build the result from, more experts for a source whose last ones
            are not open yet, or a source with LoRA experts.
        TritterError: the source has no usable config or generation settings.
    """
    return planned(named_path(source, key="source"), checked_specs(specs), seed=seed)


def planned(source: Path, specs: Sequence[ExpansionSpec], *, seed: int) -> PlannedExpansion:
    """Do the same for checked specs; none are allowed."""
    config = read_config(source)
    if specs:
        refuse_experts(source, doing="an expansion")
    steps = build_steps(config, specs, seed=seed)
    target = steps[-1].target_config if steps else config
    if steps:
        check_loadable(target, folder=source)
    return PlannedExpansion(
        config=config,
        steps=steps,
        parameter_map=composed(steps, config),
        seed=seed,
        parameters_before=count_parameters(config),
        parameters_after=count_parameters(target),
        added_experts=added_experts(AddedExperts.read(source), steps),
    )


def expand(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    specs: Sequence[ExpansionSpec] | PlannedExpansion,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    moments: Policy = "carry",
    expert_layout: LayoutKind = "hub",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Progress | None = None,
    before_placing: Callable[["Expanded"], None] | None = None,
) -> Expanded:
    """Apply `specs` in order to the checkpoint at `source` and write the result.

    Tensors are read, mapped and written one by one; nothing is loaded as a model. The result
    loads in stock transformers. Tokenizer files travel along, and so does what lies in `state/`:
    Adam's moments, Fisher and importances, anchors, averages.

    Args:
        specs: the expansions, or what `plan_expansion` made of them.
        seed: what random fills and choices are drawn from.
        dtype: of the result; by default each tensor keeps its own. Maps are applied in float32
            (float64 for float64) and rounded once.
        moments: `carry`, `zero` or `reset_new`; see `tritter.parameter_map.carry`.
        expert_layout: `hub`, a tensor for each matrix of each expert, which every reader knows;
            or `live`, the experts of a layer in one tensor, as transformers holds them.
        overwrite: replace a checkpoint that stands at `destination`; nothing else is replaced.
        progress: called with (tensors written, tensors in all).
        before_placing: called with the result in a temporary folder, while what stands at
            `destination` still does; may write into its record, or raise.

    Raises:
        RequestError: no spec, unknown family, targets that cannot be had, no place for a result,
            a source that was changed since its lineage was written or that holds values that are
            not finite; nothing is written.
        TritterError: the source is damaged or does not fit its config.
    """
    source = named_path(source, key="source")
    destination = named_path(destination, key="destination")
    check_output(destination, sources=[source], overwrite=overwrite)
    plan = (
        specs if isinstance(specs, PlannedExpansion) else plan_expansion(source, specs, seed=seed)
    )
    opened = Source.open(source, plan.config)
    artifacts = _followed(plan, source, moments, max_shard_bytes)
    stated = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    write_checkpoint(
        destination,
        config={**plan.target_config, **stated},
        tensors=_stream(opened, plan, dtype=dtype, kind=expert_layout, progress=progress),
        lineage=lambda: _child_lineage(opened, plan, destination),
        artifacts=artifacts,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        check=partial(check_replaceable, sources=[source]),
        before_placing=before_placing and (lambda place: before_placing(Expanded.of(place, plan))),
    )
    return Expanded.of(destination, plan)


def state_stream(
    plan: PlannedExpansion, rule: StateKind, tensors: TensorFolder, *, moments: Policy = "carry"
) -> TensorStream:
    """Return one kind of state of the expanded model, by name on disk; absent what starts anew."""
    source_family, family = family_of(plan.config), family_of(plan.target_config)
    disk_names = {t.name: t.disk_name for t in source_family.logical_tensors(plan.config)}
    held = {name: on_disk for name, on_disk in disk_names.items() if on_disk in tensors.headers}
    maps = plan.parameter_map.tensors
    targets = [
        t
        for t in family.logical_tensors(plan.target_config)
        if has_state(maps[t.name], rule, held.__contains__, policy=moments)
    ]
    entries = tuple(
        TensorEntry(
            t.disk_name,
            tensors.torch_dtype(held[maps[t.name].origin or ""]),
            family.shape(t, plan.target_config),
        )
        for t in targets
    )

    def read(name: str) -> Tensor:
        return tensors.get(held[name])

    values = ((t.disk_name, followed(maps[t.name], rule, read, policy=moments)) for t in targets)
    return TensorStream(entries, values)


def _followed(
    plan: PlannedExpansion, source: Path, moments: Policy, max_shard_bytes: int
) -> tuple[Artifact | None, ...]:
    """Return what stands beside the source as it stands beside the result; reads no tensor.

    Raises:
        TritterError: the state beside the source is damaged.
    """
    state = read_state(source)
    carried = None if state is None else _MappedState(plan, state, moments, max_shard_bytes)
    return TokenizerFiles(source), carried, plan.added_experts, KeptSequences.read(source)


@dataclass(frozen=True, slots=True)
class _MappedState:
    """State that follows an expansion, tensor by tensor."""

    plan: PlannedExpansion
    state: State
    moments: Policy
    max_shard_bytes: int

    def write(self, folder: Path) -> None:
        state, rules = self.state, self.state.rules
        mapped_to = partial(state_stream, self.plan, moments=self.moments)
        write_state(
            folder,
            {kind: mapped_to(rules[kind], held) for kind, held in state.kinds.items()},
            step=state.step,
            other_steps=_carried_steps(self.plan, state),
            rules=rules,
            max_shard_bytes=self.max_shard_bytes,
        )


def _carried_steps(plan: PlannedExpansion, state: State) -> dict[str, int]:
    """Return the steps of parameters that are not those of most, by name on disk."""
    names = {t.name: t.disk_name for t in family_of(plan.config).logical_tensors(plan.config)}
    targets = family_of(plan.target_config).logical_tensors(plan.target_config)
    maps = plan.parameter_map.tensors
    origins = {t.disk_name: names.get(maps[t.name].origin or "", "") for t in targets}
    return {n: state.other_steps[o] for n, o in origins.items() if o in state.other_steps}


def _stream(
    source: Source,
    plan: PlannedExpansion,
    *,
    dtype: torch.dtype | None,
    kind: LayoutKind,
    progress: Progress | None,
) -> TensorStream:
    config, maps = plan.target_config, plan.parameter_map.tensors
    targets = layout(config, kind)
    dtypes = {t.name: dtype or _dtype_of(t, source, maps) for t in targets}
    entries = tuple(TensorEntry(t.name, dtypes[t.name], t.shape) for t in targets)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for position, target in enumerate(targets):

            def read(name: str, dtype: torch.dtype = dtypes[target.name]) -> Tensor:
                return rounded_weight(maps[name], source.read, dtype)

            value = target.pack(read)
            if not is_finite(value):
                raise RequestError(
                    f"{source.folder}: {target.name} would hold values that are not finite."
                )
            yield target.name, value
            if progress is not None:
                progress(position + 1, len(targets))

    return TensorStream(entries, tensors())


def _dtype_of(target: StoredTensor, source: Source, maps: Mapping[str, TensorMap]) -> torch.dtype:
    """Return the dtype of what a target stems from; of the embedding, if it stems from nothing.

    Experts that share a tensor get the one that holds all of them without rounding.
    """
    origins = (maps[part.tensor.name].origin or "embed" for part in target.parts)
    return reduce(torch.promote_types, map(source.dtype, origins))


def added_experts(
    held: AddedExperts | None, steps: Sequence[ResolvedExpansion]
) -> AddedExperts | None:
    """Return the experts of the result that are not open yet, if any.

    Args:
        held: those of the source.

    Raises:
        RequestError: experts are added while the last ones are not open yet.
    """
    if held is None or held.is_settled:
        appended = closed_experts(steps)
        return AddedExperts(experts=appended) if appended else None
    closed_experts(steps, held=held.experts)
    return held


def _child_lineage(source: Source, plan: PlannedExpansion, destination: Path) -> Lineage:
    parent = source.lineage
    digests = source.read_digests()
    parent_hash = merkle_hash(digests)
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        parent_path=os.path.relpath(source.folder, destination),
        parent_tensor_digests=None if parent else digests,
        parent_file_digests=None if parent else known_digests(source.folder),
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(
            *(parent.expansion_history if parent else ()),
            *(_record(step, seed=plan.seed + position) for position, step in enumerate(plan.steps)),
        ),
        stock_loadable="yes" if plan.added_experts is None else "after adaptation",
        training_config=parent.training_config if parent else {},
        split=parent.split if parent else None,
        domains=parent.domains if parent else {},
    )


def known_digests(folder: Path) -> dict[str, str]:
    """Digest the files that a plain Hugging Face folder needs, and no other it may hold."""
    names = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    return {name: file_digest(folder / name) for name in names}


def _record(step: ResolvedExpansion, *, seed: int) -> ExpansionRecord:
    return ExpansionRecord(
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        expansion_type=step.spec.expansion_type,
        method=step.spec.name,
        options=step.options,
        seed=seed,
        source_config=step.source_config,
        target_config=step.target_config,
        layer_sources=step.parameter_map.layer_sources,
        map_digest=step.parameter_map.digest(),
        claims_exact=step.spec.is_exact,
    )
