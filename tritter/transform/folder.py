"""Expand a checkpoint folder: source → maps → destination, one tensor in memory at a time."""

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tritter.checkpoints import ExpansionRecord, Lineage, Source, write_checkpoint
from tritter.checkpoints.folder import Artifact, copy_small_files, small_files, tokenizer_files
from tritter.checkpoints.location import check_output, check_replaceable, require_plain
from tritter.checkpoints.state import KeptSequences, State, write_state
from tritter.core.expansions import (
    ExpansionSpec,
    ResolvedExpansion,
    check_specs,
    children_place,
    target_model,
    vocab_place,
)
from tritter.core.families import LayoutKind, Model, StoredTensor
from tritter.core.parameter_map.rows import WeightReader, peak_bytes
from tritter.errors import RequestError, TritterError
from tritter.storage.hashing import file_digest, merkle_hash
from tritter.storage.reading import named_path
from tritter.storage.tensors import is_finite
from tritter.storage.writer import (
    Pieces,
    TensorEntry,
    TensorStream,
    num_threads,
)
from tritter.transform.change import PlannedExpansion
from tritter.transform.children import bound_children, router_bytes
from tritter.transform.vocabulary import bound_vocabulary, kept_in, write_tokenizer_file

# Disk and memory requirements

_BYTES_OF_A_NAME = 512  # of one tensor in the header of a file, the index and the lineage
_BYTES_OF_RECORDS = 2**16  # lineage, model card and configs, without names
_WIDE = 4  # bytes of a float32 number
_AT_ONCE_PADDED = 3  # copies of a padded tensor: its pieces, the whole, and the padded one
_AT_ONCE_OF_STATE = 4  # copies: gathered along each axis, scaled, and filled with a mean
# Of the step-0 check: transformers and its classes (130 MB), blocks of weights, and activations
_BYTES_OF_CHECK = 300 * 10**6
_WIDENED = 2  # copies of an expert, or of a layer without a table, in float32: one per model
_Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeeds:
    """Disk and memory requirements of an expansion, in bytes.

    Args:
        weights: weights of the result on disk, padding included.
        state: mapped state on disk: importances, anchors, replay sequences.
        others: tokenizer files, and an estimate for headers, configs and records.
        in_flight: peak memory of the tensors that are read, computed and written at once.
        process: peak memory of the process so far.
        check: peak memory of the step-0 check after writing; 0 without it. The weights that it maps
            from disk do not count: the system drops them when memory is short.
    """

    weights: int
    state: int
    others: int
    in_flight: int
    process: int
    check: int

    @classmethod
    def of(
        cls,
        opened: Source,
        plan: PlannedExpansion,
        *,
        dtype: torch.dtype | None = None,
        is_checked: bool = True,
    ) -> "DiskNeeds":
        """Return the disk and memory requirements of a plan; reads no tensor.

        Args:
            opened: the source.
            plan: the expansion.
            dtype: of the result; by default each tensor keeps its own.
            is_checked: count the memory of the step-0 check.
        """
        state = opened.state
        streams = {} if state is None else _state_streams(plan, state)
        others = [entry.num_bytes for each in streams.values() for entry in each.entries]
        stream = _stream(opened, plan, dtype=dtype, kind="hub", progress=None)
        shapes, maps = plan.target.padded_shapes(), plan.parameter_map.tensors
        weights = stream.padded(shapes).entries
        shape_of = opened.model.shapes.__getitem__

        # Each writer thread computes a target in blocks of rows, or whole if its rows do not derive
        # from rows. State tensors are read and mapped whole while the two before them are written.
        usual, rare = [], 0
        for target in plan.target.layout("hub"):
            parts = [peak_bytes(maps[part.tensor.name], shape_of) for part in target.parts]
            origins = {maps[part.tensor.name].origin for part in target.parts}
            copied = [
                o for o in origins if o and opened.stored_parts[o][0].name in opened.live_shapes
            ]
            is_whole = target.name in shapes or target.is_transposed
            usual.append(
                max(part.usual for part in parts)
                + is_whole * _AT_ONCE_PADDED * _WIDE * prod(target.shape)
                + _WIDE * max((prod(shape_of(name)) for name in copied), default=0)
            )
            rare = max(rare, *(part.rare for part in parts))
        of_weights = sum(sorted(usual)[-num_threads() :]) + rare
        of_state = (TensorStream.MAX_PENDING + _AT_ONCE_OF_STATE) * max(others, default=0)
        kept_sequences = opened.folder / State.FOLDER / KeptSequences.FILE_NAME
        files = sum(path.stat().st_size for path in small_files(opened.folder))
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        return cls(
            weights=sum(entry.num_bytes for entry in weights),
            state=sum(others) + (kept_sequences.stat().st_size if kept_sequences.is_file() else 0),
            others=files + _BYTES_OF_RECORDS + _BYTES_OF_A_NAME * (len(weights) + len(others)),
            in_flight=TensorStream.KEPT_BYTES + max(of_weights + router_bytes(plan), of_state),
            process=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            check=_check_bytes(plan.target) if is_checked else 0,
        )

    @property
    def disk(self) -> int:
        """Size of the temporary folder, which is renamed to the result."""
        return self.weights + self.state + self.others

    @property
    def memory(self) -> int:
        return self.process + max(self.in_flight, self.check)

    def check_space(self, destination: str | os.PathLike[str]) -> None:
        """Refuse a result that does not fit on the disk of its folder."""
        free = free_bytes(Path(destination))
        if free is not None and self.disk > free:
            raise RequestError(
                f"{destination}: the result takes {size_text(self.disk)} (weights "
                f"{size_text(self.weights)}, state {size_text(self.state)}), but {size_text(free)} "
                "are free on the disk. A checkpoint that it replaces is removed only after the new "
                "one is complete. Choose another folder, or a smaller dtype."
            )


