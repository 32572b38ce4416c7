"""Names and shapes of a stock model's tensors, on disk and in memory, without its weights.

The stock class is built on the meta device, and transformers' own conversion gives the names that
`save_pretrained` writes.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from tritter.core.families.dimensions import Config
from tritter.core.families.discovery.configs import Key, StockConfig, quiet, reason_of
from tritter.core.families.logical import Place
from tritter.errors import RequestError
from tritter.storage.tensors import is_computed

Shape = tuple[int, ...]
_TOWER = re.compile(r"vision|visual|image|audio|speech")  # not a decoder, if another list fits
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True)
class Skeleton:
    """The tensors of a model.

    Args:
        disk: name on disk → shape.
        tied: name on disk or in memory of a tied tensor, which files may omit → name of the tensor
            that it repeats; empty if unknown.
        layers: beginning of the names of all layers on disk, such as `model.layers.`.
        renamings: by which the class reads former names, and those of a multimodal model.
        unread: patterns of names that the class does not read, such as heads for later tokens.
        float32: 16-bit dtype → names on disk and in memory of tensors that stay in float32.
    """

    disk: Mapping[str, Shape]
    tied: Mapping[str, str]
    layers: str
    renamings: tuple[WeightRenaming, ...] = ()
    unread: tuple[str, ...] = ()
    float32: Mapping[torch.dtype, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> "Skeleton":
        """Return the tensors of a model with this config.json."""
        return _skeleton(Key.of(config))

    @cached_property
    def signatures(self) -> tuple[frozenset[tuple[str, Shape]], ...]:
        """The names and shapes on disk of each layer's tensors."""
        found: dict[int, set[tuple[str, Shape]]] = {}
        for name, shape in self.disk.items():
            if (split := in_layer(name, self.layers)) is not None:
                found.setdefault(split[0], set()).add((split[1], shape))
        return tuple(frozenset(found[layer]) for layer in sorted(found))

    def read_as(self, extra: Collection[str], missing: Collection[str]) -> dict[str, str]:
        """Return name in files → name on disk that it stands for; empty: no class reads it."""
        expected = {self._renamed(name): name for name in missing}
        found = {name: expected.get(self._renamed(name), "") for name in extra}
        return {
            name: known
            for name, known in found.items()
            if known or any(re.search(each, self._renamed(name)) for each in self.unread)
        }

    def _renamed(self, name: str) -> str:
        for renaming in self.renamings:
            name = renaming.rename_source_key(name)[0]
        return name


def in_layer(name: str, layers: str) -> tuple[int, str] | None:
    """Return the index of a tensor's layer and its name within it, or None outside the layers."""
    if not layers or not name.startswith(layers):
        return None
    index, _, rest = name.removeprefix(layers).partition(".")
    return (int(index), rest) if index.isdigit() else None


def template(name: str, layers: str) -> str:
    """Return a name with marks in place of its layer and its expert."""
    split = in_layer(name, layers)
    if split is not None:
        name = f"{layers}{{layer}}.{split[1]}"
    return _EXPERT.sub("experts.{expert}.", name, count=1)


