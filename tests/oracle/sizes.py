"""Stock models whose layers' FFNs differ in width, put together by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tests.oracle.families import tiny
from tritter.checkpoint import Lineage, write_checkpoint
from tritter.models import config_of, named_tensors
from tritter.storage.writer import TensorStream

SIZES = (12, 40, 7)


def uneven(family: str, sizes: Sequence[int], **changes: Any) -> PreTrainedModel:
    """Return a small stock model whose layers' FFNs were replaced by others of these widths."""
    model = tiny(family, intermediate_size=max(sizes), num_hidden_layers=len(sizes), **changes)
    hidden = model.config.hidden_size
    for layer, size in zip(model.model.layers, sizes, strict=True):
        has_bias = layer.mlp.up_proj.bias is not None
        layer.mlp.gate_proj = nn.Linear(hidden, size, bias=has_bias)
        layer.mlp.up_proj = nn.Linear(hidden, size, bias=has_bias)
        layer.mlp.down_proj = nn.Linear(size, hidden, bias=has_bias)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def written(model: nn.Module, folder: Path) -> Path:
    """Write a live model as the start of a chain."""
    config = {**config_of(model), "dtype": str(next(model.parameters()).dtype)[len("torch.") :]}
    write_checkpoint(
        folder,
        config=config,
        tensors=TensorStream.of(named_tensors(model, config)),
        lineage=lambda: Lineage(
            model_hash="", base_model_hash="", tensor_digests={}, file_digests={}
        ),
        artifacts=(),
    )
    return folder
