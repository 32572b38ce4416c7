"""Expand a checkpoint folder: source → maps → destination, one tensor in memory at a time."""

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial, reduce
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tritter.checkpoints import (
    ExpansionRecord,
    Lineage,
    Source,
    read_lineage,
    write_checkpoint,
)
from tritter.checkpoints.expert_files import refuse_experts
from tritter.checkpoints.folder import (
    TOKENIZER_FILES,
    TokenizerFiles,
    check_tokenizer_files,
)
from tritter.checkpoints.location import check_output, check_replaceable
from tritter.checkpoints.state import KEPT_FILE, STATE_FOLDER, State, write_state
from tritter.core.expansions import (
    ExpansionSpec,
    MoeAdd,
    ResolvedExpansion,
    build_steps,
    checked_specs,
    composed,
)
from tritter.core.families import (
    LayoutKind,
    StoredTensor,
    count_parameters,
    family_of,
    layout,
    padded_shapes,
)
from tritter.core.parameter_map.carry import Policy, StateKind, followed, has_state
from tritter.core.parameter_map.rows import WeightReader, peak_bytes
from tritter.core.stock_routers import AddedExperts
from tritter.errors import Problem, RequestError, TritterError
from tritter.storage.hashing import file_digest, merkle_hash
from tritter.storage.reading import named_path
from tritter.storage.tensors import TensorFolder, is_finite
from tritter.storage.writer import (
    HELD_TENSORS,
    KEPT_BYTES,
    Pieces,
    TensorEntry,
    TensorStream,
    num_threads,
    padded,
)
from tritter.transform.change import PlannedExpansion

# Disk and memory requirements

_BYTES_OF_A_NAME = 512  # of one tensor in a file's header, in the index and in the record
_BYTES_OF_RECORDS = 2**16  # the record, the card and the configs, without names
_WIDE = 4  # bytes of what is computed in float32
_AT_ONCE_PADDED = 3  # its pieces, the whole, and the one that is filled up
_AT_ONCE_OF_STATE = 4  # gathered along each axis, multiplied, and with a mean in new entries


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeeds:
    """Bytes that an expansion takes.

    Args:
        weights: of the result on disk, padding included.
        state: of what follows beside it: moments, importances, kept sequences.
        others: tokenizer files, and headers, configs and records, estimated.
        in_flight: memory at most for the tensors that are read, computed and written at a time.
        process: memory that the process has held already.
    """

    weights: int
    state: int
    others: int
    in_flight: int
    process: int

    @property
    def disk(self) -> int:
        """What the temporary folder takes that becomes the result: no byte is written twice."""
        return self.weights + self.state + self.others

    @property
    def memory(self) -> int:
        return self.process + self.in_flight


def free_bytes(destination: Path) -> int | None:
    """Return what is free on the disk that a folder would lie on; None where it does not say."""
    place = destination.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free if usage.total else None


def check_disk_space(destination: str | os.PathLike[str], room: DiskNeeds) -> None:
    """Refuse a result that the disk has no room for.

    Raises:
        RequestError: says what it takes and what is free.
    """
    free = free_bytes(Path(destination))
    if free is not None and room.disk > free:
        raise RequestError(
            f"{destination}: the result takes {size_text(room.disk)} (weights "
            f"{size_text(room.weights)}, state {size_text(room.state)}), and {size_text(free)} are "
            "free on the disk there. What it replaces goes only once it is whole. Choose another "
            "place, or a smaller dtype."
        )


