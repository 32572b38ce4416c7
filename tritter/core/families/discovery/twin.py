"""A tiny twin of a model, and probes of its blocks.

The twin has the structure of the model's config, at the smallest sizes its class allows, and as
many layers as the model, so that rules which depend on a layer's position hold in it too. Its
parameters are random in float64, norms and biases included; its attention and experts use the
plain implementations, which support float64, and what a class computes in float32 is computed in
float64.

The probes find the tensors that write the residual stream: a change of entry i along one axis
changes coordinate i of the block's output and no other. If all writers of a block are zero, the
block is the identity. Writers are found from the end of the block to its beginning: an output
projection of attention writes the stream alone once the FFN after it is zero.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tritter.core.families.dimensions import Config
from tritter.core.families.discovery.configs import StockConfig, quiet, reason_of
from tritter.errors import RequestError

# Pattern of a config key → its size in the twin; the first match counts, None leaves the value
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r".*token_id|.*_index|.*_idx|.*_interval|.*_period", None),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r".*(layers|layer)", None),
    (r".*vocab_size.*|.*_vocab", 128),
    (r"max_position_embeddings|n_positions|n_ctx|max_.*_positions|max_seq_len|.*max_length", 64),
    (r"num_(key_value|kv)_heads|n_kv_heads|.*swa_num_key_value_heads|linear_num_key_heads", 2),
    (r".*(mamba|ssm).*heads", 8),
    (r".*(_heads|n_head)", 4),
    (r"linear_(key|value)_head_dim", 8),
    (r".*(head_dim|d_head|headdim|dim_head|kv_channels|head_size|attn_scalar)", 16),
    (r".*(rank)", 16),
    (r"rotary_dim", 8),
    (r"hidden_size_per_layer_input|mamba_d_state|state_size|ssm_state_size|.*chunk_size", 8),
    (r"hidden_size|d_model|n_embd|dim|emb_dim|.*embedding_size|attention_hidden_size", 64),
    (r"hidden_size_global|adapter_(in_dim|out_dim|input_size)", 64),
    (r"lru_width|word_embed_proj_dim|embedding_dim|dim_model_base", 64),
    (r"moe.*intermediate_size|expert_ffn.*size|shared_expert.*size", 32),
    (r".*(intermediate_size|ffn_dim|ffn_size|n_inner|d_ff|dff|dim_ff|ffn_hidden_size)", 96),
    (r"num_.*experts_per.*|moe_topk|moe_k|.*top_k", 2),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r".*window.*|.*local_attention|index_topk|attention_chunk_size|block_size", 8),
    (r"index_n_heads|num_codebooks", 2),
)
# Model type → values that its class requires of the sizes above
_HINTS: Mapping[str, Config] = {
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"hidden_size": 64, "expand": 2, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16},
    "reformer": {"hidden_size": 64, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
}
_GROUPS = ("num_key_value_heads", "num_kv_heads")  # of heads, which a class may derive
TOLERANCE = 1e-10  # of float64 identities
_CHANGE = 0.37  # of the entries that are probed
_COORDINATE = 3
_TOKENS = (2, 12)  # sequences and tokens of a forward pass
_SPREAD = 0.1  # of random parameters
_NORMED = 0.01  # smaller relative changes of an output are none
_MAX_STREAMS = 4
_LARGE = 1e6  # factor of the stream in which only factors of the stream matter
_MAX_PARAMETERS = 2**25


@dataclass(frozen=True, slots=True)
class Twin:
    """A tiny model with the structure of a larger one.

    Args:
        config: its config, of the model's own class.
        model: float64, in evaluation mode.
    """

    config: PreTrainedConfig
    model: nn.Module

    @property
    def text(self) -> PreTrainedConfig:
        """The config of the decoder, which multimodal configs contain."""
        return self.config.get_text_config(decoder=True)

    @classmethod
    def of(cls, config: Config) -> "Twin":
        """Return the twin of a model.

        Args:
            config: its config.json.
        """
        _ = StockConfig(config).kind  # refuses unknown types
        reasons: list[str] = []
        for changes in _variants():
            try:
                with quiet():
                    twin = _built(_small_config(config, changes))
                    if bool(twin.logits().isfinite().all()):
                        return twin
                reasons.append("its logits are not finite")
            except AttributeError as error:
                reasons.append(f"its class reads what its config lacks ({reason_of(error)})")
            except Exception as error:  # a config class or a model may raise anything
                reasons.append(reason_of(error))
        raise RequestError(f"no tiny model of it runs: {reasons[0]}")

    def logits(self, model: nn.Module | None = None) -> Tensor:
        """Return float64 logits [B, T, V] of fixed random tokens.

        Args:
            model: a model with the same tokens. Default: the twin.
        """
        model = self.model if model is None else model
        draws = torch.Generator().manual_seed(0)
        input_ids = torch.randint(3, min(self.text.vocab_size, 120), _TOKENS, generator=draws)
        if getattr(model.config, "rescale_every", 0):  # RWKV changes its weights when evaluated
            model = deepcopy(model)
        with torch.no_grad(), in_float64():
            return model(input_ids=input_ids, use_cache=False).logits

    def sibling(self, config: Config) -> nn.Module:
        """Return the stock model, in float64, of another config of the same class."""
        return _stock_model(type(self.config).from_dict(config))

    def scales_embedding(self, embedding: nn.Module, block: "Block") -> bool:
        """Return True if the model multiplies the embedding by √hidden_size.

        Args:
            embedding: of the model.
            block: the first layer.
        """
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        modules = self.model.named_modules()
        name = next(name for name, module in modules if module is block.module)
        streams = []
        with restored(weight):
            for change in (0.0, _CHANGE):
                weight.data[:, _COORDINATE] += change
                (call,) = calls_in(self.model, self.logits, [name])
                streams.append(call.given)
        scale = (streams[1] - streams[0])[..., _COORDINATE] / _CHANGE
        return is_equal(scale, torch.full_like(scale, math.sqrt(weight.shape[-1])))

    def block(self, name: str) -> "Block":
        """Return a layer, by its name in memory, with the arguments of a call of it."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            calls.append((args, dict(keywords)))

        layer = self.model.get_submodule(name)
        handle = layer.register_forward_pre_hook(record, with_kwargs=True)
        try:
            self.logits()
        finally:
            handle.remove()
        if len(calls) != 1:
            raise RequestError(f"the model calls {name} {len(calls)} times, not once.")
        args, keywords = calls[0]
        hidden = first_tensor((*args, *keywords.values()))
        assert hidden is not None
        return Block(layer, args, keywords, hidden)

    def further_streams(self, name: str) -> "Iterator[Block]":
        """Yield a layer once for each further tensor that it receives from the layer before it."""
        layers, _, index = name.rpartition(".")
        if index == "0":
            return
        before = self.model.get_submodule(f"{layers}.{int(index) - 1}")
        outputs: list[Tensor] = []
        handle = before.register_forward_hook(
            lambda _, __, values: outputs.extend(_tensors_in(values))
        )
        try:
            block = self.block(name)
        finally:
            handle.remove()
        inputs = [id(each) for each in (*block.args, *block.keywords.values())]
        for number, value in enumerate(outputs[1:], start=1):
            if id(value) in inputs and value.is_floating_point():
                yield replace(block, hidden=value, output=number)


