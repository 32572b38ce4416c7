"""Checkpoints as if trained from one parent: perturbed copies with a lineage."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import oracle
from tritter.checkpoints import Lineage, Source, write_checkpoint
from tritter.checkpoints.folder import copy_small_files
from tritter.core.models import read_model, save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.storage.hashing import merkle_hash
from tritter.storage.writer import TensorStream

TEXT = "the quick brown fox jumps over the lazy dog\n" * 30


def parent(folder: Path, model: PreTrainedModel, *, vocab_size: int | None = None) -> Path:
    """Save a plain folder with a tokenizer."""
    oracle.saved(model, folder)
    size = vocab_size or model.config.vocab_size
    tokenizer = train_tokenizer([Document("d", TEXT)], vocab_size=size)
    save_tokenizer(tokenizer, folder, end_of_text=END_OF_TEXT)
    return folder


def child(
    folder: Path,
    of: Path,
    *,
    seed: int,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    **lineage: Any,
) -> Path:
    """Write a checkpoint whose weights are those of its parent, changed at random."""
    source = Source.open(of, read_model(of))
    generator = torch.Generator().manual_seed(seed)

    def changed(value: Tensor) -> Tensor:
        if change is not None:
            return change(value, generator)
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value + 0.3 * value.std() * noise

    stream = source.stream()
    tensors = ((entry.name, changed(source.read_stored(entry.name))) for entry in stream.entries)
    root = merkle_hash(source.read_digests())
    record: Mapping[str, Any] = {
        "model_hash": "",
        "parent_hash": root,
        "parent_path": "../" + of.name,
        "base_model_hash": root,
        "tensor_digests": {},
        "file_digests": {},
        **lineage,
    }
    write_checkpoint(
        folder,
        config={**source.config, **(config or {})},
        tensors=TensorStream(stream.entries, tensors),
        lineage=lambda: Lineage(**record),
        artifacts=(partial(copy_small_files, of),),
    )
    return folder
