"""Expand a checkpoint folder: source → maps → destination, one tensor in memory at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial, reduce
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
from tritter.errors import RequestError, TritterError
from tritter.expand.change import PlannedExpansion
from tritter.expand.room import Room, check_room, in_flight_bytes
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
    padded_shapes,
)
from tritter.parameter_map import TensorMap
from tritter.parameter_map.carry import Policy, StateKind, followed, has_state
from tritter.parameter_map.rows import WeightReader
from tritter.stock_routers import AddedExperts
from tritter.storage.hashing import file_digest, merkle_hash
from tritter.storage.reading import named_path
from tritter.storage.tensors import TensorFolder, is_finite
from tritter.storage.writer import Pieces, TensorEntry, TensorStream, padded

Progress = Callable[[int, int], None]


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
    from tritter.loadable import check_loadable
    from tritter.models import read_config

    if specs:
        refuse_experts(source, doing="an expansion")
    plan = _planned(source, read_config(source), specs, seed=seed)
    if specs:
        check_loadable(plan.target_config, folder=source)
    return plan


def plan_by_tables(
    source: Source, specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PlannedExpansion:
    """Do the same by the families' tables alone, since transformers takes seconds to import.

    `expand` asks transformers once the tensors are written, before the result is placed.
    """
    plan = _planned(source.folder, source.config, specs, seed=seed)
    return replace(plan, is_confirmed=False)


def _confirmed(plan: PlannedExpansion, source: Path) -> PlannedExpansion:
    """Return a plan with all that configs say, after transformers was asked.

    Raises:
        RequestError: transformers can't build the result.
    """
    if plan.is_confirmed:
        return plan
    try:
        found = planned(source, [step.spec for step in plan.steps], seed=plan.seed)
    except TritterError as error:
        raise RequestError(str(error)) from error
    digests = [[step.parameter_map.digest() for step in each.steps] for each in (plan, found)]
    assert digests[0] == digests[1], "the family's table and transformers read another model"
    return found


def _planned(
    source: Path, config: Config, specs: Sequence[ExpansionSpec], *, seed: int
) -> PlannedExpansion:
    steps = build_steps(config, specs, seed=seed)
    target = steps[-1].target_config if steps else config
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
    source: str | os.PathLike[str] | Source,
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
        source: a folder, or one that was opened by the config that a plan is of.
        specs: the expansions, or what `plan_expansion` made of them.
        seed: what random fills and choices are drawn from.
        dtype: of the result; by default each tensor keeps its own. Maps are applied in float32
            (float64 for float64) and rounded once.
        moments: `carry`, `zero` or `reset_new`; see `tritter.parameter_map.carry`.
        expert_layout: `hub`, a tensor for each matrix of each expert, which every reader knows;
            or `live`, the experts of a layer in one tensor, as transformers holds them.
        overwrite: replace a checkpoint that stands at `destination`; nothing else is replaced.
        progress: called with (tensors written, tensors in all).
        before_placing: called with the result while it lies in a temporary folder; may raise.

    Raises:
        RequestError: no spec, unknown family, targets that cannot be had, no place or room for a
            result, a source changed since its lineage was written, or values in it that are not
            finite; nothing is written.
        TritterError: the source is damaged or does not fit its config.
    """
    folder = source.folder if isinstance(source, Source) else named_path(source, key="source")
    destination = named_path(destination, key="destination")
    check_output(destination, sources=[folder], overwrite=overwrite)
    plan = specs
    if not isinstance(plan, PlannedExpansion):
        plan = plan_expansion(folder, plan, seed=seed)
    opened = source if isinstance(source, Source) else Source.open(folder, plan.config)
    check_room(destination, room_for(opened, plan, dtype=dtype, moments=moments))
    stated = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    confirmed = cache(partial(_confirmed, plan, folder))
    write_checkpoint(
        destination,
        config=plan.target_config,
        final_config=lambda: {**confirmed().target_config, **stated},
        tensors=_stream(opened, plan, dtype=dtype, kind=expert_layout, progress=progress),
        lineage=lambda: _child_lineage(opened, confirmed(), destination),
        artifacts=_followed(plan, folder, moments, max_shard_bytes),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        check=partial(check_replaceable, sources=[folder]),
        before_placing=before_placing and (lambda place: before_placing(Expanded.of(place, plan))),
    )
    return Expanded.of(destination, plan)


