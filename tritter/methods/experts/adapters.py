"""PEFT's LoRA layers in a model: put on, named, taken off. All that we know of them stands here.

PEFT's own forward pass runs with no adapter active, so that a layer computes what its base does,
quantised or not; what the adapters add is computed in `tritter.methods.experts.mixture`.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tritter.errors import RequestError, did_you_mean
from tritter.training.parameters import WRAPPED

# Tensors of all experts of a layer → what PEFT takes for a part of them
_FUSED = {"down_proj": ("down_proj",), "gate_up_proj": ("gate_proj", "up_proj")}
_LAYER = re.compile(r"(?:^|.*\.)(?:layers|h)\.(\d+)(?=\.)")  # h in GPT-2
_OWN = re.compile(r".*\.lora_(?:embedding_)?[AB]\.(?P<adapter>[^.]+)(?:\.weight)?")
_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """The size of one adapter, equal in all layers that it stands on.

    Args:
        rank: r, rows of A and columns of B.
        alpha: α; what the adapter adds is multiplied with α / r.
        targets: last names of the layers that it stands on: linear layers of decoder layers, such
            as `q_proj`, and the vocabulary, `embed_tokens` and `lm_head`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """α / r."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One adapter in one layer; an embedding is a linear layer of one-hot tokens.

    Args:
        down: A [r, in_features]; of an embedding [r, V].
        up: B [out_features, r].
        scaling: factor on B·A.
        gain: what the layer multiplies its output with, the adapter's included (Gemma's
            embeddings have one); None: nothing.
    """

    down: Tensor
    up: Tensor
    scaling: float
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, [out_features, in_features].

        The weight of an embedding lies transposed, [V, out_features].
        """
        return self.scaling * (self.up @ self.down)


def put_on(model: nn.Module, name: str, shape: AdapterShape, *, seed: int) -> None:
    """Put an adapter on a live model, drawn as PEFT draws it, so that nothing changes.

    In a linear layer B = 0, in an embedding A = 0. Embeddings and a head that are tied stay so, and
    each has an adapter of its own. Whether the model is trained or not stays as it is; the
    adapter's parameters are trained.

    Raises:
        RequestError: the model has no layer of a name in `targets` that takes an adapter, or an
            adapter `name` already; or nothing can be called so.
    """
    is_taken = hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name)
    if _NAME.fullmatch(name) is None or is_taken:
        why = "it is a name of torch's own" if is_taken else "allowed are letters, digits, _ and -"
        raise RequestError(f"no adapter can be called {name!r}: {why}.")
    if name in adapter_names(model):
        raise RequestError(f"the model has an adapter {name} already.")
    known = adaptable(model)
    if unknown := [target for target in shape.targets if target not in known]:
        raise RequestError(
            f"experts.targets = {unknown[0]}: the model has no linear layer or vocabulary of this "
            f"name; it has {_listed(known)}.{did_you_mean(unknown[0], known)}"
        )
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type] # PEFT divides it and asks no more
        target_modules=list(shape.targets),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT sets it for each layer
        torch.default_generator.manual_seed(seed)  # the GPUs' generators stay as they are
        inject_adapter_in_model(config, model, adapter_name=name)
    for _, layer in adapted_layers(model):
        layer.set_adapter([])  # which freezes all adapters
        layer.train(model.training)
    own = {id(parameter) for parameter in parameters_of(model, name).values()}
    for key, parameter in model.named_parameters():
        was_trained = key in trained or base_name(key) in trained
        parameter.requires_grad_(was_trained or id(parameter) in own)


def take_off(model: nn.Module, name: str) -> None:
    """Take an adapter off a live model, with its weights.

    Raises:
        RequestError: there is none of this name.
    """
    _check_known(model, name)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    for _, layer in adapted_layers(model):
        if name in layer.r:
            layer.delete_adapter(name)
            layer.set_adapter([])
    del _configs(model)[name]
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in frozen)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the adapters on a model, in the order in which they came."""
    return tuple(_configs(model))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (name, layer) of the layers with adapters, in forward order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, cast(LoraLinear, module)  # or its like, quantised or of an embedding