def size_text(num_bytes: int) -> str:
    """Return a size as a person reads it: 1.53 GB."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


# Expansions of folders

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Expanded:
    """What an expansion made: where it lies, the plan that was carried out, and its record."""

    folder: Path
    plan: PlannedExpansion
    lineage: Lineage

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
    source: str | os.PathLike[str] | Source, specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PlannedExpansion:
    """Resolve `specs` against the checkpoint at `source`; reads no tensor.

    Raises:
        RequestError: no spec, unknown family, targets that cannot be had, a config that
            transformers can't build the result from, more experts for a source whose last ones
            are not open yet, or a source with LoRA experts.
        TritterError: the source has no usable config or generation settings.
    """
    specs = checked_specs(specs)
    if not isinstance(source, Source):
        folder = named_path(source, key="source")
        from tritter.core.models import read_config

        source = Source(folder, read_config(folder), read_lineage(folder))
    return planned(source, specs, seed=seed)


def planned(source: Source, specs: Sequence[ExpansionSpec], *, seed: int) -> PlannedExpansion:
    """Do the same for checked specs; none are allowed."""
    from tritter.core.models import check_loadable

    if specs:
        refuse_experts(source.folder, doing="an expansion", recorded=source.recorded_files)
    plan = replace(plan_by_tables(source, specs, seed=seed), is_confirmed=True)
    if specs:
        check_loadable(plan.target_config, folder=source.folder)
    return plan


def plan_by_tables(
    source: Source, specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PlannedExpansion:
    """Do the same by the families' tables alone, since transformers takes seconds to import.

    `expand` asks transformers once the tensors are written, before the result is placed.
    """
    config = source.config
    steps = build_steps(config, specs, seed=seed)
    target = steps[-1].target_config if steps else config
    return PlannedExpansion(
        config=config,
        steps=steps,
        parameter_map=composed(steps, config),
        seed=seed,
        parameters_before=count_parameters(config),
        parameters_after=count_parameters(target),
        added_experts=added_experts(source.added, steps),
        is_confirmed=False,
    )


def _confirmed(plan: PlannedExpansion, source: Source) -> PlannedExpansion:
    """Return a plan with all that configs say, after transformers was asked.

    Raises:
        RequestError: transformers can't build the result.
    """
    if plan.is_confirmed:
        return plan
    from tritter.core.models import read_config

    try:
        source = Source(source.folder, read_config(source.folder), source.lineage)
        found = planned(source, [step.spec for step in plan.steps], seed=plan.seed)
    except TritterError as error:
        raise RequestError(str(error)) from error
    digests = [[step.parameter_map.digest() for step in each.steps] for each in (plan, found)]
    assert digests[0] == digests[1], "the family's table and transformers read another model"
    return found


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
    before_placing: Callable[["Expanded"], Lineage] | None = None,
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
        moments: `carry`, `zero` or `reset_new`; see `tritter.core.parameter_map.carry`.
        expert_layout: `hub`, a tensor for each matrix of each expert, which every reader knows;
            or `live`, the experts of a layer in one tensor, as transformers holds them.
        overwrite: replace a checkpoint that stands at `destination`; nothing else is replaced.
        progress: called with (tensors written, tensors in all).
        before_placing: called with the result while it lies in a temporary folder; may write its
            lineage anew, returns the one that is there then, and may raise.

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
        plan = plan_expansion(source, plan, seed=seed)
    opened = source if isinstance(source, Source) else Source.open(folder, plan.config)
    check_disk_space(destination, disk_needs(opened, plan, dtype=dtype, moments=moments))
    stated = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}

    def look(place: Path, lineage: Lineage) -> Lineage:
        return before_placing(Expanded(place, plan, lineage)) if before_placing else lineage

    confirmed = cache(partial(_confirmed, plan, opened))
    state = opened.state
    carried = None if state is None else MappedState(plan, state, moments, max_shard_bytes)
    lineage = write_checkpoint(
        destination,
        config=plan.target_config,
        final_config=lambda: {**confirmed().target_config, **stated},
        tensors=_stream(opened, plan, dtype=dtype, kind=expert_layout, progress=progress),
        lineage=lambda: _child_lineage(opened, confirmed(), destination),
        artifacts=(TokenizerFiles(opened.folder), carried, plan.added_experts, opened.kept),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        check=partial(check_replaceable, sources=[folder]),
        before_placing=look,
    )
    return Expanded(destination, plan, lineage)


def disk_needs(
    opened: Source,
    plan: PlannedExpansion,
    *,
    dtype: torch.dtype | None = None,
    moments: Policy = "carry",
) -> DiskNeeds:
    """Return what carrying a plan out takes of disk and memory; reads no tensor.

    Raises:
        TritterError: the state beside the source is damaged.
    """
    state = opened.state
    streams = {} if state is None else state_streams(plan, state, moments=moments)
    others = [entry for each in streams.values() for entry in each.entries]
    stream = _stream(opened, plan, dtype=dtype, kind="hub", progress=None)
    shapes, maps = padded_shapes(plan.target_config), plan.parameter_map.tensors
    weights = padded(stream, shapes).entries

    def shape_of(name: str) -> tuple[int, ...]:
        stored, number = opened.stored_parts[name]
        return opened.family.shape(stored.parts[number].tensor, opened.config)

    # Each of the writer's threads makes a target in blocks of rows, or whole where its rows do not
    # follow from rows. State comes whole: read and mapped, while the two before it are written.
    usual, rare = [], 0
    for target in layout(plan.target_config, "hub"):
        parts = [peak_bytes(maps[part.tensor.name], shape_of) for part in target.parts]
        origins = {maps[part.tensor.name].origin for part in target.parts}
        copied = [o for o in origins if o and opened.stored_parts[o][0].name in opened.live_shapes]
        is_whole = target.name in shapes or target.is_transposed
        usual.append(
            max(part.usual for part in parts)
            + is_whole * _AT_ONCE_PADDED * _WIDE * prod(target.shape)
            + _WIDE * max((prod(shape_of(name)) for name in copied), default=0)
        )
        rare = max(rare, *(part.rare for part in parts))
    largest = max((entry.num_bytes for entry in others), default=0)
    of_weights = sum(sorted(usual)[-num_threads() :]) + rare
    of_state = (HELD_TENSORS + _AT_ONCE_OF_STATE) * largest
    kept = opened.folder / STATE_FOLDER / KEPT_FILE
    files = sum(path.stat().st_size for path in check_tokenizer_files(opened.folder))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return DiskNeeds(
        weights=sum(entry.num_bytes for entry in weights),
        state=sum(e.num_bytes for e in others) + (kept.stat().st_size if kept.is_file() else 0),
        others=files + _BYTES_OF_RECORDS + _BYTES_OF_A_NAME * (len(weights) + len(others)),
        in_flight=KEPT_BYTES + max(of_weights, of_state),
        process=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )


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
    dtypes = {}
    for target in targets:
        # That of what it stems from; of the embedding, if it stems from nothing. Experts that
        # share a tensor get the one that holds all of them without rounding.
        origins = (maps[part.tensor.name].origin or "embed" for part in target.parts)
        dtypes[target.name] = dtype or reduce(torch.promote_types, map(source.dtype, origins))
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


def added_experts(
    held: AddedExperts | None, steps: Sequence[ResolvedExpansion]
) -> AddedExperts | None:
    """Return the experts of the result that are not open yet, or not wholly, if any.

    Args:
        held: those of the source.

    Raises:
        RequestError: experts are added while the last ones are not open yet.
    """
    is_open = held is None or held.is_settled
    closed = () if held is None or is_open else held.experts
    for step in steps:
        if not isinstance(step.spec, MoeAdd):
            continue
        if closed:
            reason = (
                f"the router offset of experts {closed[0]} to {closed[-1]}, which were appended "
                "before, is not 0 yet; train the model until it is, then add more"
            )
            raise RequestError(Problem("expansion.moe_add", reason=reason))
        if step.spec.is_append:
            old, new = (
                family_of(config).dimensions(config).num_experts
                for config in (step.source_config, step.target_config)
            )
            closed = tuple(range(old, new))
    if not is_open:
        return held
    return AddedExperts(experts=closed) if closed else None


def _child_lineage(source: Source, plan: PlannedExpansion, destination: Path) -> Lineage:
    parent = source.lineage
    digests = source.read_digests()
    parent_hash = merkle_hash(digests)
    history = parent.expansion_history if parent else ()
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        parent_path=os.path.relpath(source.folder, destination),
        parent_tensor_digests=None if parent else digests,
        parent_file_digests=None if parent else known_digests(source.folder),
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(*history, *expansion_records(plan.steps, seed=plan.seed)),
        stock_loadable="yes" if plan.added_experts is None else "after adaptation",
        training_config=parent.training_config if parent else {},
        split=parent.split if parent else None,
        domains=parent.domains if parent else {},
    )


def expansion_records(
    steps: Sequence[ResolvedExpansion], *, seed: int
) -> tuple[ExpansionRecord, ...]:
    """Return the lineage's records of some expansions in order, with the time of now."""
    return tuple(
        ExpansionRecord(
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            expansion_type=step.spec.expansion_type,
            method=step.spec.name,
            options=step.options,
            seed=seed + position,
            source_config=step.source_config,
            target_config=step.target_config,
            layer_sources=step.parameter_map.layer_sources,
            map_digest=step.parameter_map.digest(),
            claims_exact=step.spec.is_exact,
        )
        for position, step in enumerate(steps)
    )


def known_digests(folder: Path) -> dict[str, str]:
    """Digest the files that a plain Hugging Face folder needs, and no other it may hold."""
    names = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    return {name: file_digest(folder / name) for name in names}


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
        plan, state = self.plan, self.state
        # Parameters whose steps are not those of most, by name on disk
        names = {t.name: t.disk_name for t in family_of(plan.config).logical_tensors(plan.config)}
        targets = family_of(plan.target_config).logical_tensors(plan.target_config)
        maps = plan.parameter_map.tensors
        origins = {t.disk_name: names.get(maps[t.name].origin or "", "") for t in targets}
        steps = {n: state.other_steps[o] for n, o in origins.items() if o in state.other_steps}
        write_state(
            folder,
            state_streams(plan, state, moments=self.moments),
            step=state.step,
            other_steps=steps,
            rules=state.rules,
            max_shard_bytes=self.max_shard_bytes,
        )