def _variants() -> Iterator[Config]:
    """Yield changes of the usual sizes, for classes that refuse these."""
    yield {}
    yield {"num_key_value_heads": 4}
    yield {"head_dim": 8}
    yield {"qk_head_dim": 32, "head_dim": 32}


def small_sizes(config: Config) -> Config:
    """Return a config, complete with the defaults of its class, at the sizes of a twin."""
    kind, full = StockConfig(config).kind, StockConfig(config).full
    explicit = set(config) | {key for key, value in kind().to_dict().items() if value is not None}
    small = _shrunk({key: value for key, value in full.items() if key in explicit})
    for name, value in full.items():
        if isinstance(value, dict) and name.endswith("_config"):
            small[name] = _shrunk(value)
    for key in ("is_decoder", "residual_in_fp32"):
        if key in full:
            small[key] = key == "is_decoder"
    dropped = _derived(kind) - {key for key in _GROUPS if config.get(key)}
    return {key: value for key, value in small.items() if key not in dropped}


def _small_config(config: Config, changes: Config) -> PreTrainedConfig:
    small = small_sizes(config)
    small |= {key: value for key, value in changes.items() if key in small}
    if part := StockConfig(small).part:
        inner: Config = small[part]  # type: ignore[assignment]
        small[part] = {**inner, **{key: value for key, value in changes.items() if key in inner}}
    hints = _HINTS.get(str(config["model_type"]), {})
    return StockConfig(config).kind.from_dict({**small, **hints})


