"""A grown model as a folder: padded for stock classes, with the record of what grew."""

import os
from functools import partial, reduce
from pathlib import Path

import torch
from torch import nn

from tritter.checkpoint import ExpansionRecord, Lineage, Source, write_checkpoint
from tritter.checkpoint.place import check_output, check_replaceable
from tritter.checkpoint.tokenizer_files import TokenizerFiles
from tritter.expand.folder import known_digests
from tritter.families import Config, family_of
from tritter.models import config_of, named_tensors, read_config
from tritter.storage.hashing import merkle_hash
from tritter.storage.writer import TensorStream


def save_grown(
    model: nn.Module,
    target: Path,
    *,
    origin: Path | None,
    record: ExpansionRecord | None,
    overwrite: bool,
) -> None:
    """Write a checkpoint folder whole, or not at all.

    Args:
        origin: the folder that the model comes from; its tokenizer goes along.
        record: of what grew since; None: nothing did.

    Raises:
        RequestError: something stands there and `overwrite` is off, or it is no checkpoint; the
            origin was changed since its lineage was written.
    """
    sources = () if origin is None else (origin,)
    check_output(target, sources=sources, overwrite=overwrite)
    known = config_of(model)
    tensors = [(name, tensor.cpu()) for name, tensor in named_tensors(model, known)]
    widest = reduce(torch.promote_types, (tensor.dtype for _, tensor in tensors))
    config: Config = {
        **known,
        "architectures": [family_of(known).architecture],
        "dtype": str(widest).removeprefix("torch."),
    }
    records = () if record is None else (record,)
    write_checkpoint(
        target,
        config=config,
        tensors=TensorStream.of(tensors),
        lineage=lambda: _root(records) if origin is None else _child(origin, target, records),
        artifacts=[None if origin is None else TokenizerFiles(origin)],
        overwrite=overwrite,
        check=partial(check_replaceable, sources=sources),
    )


def _root(records: tuple[ExpansionRecord, ...]) -> Lineage:
    """Return the lineage of a model that came from nowhere; its own hash is the base's."""
    return Lineage(
        model_hash="",
        base_model_hash="",
        tensor_digests={},
        file_digests={},
        expansion_history=records,
    )


def _child(origin: Path, target: Path, records: tuple[ExpansionRecord, ...]) -> Lineage:
    """Return the lineage of a model whose parent lies in a folder."""
    source = Source.open(origin, read_config(origin))
    parent, digests = source.lineage, source.read_digests()
    parent_hash = merkle_hash(digests)
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        parent_path=os.path.relpath(origin, target),
        parent_tensor_digests=None if parent else digests,
        parent_file_digests=None if parent else known_digests(origin),
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(*(parent.expansion_history if parent else ()), *records),
        training_config=parent.training_config if parent else {},
        split=parent.split if parent else None,
        domains=parent.domains if parent else {},
    )
