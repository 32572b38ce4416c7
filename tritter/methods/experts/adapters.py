"""PEFT's LoRA layers on a live model: adding, naming and removing them.

This is the only module that depends on PEFT's layers. Their own forward pass runs with no adapter
active, so that a layer computes its base output, quantised or not. The output of the adapters is
added in `tritter.methods.experts.mixture`.
PEFT imports bitsandbytes and torch's compiler, so functions import it once there are adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad
from transformers.pytorch_utils import Conv1D

from tritter.checkpoints.expert_files import AdapterShape
from tritter.errors import RequestError, did_you_mean
from tritter.training.parameters import WRAPPED

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

# Fused tensors of a layer's experts → names that PEFT would mistake for parts of them
_FUSED = {"down_proj": ("down_proj",), "gate_up_proj": ("gate_proj", "up_proj")}
# Model type → names that get no adapter: PEFT refuses `out_proj` of Mamba, and RWKV rescales two
# kinds of weights in evaluation
_UNFIT = {
    "rwkv": {"output", "value"},
    "falcon_h1": {"out_proj"},
    "falcon_mamba": {"out_proj"},
    "mamba": {"out_proj"},
    "mamba2": {"out_proj"},
    "nemotron_h": {"out_proj"},
}
_LAYER = re.compile(r"(?:^|.*\.)(?:layers|h|blocks)\.(\d+)(?=\.)")  # h in GPT-2, blocks in MPT
_OWN = re.compile(r".*\.lora_(?:embedding_)?[AB]\.(?P<adapter>[^.]+)(?:\.weight)?")
_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One adapter in one layer; an embedding is a linear layer of one-hot tokens.

    Args:
        down: A [r, in_features]; for an embedding [r, V].
        up: B [out_features, r].
        scaling: factor on B·A.
        gain: factor on the layer's output, the adapter's included (Gemma's embeddings have one);
            None: 1.
        is_embedding: the layer is an embedding.
    """

    down: Tensor
    up: Tensor
    scaling: float
    gain: Tensor | None = None
    is_embedding: bool = False

    @classmethod
    def of(cls, layer: LoraLinear, name: str) -> Factors | None:
        """Return one adapter of a layer; None if the layer does not have it."""
        if name in layer.lora_embedding_A:
            gain = getattr(layer.get_base_layer(), "embed_scale", None)
            down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
            return cls(down, up, float(layer.scaling[name]), gain, is_embedding=True)
        if name not in layer.lora_A:
            return None
        down, up = (
            layer.lora_A[name].get_parameter("weight"),
            layer.lora_B[name].get_parameter("weight"),
        )
        return cls(down, up, float(layer.scaling[name]))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def low(self, tokens: Tensor) -> Tensor:
        """Return A x for tokens [N, in_features], or one-hot ones as integers [N]: [N, r]."""
        if tokens.is_floating_point():
            return linear(tokens, self.down)
        return embedding(tokens, self.down.T)

    def delta(self) -> Tensor:
        """Return the change of the weight, [out_features, in_features].

        The weight of an embedding is stored transposed, [V, out_features].
        """
        return self.scaling * (self.up @ self.down)

    @classmethod
    def merged(
        cls, parts: Sequence[Factors], weights: Sequence[float], *, rank: int, alpha: float
    ) -> Factors:
        """Return the adapter of a rank that is nearest to Σ wᵢ · (α/r)ᵢ · Bᵢ Aᵢ (Eckart–Young).

        The sum is never computed: with [B₁ …] = Q S and [A₁ …]ᵀ = P T it is Q (S Tᵀ) Pᵀ, so the
        SVD is of a matrix whose size is the sum of the ranks.

        Args:
            parts: the adapters.
            weights: weight of each, such as its mean gate.
            rank: rank of the result; if the sum has a lower one, the rest is zero.
            alpha: α of the result; B is divided by α / rank.
        """
        scaled = zip(parts, weights, strict=True)
        up = torch.cat([w * each.scaling * each.up.double() for each, w in scaled], dim=1)
        down = torch.cat([each.down.double() for each in parts])  # [R, in]; up is [out, R]
        q, s = torch.linalg.qr(up)
        p, t = torch.linalg.qr(down.T)
        left, values, right = torch.linalg.svd(s @ t.T)
        number = min(rank, len(values))
        root = values[:number].sqrt()
        example, scaling = parts[0].down, alpha / rank
        new_up = pad((q @ left[:, :number]) * root / scaling, (0, rank - number))
        new_down = pad((root[:, None] * right[:number]) @ p.T, (0, 0, 0, rank - number))
        return replace(parts[0], down=new_down.to(example), up=new_up.to(example), scaling=scaling)

    def lost_share(self, parts: Sequence[Factors], weights: Sequence[float]) -> float:
        """Return ‖sum − merged‖ / ‖sum‖ (Frobenius), the loss of a merge; 0 for a sum of zeros."""
        whole = sum((w * each.delta().double() for each, w in zip(parts, weights, strict=True)))
        assert isinstance(whole, Tensor)
        norm = float(whole.norm())
        return float((whole - self.delta().double()).norm()) / norm if norm else 0.0


