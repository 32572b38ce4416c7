"""One adapter as a folder of PEFT's format: written for stock PEFT, and read from anywhere.

Only plain LoRA of linear layers and embeddings is read; whatever else a config asks for would be
left out in silence, and is refused by name. Nothing in such a folder is run or unpickled.

Where an adapter stands on the vocabulary, stock PEFT writes the base's own weights of it beside the
factors, and puts them in the place of a model's when it loads them. Here a base is never written,
and one that is read has to be the model's: then it says nothing, and else the adapter belongs to
another base.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from tritter.checkpoint.expert_files import ADAPTER_FILES, AdapterConfig, is_plain_setting
from tritter.errors import TritterError
from tritter.experts.adapters import (
    AdapterShape,
    adapted_layers,
    factors,
    is_embedding,
    shape_of,
)
from tritter.storage.atomic import atomic_folder
from tritter.storage.tensors import TensorFolder, is_finite

CONFIG_NAME, TENSORS_NAME = ADAPTER_FILES
_PREFIX = "base_model.model."
_KEY = re.compile(
    rf"{re.escape(_PREFIX)}(?P<layer>[\w.]+)\."
    r"(?:lora_(?P<part>[AB])\.weight|lora_embedding_(?P<looked_up>[AB])|(?P<base>base_layer\.weight))"
)


@dataclass(frozen=True, slots=True, eq=False)
class StoredAdapter:
    """What a folder holds.

    Args:
        shape: its targets are the last names of the layers below.
        factors: name of the layer in the stock model → A [r, in_features] and
            B [out_features, r].
        embeddings: the layers of these that look tokens up.
        base: name of a layer → the base's weight of it, where the folder holds one.
    """

    shape: AdapterShape
    factors: Mapping[str, tuple[Tensor, Tensor]]
    embeddings: frozenset[str] = frozenset()
    base: Mapping[str, Tensor] = field(default_factory=dict)


def write_adapter(
    model: nn.Module, name: str, folder: Path, *, base: str, overwrite: bool = False
) -> None:
    """Write an adapter of a live model, as PEFT's `save_pretrained` would.

    Args:
        base: hub id or path of the model that it belongs on, as its config says it.

    Raises:
        RequestError: there is no adapter of this name, or something stands at `folder`.
        TritterError: a weight is not finite, or the disk refuses.
    """
    write_stored(taken(model, name), folder, base=base, overwrite=overwrite)


def taken(model: nn.Module, name: str) -> StoredAdapter:
    """Return an adapter of a live model as it is now, copied to the CPU.

    Raises:
        RequestError: there is no adapter of this name.
        TritterError: a weight is not finite.
    """
    shape, found, embeddings = shape_of(model, name), {}, set()
    for layer_name, layer in adapted_layers(model):
        held = factors(layer, name)
        if held is not None:
            found[layer_name] = _copied(held.down), _copied(held.up)
            if is_embedding(layer):
                embeddings.add(layer_name)
    for layer_name, pair in found.items():
        if not all(map(is_finite, pair)):
            raise TritterError(f"the adapter {name} of {layer_name} is not finite.")
    return StoredAdapter(shape, found, frozenset(embeddings))


def write_stored(
    stored: StoredAdapter, folder: Path, *, base: str, overwrite: bool = False
) -> None:
    """Write an adapter that is no model's any more; see `write_adapter`.

    Raises:
        RequestError: something stands at `folder`.
        TritterError: the disk refuses.
    """
    shape, tensors = stored.shape, {}
    for layer, (down, up) in stored.factors.items():
        part = "lora_embedding_{}" if layer in stored.embeddings else "lora_{}.weight"
        tensors[f"{_PREFIX}{layer}.{part.format('A')}"] = down.contiguous()
        tensors[f"{_PREFIX}{layer}.{part.format('B')}"] = up.contiguous()
    alpha = int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(shape.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with atomic_folder(folder, overwrite=overwrite) as place:
        save_file(tensors, place / TENSORS_NAME, metadata={"format": "pt"})
        (place / TENSORS_NAME).chmod(0o644)  # as other files; it is made for its owner alone
        # What a newer PEFT adds is at its default, which needs no entry
        settings = {k: v for k, v in config.to_dict().items() if is_plain_setting(k, v)}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
        (place / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter folder, of ours or of stock PEFT.

    Raises:
        TritterError: it is none, asks for more than plain LoRA, or its tensors don't fit its
            config; names the key or the tensor.
    """
    config = AdapterConfig.read(folder)
    tensors = TensorFolder.open_file(folder, TENSORS_NAME)
    names = _names(tensors)
    found = {layer: _pair(tensors, config.rank, layer, own) for layer, own in names.items()}
    targets = tuple(sorted({name.rpartition(".")[2] for name in found}))
    return StoredAdapter(
        AdapterShape(config.rank, config.alpha, targets),
        found,
        frozenset(layer for layer, own in names.items() if own.is_embedding),
        {layer: tensors.get(own.base) for layer, own in names.items() if own.base},
    )