def expert_of(name: str) -> int | None:
    """Return the index of a tensor's expert, or None."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


@lru_cache(maxsize=64)
def _skeleton(key: Key) -> Skeleton:
    config = key.config
    try:
        with quiet(), torch.device("meta"):
            stock = StockConfig(config).stock
            model = AutoModelForCausalLM.from_config(stock, dtype=torch.bfloat16)
        state = model.state_dict()
        every = revert_weight_conversion(model, dict(state))
        ties: Mapping[str, str] = model.all_tied_weights_keys
        own = {name: state[name] for name in state if name not in ties}
        disk = revert_weight_conversion(model, own)
        halves = (torch.bfloat16, torch.float16)
        float32 = {dtype: _float32_names(model, own, dtype) for dtype in halves}
        conversions = get_model_conversion_mapping(model)
    except Exception as error:  # config and model classes may raise anything
        raise RequestError(
            f"config.json: transformers can't build this model: {reason_of(error)}."
        ) from error
    return Skeleton(
        disk=_shapes(disk),
        tied={name: ties.get(name, "") for name in (every.keys() | ties.keys()) - disk.keys()},
        layers=layers_on_disk(layer_list(model), disk),
        renamings=tuple(each for each in conversions if isinstance(each, WeightRenaming)),
        unread=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        float32=float32,
    )


def _float32_names(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> frozenset[str]:
    """Return the names, in memory and on disk, of what a 16-bit model keeps in float32.

    The class creates it so, or lists it for transformers, some for float16 alone.
    """
    listed = [*(model._keep_in_fp32_modules_strict or ())]
    if dtype == torch.float16:
        listed += model._keep_in_fp32_modules or ()
    kept = [re.compile(part.replace("*", ".*")) for part in listed]
    found = {
        name: value
        for name, value in state.items()
        if value.dtype == torch.float32
        or (value.is_floating_point() and any(one.search(name) for one in kept))
    }
    return frozenset(found.keys() | revert_weight_conversion(model, dict(found)))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in tensors.items() if not is_computed(name)}


def layer_list(model: nn.Module) -> str:
    """Return the name of a model's list of layers: of those as long, that with most parameters."""
    config = model.config.get_text_config(decoder=True).to_dict()  # type: ignore[union-attr, operator]
    count = StockConfig(config).num_layers
    sizes = {
        name: sum(value.numel() for value in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not sizes:
        raise RequestError("the model has no list of layers.")
    decoders = {name: size for name, size in sizes.items() if not is_tower(name)}
    sizes = decoders or sizes
    found = max(sizes, key=lambda name: sizes[name])
    owner = found.rpartition(".")[0]
    if others := [name for name in sizes if name != found and name.rpartition(".")[0] == owner]:
        raise RequestError(f"a layer is spread over the lists {', '.join([found, *others])}.")
    return found


def is_tower(name: str) -> bool:
    """Return True if a module belongs to the encoder of images or audio, by its name."""
    return _TOWER.search(name) is not None


def layers_on_disk(name: str, disk: Mapping[str, object]) -> str:
    """Return the beginning of the names of all layers on disk."""
    if any(each.startswith(f"{name}.") for each in disk):
        return f"{name}."
    last = name.rpartition(".")[2]  # the same on disk, except in EXAONE: `transformer.h.`
    numbered = (re.match(r"(.*?\.)\d+\.", each) for each in disk)
    sizes = Counter(found[1] for found in numbered if found is not None)
    if not sizes:
        raise RequestError("the names on disk have no list of layers.")
    return max(sizes, key=lambda it: (it.split(".")[-2] == last, not is_tower(it), sizes[it]))


def places(model: nn.Module) -> dict[str, Place]:
    """Return template on disk → location in memory, of all tensors that conversion moves.

    Each value of the model is replaced by a number of its own, which the conversion keeps.
    """
    state, marks, names = model.state_dict(), dict[str, Tensor](), list[str]()
    total, owner = 0, list[int]()
    for name, value in state.items():
        numbers = torch.arange(total, total + value.numel(), dtype=torch.float64)
        marks[name] = numbers.view(value.shape)
        total += value.numel()
        names.append(name)
        owner.append(total)
    ends = torch.tensor(owner)
    layers = layer_list(model)
    found: dict[str, Place] = {}
    converted = revert_weight_conversion(model, dict(marks))
    prefix = layers_on_disk(layers, converted)
    for name, value in converted.items():
        if name in marks and value.shape == marks[name].shape:
            continue
        live = names[int(torch.searchsorted(ends, value.flatten()[0], right=True))]
        place = _place(name, value, marks[live])
        if place is None:
            raise RequestError(f"{name} is neither whole nor a block of rows in memory.")
        mark = template(live, f"{layers}.")
        found[template(name, prefix)] = Place(mark, *place)
    return found


def _place(name: str, value: Tensor, whole: Tensor) -> tuple[int, int, bool] | None:
    """Return the block, the number of blocks, and whether the whole stacks experts."""
    expert = expert_of(name)
    is_stacked = expert is not None and whole.ndim == value.ndim + 1
    if is_stacked:
        assert expert is not None
        whole = whole[expert]
    if whole.ndim != value.ndim or whole.shape[1:] != value.shape[1:]:
        return None
    rows = len(value) if value.ndim else 1
    if value.ndim and len(whole) % rows:
        return None
    for block in range(len(whole) // rows if value.ndim else 1):
        part = whole[block * rows : (block + 1) * rows] if value.ndim else whole
        if torch.equal(part, value):
            return block, len(whole) // rows if value.ndim else 1, is_stacked
    return None