def room_for(
    opened: Source,
    plan: PlannedExpansion,
    *,
    dtype: torch.dtype | None = None,
    moments: Policy = "carry",
) -> Room:
    """Return what carrying a plan out takes of disk and memory; reads no tensor.

    Raises:
        TritterError: the state beside the source is damaged.
    """
    state = read_state(opened.folder)
    streams = {} if state is None else state_streams(plan, state, moments=moments)
    others = [entry for each in streams.values() for entry in each.entries]
    stream = _stream(opened, plan, dtype=dtype, kind="hub", progress=None)
    shapes = padded_shapes(plan.target_config)
    weights = padded(stream, shapes).entries
    in_flight = in_flight_bytes(
        layout(plan.target_config, "hub"),
        plan.parameter_map.tensors,
        others,
        source=opened,
        padded=shapes,
    )
    return Room.of(weights, others, source=opened, in_flight=in_flight)


def _followed(
    plan: PlannedExpansion, source: Path, moments: Policy, max_shard_bytes: int
) -> tuple[Artifact | None, ...]:
    """Return what stands beside the source as it stands beside the result; reads no tensor.

    Raises:
        TritterError: the state beside the source is damaged.
    """
    state = read_state(source)
    carried = None if state is None else MappedState(plan, state, moments, max_shard_bytes)
    return TokenizerFiles(source), carried, plan.added_experts, KeptSequences.read(source)


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
    reader = WeightReader(source.read)

    def rows(target: StoredTensor) -> Iterator[Tensor]:
        for part in target.parts_in_order:
            yield from reader.blocks(maps[part.tensor.name], dtypes[target.name])

    def turned(target: StoredTensor) -> Iterator[Tensor]:
        """Yield what can't come row by row, its rows being inputs, as a whole."""
        steps = [maps[part.tensor.name] for part in target.parts]
        origins = [step.origin if step.is_verbatim else None for step in steps]
        held = source.holding(target, origins)
        if held is not None:
            yield source.read_stored(held).to(dtypes[target.name])
            return
        whole = torch.cat([block.reshape(-1) for block in rows(target)])
        yield whole.view(-1, target.shape[0]).T.contiguous()

    def blocks(target: StoredTensor) -> Iterator[Tensor]:
        for block in turned(target) if target.is_transposed else rows(target):
            if not is_finite(block):
                raise RequestError(
                    f"{source.folder}: {target.name} would hold values that are not finite."
                )
            yield block

    def tensors() -> Iterator[tuple[str, Pieces]]:
        for position, target in enumerate(targets):
            step = maps[target.parts[0].tensor.name]
            origin = step.origin if step.is_verbatim else None
            is_same = origin is not None and source.holds(target, origin, dtypes[target.name])
            digest = partial(source.digests.digest, target.name) if is_same else None
            yield target.name, Pieces(partial(blocks, target), digest)
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


def state_streams(
    plan: PlannedExpansion, state: State, *, moments: Policy = "carry"
) -> dict[str, TensorStream]:
    """Return all kinds of a state, of the expanded model."""
    return {
        kind: state_stream(plan, state.rules[kind], held, moments=moments)
        for kind, held in state.kinds.items()
    }


@dataclass(frozen=True, slots=True)
class MappedState:
    """State that follows an expansion, tensor by tensor."""

    plan: PlannedExpansion
    state: State
    moments: Policy
    max_shard_bytes: int

    def write(self, folder: Path) -> None:
        state = self.state
        write_state(
            folder,
            state_streams(self.plan, state, moments=self.moments),
            step=state.step,
            other_steps=_carried_steps(self.plan, state),
            rules=state.rules,
            max_shard_bytes=self.max_shard_bytes,
        )


def _carried_steps(plan: PlannedExpansion, state: State) -> dict[str, int]:
    """Return the steps of parameters that are not those of most, by name on disk."""
    names = {t.name: t.disk_name for t in family_of(plan.config).logical_tensors(plan.config)}
    targets = family_of(plan.target_config).logical_tensors(plan.target_config)
    maps = plan.parameter_map.tensors
    origins = {t.disk_name: names.get(maps[t.name].origin or "", "") for t in targets}
    return {n: state.other_steps[o] for n, o in origins.items() if o in state.other_steps}