def free_bytes(destination: Path) -> int | None:
    """Return the free bytes on the disk of a future folder, or None if unknown."""
    existing = destination.absolute()
    while not existing.is_dir():
        existing = existing.parent
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return None
    return usage.free if usage.total else None


def size_text(num_bytes: int) -> str:
    """Return a human-readable size: 1.53 GB."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


# Expansions of folders


@dataclass(frozen=True, slots=True)
class Expanded:
    """The result of an expansion: its folder, the executed plan and the lineage."""

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
        return self.plan.source.num_parameters

    @property
    def parameters_after(self) -> int:
        """Parameters of the result, counted from shapes, ties once."""
        return self.plan.target.num_parameters


def plan_expansion(
    source: str | os.PathLike[str] | Source, specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PlannedExpansion:
    """Resolve `specs` against the checkpoint at `source`; reads no tensor.

    Args:
        source: a checkpoint folder, or an open one.
        specs: the expansions in order.
        seed: of random fills and choices.
    """
    specs = check_specs(specs)
    if not isinstance(source, Source):
        folder = named_path(source, key="source")
        from tritter.core.models import read_model

        source = Source(folder, read_model(folder), Lineage.read(folder))
    return planned(source, specs, seed=seed)


def planned(source: Source, specs: Sequence[ExpansionSpec], *, seed: int) -> PlannedExpansion:
    """Return the plan for checked specs, which may be empty; see `plan_expansion`."""
    from tritter.core.models import check_loadable

    if specs:
        require_plain(source.folder, doing="an expansion")
    plan = replace(plan_by_tables(source, specs, seed=seed), is_confirmed=True)
    if specs:
        check_loadable(plan.target, folder=source.folder)
    return plan


def plan_by_tables(
    source: Source, specs: Sequence[ExpansionSpec], *, seed: int = 0
) -> PlannedExpansion:
    """Return the plan from the family tables alone: importing transformers takes seconds.

    `expand` checks the plan with transformers after it has written the tensors and before it moves
    the result to the destination.
    """
    bound = list(specs)
    if (place := vocab_place(specs)) is not None:
        bound[place] = bound_vocabulary(specs[place], source)
    if (place := children_place(specs)) is not None:
        bound[place] = bound_children(specs[place], source)
    return PlannedExpansion.of(source.model, bound, seed=seed, added=source.added)


def _confirm(plan: PlannedExpansion, source: Source) -> PlannedExpansion:
    """Return the plan with the full configs of transformers; its maps depend on shapes alone."""
    from tritter.core.models import check_loadable, read_model

    steps: list[ResolvedExpansion] = []
    try:
        model = read_model(source.folder)
        for step in plan.steps:
            steps.append(replace(step, source=model, target=target_model(model, [step.spec])))
            model = steps[-1].target
        check_loadable(model, folder=source.folder)
    except TritterError as error:
        raise RequestError(str(error)) from error
    by_tables, by_classes = ([each.target.shapes for each in both] for both in (plan.steps, steps))
    assert by_tables == by_classes, "the family table and transformers disagree on the model"
    return replace(plan, source=steps[0].source, steps=tuple(steps), is_confirmed=True)


def expand(
    source: str | os.PathLike[str] | Source,
    destination: str | os.PathLike[str],
    specs: Sequence[ExpansionSpec] | PlannedExpansion,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    expert_layout: LayoutKind = "hub",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: _Progress | None = None,
    before_publish: Callable[["Expanded"], Lineage] | None = None,
    confirms: bool = True,
) -> Expanded:
    """Apply `specs` in order to the checkpoint at `source` and write the result.

    Tensors are read, mapped and written one by one; the model is never instantiated. The result
    loads in stock transformers. Tokenizer files are copied. The contents of `state/` are mapped
    like the weights: Fisher and importances, anchors, averages.

    Args:
        source: a folder, or an open one whose config the plan was made from.
        destination: folder of the result.
        specs: the expansions, or their plan by `plan_expansion`.
        seed: of random fills and choices.
        dtype: of the result; by default each tensor keeps its own. Maps are applied in float32
            (float64 for float64) and rounded once.
        expert_layout: `hub` writes one tensor per matrix and expert, which every reader supports;
            `live` stacks the experts of a layer in one tensor, as transformers does in memory.
        max_shard_bytes: size limit of one file of weights.
        overwrite: replace a checkpoint at `destination`; other folders are never replaced.
        progress: called with the number of written tensors and their total.
        before_publish: called with the result in its temporary folder. It may rewrite the
            lineage, returns the current one, and may raise.
        confirms: let transformers check a plan made from the family tables alone. False trusts the
            tables: importing transformers takes seconds.

    Returns:
        The folder, the plan and the lineage of the result.

    Raises:
        RequestError: no spec, unknown family, impossible targets, a destination that can't be
            written or lacks space, a source that changed since its lineage was written, or
            non-finite values; nothing is written.
        TritterError: the source is damaged or does not match its config.
    """
    folder = source.folder if isinstance(source, Source) else named_path(source, key="source")
    destination = named_path(destination, key="destination")
    check_output(destination, sources=[folder], overwrite=overwrite)
    plan = specs
    if not isinstance(plan, PlannedExpansion):
        plan = plan_expansion(source, plan, seed=seed)
    opened = source if isinstance(source, Source) else Source.open(folder, plan.source)
    DiskNeeds.of(opened, plan, dtype=dtype).check_space(destination)
    new_dtype = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}

    def call_back(folder: Path, lineage: Lineage) -> Lineage:
        return before_publish(Expanded(folder, plan, lineage)) if before_publish else lineage

    is_due = confirms and not plan.is_confirmed
    confirmed = cache(partial(_confirm, plan, opened) if is_due else lambda: plan)
    lineage = write_checkpoint(
        destination,
        config=plan.target.config,
        final_config=lambda: {**confirmed().target.config, **new_dtype},
        tensors=_stream(opened, plan, dtype=dtype, kind=expert_layout, progress=progress),
        lineage=lambda: _expanded_lineage(opened, confirmed(), destination),
        artifacts=_artifacts(opened, plan, max_shard_bytes=max_shard_bytes),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        check=check_replaceable,
        before_publish=call_back,
    )
    return Expanded(destination, plan, lineage)


def _artifacts(
    opened: Source, plan: PlannedExpansion, *, max_shard_bytes: int
) -> tuple[Artifact | None, ...]:
    """Return the files of the result other than its weights."""
    vocabulary, added, state = plan.vocabulary, plan.added_experts, opened.state
    return (
        partial(copy_small_files, opened.folder),
        None if vocabulary is None else partial(write_tokenizer_file, vocabulary.tokenizer),
        None if state is None else partial(_write_mapped, plan, state, max_shard_bytes),
        None if added is None else added.write,
        kept_in(opened, vocabulary).write,
    )


def _check_bytes(model: Model) -> int:
    """Return the peak memory of the step-0 check of a result (`tritter.core.streamed`)."""
    has_table, sizes = model.family.has_table, dict[object, int]()
    for tensor in model.tensors:
        # Experts are widened one by one; a model type without a table, layer by layer
        unit = tensor.name if has_table else tensor.layer
        if tensor.layer is not None and (tensor.expert is not None or not has_table):
            sizes[unit] = sizes.get(unit, 0) + prod(model.shapes[tensor.name])
    return _BYTES_OF_CHECK + _WIDENED * _WIDE * max(sizes.values(), default=0)


def _stream(
    source: Source,
    plan: PlannedExpansion,
    *,
    dtype: torch.dtype | None,
    kind: LayoutKind,
    progress: _Progress | None,
) -> TensorStream:
    maps, targets = plan.parameter_map.tensors, plan.target.layout(kind)
    unrounded = plan.target.family.unrounded(plan.target.config, dtype) if dtype else ()
    dtypes = {}
    for target in targets:
        # The dtype of its source, or of the embedding if it has none. Experts in one tensor get
        # the dtype that represents all of them without rounding.
        origins = (maps[part.tensor.name].origin or "embed" for part in target.parts)
        own = reduce(torch.promote_types, map(source.dtype, origins))
        dtypes[target.name] = own if dtype is None or target.name in unrounded else dtype
    entries = tuple(TensorEntry(t.name, dtypes[t.name], t.shape) for t in targets)
    reader = WeightReader(source.read)

    def rows(target: StoredTensor) -> Iterator[Tensor]:
        for part in target.parts_in_order:
            yield from reader.blocks(maps[part.tensor.name], dtypes[target.name])

    def transposed(target: StoredTensor) -> Iterator[Tensor]:
        """Yield a transposed tensor whole: its rows are inputs."""
        steps = [maps[part.tensor.name] for part in target.parts]
        origins = [step.origin if step.is_verbatim else None for step in steps]
        same = source.stored_name(target, origins)
        if same is not None:
            yield source.read_stored(same).to(dtypes[target.name])
            return
        whole = torch.cat([block.reshape(-1) for block in rows(target)])
        yield whole.view(-1, target.shape[0]).T.contiguous()

    def blocks(target: StoredTensor) -> Iterator[Tensor]:
        for block in transposed(target) if target.is_transposed else rows(target):
            if not is_finite(block):
                raise RequestError(
                    f"{source.folder}: {target.name} would contain values that are not finite."
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


def _expanded_lineage(source: Source, plan: PlannedExpansion, destination: Path) -> Lineage:
    for step in plan.steps:
        for child in getattr(step.spec, "experts", ()):
            child.source.read_digests()  # compares its tensors with its lineage
    lineage = child_lineage(source, destination, plan.records)
    is_open = plan.added_experts is None
    return lineage if is_open else replace(lineage, stock_loadable="after adaptation")


def child_lineage(source: Source, destination: Path, records: Sequence[ExpansionRecord]) -> Lineage:
    """Return the lineage of a checkpoint that some expansions make from another one.

    All tensors of the source are hashed, and compared with its own lineage.
    """
    folder, parent, digests = source.folder, source.lineage, source.read_digests()
    parent_hash, files = merkle_hash(digests), ("config.json", *tokenizer_files(folder))
    known_files = {name: file_digest(folder / name) for name in files if (folder / name).is_file()}
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        # Both resolved, as by readers: `..` of a symbolic link leads elsewhere
        parent_path=os.path.relpath(folder.resolve(), destination.resolve()),
        parent_tensor_digests=None if parent else digests,
        parent_file_digests=None if parent else known_files,
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(*(parent.expansion_history if parent else ()), *records),
        training_config=parent.training_config if parent else {},
        split=parent.split if parent else None,
        domains=parent.domains if parent else {},
    )


def _state_streams(plan: PlannedExpansion, state: State) -> dict[str, TensorStream]:
    """Return every kind of state of the expanded model."""
    return {
        kind: plan.state_stream(state.rules[kind], tensors) for kind, tensors in state.kinds.items()
    }


def _write_mapped(plan: PlannedExpansion, state: State, max_shard_bytes: int, folder: Path) -> None:
    """Write the state of an expanded model, mapped tensor by tensor."""
    write_state(
        folder,
        _state_streams(plan, state),
        step=state.step,
        rules=state.rules,
        max_shard_bytes=max_shard_bytes,
    )