def put_values(model: nn.Module, name: str, stored: StoredAdapter) -> None:
    """Give an adapter that a model has already the values of a folder.

    Raises:
        TritterError: the adapter stands on other layers, or has other sizes, than the folder's; or
            the folder is of another base.
    """
    layers = dict(adapted_layers(model))
    own = {n: f for n, layer in layers.items() if (f := factors(layer, name)) is not None}
    if own.keys() != stored.factors.keys():
        first = sorted(own.keys() ^ stored.factors.keys())[0]
        where = "the folder" if first in stored.factors else "the model"
        raise TritterError(f"the adapter does not fit the model: {first} is in {where} alone.")
    for layer, (down, up) in stored.factors.items():
        if is_embedding(layers[layer]) != (layer in stored.embeddings):
            raise TritterError(
                f"the adapter does not fit the model: {layer} is an embedding in the "
                f"{'folder' if layer in stored.embeddings else 'model'} alone."
            )
        base = layers[layer].get_base_layer().get_parameter("weight")
        if layer in stored.base and not _is_same(base, stored.base[layer]):
            raise TritterError(
                f"the adapter does not fit the model: the folder holds other base weights of "
                f"{layer}."
            )
        for held, value in ((own[layer].down, down), (own[layer].up, up)):
            if held.shape != value.shape:
                raise TritterError(
                    f"the adapter does not fit the model: {layer} is of shape "
                    f"{list(value.shape)} in the folder and {list(held.shape)} in the model."
                )
    with torch.no_grad():
        for layer, (down, up) in stored.factors.items():
            own[layer].down.copy_(down)
            own[layer].up.copy_(up)


@dataclass(slots=True)
class _Names:
    """What the tensors of one layer are called in a file."""

    down: str = ""
    up: str = ""
    base: str = ""
    is_embedding: bool = False


def _names(tensors: TensorFolder) -> dict[str, _Names]:
    """Return the names of a file's tensors by layer, each layer with both factors."""
    path = tensors.folder / TENSORS_NAME
    layers: dict[str, _Names] = {}
    kinds: dict[str, set[bool]] = {}
    for name in tensors.headers:
        match = _KEY.fullmatch(name)
        if match is None:
            raise TritterError(
                f"{path}: {name} is no factor of LoRA on a linear layer or an embedding."
            )
        own = layers.setdefault(match["layer"], _Names())
        if match["base"]:
            own.base = name
            continue
        kinds.setdefault(match["layer"], set()).add(match["part"] is None)
        own.is_embedding = match["part"] is None
        if (match["part"] or match["looked_up"]) == "A":
            own.down = name
        else:
            own.up = name
    if not layers:
        raise TritterError(f"{path} holds no tensors.")
    for layer, own in layers.items():
        if len(kinds.get(layer, ())) > 1:
            raise TritterError(f"{path}: {layer} is a linear layer and an embedding at once.")
        if not own.down or not own.up:
            raise TritterError(f"{path}: {layer} lacks its {'A' if own.up else 'B'}.")
    return layers


def _pair(tensors: TensorFolder, rank: int, layer: str, names: _Names) -> tuple[Tensor, Tensor]:
    """Return a layer's (A, B), found sound."""
    path = tensors.folder / TENSORS_NAME
    shapes = [tensors.shape(names.down), tensors.shape(names.up)]
    if any(len(shape) != 2 for shape in shapes) or (shapes[0][0], shapes[1][1]) != (rank, rank):
        raise TritterError(
            f"{path}: {layer} has factors of shapes {[list(shape) for shape in shapes]}; its "
            f"config says r = {rank}."
        )
    values = tensors.get(names.down), tensors.get(names.up)
    if not all(map(is_finite, values)):
        raise TritterError(f"{path}: {layer} holds values that are not finite.")
    return values


def _is_same(own: Tensor, stored: Tensor) -> bool:
    """Say whether two tensors are one, in the narrower of their dtypes."""
    dtype = min(own.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.detach().cpu().to(dtype), stored.to(dtype))


def _copied(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()
