"""Expand a checkpoint folder: source → maps → destination, one tensor in memory at a time."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from tritter.checkpoint import ExpansionRecord, Lineage, Source, write_checkpoint
from tritter.errors import RequestError, TritterError
from tritter.expansion import ExpansionSpec, ExpansionStep, build_steps
from tritter.families import Config, Family
from tritter.models import read_config
from tritter.parameter_map import carried, map_tensor

Read = Callable[[str], Tensor]
Progress = Callable[[int, int], None]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Expanded:
    """What an expansion made.

    Args:
        folder: the checkpoint written.
        steps: the expansions in order, with their maps.
        parameters_before: counted from shapes, ties once.
        parameters_after: the same of the result; equals what was predicted.
        lineage: the record written.
    """

    folder: Path
    steps: tuple[ExpansionStep, ...]
    parameters_before: int
    parameters_after: int
    lineage: Lineage


def expand(
    source: Path,
    destination: Path,
    specs: Sequence[ExpansionSpec],
    *,
    seed: int = 0,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Expanded:
    """Apply `specs` in order to the checkpoint at `source` and write the result.

    Tensors are read, mapped and written one by one; nothing is loaded as a model. The result
    loads in stock transformers. Tokenizer files travel along.

    Args:
        seed: what random fills and choices are drawn from.
        progress: called with (tensors written, tensors in all).

    Raises:
        RequestError: no spec, unknown family, targets that cannot be had, or a destination that
            exists; nothing is written.
        TritterError: the source is damaged, does not fit its config, or was changed since its
            lineage was written.
    """
    if not specs:
        raise RequestError("expand needs at least one expansion.")
    opened = Source.open(source, read_config(source))
    steps = build_steps(opened.config, specs, seed=seed)
    target_config = steps[-1].target_config
    lineage = _child_lineage(opened, steps, destination, seed=seed)

    def write_extras(folder: Path) -> None:
        opened.check_unchanged()
        copy_tokenizer(source, folder)

    written = write_checkpoint(
        destination,
        config=target_config,
        tensors=_stream(opened.family, target_config, mapped_reader(opened.read, steps), progress),
        lineage=lineage,
        write_extras=write_extras,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    return Expanded(
        folder=destination,
        steps=steps,
        parameters_before=opened.family.count_parameters(opened.config),
        parameters_after=opened.family.count_parameters(target_config),
        lineage=written,
    )


def mapped_reader(read: Read, steps: Sequence[ExpansionStep]) -> Read:
    """Return a reader of the expanded model's logical tensors on top of one of the source's."""
    for step in steps:
        read = _through(read, step)
    return read


def carried_masks(
    family: Family, source_config: Config, steps: Sequence[ExpansionStep]
) -> dict[str, Tensor]:
    """Return, by name on disk, which entries of the expanded model carry old knowledge on."""
    shapes = {t.name: family.shape(t, source_config) for t in family.logical_tensors(source_config)}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    config = source_config
    for step in steps:
        masks = {
            name: carried(tensor_map, masks[tensor_map.source])
            for name, tensor_map in step.parameter_map.tensors.items()
        }
        config = step.target_config
    return {tensor.disk_name: masks[tensor.name] for tensor in family.logical_tensors(config)}


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy tokenizer and generation files that stand beside a model."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def _through(read: Read, step: ExpansionStep) -> Read:
    tensors = step.parameter_map.tensors

    def read_mapped(name: str) -> Tensor:
        return map_tensor(tensors[name], read(tensors[name].source))

    return read_mapped


def _stream(
    family: Family, config: Config, read: Read, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    expected = family.logical_tensors(config)
    for position, tensor in enumerate(expected):
        value = read(tensor.name)
        if tuple(value.shape) != family.shape(tensor, config):
            raise AssertionError(f"{tensor.name}: {tuple(value.shape)} is not what was predicted")
        if not bool(torch.isfinite(value).all()):
            raise TritterError(f"{tensor.disk_name} holds values that are not finite.")
        yield tensor.disk_name, value
        if progress is not None:
            progress(position + 1, len(expected))


def _child_lineage(
    source: Source, steps: Sequence[ExpansionStep], destination: Path, *, seed: int
) -> Lineage:
    parent = source.lineage
    parent_hash = source.model_hash()
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        parent_path=os.path.relpath(source.folder, destination),
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(
            *(parent.expansion_history if parent else ()),
            *(_record(step, seed=seed + position) for position, step in enumerate(steps)),
        ),
        training_config=parent.training_config if parent else {},
    )


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