def _derived(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the keys that a config class computes from others."""
    plain, own = kind().to_dict(), set()
    fields = getattr(kind, "__dataclass_fields__", {})
    for key, value in plain.items():
        default = fields[key].default if key in fields else None
        if key in fields and default is None and isinstance(value, int):
            own.add(key)
    return own


def _shrunk(config: Config) -> Config:
    """Return a config with small sizes."""
    small = dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and (key == "per_layer_config" or key.isdigit()):
            small[key] = _shrunk(value)
        size = _small_size(key)
        if size is not None and isinstance(value, list):
            small[key] = [min(each, size) if isinstance(each, int) else each for each in value]
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if key.endswith("token_id"):
            small[key] = min(value, 2)
        elif size is not None and value > size:
            small[key] = size
    heads = [small.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    if config.get("num_attention_heads") == config.get("num_key_value_heads") and None not in heads:
        small["num_key_value_heads"] = heads[0]
    return small


def _small_size(key: str) -> int | None:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, key):
            return size
    return None


def _built(config: PreTrainedConfig) -> Twin:
    """Build the model of a small config, with random float64 parameters."""
    with torch.device("meta"):
        size = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise RequestError(f"the smallest twin has {size:,} parameters")
    model = _stock_model(config)
    draws = torch.Generator().manual_seed(1)
    for value in _values(model):
        is_gain = value.ndim == 1 and bool((value == 1).all())
        noise = torch.randn(value.shape, generator=draws, dtype=torch.float64) * _SPREAD
        value.data.copy_(noise + (1.0 if is_gain else 0.0))
    return Twin(config, model)


def _stock_model(config: PreTrainedConfig) -> nn.Module:
    """Return the stock model of a config in float64, with plain attention and experts."""
    plain: dict[str, Any] = {"attn_implementation": "eager"}
    with _float64_by_default(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float64, experts_implementation="eager", **plain
            )
        except (ValueError, TypeError):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return model.double().eval()


def _values(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a model, and the buffers that its files have."""
    yield from model.parameters()
    saved = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            yield buffer


class _Float64(TorchFunctionMode):
    """Computes in float64 what a class converts to float32, such as norms."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if each is torch.float32 else each for each in args]
        named = dict(kwargs or {})
        if named.get("dtype") is torch.float32:
            named["dtype"] = torch.float64
        return func(*wide, **named)


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64, also what a class creates or converts."""
    with _float64_by_default(), _Float64():
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: on a busy machine, twins are 40 times as slow in several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Probes of blocks


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of a twin, and a call of it.

    Args:
        module: the layer.
        args: of the call.
        keywords: of the call.
        hidden: residual stream before it, [..., H].
        output: index of that stream among the tensors that the layer returns.
    """

    module: nn.Module
    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    hidden: Tensor
    output: int = 0

    def change(self, hidden: Tensor | None = None) -> Tensor:
        """Return the change of the residual stream by the block.

        Args:
            hidden: residual stream before it. Default: its own.
        """
        stream = self.hidden if hidden is None else hidden
        args = [stream if each is self.hidden else each for each in self.args]
        named = {k: stream if each is self.hidden else each for k, each in self.keywords.items()}
        with torch.no_grad(), in_float64():
            outputs = _tensors_in(self.module(*args, **named))[self.output :]
        if not outputs or outputs[0].shape != stream.shape:
            raise RequestError("a layer does not return its residual stream.")
        return outputs[0] - stream

    def writers(self) -> dict[str, float]:
        """Return the smallest set of tensors with which it is the identity: name → its value then.

        That is 0 for what is added to the stream, −1 for such a gain that is stored minus one, 1
        for a factor of the stream itself.
        """
        saved = self.module.state_dict(keep_vars=True)
        buffers = {name: value for name, value in self.module.named_buffers() if name in saved}
        values = {**dict(self.module.named_parameters()), **buffers}
        values = {name: value for name, value in values.items() if value.is_floating_point()}
        before = {name: value.detach().clone() for name, value in values.items()}
        found: list[str] = []
        with restored(*values.values()):
            reason = _zero_writers(self, values, found)
            if not reason:
                return _needed(self, found, values, before)
        with restored(*values.values()):
            found = _set_factors(self, values)
            if _zero_writers(self, values, found, streams=_MAX_STREAMS):
                raise RequestError(reason)
            return _needed(self, found, values, before)

    @property
    def values(self) -> dict[str, Tensor]:
        """Its parameters and buffers, by name within the layer."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def activation(self, gate: str, up: str, down: str) -> str:
        """Return the name of the module σ if down reads σ(gate(x)) · up(x); empty: there is none.

        Args:
            gate: name of a weight.
            up: name of a weight; empty if down reads σ(gate(x)).
            down: name of a weight.
        """
        calls = {call.name: call for call in calls_in(self.module, self.change)}
        matrices = [name.removesuffix(".weight") for name in (gate, up, down) if name]
        if not calls.keys() >= set(matrices):
            return ""
        for name in matrices:  # a subclass may compute something else
            linear = self.module.get_submodule(name)
            assert isinstance(linear, nn.Linear | Conv1D)
            weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
            with torch.no_grad():
                made = nn.functional.linear(calls[name].given, weight, linear.bias)
            if not is_equal(made, calls[name].made):
                return ""
        first, last = calls[matrices[0]], calls[matrices[-1]]
        factor = calls[matrices[1]].made if up else torch.ones(())
        for name, call in calls.items():
            is_next = name not in matrices and torch.equal(call.given, first.made)
            if is_next and is_equal(call.made * factor, last.given):
                return name if _is_elementwise(self.module.get_submodule(name), call.given) else ""
        return ""

    def is_output(self, name: str, axis: int) -> bool:
        """Return True if an axis of a tensor has the outputs of the tensor's module."""
        _, value = owner_of(self.module, name)
        path, size = name.rpartition(".")[0], value.shape[axis]
        before = calls_in(self.module, self.change, [path])
        if not before or before[-1].made.shape[-1] != size or size <= _COORDINATE:
            return False
        with restored(value):
            value.data.select(axis, _COORDINATE).add_(_CHANGE)
            after = calls_in(self.module, self.change, [path])
        return _is_at_coordinate(after[-1].made - before[-1].made)


def _is_elementwise(module: nn.Module, values: Tensor) -> bool:
    """Return True if a module's outputs for some entries do not depend on the others."""
    half = values.shape[-1] // 2
    changed = torch.cat([values[..., :half], values[..., half:] + _CHANGE], -1)
    with torch.no_grad(), in_float64():
        first, second = module(values), module(changed)
    return torch.equal(first[..., :half], second[..., :half])


def _zero_writers(
    block: Block, values: Mapping[str, Tensor], found: list[str], *, streams: int = 1
) -> str:
    """Zero writers until the block is the identity, and add them to those found.

    Args:
        block: the layer.
        values: its tensors.
        found: names of the writers.
        streams: a writer may write up to as many residual streams, which lie one after another.

    Returns:
        The reason why it can't be the identity; empty if it is.
    """
    while block.change().abs().max() > TOLERANCE:
        more = [
            name
            for name, value in sorted(values.items(), key=lambda item: -item[1].ndim)
            if name not in found and _is_writer(block, value, streams)
        ]
        more = [name for name in more if _is_zeroed(block, values[name], always=streams > 1)]
        if not more:
            return _reason(block)
        found += more
    return ""


def _set_factors(block: Block, values: Mapping[str, Tensor]) -> list[str]:
    """Set the factors of the stream itself to one, and return their names.

    In a large stream they matter, and branches that begin with a norm do not.
    """
    found, large = [], block.hidden * _LARGE
    size = block.change(large).abs().sum()
    for name, value in values.items():
        if value.ndim > 1 or size <= TOLERANCE * _LARGE:
            continue
        before = value.detach().clone()
        value.data.fill_(1.0)
        changed = block.change(large).abs().sum()
        if changed < size * (1 - _NORMED):
            found.append(name)
            size = changed
        else:
            value.data.copy_(before)
    return found


def _is_writer(block: Block, value: Tensor, streams: int) -> bool:
    """Return True if a tensor writes the residual stream."""
    size = block.hidden.shape[-1]
    change = block.change()
    for axis, length in enumerate(value.shape):
        if length <= _COORDINATE or size % length or size // length > streams:
            continue
        with restored(value):
            value.data.select(axis, _COORDINATE).add_(_CHANGE)
            moved = block.change() - change
        if _is_at_coordinate(moved.unflatten(-1, (-1, length))):
            return True
    return False


def _is_at_coordinate(difference: Tensor) -> bool:
    """Return True if a difference [..., H] is zero except at the probed coordinate."""
    size = difference.abs().flatten(0, -2).amax(0)  # [H]
    others = torch.cat([size[:_COORDINATE], size[_COORDINATE + 1 :]])
    return bool(size[_COORDINATE] > TOLERANCE and others.max() <= TOLERANCE * (1 + size.max()))


def _is_zeroed(block: Block, value: Tensor, *, always: bool) -> bool:
    """Zero a writer, `always` or if that reduces what the block adds; return whether it is zero.

    A gain may be stored minus one.
    """
    before, change = value.detach().clone(), block.change().abs().sum()
    sizes: dict[float, Tensor] = {}
    for zero in (0.0, -1.0) if value.ndim == 1 else (0.0,):
        value.data.fill_(zero)
        sizes[zero] = block.change().abs().sum()
    zero, size = min(sizes.items(), key=lambda item: float(item[1]))
    if always or size < change * (1 - TOLERANCE):
        value.data.fill_(zero)
        return True
    value.data.copy_(before)
    return False


def _needed(
    block: Block, found: list[str], values: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, float]:
    """Restore each writer that the identity does not need; return the others, with their zeros.

    A gain after a projection and the projection are both writers. Without the gain at zero the
    projection is needed, so gains are restored first.
    """
    needed = list(found)
    for name in sorted(found, key=lambda each: values[each].ndim):
        zeroed = values[name].detach().clone()
        values[name].data.copy_(before[name])
        if block.change().abs().max() <= TOLERANCE:
            needed.remove(name)
        else:
            values[name].data.copy_(zeroed)
    return {name: float(values[name].detach().flatten()[0]) for name in needed}


def _reason(block: Block) -> str:
    """Return the reason why a block cannot be the identity."""
    large = block.hidden * _LARGE
    moved = block.change(2 * large) - block.change(large) + large
    if moved.norm() < large.norm() * _NORMED:  # a norm removes the scale of its input
        found = "it normalises the residual stream itself (post-norm)"
        return f"no zeroed block is an identity: {found}"
    return "no values of its tensors make a layer the identity"


def _tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in the outputs of a module."""
    if isinstance(values, Tensor):
        return [values]
    items = values.values() if isinstance(values, Mapping) else values
    return [each for each in items if isinstance(each, Tensor)] if items is not None else []


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor in the outputs of a module, or None."""
    return next(iter(_tensors_in(values)), None)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a module.

    Args:
        name: of the module.
        given: its first input.
        made: its output.
    """

    name: str
    given: Tensor
    made: Tensor


def calls_in(
    module: nn.Module, run: Callable[[], object], names: Collection[str] | None = None
) -> list[_Call]:
    """Return the calls of modules within a module, in the order in which they end.

    Args:
        module: the owner.
        run: calls it.
        names: of the modules. Default: all.
    """
    calls: list[_Call] = []

    def record(
        name: str, _: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any], output: Any
    ) -> None:
        given, made = first_tensor((*args, *keywords.values())), first_tensor(output)
        if given is not None and made is not None:  # whose caller may add to it in place
            calls.append(_Call(name, given.detach(), made.detach().clone()))

    handles = [
        each.register_forward_hook(partial(record, name), with_kwargs=True)
        for name, each in module.named_modules()
        if names is None or name in names
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    """Return the module that a tensor belongs to, and the tensor."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner, getattr(owner, attribute)


@contextmanager
def restored(*values: Tensor) -> Iterator[None]:
    """Restore tensors after changes."""
    saved = [value.detach().clone() for value in values]
    try:
        yield
    finally:
        for value, before in zip(values, saved, strict=True):
            value.data.copy_(before)


def is_equal(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors are equal in float64."""
    size = 1 + float(second.abs().max())
    return first.shape == second.shape and bool((first - second).abs().max() <= TOLERANCE * size)
