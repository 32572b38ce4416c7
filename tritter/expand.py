"""Expand a checkpoint folder: source → maps → destination, one tensor in memory at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
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
    read_lineage,
    write_checkpoint,
)
from tritter.checkpoint.place import check_output, check_replaceable
from tritter.checkpoint.state import State, read_state, write_state
from tritter.checkpoint.tokenizer_files import TOKENIZER_FILES, copy_tokenizer
from tritter.config.specs import checked_specs
from tritter.errors import RequestError
from tritter.expansion import ExpansionSpec, ExpansionStep, build_steps, closed_experts
from tritter.families import Config, LayoutKind, StoredTensor, family_of, layout, pack_all
from tritter.loadable import check_loadable
from tritter.models import read_config
from tritter.parameter_map import TensorMap, carried, mapped
from tritter.parameter_map.carry import STATE_KINDS, Policy, carry, starts_anew
from tritter.routing import AddedExperts
from tritter.storage.hashing import file_digest, merkle_hash
from tritter.storage.names import named_path
from tritter.storage.tensors import TensorFolder, is_finite
from tritter.storage.writer import TensorEntry, TensorStream

Read = Callable[[str], Tensor]
Move = Callable[[TensorMap, Read], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an expansion would make.

    Args:
        config: config.json of the source.
        steps: the expansions in order, with their maps.
        parameters_before: counted from shapes, ties once.
        parameters_after: the same of the result.
        added_experts: those of the result that are not open yet, if any.
    """

    config: Config
    steps: tuple[ExpansionStep, ...]
    parameters_before: int
    parameters_after: int
    added_experts: AddedExperts | None = None

    @property
    def target_config(self) -> Config:
        return self.steps[-1].target_config


@dataclass(frozen=True, slots=True)
class Expanded:
    """What an expansion made: the plan as carried out, where it lies, and its record."""

    folder: Path
    steps: tuple[ExpansionStep, ...]
    parameters_before: int
    parameters_after: int
    lineage: Lineage

    @classmethod
    def of(cls, folder: Path, plan: Plan) -> "Expanded":
        """Return what a plan made at `folder`."""
        lineage = read_lineage(folder)
        assert lineage is not None
        return cls(folder, plan.steps, plan.parameters_before, plan.parameters_after, lineage)


