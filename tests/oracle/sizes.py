"""Stock models whose layers' FFNs differ in width, put together by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.oracle.families import layers_of, tiny
from tritter.checkpoints import Lineage, write_checkpoint
from tritter.core.families import Model
from tritter.core.models import model_of
from tritter.storage.writer import TensorStream

SIZES = (12, 40, 7)
DOWN = ("down_proj", "dense_4h_to_h", "c_proj")
PROJECTIONS = ("gate_proj", "up_proj", "dense_h_to_4h", "c_fc", *DOWN)


def uneven(family: str, sizes: Sequence[int], **changes: Any) -> PreTrainedModel:
    """Return a small stock model whose layers' FFNs were replaced by others of these widths."""
    model = tiny(family, intermediate_size=max(sizes), num_hidden_layers=len(sizes), **changes)
    hidden = model.config.hidden_size
    for layer, size in zip(layers_of(model), sizes, strict=True):
        for name in [name for name in PROJECTIONS if hasattr(layer.mlp, name)]:
            ends = (size, hidden) if name in DOWN else (hidden, size)
            old = getattr(layer.mlp, name)
            turned = isinstance(old, Conv1D)  # which is told its outputs first
            made = Conv1D(*ends[::-1]) if turned else nn.Linear(*ends, bias=old.bias is not None)
            setattr(layer.mlp, name, made)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def written(model: nn.Module, folder: Path) -> Path:
    """Write a live model as the start of a chain."""
    config = {
        **model_of(model).config,
        "dtype": str(next(model.parameters()).dtype)[len("torch.") :],
    }
    write_checkpoint(
        folder,
        config=config,
        tensors=TensorStream.of(Model(config).disk_tensors(model.state_dict())),
        lineage=lambda: Lineage(
            model_hash="", base_model_hash="", tensor_digests={}, file_digests={}
        ),
        artifacts=(),
    )
    return folder