class LoraLayers:
    """The layers of a live model with LoRA adapters, or that can get some.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, LoraLinear]]:
        """Yield (name, layer) of the layers with adapters, in forward order."""
        if not hasattr(self.model, "peft_config"):
            return
        from peft.tuners.lora import LoraLayer

        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, cast("LoraLinear", module)  # or a quantised layer or an embedding

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters on the model, in the order in which they were added."""
        return tuple(self._configs)

    @property
    def base_bits(self) -> Literal[8, 4] | None:
        """The number of bits that bitsandbytes quantised the base to; None: it is not."""
        if vars(self.model).get("is_loaded_in_8bit"):
            return 8
        return 4 if vars(self.model).get("is_loaded_in_4bit") else None

    def add(self, name: str, shape: AdapterShape, *, seed: int) -> None:
        """Add an adapter, initialised as by PEFT, so that the function is unchanged.

        A linear layer starts with B = 0, an embedding with A = 0. A tied embedding and head stay
        tied, and each gets its own adapter. The training mode of the model does not change; the
        parameters of the adapter require gradients.
        """
        from peft import LoraConfig, inject_adapter_in_model

        model = self.model
        is_taken = hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name)
        if _NAME.fullmatch(name) is None or is_taken:
            why = "torch reserves this name" if is_taken else "use only letters, digits, _ and -"
            raise RequestError(f"{name!r} is not a valid adapter name: {why}.")
        known = self.adaptable()
        if unknown := [target for target in shape.targets if target not in known]:
            raise RequestError(
                f"experts.targets = {unknown[0]}: the model has no linear layer or vocabulary with "
                f"this name; it has {_join_names(known)}.{did_you_mean(unknown[0], known)}"
            )
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,  # type: ignore[arg-type] # a float works: PEFT only divides it
            target_modules=list(shape.targets),
            lora_dropout=0.0,
            bias="none",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT sets it for each
            torch.default_generator.manual_seed(seed)  # GPU generators are unaffected
            inject_adapter_in_model(config, model, adapter_name=name)
        for _, layer in self:
            layer.set_adapter([])  # this freezes all adapters
            layer.train(model.training)
        others = (p for other in self.adapters for p in self.parameters(other).values())
        dtype = next(others).dtype  # PEFT takes that of the base, or float32 if it is quantised
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.to(dtype)
        own = {id(parameter) for parameter in self.parameters(name).values()}
        for key, parameter in model.named_parameters():
            was_trained = key in trained or key.replace(f"{WRAPPED}.", ".") in trained
            parameter.requires_grad_(was_trained or id(parameter) in own)

    def remove(self, name: str) -> None:
        """Remove an adapter and its weights."""
        frozen = {key for key, p in self.model.named_parameters() if not p.requires_grad}
        for _, layer in self:
            if name in layer.r:
                layer.delete_adapter(name)
                layer.set_adapter([])
        del self._configs[name]
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(key not in frozen)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of an adapter by name, A before B."""
        named = ((n, p, _OWN.fullmatch(n)) for n, p in self.model.named_parameters())
        return {n: p for n, p, own in named if own is not None and own["adapter"] == name}

    def num_parameters(self, *names: str) -> int:
        """Return the number of parameters of adapters."""
        return sum(p.numel() for name in names for p in self.parameters(name).values())

    def shape(self, name: str) -> AdapterShape:
        """Return the size of an adapter."""
        if name not in (known := self.adapters):
            raise RequestError(
                f"no adapter {name}; the model has {_join_names(known)}.{did_you_mean(name, known)}"
            )
        config = self._configs[name]
        targets = tuple(sorted(config.target_modules))
        return AdapterShape(config.r, float(config.lora_alpha), targets)

    def set_rank(self, name: str, rank: int) -> None:
        """Set the rank of an adapter whose parameters were already resized; α / r is kept."""
        alpha = self.shape(name).scaling * rank
        config = self._configs[name]
        config.r, config.lora_alpha = rank, alpha
        for _, layer in self:
            if name in layer.r:
                layer.r[name], layer.lora_alpha[name] = rank, alpha
            if name in layer.lora_A:
                down, up = layer.lora_A[name], layer.lora_B[name]
                down.out_features = up.in_features = rank  # type: ignore[assignment]

    def decoder_layers(self) -> dict[int, nn.Module]:
        """Return the decoder layers of the model by index."""
        named = dict(self.model.named_modules())
        found = [match for name in named if (match := _LAYER.match(name)) is not None]
        paths = {int(match[1]): match[0] for match in found}
        stacks = {match[0].removesuffix(match[1]) for match in found}
        if len(stacks) > 1:
            raise RequestError(
                f"LoRA experts need one stack of layers, and the model has {len(stacks)}: "
                f"{', '.join(sorted(each.strip('.') for each in stacks))}. Use a text model."
            )
        return {number: named[path] for number, path in sorted(paths.items())}

    def adaptable(self, *, whole: bool = True) -> set[str]:
        """Return the last names of the layers that can get adapters.

        In models that store all experts of a layer as one tensor, PEFT would mistake `down_proj`
        and similar names for parts of it; there these names are excluded, as are some in Mamba and
        RWKV.

        Args:
            whole: include the vocabulary.
        """
        model = self.model
        ends = ("get_input_embeddings", "get_output_embeddings") if whole else ()
        vocabulary = [getattr(model, each)() for each in ends if hasattr(model, each)]
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        excluded = {part for fused, parts in _FUSED.items() if fused in names for part in parts}
        excluded |= _UNFIT.get(getattr(getattr(model, "config", None), "model_type", ""), set())
        adapted = {layer for _, layer in self}
        return {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if (
                (isinstance(module, nn.Linear | Conv1D) or module in adapted)
                and layer_number(name) is not None
                and not is_of_adapter(f".{name}.")
                and not name.endswith(WRAPPED)
            )
            or any(module is each for each in vocabulary)
        } - excluded

    @property
    def _configs(self) -> dict[str, Any]:
        """PEFT's configs of the adapters."""
        configs: dict[str, Any] = getattr(self.model, "peft_config", {})
        return configs


def layer_number(name: str) -> int | None:
    """Return the index of the decoder layer that a module belongs to; None: it has none."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def is_of_adapter(name: str) -> bool:
    """Return True if a parameter of this name belongs to an adapter."""
    return any(part in name for part in _PARTS)


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