def plan_expansion(
    source: str | os.PathLike[str], specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> Plan:
    """Resolve `specs` against the checkpoint at `source`; reads no tensor.

    Raises:
        RequestError: no spec, unknown family, targets that cannot be had, a config that
            transformers can't build the result from, or more experts for a source whose last ones
            are not open yet.
        TritterError: the source has no usable config or generation settings.
    """
    specs = checked_specs(specs)
    source = named_path(source, key="source")
    config = read_config(source)
    steps = build_steps(config, specs, seed=seed)
    check_loadable(steps[-1].target_config, folder=source)
    before, after = map(_count_parameters, (config, steps[-1].target_config))
    return Plan(config, steps, before, after, added_experts(AddedExperts.read(source), steps))


def expand(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    specs: Sequence[ExpansionSpec],
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
    plan = plan_expansion(source, specs, seed=seed)
    opened = Source.open(source, plan.config)
    write_extras = _extras_writer(plan, source, moments, max_shard_bytes)
    target_config = plan.target_config
    if dtype is not None:
        target_config = {**target_config, "dtype": str(dtype).removeprefix("torch.")}
    write_checkpoint(
        destination,
        config=target_config,
        tensors=_stream(opened, plan, dtype=dtype, kind=expert_layout, progress=progress),
        lineage=lambda: _child_lineage(opened, plan, destination, seed=seed),
        write_extras=write_extras,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        check=partial(check_replaceable, sources=[source]),
        before_placing=before_placing and (lambda place: before_placing(Expanded.of(place, plan))),
    )
    return Expanded.of(destination, plan)


def mapped_reader(read: Read, steps: Sequence[ExpansionStep]) -> Read:
    """Return a reader of the expanded model's logical tensors on top of one of the source's."""
    for step in steps:
        read = _through(read, step, mapped)
    return read


def carried_masks(source_config: Config, steps: Sequence[ExpansionStep]) -> dict[str, Tensor]:
    """Return, by parameter name in memory, which entries of the result carry old knowledge on."""
    family = family_of(source_config)
    shapes = {t.name: family.shape(t, source_config) for t in family.logical_tensors(source_config)}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    config = source_config
    for step in steps:
        masks = {
            name: carried(tensor_map, masks[tensor_map.source] if tensor_map.source else None)
            for name, tensor_map in step.parameter_map.tensors.items()
        }
        config = step.target_config
    return pack_all(family_of(config), config, masks)


def state_stream(plan: Plan, kind: str, tensors: TensorFolder, *, moments: Policy) -> TensorStream:
    """Return one kind of state of the expanded model, by name on disk.

    Parameters that start anew are absent, not zero.
    """
    source_family, config = family_of(plan.config), plan.target_config
    disk_names = {t.name: t.disk_name for t in source_family.logical_tensors(plan.config)}

    def has_state(name: str, steps: Sequence[ExpansionStep] = plan.steps) -> bool:
        if not steps:
            return disk_names[name] in tensors.headers
        tensor_map = steps[-1].parameter_map.tensors[name]
        if tensor_map.source is None or starts_anew(tensor_map, kind, policy=moments):
            return False
        is_as_weights = STATE_KINDS[kind].new_entries == "as_weights"
        needed = tensor_map.sources if is_as_weights else (tensor_map.source,)
        return all(has_state(source, steps[:-1]) for source in needed)

    reader: Read = lambda name: tensors.get(disk_names[name])  # noqa: E731
    for step in plan.steps:
        reader = _through(reader, step, _state_move(kind, moments))
    family = family_of(config)
    targets = [t for t in family.logical_tensors(config) if has_state(t.name)]
    entries = tuple(
        TensorEntry(
            t.disk_name,
            tensors.torch_dtype(disk_names[origin_of(t.name, plan.steps) or ""]),
            family.shape(t, config),
        )
        for t in targets
    )
    return TensorStream(entries, ((t.disk_name, reader(t.name)) for t in targets))


def _extras_writer(
    plan: Plan, source: Path, moments: Policy, max_shard_bytes: int
) -> Callable[[Path], None]:
    """Return what writes all but the model into its folder; reads no tensor before.

    Raises:
        TritterError: the state beside the source is damaged.
    """
    state = read_state(source)

    def write(folder: Path) -> None:
        copy_tokenizer(source, folder)
        if state is not None:
            kinds = {k: state_stream(plan, k, t, moments=moments) for k, t in state.kinds.items()}
            steps, size = _carried_steps(plan, state), max_shard_bytes
            write_state(folder, kinds, step=state.step, other_steps=steps, max_shard_bytes=size)
        if plan.added_experts is not None:
            plan.added_experts.write(folder)

    return write


def _carried_steps(plan: Plan, state: State) -> dict[str, int]:
    """Return the steps of parameters that are not those of most, by name on disk."""
    names = {t.name: t.disk_name for t in family_of(plan.config).logical_tensors(plan.config)}
    targets = family_of(plan.target_config).logical_tensors(plan.target_config)
    origins = {t.disk_name: names.get(origin_of(t.name, plan.steps) or "", "") for t in targets}
    return {n: state.other_steps[o] for n, o in origins.items() if o in state.other_steps}


def _state_move(kind: str, moments: Policy) -> Move:
    if STATE_KINDS[kind].new_entries == "as_weights":
        return mapped

    def move(tensor_map: TensorMap, read: Read) -> Tensor:
        assert tensor_map.source is not None, "what has no source starts anew"
        return carry(tensor_map, read(tensor_map.source), kind, policy=moments)

    return move


def _through(read: Read, step: ExpansionStep, move: Move) -> Read:
    tensors = step.parameter_map.tensors
    return lambda name: move(tensors[name], read)


def _stream(
    source: Source,
    plan: Plan,
    *,
    dtype: torch.dtype | None,
    kind: LayoutKind,
    progress: Progress | None,
) -> TensorStream:
    config = plan.target_config
    targets = layout(family_of(config), config, kind)
    dtypes = {t.name: dtype or _dtype_of(t, source, plan.steps) for t in targets}
    entries = tuple(TensorEntry(t.name, dtypes[t.name], t.shape) for t in targets)

    def read_wide(name: str) -> Tensor:
        tensor = source.read(name)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        read_mapped = mapped_reader(read_wide, plan.steps)

        for position, target in enumerate(targets):

            def read(name: str, dtype: torch.dtype = dtypes[target.name]) -> Tensor:
                origin = _verbatim_origin(name, plan.steps)
                value = read_mapped(name) if origin is None else source.read(origin)
                return value.to(dtype)

            value = target.pack(read)
            if not is_finite(value):
                raise RequestError(
                    f"{source.folder}: {target.name} would hold values that are not finite."
                )
            yield target.name, value
            if progress is not None:
                progress(position + 1, len(targets))

    return TensorStream(entries, tensors())


def _dtype_of(target: StoredTensor, source: Source, steps: Sequence[ExpansionStep]) -> torch.dtype:
    """Return the dtype of what a target stems from; of the embedding, if it stems from nothing.

    Experts that share a tensor get the one that holds all of them without rounding.
    """
    origins = (origin_of(part.tensor.name, steps) or "embed" for part in target.parts)
    return reduce(torch.promote_types, map(source.dtype, origins))


def origin_of(name: str, steps: Sequence[ExpansionStep]) -> str | None:
    """Return the logical tensor of the source that a target tensor stems from, if any."""
    for step in reversed(steps):
        source = step.parameter_map.tensors[name].source
        if source is None:
            return None
        name = source
    return name


def _verbatim_origin(name: str, steps: Sequence[ExpansionStep]) -> str | None:
    """Return the tensor of the source that a target tensor is, when no map computes anything."""
    for step in reversed(steps):
        tensor_map = step.parameter_map.tensors[name]
        if not tensor_map.is_verbatim:
            return None
        assert tensor_map.source is not None
        name = tensor_map.source
    return name


def _count_parameters(config: Config) -> int:
    return family_of(config).count_parameters(config)


def added_experts(held: AddedExperts | None, steps: Sequence[ExpansionStep]) -> AddedExperts | None:
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


def _child_lineage(source: Source, plan: Plan, destination: Path, *, seed: int) -> Lineage:
    parent = source.lineage
    digests = source.read_digests()
    parent_hash = merkle_hash(digests)
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        parent_path=os.path.relpath(source.folder, destination),
        parent_tensor_digests=None if parent else digests,
        parent_file_digests=None if parent else _known_digests(source.folder),
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(
            *(parent.expansion_history if parent else ()),
            *(_record(step, seed=seed + position) for position, step in enumerate(plan.steps)),
        ),
        stock_loadable="yes" if plan.added_experts is None else "after adaptation",
        training_config=parent.training_config if parent else {},
        split=parent.split if parent else None,
        domains=parent.domains if parent else {},
    )


def _known_digests(folder: Path) -> dict[str, str]:
    """Digest the files that a plain Hugging Face folder needs, and no other it may hold."""
    names = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    return {name: file_digest(folder / name) for name in names}


def _record(step: ExpansionStep, *, seed: int) -> ExpansionRecord:
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
