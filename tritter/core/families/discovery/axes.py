"""The axes along which a model's sizes grow, found as permutation symmetries of its layers.

The neurons of an FFN, groups of attention heads and coordinates of the residual stream have no
order: a layer computes the same function if they are permuted along all axes of their space. So the
axes that follow a config key are found by changing it on the meta device, and the order of the
units along each axis by permuting a twin's layer in each possible arrangement.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, product
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tritter.core.families.dimensions import Config
from tritter.core.families.discovery.configs import StockConfig, quiet, reason_of
from tritter.core.families.discovery.skeleton import Shape, in_layer, layer_list
from tritter.core.families.discovery.twin import (
    Block,
    Twin,
    calls_in,
    first_tensor,
    in_float64,
    is_equal,
    owner_of,
    restored,
)
from tritter.core.families.logical import Arrangement, Port, segments
from tritter.errors import RequestError

# Attribute of `Dimensions` → config keys that may have it
SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "emb_dim", "dim"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "num_attention_heads": (
        *("num_attention_heads", "n_head", "n_heads", "num_heads"),
        *("decoder_attention_heads", "attention_heads"),
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"),
    ),
}
_FFN_KEYS = re.compile(
    r"(.*_)?(intermediate_size|ffn_dim|ffn_size|n_inner|d_ff|dff|dim_ff|ffn_hidden_size)(_mlp)?"
)
EPS = re.compile(r"(.*_)?eps(ilon)?")
_HIDDEN_ALIASES = re.compile(r".*(hidden_size|embd|embed\w*_(dim|size)|d_model|width)")
_ARRANGEMENTS: tuple[Arrangement, ...] = ("whole", "halves", "thirds", "qkv")
_WITH_HIDDEN = "the size of a head follows from the hidden size"
_MAX_TRIES = 600

_AxisOf = tuple[str, int]  # name of a tensor within a layer or outside, and one of its axes
_Sizes = tuple[int, int]  # of an axis, before and after the change of a key
_Option = TypeVar("_Option")


@dataclass(frozen=True, slots=True)
class Role:
    """How one axis of a tensor uses a space.

    Args:
        space: `residual`, `head_input` (read by the last norm and the head), `heads`, `ffn`,
            `experts`, or `normed` (the input of a norm inside a layer, without a key).
        key: config key of the number of units in the space.
        port: how the tensor uses the space.
        arrangement: of the units along the axis.
        per_unit: value of the key per unit of the space; 2 if gate and up share an FFN's width.
        offset: constant that a norm adds to its gain.
    """

    space: str
    key: str
    port: Port
    arrangement: Arrangement = "whole"
    per_unit: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Axes:
    """The roles of all axes that follow a size.

    Args:
        roles: name in memory, within a layer or outside → axis → its role.
        ffn_keys: config keys of the widths of FFNs and experts.
        hidden_keys: further config keys that grow with the hidden size.
        has_head_dim: `head_dim` can be set, so heads keep their size.
        heads_fill_hidden: the number of heads grows with the hidden size alone.
        subtracts_mean: norms subtract the mean over the residual stream.
        ffn_parts: of FFNs that can grow in single layers: `gate`, `up` and `down` → name in memory
            within a layer; an FFN that computes down(σ(up(x))) has no gate.
        activation: name within a layer of the module that computes σ of these FFNs.
        refused: `ffn`, `neurons`, `heads`, `hidden` or `experts` → why this size can't grow.
    """

    roles: Mapping[str, Mapping[int, Role]] = field(default_factory=dict)
    ffn_keys: tuple[str, ...] = ()
    hidden_keys: tuple[str, ...] = ()
    has_head_dim: bool = False
    heads_fill_hidden: bool = False
    subtracts_mean: bool = False
    ffn_parts: Mapping[str, str] = field(default_factory=dict)
    activation: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(twin: Twin, layers: Sequence[int], writers: Iterable[str]) -> "Axes":
        """Return the axes of a model.

        Args:
            twin: of the model.
            layers: one layer of each kind.
            writers: names within a layer of the tensors that write the residual stream.
        """
        search = _Search(twin, layers, frozenset(writers))
        for name, step in (
            ("ffn", search.add_ffns),
            ("neurons", search.add_neurons),
            ("heads", search.add_heads),
            ("hidden", search.add_hidden),
            ("experts", search.add_experts),
        ):
            before = {tensor: dict(axes) for tensor, axes in search.roles.items()}
            try:
                step()
            except RequestError as error:
                search.refused[name], search.roles = str(error), before
        return replace(search.axes, roles=search.roles, refused=search.refused)

    @property
    def width_key(self) -> str:
        """The config key of the number of neurons in `ffn_parts`."""
        roles = self.roles[self.ffn_parts["up"]].values()
        return next(role.key for role in roles if role.space == "ffn")

    @property
    def all_roles(self) -> tuple[Role, ...]:
        return tuple(role for axes in self.roles.values() for role in axes.values())

    def without_heads(self, reason: str) -> "Axes":
        """Return these axes without those of heads, and the hidden size if heads fill it."""
        roles = {
            name: {axis: role for axis, role in axes.items() if role.space != "heads"}
            for name, axes in self.roles.items()
        }
        sizes = ("heads", "hidden") if self.heads_fill_hidden else ("heads",)
        return replace(self, roles=roles, refused={**self.refused, **dict.fromkeys(sizes, reason)})


class _Search:
    """Collects the roles of a twin's axes."""

    def __init__(self, twin: Twin, layers: Sequence[int], writers: frozenset[str]) -> None:
        self._twin, self._writers = twin, writers
        self._prefix = f"{layer_list(twin.model)}."
        self._blocks = {layer: twin.block(f"{self._prefix}{layer}") for layer in layers}
        self._full: Config = twin.config.to_dict()
        self._config = StockConfig(self._full).decoder
        self._head_dim = self._size_of_heads()
        self.roles: dict[str, dict[int, Role]] = {}
        self.refused: dict[str, str] = {}
        self.axes = Axes()  # without roles

    def add_ffns(self) -> None:
        """Find the axes of neurons, of FFNs and of experts."""
        keys = [key for key in self._config if _FFN_KEYS.fullmatch(key)]
        hidden = self._size(self._first("hidden_size"))
        for key in keys:  # GPT-J's default is four times the hidden size
            if self._config[key] is None and not self._changed({}, {key: 4 * hidden}):
                self._config = {**self._config, key: 4 * hidden}
        keys = [key for key in keys if self._size(key)]
        found = {key: following for key in keys if (following := self._following([key]))}
        if not found:
            raise RequestError("no config key is the width of an FFN")
        for key, following in found.items():
            self._add_units("ffn", key, following)
        self.axes = replace(self.axes, ffn_keys=tuple(found))

    def add_neurons(self) -> None:
        """Find the FFN of the layers: down(σ(gate(x)) · up(x)), or down(σ(up(x)))."""
        found = [_neurons_of(block, self.roles) for block in self._blocks.values()]
        if any(each != found[0] for each in found):
            raise RequestError("its layers have FFNs of different kinds")
        model = self._twin.model  # surgery during training replaces its parameters, by these names
        tied: Iterable[str] = model.all_tied_weights_keys  # type: ignore[assignment]
        tensors = model.state_dict().keys() - set(tied)
        if others := tensors - dict(model.named_parameters()).keys():
            raise RequestError(f"its files have tensors that are not parameters ({min(others)})")
        ffn_parts, activation = found[0]
        self.axes = replace(self.axes, ffn_parts=ffn_parts, activation=activation)

    def add_heads(self) -> None:
        """Find the axes of attention heads, at a constant size of each head."""
        heads, groups = self._head_keys()
        if not groups:
            reason = (
                "it has one key/value head" if heads else "no config key is the number of heads"
            )
            raise RequestError(reason)
        fixed: Config = {"head_dim": self._head_dim}
        try:
            is_neutral = not self._changed({}, fixed)
            following = self._following([heads, groups], fixed) if is_neutral else {}
        except RequestError:
            following = {}  # the size of a head can't be set
        if not following or any(new < old for old, new in following.values()):
            raise RequestError(_WITH_HIDDEN)
        self.axes = replace(self.axes, has_head_dim=True)
        self._add_units("heads", groups, following)

    def add_experts(self) -> None:
        """Find the axes of routed experts."""
        key = self._first("num_experts")
        following = self._following([key]) if key else {}
        if not following:
            raise RequestError("no config key is the number of experts")
        self._add_units("experts", key, following)

    def add_hidden(self) -> None:
        """Find the axes of the residual stream, and of units that follow its size.

        Heads may have a size of their own, or fill the hidden size; other keys may follow too.
        """
        key = self._first("hidden_size")
        if not key:
            raise RequestError("no config key is the hidden size")
        heads, groups = self._head_keys()
        before = {tensor: dict(axes) for tensor, axes in self.roles.items()}
        reasons: list[RequestError] = []
        attempts: list[tuple[str, ...]] = [(heads, groups)] if groups else []
        if self.axes.has_head_dim or not heads:
            attempts.insert(0, ())
        if not attempts:
            raise RequestError("it has one key/value head, whose size follows from the hidden size")
        aliases = tuple(
            name
            for name in self._config
            if name != key
            and _HIDDEN_ALIASES.fullmatch(name)
            and self._size(name) == self._size(key)
        )
        for others, of_heads in product(dict.fromkeys(((), aliases)), attempts):
            try:
                self._add_stream(key, of_heads, groups, others)
            except RequestError as error:
                reasons.append(error)
                self.roles = {tensor: dict(axes) for tensor, axes in before.items()}
            else:
                self.axes = replace(self.axes, heads_fill_hidden=bool(of_heads), hidden_keys=others)
                if of_heads:
                    self.refused["heads"] = _WITH_HIDDEN
                return
        raise reasons[0]

    def _add_stream(
        self, key: str, of_heads: Sequence[str], groups: str, others: Sequence[str]
    ) -> None:
        fixed: Config = {"head_dim": self._head_dim} if self.axes.has_head_dim else {}
        following = self._following([key, *of_heads, *others], fixed)
        units, space = (groups, "heads") if of_heads else (key, "ffn")
        self._add_outside(key, [axis for axis in following if self._layer_of(axis) is None])
        for layer, block in self._blocks.items():
            axes = self._within(following, layer)
            stream = _residual_axes(block, axes, self._writers)
            for name, axis in stream:
                self._add(name, axis, self._stream_role(block, name, axis, key))
            rest = {axis: axes[axis] for axis in axes.keys() - stream}
            for part in {name.partition(".")[0] for name, _ in rest}:
                of_part = {a: s for a, s in rest.items() if a[0].partition(".")[0] == part}
                self._add_within(block, space, units, of_part)
            for name in _normed(block, self._eps_users(layer)):
                self._absorb(name)

    def _add_units(self, space: str, key: str, following: Mapping[_AxisOf, _Sizes]) -> None:
        for axis in following:
            if self._layer_of(axis) is None:
                raise RequestError(f"{axis[0]}, outside the layers, depends on {key}")
        for layer, block in self._blocks.items():
            self._add_within(block, space, key, self._within(following, layer))

    def _add_within(
        self, block: Block, space: str, key: str, axes: Mapping[_AxisOf, _Sizes]
    ) -> None:
        units = math.gcd(self._size(key), *(new - old for old, new in axes.values()))
        found = _arrangements(block, axes, units, self._head_dim) if axes else {}
        if found is None:
            names = ", ".join(sorted({name for name, _ in axes}))
            raise RequestError(f"a layer depends on the order of its units ({key}: {names})")
        for (name, axis), arrangement in found.items():
            port = Port.WRITE if space == "experts" else _unit_port(block, name, axis)
            self._add(name, axis, Role(space, key, port, arrangement, self._size(key) // units))

    def _add(self, name: str, axis: int, role: Role) -> None:
        if self.roles.setdefault(name, {}).setdefault(axis, role) != role:
            raise RequestError(f"{name} has different roles in different layers")

    def _absorb(self, name: str) -> None:
        """Mark the outputs of a matrix and its bias as the input of a norm."""
        roles = self.roles.setdefault(name, {})
        role = roles.get(0, Role("normed", "", Port.ABSORBED))
        if role.space != "residual":  # whose new coordinates shrink the RMS already
            roles[0] = replace(role, port=Port.ABSORBED)

    def _eps_users(self, layer: int) -> frozenset[str]:
        """Return the modules of a layer with an eps from the config."""
        keys = [key for key, eps in self._config.items() if EPS.fullmatch(key) and eps]
        changed = self._stock({key: 2 * float(self._config[key]) for key in keys})  # type: ignore[arg-type]
        other = dict(changed.named_modules())
        return frozenset(
            name.removeprefix(f"{self._prefix}{layer}.")
            for name, module in self._twin.model.named_modules()
            if name.startswith(f"{self._prefix}{layer}.")
            and _eps(module) != _eps(other.get(name, module))
        )

    def _stream_role(self, block: Block, name: str, axis: int, key: str) -> Role:
        owner, value = owner_of(block.module, name)
        if value.ndim > 1:
            return Role("residual", key, Port.WRITE if block.is_output(name, axis) else Port.READ)
        return self._norm_role(owner, name, key, "residual")

    def _norm_role(self, owner: nn.Module, name: str, key: str, space: str) -> Role:
        """Return the role of a vector: the gain of a norm, or a bias."""
        if name.endswith("bias") or any(value.ndim > 1 for value in owner.parameters()):
            return Role(space, key, Port.WRITE)
        if _subtracts_mean(owner):
            self.axes = replace(self.axes, subtracts_mean=True)
        return Role(space, key, Port.GAIN, offset=_offset_of(owner, name))

    def _add_outside(self, key: str, axes: Iterable[_AxisOf]) -> None:
        """Add the roles of embeddings, the last norm and the head."""
        model = self._twin.model
        head = model.get_output_embeddings()  # type: ignore[operator]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        last = _module_before(self._twin, head)
        first = self._blocks[min(self._blocks)]
        reached = {call.name for call in calls_in(self._twin.model, self._twin.logits)}  # by text
        for name, axis in axes:
            owner, value = owner_of(self._twin.model, name)
            if value.ndim == 1:
                space = "head_input" if owner is last else "residual"
                self._add(name, axis, self._norm_role(owner, name, key, space))
            elif value is getattr(embedding, "weight", None):
                is_scaled = self._twin.scales_embedding(embedding, first)
                port = Port.WRITE_SCALED if is_scaled else Port.WRITE
                self._add(name, axis, Role("residual", key, port))
            elif value is getattr(head, "weight", None):
                self._add(name, axis, Role("head_input", key, Port.READ))
            elif isinstance(owner, nn.Embedding):
                self._add(name, axis, Role("residual", key, Port.WRITE))
            elif isinstance(owner, nn.Linear) and name.rpartition(".")[0] in reached:
                self._add(name, axis, Role("residual", key, Port.READ if axis else Port.WRITE))
            else:
                raise RequestError(f"{name}, outside the layers, depends on {key}")

    # Sizes and shapes

    def _size(self, key: str) -> int:
        value = self._config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    def _first(self, name: str) -> str:
        """Return the config key of a size, by the attribute of `Dimensions`; empty without one."""
        return next((key for key in SIZE_KEYS[name] if self._size(key)), "")

    def _head_keys(self) -> tuple[str, str]:
        """Return the keys of query heads and of groups; the latter is empty if there is one."""
        heads = self._first("num_attention_heads")
        groups = self._first("num_key_value_heads") or heads
        return heads, groups if groups and self._size(groups) > 1 else ""

    def _size_of_heads(self) -> int:
        hidden, heads = self._first("hidden_size"), self._first("num_attention_heads")
        derived = self._size(hidden) // self._size(heads) if hidden and heads else 1
        return self._size("head_dim") or derived

    def _layer_of(self, axis: _AxisOf) -> int | None:
        split = in_layer(axis[0], self._prefix)
        return None if split is None else split[0]

    def _within(self, following: Mapping[_AxisOf, _Sizes], layer: int) -> dict[_AxisOf, _Sizes]:
        split = {axis: in_layer(axis[0], self._prefix) for axis in following}
        return {
            (place[1], axis[1]): following[axis]
            for axis, place in split.items()
            if place is not None and place[0] == layer
        }

    def _following(self, keys: Iterable[str], fixed: Config | None = None) -> dict[_AxisOf, _Sizes]:
        """Return the axes that grow if some keys double."""
        fixed = fixed or {}
        return self._changed(fixed, {**fixed, **{key: 2 * self._size(key) for key in keys}})

    def _changed(self, first: Config, second: Config) -> dict[_AxisOf, _Sizes]:
        """Return the axes that differ between two changes of the config; raises as `_following`."""
        before, after = self._shapes(first), self._shapes(second)
        if before.keys() != after.keys():
            raise RequestError(f"the names of its tensors depend on {', '.join(second)}")
        return {
            (name, axis): (old, new)
            for name, shape in before.items()
            for axis, (old, new) in enumerate(zip(shape, after[name], strict=True))
            if new != old
        }

    def _shapes(self, changes: Config) -> dict[str, Shape]:
        state = self._stock(changes).state_dict()
        return {name: tuple(value.shape) for name, value in state.items()}

    def _stock(self, changes: Config) -> nn.Module:
        """Return the stock model of a changed config, on the meta device."""
        part = StockConfig(self._full).part
        inner = {**self._config, **changes}
        full = {**self._full, part: inner} if part else inner
        try:
            with quiet(), torch.device("meta"):
                config = type(self._twin.config).from_dict(full)
                return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except Exception as error:  # config and model classes may raise anything
            raise RequestError(f"its class refuses other sizes: {reason_of(error)}") from error


# Units


def _arrangements(
    block: Block, axes: Mapping[_AxisOf, _Sizes], units: int, head_dim: int
) -> dict[_AxisOf, Arrangement] | None:
    """Return the arrangement of units along axes, or None if none is a symmetry of the layer.

    Args:
        block: the layer.
        axes: that follow the number of units, with their sizes before and after its doubling.
        units: their number.
        head_dim: entries of a key or a value.
    """
    values = block.values
    # Weights and biases of a module have the same arrangement
    groups: dict[tuple[str, int, int], list[_AxisOf]] = {}
    for axis, (old, new) in axes.items():
        entries = (new - old) // units
        if axis[0] not in values or (new - old) % units or entries < 1 or old < entries * units:
            return None
        module = axis[0].rpartition(".")[0]
        groups.setdefault((module, entries, old - entries * units), []).append(axis)
    order, before = _permutation(units), block.change()
    choices = [
        [(kind, found) for kind in _ARRANGEMENTS if (found := segments(kind, entries, head_dim))]
        for _, entries, _ in groups
    ]
    distinct = [list({widths: (kind, widths) for kind, widths in each[::-1]}.values())[::-1]
                for each in choices]  # fmt: skip
    for choice in islice(_from_the_first(distinct), _MAX_TRIES):
        permutations = {
            axis: _along(order, widths, rest)
            for (_, widths), ((_, _, rest), group) in zip(choice, groups.items(), strict=True)
            for axis in group
        }
        with _permuted(values, permutations):
            if is_equal(block.change(), before):
                return {
                    axis: kind
                    for (kind, _), group in zip(choice, groups.values(), strict=True)
                    for axis in group
                }
    return None


def _unit_port(block: Block, name: str, axis: int) -> Port:
    """Return the port of an axis of units: READ if another axis has the outputs of the module."""
    owner, value = owner_of(block.module, name)
    if "norm" in type(owner).__name__.lower() and not name.endswith("bias"):
        return Port.GAIN
    others = [other for other in range(value.ndim) if other != axis]
    return Port.READ if any(block.is_output(name, other) for other in others) else Port.WRITE


def _neurons_of(
    block: Block, roles: Mapping[str, Mapping[int, Role]]
) -> tuple[Mapping[str, str], str]:
    """Return the matrices of a layer's FFN and the name of its σ; see `Axes`."""
    other = "an FFN is not down(σ(gate(x)) · up(x)) with matrices of their own"
    names = {name for name in block.values if name in roles}
    uses = [
        (name, axis, role)
        for name in sorted(names)
        for axis, role in roles[name].items()
        if role.space == "ffn"
    ]
    rows, columns, biases = list[str](), list[str](), set[str]()
    for name, axis, role in uses:
        owner, value = owner_of(block.module, name)
        outputs = int(isinstance(owner, Conv1D))  # the axis of its outputs
        if value.ndim == 1 and name.endswith(".bias"):
            biases.add(name.removesuffix("bias") + "weight")
        elif isinstance(owner, nn.Linear | Conv1D) and name.endswith(".weight"):
            (rows if axis == outputs else columns).append(name)
        else:
            raise RequestError(other)
        if role.arrangement != "whole" or role.per_unit != 1:
            raise RequestError(other)
    keys = {role.key for _, _, role in uses}
    if len(columns) != 1 or len(rows) not in (1, 2) or len(keys) != 1 or not biases <= {*rows}:
        raise RequestError(other)
    for gate in rows:
        up = next((name for name in rows if name != gate), "")
        if activation := block.activation(gate, up, columns[0]):
            parts = {"gate": gate, "up": up} if up else {"up": gate}
            return {**parts, "down": columns[0]}, activation
    raise RequestError(other)


# The residual stream


def _residual_axes(
    block: Block, axes: Mapping[_AxisOf, _Sizes], writers: frozenset[str]
) -> set[_AxisOf]:
    """Return the axes of the residual stream among those that follow its size.

    Args:
        block: the layer.
        axes: with their sizes before and after the doubling of the hidden size.
        writers: names of the tensors that write the stream.
    """
    size = block.hidden.shape[-1]
    candidates: dict[str, list[int]] = {}
    for (name, axis), sizes in axes.items():
        if sizes == (size, 2 * size):
            candidates.setdefault(name, []).append(axis)
    values, order = block.values, _permutation(size)
    before = block.change()[..., order]
    options = [
        [
            [(name, axis) for axis in chosen]
            for chosen in _options(name, candidates, writers, values)
        ]
        for name in candidates
    ]
    for choice in islice(_from_the_first(options), _MAX_TRIES):
        chosen = {axis for each in choice for axis in each}
        with _permuted(values, dict.fromkeys(chosen, order)):
            if is_equal(block.change(block.hidden[..., order]), before):
                return chosen
    raise RequestError("a layer depends on the order of its residual stream")


def _options(
    name: str,
    candidates: Mapping[str, Sequence[int]],
    writers: frozenset[str],
    values: Mapping[str, Tensor],
) -> list[tuple[int, ...]]:
    """Return the possible residual axes of a tensor, the most plausible first."""
    axes, module = tuple(candidates[name]), name.rpartition(".")[0]
    if len(axes) > 1:
        first, last = (axes[0],), (axes[-1],)
        return [first, last, axes, ()] if name in writers else [last, first, axes, ()]
    matrices = [
        other
        for other, value in values.items()
        if other.rpartition(".")[0] == module and value.ndim > 1
    ]
    if (
        values[name].ndim == 1
        and name not in writers
        and any(len(candidates.get(other, ())) != 1 for other in matrices)
    ):
        return [(), axes]  # the bias of a matrix that reads the stream
    return [axes, ()]


def _eps(module: nn.Module) -> float | None:
    values = [getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon")]
    return next((value for value in values if isinstance(value, float)), None)


def _normed(block: Block, norms: frozenset[str]) -> list[str]:
    """Return the matrices, and their biases, whose whole output is normalised at once."""
    calls = calls_in(block.module, block.change)
    normed = [call.given.flatten().sort().values for call in calls if call.name in norms]
    found = []
    for call in calls:
        linear, values = block.module.get_submodule(call.name), call.made.flatten().sort().values
        if isinstance(linear, nn.Linear) and any(torch.equal(values, each) for each in normed):
            found += [f"{call.name}.{attribute}" for attribute, _ in linear.named_parameters()]
    return found


def _subtracts_mean(norm: nn.Module) -> bool:
    """Return True if a norm ignores a constant that is added to all coordinates."""
    return is_equal(_applied(norm, 0.0), _applied(norm, 1.0))


def _applied(norm: nn.Module, shift: float) -> Tensor:
    """Return the output [3, H] of a norm for random inputs plus a constant."""
    size = next(norm.parameters()).shape[-1]
    stream = torch.randn(3, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    try:
        with torch.no_grad(), in_float64():
            output = first_tensor(norm(stream + shift))
    except Exception as error:  # a module may raise anything
        raise RequestError("a norm needs more than the residual stream") from error
    assert output is not None
    return output


def _offset_of(norm: nn.Module, name: str) -> float:
    """Return the constant that a norm adds to its gain."""
    gain = getattr(norm, name.rpartition(".")[2])
    with restored(*norm.parameters()):
        for value in norm.parameters():
            value.data.zero_()
        zero = _applied(norm, 0.0)
        gain.data.fill_(1.0)
        unit = _applied(norm, 0.0) - zero
    size = float((unit * unit).sum())
    if not size:
        raise RequestError(f"{name} is neither a gain nor a bias")
    return round(float((zero * unit).sum()) / size, 9)


# Outside the layers


def _module_before(twin: Twin, head: nn.Module | None) -> nn.Module | None:
    """Return the module whose output is the input of the head."""
    if head is None:
        return None
    calls = [
        (twin.model.get_submodule(call.name), call) for call in calls_in(twin.model, twin.logits)
    ]
    given = [call.given for module, call in calls if module is head]
    same = [
        module
        for module, call in calls
        if given and any(True for _ in module.parameters(recurse=False))
        if module is not head and _ends_equal(call.made, given[-1])
    ]
    return same[-1] if same else None


def _ends_equal(output: Tensor, given: Tensor) -> bool:
    """Return True if the last rows [H] of two tensors are equal."""
    first, second = output.flatten(0, -2)[-1], given.flatten(0, -2)[-1]
    return first.shape == second.shape and torch.equal(first, second)


# Probes


def _permutation(size: int) -> Tensor:
    """Return an order of units, int64 [size], that moves all of them."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(4))
    return order[(torch.argsort(order) + 1) % size]


def _along(order: Tensor, widths: Sequence[int], rest: int) -> Tensor:
    """Return the order of an axis's entries, for an order of its units."""
    parts, start = [], 0
    for width in widths:
        parts.append((order[:, None] * width + torch.arange(width)).flatten() + start)
        start += len(order) * width
    return torch.cat([*parts, torch.arange(start, start + rest)])


@contextmanager
def _permuted(values: Mapping[str, Tensor], orders: Mapping[_AxisOf, Tensor]) -> Iterator[None]:
    """Permute tensors along axes, and restore them."""
    with restored(*(values[name] for name in {name for name, _ in orders})):
        for (name, axis), order in orders.items():
            values[name].data.copy_(values[name].data.index_select(axis, order))
        yield


def _from_the_first(options: Sequence[Sequence[_Option]]) -> Iterator[tuple[_Option, ...]]:
    """Yield choices of one option each: the first ones, then with up to three others."""
    first = [each[0] for each in options]
    for others in range(min(len(options), 3) + 1):
        for places in combinations(range(len(options)), others):
            for replaced in product(*(options[place][1:] for place in places)):
                choice = list(first)
                for place, option in zip(places, replaced, strict=True):
                    choice[place] = option
                yield tuple(choice)