def factors(layer: LoraLinear, name: str) -> Factors | None:
    """Return one adapter of a layer; None where it does not stand on this layer."""
    if name in layer.lora_embedding_A:
        gain = getattr(layer.get_base_layer(), "embed_scale", None)
        down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return Factors(down, up, float(layer.scaling[name]), gain)
    if name not in layer.lora_A:
        return None
    down, up = (
        layer.lora_A[name].get_parameter("weight"),
        layer.lora_B[name].get_parameter("weight"),
    )
    return Factors(down, up, float(layer.scaling[name]))


def is_embedding(layer: LoraLinear) -> bool:
    """Say whether a layer with adapters looks tokens up."""
    return isinstance(layer, LoraEmbedding)


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter by their names in the model, A before B."""
    named = ((n, p, _OWN.fullmatch(n)) for n, p in model.named_parameters())
    return {n: p for n, p, own in named if own is not None and own["adapter"] == name}


def shape_of(model: nn.Module, name: str) -> AdapterShape:
    """Return the size of an adapter.

    Raises:
        RequestError: there is none of this name.
    """
    _check_known(model, name)
    config = _configs(model)[name]
    return AdapterShape(config.r, float(config.lora_alpha), tuple(sorted(config.target_modules)))


def set_rank(model: nn.Module, name: str, rank: int) -> None:
    """State another rank of an adapter whose parameters are changed already; α / r is kept.

    Raises:
        RequestError: there is none of this name.
    """
    shape = shape_of(model, name)
    alpha = shape.scaling * rank
    config = _configs(model)[name]
    config.r, config.lora_alpha = rank, alpha
    for _, layer in adapted_layers(model):
        if name in layer.r:
            layer.r[name], layer.lora_alpha[name] = rank, alpha
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            down.out_features = up.in_features = rank  # type: ignore[assignment]


def base_bits(model: nn.Module) -> Literal[8, 4] | None:
    """Return in how many bits bitsandbytes holds the base of a model; None: it does not."""
    if vars(model).get("is_loaded_in_8bit"):
        return 8
    return 4 if vars(model).get("is_loaded_in_4bit") else None


def layer_number(name: str) -> int | None:
    """Return which decoder layer a module of this name stands in; None: in none."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the decoder layers of a model by number."""
    named = dict(model.named_modules())
    paths = {int(m[1]): m[0] for name in named if (m := _LAYER.match(name)) is not None}
    return {number: named[path] for number, path in sorted(paths.items())}


def adaptable(model: nn.Module, *, whole: bool = True) -> set[str]:
    """Return the last names of the layers that adapters can stand on.

    Where a model holds experts as one tensor, PEFT would take `down_proj` and the like for parts of
    it; there these names are left out.

    Args:
        whole: with the vocabulary.
    """
    ends = ("get_input_embeddings", "get_output_embeddings") if whole else ()
    vocabulary = [getattr(model, each)() for each in ends if hasattr(model, each)]
    held = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if (
            isinstance(module, nn.Linear | Conv1D | LoraLayer)
            and layer_number(name) is not None
            and not is_of_adapter(f".{name}.")
            and not name.endswith(WRAPPED)
        )
        or any(module is each for each in vocabulary)
    } - {part for fused, parts in _FUSED.items() if fused in held for part in parts}


def base_name(name: str) -> str:
    """Return what a parameter of the base is called where no adapters are."""
    return name.replace(f"{WRAPPED}.", ".")


def is_of_adapter(name: str) -> bool:
    """Say whether a parameter of this name belongs to some adapter."""
    return any(part in name for part in _PARTS)


def _configs(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's configs of the adapters on a model, which it holds itself."""
    held: dict[str, Any] = getattr(model, "peft_config", {})
    return held


def _check_known(model: nn.Module, name: str) -> None:
    known = adapter_names(model)
    if name not in known:
        raise RequestError(
            f"no adapter {name}; there are {_listed(known)}.{did_you_mean(name, known)}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
