"""Families of model types without a table, discovered from their classes in transformers.

Names and shapes are those of the stock class. Probes of a tiny twin find the tensors that write
the residual stream, and show that a deeper model keeps its function.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers import __version__ as transformers_version
from transformers.core_model_loading import revert_weight_conversion

from tritter.core.families.dimensions import (
    Config,
    Dimensions,
    ffn_sizes,
    require_size,
)
from tritter.core.families.discovery.axes import (
    EPS,
    SIZE_KEYS,
    Axes,
    Role,
)
from tritter.core.families.discovery.configs import Key, StockConfig, quiet
from tritter.core.families.discovery.skeleton import (
    Skeleton,
    expert_of,
    in_layer,
    layer_list,
    layers_on_disk,
    places,
    template,
)
from tritter.core.families.discovery.twin import (
    TOLERANCE,
    Twin,
    in_float64,
    one_thread,
    small_sizes,
)
from tritter.core.families.family import Family
from tritter.core.families.logical import Axis, LogicalTensor, Place, Port, Space
from tritter.errors import Problem, RequestError
from tritter.terminal import status

_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_BLOCKS = {"halves": 2, "thirds": 3}
_ROUTED = re.compile(r"(\.|^)(experts|router)\.")  # a tensor of a layer with experts
# Pattern of a name within a layer → beginning of its logical kind
_PARTS = (
    (re.compile(r"(?i).*(\bexperts|moe\.(input|output)_linear)\."), "experts"),
    (re.compile(r"(?i).*(router|(mlp|moe)\.gate\.)"), "router"),
    (re.compile(r"(?i).*(norm|ln_?\w*)\."), "norm"),
    (re.compile(r"(?i).*(attn|attention|mixer|mamba|temporal|conv)"), "attention"),
    (re.compile(r"(?i).*(mlp|ffn|fc\d|feed_?forward|dense|moe)"), "ffn"),
)


@dataclass(frozen=True)
class DiscoveredFamily(Family):
    """A model type of transformers that has no table.

    Args:
        writers: logical kinds of the tensors that write the residual stream → the value at which
            they write nothing.
        live_writers: the same by their names within a layer in memory.
        refusals: names of the tensors of a layer → why no copy of such a layer is an identity.
        outside: names on disk of the embedding and the head → their logical kinds.
        places: template of a name on disk → its location in memory if that differs.
        is_routed: tokens are routed to experts.
        axes: of its tensors; None until `widened`, as growth in depth needs none.
    """

    writers: Mapping[str, float] = field(default_factory=dict)
    live_writers: Mapping[str, float] = field(default_factory=dict)
    refusals: Mapping[frozenset[str], str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    is_routed: bool = False
    axes: Axes | None = None

    @classmethod
    def of(cls, config: Config) -> "DiscoveredFamily":
        """Return the family of a model type without a table.

        Args:
            config: config.json of a model.
        """
        structure = _structure(config)
        if structure not in _FOUND:
            model_type = str(config["model_type"])
            try:
                with one_thread():
                    twin = Twin.of(config)
                    found = _probed(config, twin, Skeleton.of(config))
            except RequestError as error:
                raise RequestError(
                    f"model_type '{model_type}' is not supported: {error}"
                ) from error
            _FOUND[structure] = _FOUND[_structure(twin.config.to_dict())] = found
        return _FOUND[structure]

    @property
    def refusal(self) -> str:
        """The reason why no copy of any layer is an identity; empty if there are such copies."""
        return "" if self.writers else next(iter(self.refusals.values()), "")

    def inexact_reason(self, config: Config, copied: Collection[int]) -> str:
        layers = _kinds(Skeleton.of(config))
        refused = {each: self.refusals.get(layers[each], "") for each in copied}
        reasons = [f"layer {each}: {reason}" for each, reason in refused.items() if reason]
        if self.refusal:
            is_stackable = _fits(config, tuple(range(len(layers))) * 2)
            return f"{self.refusal}; use dus or stack" if is_stackable else self.refusal
        return f"{reasons[0]}; use other positions, dus or stack" if reasons else ""

    def zero_of(self, tensor: LogicalTensor) -> float:
        return self.writers.get(tensor.kind, 0.0)

    @property
    def zeroed_names(self) -> tuple[str, ...]:
        """The names within a layer of the tensors that are zero in an identity copy, or one."""
        factors = {kind: " = 1" for kind, zero in self.writers.items() if zero > 0}
        names = {kind.partition(".")[2] + factors.get(kind, "") for kind in self.writers}
        return tuple(sorted(names))

    @property
    def has_experts(self) -> bool:
        return self.is_routed

    @property
    def heads_fill_hidden(self) -> bool:
        return self.axes is not None and self.axes.heads_fill_hidden

    @property
    def norms_all_heads(self) -> bool:
        roles = () if self.axes is None else self.axes.all_roles
        return any(role.space == "heads" and role.port is Port.GAIN for role in roles)

    @property
    def keeps_heads(self) -> bool:
        refused = self.axes is not None and "heads" in self.axes.refused
        return refused and not self.heads_fill_hidden

    def findings(self, config: Config) -> Config:
        axes = _WIDENED.get(_structure(config), self).axes
        return {
            "transformers": transformers_version,
            "in_new_layers": dict(self.live_writers),
            "axes": {
                f"{name}.{axis}": f"{role.space}: {role.port.value}"
                for name, roles in (axes.roles if axes else {}).items()
                for axis, role in roles.items()
            },
        }

    def widened(self, config: Config) -> "DiscoveredFamily":
        """Return this family with the axes of its tensors."""
        if self.axes is not None:
            return self
        structure = _structure(config)
        if structure not in _WIDENED:
            with one_thread(), status(f"finding the axes of {self.model_type}"):
                _WIDENED[structure] = self._with_axes(config)
        return _WIDENED[structure]

    def fixed_neurons(self, config: Config) -> str:
        if reason := super().fixed_neurons(config):
            return reason
        axes = self.widened(config).axes
        assert axes is not None
        reason = axes.refused.get("neurons", "")
        hint = "" if "ffn" in axes.refused else "; use expansion=width"
        return reason and f"{self.model_type}: {reason}{hint}"

    def ffn_part(self, tensor: LogicalTensor) -> str:
        parts = {} if self.axes is None else self.axes.ffn_parts
        live = tensor.live_name or tensor.disk_name
        return next(
            (n for n, name in parts.items() if live.endswith(f".{tensor.layer}.{name}")), ""
        )

    def activation_name(self, up: str) -> str:
        assert self.axes is not None
        return up.removesuffix(self.axes.ffn_parts["up"]) + self.axes.activation

    def with_widest_ffn(self, config: Config, size: int) -> Config:
        axes = self.widened(config).axes
        assert axes is not None
        return StockConfig(config).with_decoder({axes.width_key: size})

    def check_growth(self, old: Dimensions, new: Dimensions) -> None:
        refused = {} if self.axes is None else self.axes.refused
        is_wider = new.hidden_size != old.hidden_size
        keeps_ratio = new.ffn_size * old.hidden_size == old.ffn_size * new.hidden_size
        for part, name, is_changed in (
            ("hidden", "hidden_size", is_wider),
            ("heads", "num_attention_heads", new.num_attention_heads != old.num_attention_heads),
            ("ffn", "intermediate_size", not keeps_ratio and new.ffn_size != old.ffn_size),
        ):
            if not is_changed or part not in refused:
                continue
            if part == "heads" and is_wider and self.heads_fill_hidden:
                continue  # they grow with the hidden size
            reason = f"{self.model_type}: {refused[part]}"
            raise RequestError(Problem(f"expansion.width.{name}", reason=reason))

    def with_dimensions(self, config: Config, sizes: Dimensions) -> Config:
        old, inner = self.dimensions(config), StockConfig(config).full_decoder
        changes: Config = {}
        grown, base = sizes.ffn_size, old.ffn_size
        for key in self.axes.ffn_keys if self.axes else ():
            changes[key] = round(_default_size(inner.get(key), old) * grown / base)
        for key in self.axes.hidden_keys if self.axes else ():
            changes[key] = _default_size(inner[key], old) * sizes.hidden_size // old.hidden_size
        for name, key in self.sizes.items():
            after = getattr(sizes, name)
            if after != getattr(old, name) or name == "head_dim":
                changes[key] = after
        return StockConfig(config).with_decoder(changes)

    def separates_documents(self, config: Config) -> bool:
        return _separates_documents(Key.of(config))

    def with_vocabulary(self, config: Config, size: int) -> Config:
        if "vocab_size" not in self.sizes:
            return super().with_vocabulary(config, size)
        inner, key = StockConfig(config).full_decoder, "vocab_size_per_layer_input"  # of Gemma 4
        more: Config = {key: size} if inner.get(key) == inner["vocab_size"] else {}
        return StockConfig(config).with_decoder(super().with_vocabulary(more, size))

    def with_experts(self, config: Config, num_experts: int, experts_per_token: int) -> Config:
        reason = "" if self.axes is None else self.axes.refused.get("experts", "")
        if not reason and not {"num_experts", "experts_per_token"} <= self.sizes.keys():
            reason = "no config key is the number of experts per token"
        if reason:
            reason = f"{self.model_type}: {reason}"
            raise RequestError(Problem("expansion.moe_add", reason=reason))
        changes = super().with_experts({}, num_experts, experts_per_token)
        return StockConfig(config).with_decoder(changes)

    def with_rms(self, config: Config, ratio: float) -> Config:
        inner = StockConfig(config).full_decoder
        eps = {key: inner[key] for key in self._eps_keys(inner)}
        return StockConfig(config).with_decoder(super().with_rms(eps, ratio))

    def _eps_keys(self, config: Config) -> Collection[str]:
        return [key for key, eps in config.items() if EPS.fullmatch(key) and eps]

    def decoder(self, config: Config) -> Config:
        return StockConfig(config).decoder

    def is_tied(self, config: Config) -> bool:
        tensors = self.logical_tensors(config, self.dimensions(config))
        return not any(tensor.kind == "head" for tensor in tensors)

    def offset_of(self, tensor: LogicalTensor) -> float:
        return tensor.axes[0].offset if self.axes and tensor.axes else self.norm_offset

    def dimensions(self, config: Config) -> Dimensions:
        full = StockConfig(config).full
        inner = StockConfig(full).decoder
        known = {name: inner.get(key) for name, key in self.sizes.items()}
        known.setdefault("vocab_size", full.get("vocab_size"))  # BLT's decoder has none
        known["num_hidden_layers"] = StockConfig(inner).num_layers
        sizes = {
            name: require_size(name, self.sizes.get(name, name), value)
            for name, value in known.items()
            if value is not None
        }
        heads = sizes.setdefault("num_attention_heads", 1)
        sizes.setdefault("num_key_value_heads", heads)
        sizes.setdefault("head_dim", max(1, sizes["hidden_size"] // heads))
        sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
        return Dimensions(**sizes)

    def position_limit(self, config: Config) -> int | None:
        text = StockConfig(config).stock.get_text_config(decoder=True)
        limits = (getattr(text, name, None) for name in _POSITIONS)
        return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)

    def layer_kinds(self, config: Config, num_layers: int) -> list[Literal["dense", "sparse"]]:
        return [
            "sparse" if any(_ROUTED.search(name) for name, _ in signature) else "dense"
            for signature in Skeleton.of(config).signatures
        ]

    def logical_tensors(self, config: Config, sizes: Dimensions) -> tuple[LogicalTensor, ...]:
        tensors, widths = Skeleton.of(config), ffn_sizes(config)
        if widths and self.axes is None:
            return self.widened(config).logical_tensors(config, sizes)
        counts = self._counts(config, sizes)
        return tuple(
            self._logical(name, shape, tensors, counts, widths)
            for name, shape in tensors.disk.items()
        )

    def shape(self, tensor: LogicalTensor, sizes: Dimensions) -> tuple[int, ...]:
        return tuple(axis.length or int(axis.space.size) for axis in tensor.axes)

    def branch_output(self, tensor: LogicalTensor) -> bool:
        return tensor.layer is not None and tensor.kind in self.writers

    def count(self, config: Config, sizes: Dimensions) -> tuple[int, int]:
        shapes = list(Skeleton.of(config).disk.values())
        if ffn_sizes(config):
            shapes = [self.shape(each, sizes) for each in self.logical_tensors(config, sizes)]
        return len(shapes), sum(map(prod, shapes))

    def tied_names(self, config: Config) -> Mapping[str, str]:
        return Skeleton.of(config).tied

    def read_as(
        self, config: Config, extra: Collection[str], missing: Collection[str]
    ) -> dict[str, str]:
        return Skeleton.of(config).read_as(extra, missing)

    def causal_config(self, config: Config) -> Config:
        kind = StockConfig(config).kind
        model, text = MODEL_FOR_CAUSAL_LM_MAPPING[kind], kind.sub_configs.get("text_config")
        if text is None or model.config_class is not text:
            return config
        inner: Config = StockConfig(config).full["text_config"]  # type: ignore[assignment]
        dtype = inner.get("dtype") or config.get("dtype") or config.get("torch_dtype")
        own = {"architectures": [model.__name__], **({"dtype": dtype} if dtype else {})}
        return {**inner, **own}

    def unrounded(self, config: Config, dtype: Any) -> Collection[str]:
        return Skeleton.of(config).float32.get(dtype, ())

    def attention_window(self, config: Config, layer: int) -> int | None:
        config = StockConfig(config).decoder
        kinds, window = config.get("layer_types"), config.get("sliding_window")
        is_windowed = not isinstance(kinds, list) or "sliding" in str(kinds[layer])
        return window if is_windowed and isinstance(window, int) else None

    def with_layers(
        self,
        config: Config,
        layer_sources: Sequence[int],
        identities: Collection[int] | None = None,
    ) -> Config:
        """Return the config of a model whose layer t is a copy of layer `layer_sources[t]`.

        If the other layers are those of the source, in its order, a twin of the model shows that
        identities keep its function.
        """
        sources = tuple(layer_sources)
        deeper = _with_layers(config, sources)
        layers = self.dimensions(config).num_hidden_layers
        if identities is None:
            identities = [t for t, source in enumerate(sources) if source in sources[:t]]
        kept = [source for t, source in enumerate(sources) if t not in identities]
        copied = {sources[t] for t in identities}
        if copied and kept == list(range(layers)) and not self.inexact_reason(config, copied):
            _check_identity(self, config, sources, frozenset(identities))
        if widths := ffn_sizes(config):
            return self.with_ffn_sizes(deeper, [widths[source] for source in sources])
        return deeper

    def _with_axes(self, config: Config) -> "DiscoveredFamily":
        few = shallow(config)
        layers = _kinds_of_layers(Skeleton.of(few))
        twin = Twin.of(few)
        axes = Axes.of(twin, layers, self.live_writers)
        both = self.dimensions(config), self.dimensions(twin.config.to_dict())
        has_groups, of_twin = (s.num_key_value_heads < s.num_attention_heads for s in both)
        if has_groups and not of_twin:
            axes = axes.without_heads("no small model of it has groups of heads")
        sizes = {name: key for name, key in self.sizes.items() if name != "intermediate_size"}
        keys = list(axes.ffn_keys)
        for name, part in (("shared_expert_size", "shared"), ("expert_size", "moe")):
            found = next((key for key in keys if part in key), None)
            if found is not None:
                keys.remove(found)
                sizes[name] = found
        if keys:
            sizes["intermediate_size"] = keys[0]
        if axes.has_head_dim:
            sizes["head_dim"] = "head_dim"
        return replace(self, axes=axes, sizes=sizes, subtracts_mean=axes.subtracts_mean)

    def _roles(self, place: Place) -> Mapping[int, Role]:
        """Return the roles of the axes of a tensor on disk, by its place in memory."""
        if self.axes is None:
            return {}
        roles = self.axes.roles.get(place.name.partition("{layer}.")[2] or place.name, {})
        found = {axis - place.is_stacked: role for axis, role in roles.items()}
        if place.num_blocks > 1 and 0 in found:
            if _BLOCKS.get(found[0].arrangement) != place.num_blocks:
                raise RequestError(f"the blocks of {place.name} differ on disk and in memory.")
            found[0] = replace(found[0], arrangement="whole")
        return found

    def _counts(self, config: Config, sizes: Dimensions) -> Mapping[str, int]:
        """Return config key → number of units, for the keys that axes follow."""
        if self.axes is None:
            return {}
        keys = {role.key for role in self.axes.all_roles if role.key}
        inner = StockConfig(config).full_decoder
        return {key: _default_size(inner.get(key), sizes) for key in keys}

    def _logical(
        self,
        name: str,
        shape: tuple[int, ...],
        tensors: Skeleton,
        counts: Mapping[str, int],
        widths: Sequence[int],
    ) -> LogicalTensor:
        split, expert = in_layer(name, tensors.layers), expert_of(name)
        layer = None if split is None else split[0]
        mark = template(name, tensors.layers)
        place = self.places.get(mark, Place(mark))
        kind = self.outside.get(place.name, name) if split is None else _kind_of(split[1])
        live = place.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        roles = self._roles(place)
        if widths and layer is not None and self.axes is not None:
            key = self.axes.width_key
            counts = {**counts, key: widths[layer]}
            grown = {axis: widths[layer] for axis, role in roles.items() if role.key == key}
            shape = tuple(grown.get(axis, length) for axis, length in enumerate(shape))
        axes = tuple(
            _axis(
                roles.get(number), length, counts, Space(kind, length, layer=layer, expert=expert)
            )
            for number, length in enumerate(shape)
        )
        is_block = place.is_stacked or place.num_blocks > 1
        return LogicalTensor(
            kind=kind,
            disk_name=name,
            axes=axes,
            layers="none" if layer is None else "all",
            live_name="" if is_block else live,
            fused=replace(place, name=live) if is_block else None,
            layer=layer,
            expert=expert,
        )


def _default_size(value: object, sizes: Dimensions) -> int:
    """Return the value of a size, or GPT-J's default of an FFN."""
    return value if isinstance(value, int) else 4 * sizes.hidden_size


@lru_cache(maxsize=64)
@one_thread()
def _separates_documents(key: Key) -> bool:
    """Return True if a twin has the same logits for a document alone and after another one."""
    twin = Twin.of(shallow(key.config))
    documents = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(6)
    try:
        with quiet(), torch.no_grad(), in_float64():
            alone, both = (
                twin.model(input_ids=ids[None], position_ids=at[None], use_cache=False).logits
                for ids, at in (
                    (documents[1], positions),
                    (documents.flatten(), positions.repeat(2)),
                )
            )
    except Exception:  # a class may raise anything if it has no position ids
        return False
    return bool((both[:, 6:] - alone).abs().max() <= TOLERANCE)


def _axis(role: Role | None, length: int, counts: Mapping[str, int], own: Space) -> Axis:
    """Return an axis of a tensor: with its role in a space, or in a space of its own."""
    if role is None:
        return Axis(own, Port.WRITE)
    if not role.key:
        return Axis(own, role.port)
    scope: Literal["model", "layer"] = "model" if own.layer is None else "layer"
    units = counts[role.key] // role.per_unit
    space = Space(role.space, units, scope, layer=own.layer)
    return Axis(space, role.port, length, role.arrangement, role.offset)


def _kind_of(name: str) -> str:
    """Return the logical kind of a tensor by its name within a layer, without its expert."""
    name = re.sub(r"\bexperts\.\d+\.", "experts.", name, count=1)
    part = next((part for pattern, part in _PARTS if pattern.match(name)), "other")
    return f"{part}.{(part == 'experts' and name.partition('experts.')[2]) or name}"


_FOUND: dict[Key, DiscoveredFamily] = {}  # by the structure of a config
_WIDENED: dict[Key, DiscoveredFamily] = {}  # the same, with axes


def _structure(config: Config) -> Key:
    return _structure_in(Key.of(config))


@lru_cache(maxsize=256)  # asked for once per tensor
def _structure_in(key: Key) -> Key:
    config = key.config
    return StockConfig(config).structure(small_sizes(config))


def _probed(config: Config, twin: Twin, tensors: Skeleton) -> DiscoveredFamily:
    live: dict[str, float] = {}
    refusals: dict[frozenset[str], str] = {}
    layers, kinds = layer_list(twin.model), _kinds(tensors)
    for layer in _kinds_of_layers(tensors):
        try:
            found = twin.block(f"{layers}.{layer}").writers()
        except RequestError as error:
            refusals[kinds[layer]] = str(error)
            continue
        for block in twin.further_streams(f"{layers}.{layer}"):
            with suppress(RequestError):  # the twin shows whether a copy has to keep the stream
                found |= block.writers()
        live |= found
    writers = _on_disk(twin, layers, live)
    inner = StockConfig(config).full_decoder
    count = StockConfig(inner).layer_key
    sizes = {"num_hidden_layers": count} if isinstance(inner[count], int) else {}
    is_routed = any(_ROUTED.search(name) for name in tensors.disk)
    lengths = {length for shape in tensors.disk.values() for length in shape}
    for name, keys in SIZE_KEYS.items():
        known = [key for key in keys if isinstance(inner.get(key), int)]
        # A dense Doge has a number of experts in its config
        if known and (name != "num_experts" or is_routed or inner[known[0]] in lengths):
            sizes[name] = known[0]
    offsets = {-zero for zero in writers.values() if zero < 0}
    return DiscoveredFamily(
        model_type=str(config["model_type"]),
        architecture=type(twin.model).__name__,
        tensors=(),
        sizes=sizes,
        norm_offset=offsets.pop() if offsets else 0.0,
        writers=writers,
        live_writers=live,
        refusals=refusals,
        outside=_outside(twin),
        places=places(twin.model),
        is_routed=is_routed,
    )


def _kinds_of_layers(tensors: Skeleton) -> list[int]:
    """Return one layer of each kind: those with other names."""
    first: dict[frozenset[str], int] = {}
    for layer, kind in enumerate(_kinds(tensors)):
        first.setdefault(kind, layer)
    return list(first.values())


def _kinds(tensors: Skeleton) -> list[frozenset[str]]:
    """Return the kind of each layer: the names of its tensors."""
    return [frozenset(name for name, _ in signature) for signature in tensors.signatures]


def _on_disk(twin: Twin, layers: str, live: Mapping[str, float]) -> dict[str, float]:
    """Return logical kind → zero of the writers, by the names that files have."""
    found: dict[str, float] = {}
    state = twin.model.state_dict()
    for zero in set(live.values()):
        flagged = {}
        for name, value in state.items():
            split = in_layer(name, f"{layers}.")
            is_writer = split is not None and live.get(split[1]) == zero
            flagged[name] = torch.full_like(value, float(is_writer))
        converted = revert_weight_conversion(twin.model, flagged)
        prefix = layers_on_disk(layers, converted)
        for name, value in converted.items():
            if (split := in_layer(name, prefix)) is None or not bool(value.any()):
                continue
            if not bool(value.all()):
                raise RequestError(f"{name} has more than what writes the residual stream.")
            found[_kind_of(split[1])] = zero
    return found


def _outside(twin: Twin) -> dict[str, str]:
    """Return the names of embeddings and of the head → their logical kinds; tied: `embed`."""
    parts = {
        "head": twin.model.get_output_embeddings(),  # type: ignore[operator]
        "embed": twin.model.get_input_embeddings(),  # type: ignore[operator]
    }
    weights = {kind: getattr(module, "weight", None) for kind, module in parts.items()}
    lookups = {
        id(module.weight) for module in twin.model.modules() if isinstance(module, nn.Embedding)
    }
    found = {
        name: f"embed.{name}"  # of positions, for example
        for name, value in twin.model.named_parameters()
        if id(value) in lookups
    }
    for kind, weight in weights.items():
        found |= {name: kind for name, value in twin.model.named_parameters() if value is weight}
    return found


# Deeper models


@lru_cache(maxsize=64)
def _deeper(key: Key, sources: tuple[int, ...]) -> Config:
    config = key.config
    before = Skeleton.of(config)
    wanted = [before.signatures[source] for source in sources]
    for deeper in StockConfig(config).deeper(sources):
        kinds = StockConfig(deeper).decoder.get("layer_types")
        if kinds is not None and StockConfig(deeper).full_decoder.get("layer_types") != kinds:
            continue  # the class overrules it: the last layer of Gemma 4 has full attention
        after = Skeleton.of(deeper)
        if list(after.signatures) == wanted and _are_blocks_of_layers(before, after, sources):
            return deeper
    raise RequestError(
        f"config.json: {config['model_type']} derives the kind of a layer from its position, and "
        "no config has these copies in this order; other positions or whole copies of the stack "
        "may fit (expansion=stack)"
    )


def _fits(config: Config, sources: tuple[int, ...]) -> bool:
    try:
        _deeper(Key.of(config), sources)
    except RequestError:
        return False
    return True


def _are_blocks_of_layers(before: Skeleton, after: Skeleton, sources: Sequence[int]) -> bool:
    """Return True if tensors outside the layers are as before, or have a block per layer."""
    layers = len(before.signatures)
    old, new = (
        {name: shape for name, shape in each.disk.items() if in_layer(name, each.layers) is None}
        for each in (before, after)
    )
    return old.keys() == new.keys() and all(
        length == other or (length % layers == 0 and other == length // layers * len(sources))
        for name, shape in old.items()
        for length, other in zip(shape, new[name], strict=True)
    )


def shallow(config: Config) -> Config:
    """Return the config of a model with one layer of each kind and the last one.

    Layers are of one kind if they have the same tensors and the same entries in the config. Return
    the config unchanged if none has exactly these layers.
    """
    signatures, inner = Skeleton.of(config).signatures, StockConfig(config).full_decoder
    lists = [v for v in inner.values() if isinstance(v, list) and len(v) == len(signatures)]
    first: dict[str, int] = {}
    for layer, signature in enumerate(signatures):
        names = sorted(name for name, _ in signature)
        first.setdefault(str((names, [values[layer] for values in lists])), layer)
    try:
        return _with_layers(config, tuple(sorted({*first.values(), len(signatures) - 1})))
    except RequestError:
        return config


def _with_layers(config: Config, sources: tuple[int, ...]) -> Config:
    deeper = _deeper(Key.of(config), sources)
    return {**config, **{name: deeper[name] for name in deeper if name in config}}


def _check_identity(
    family: DiscoveredFamily, config: Config, sources: tuple[int, ...], identities: frozenset[int]
) -> None:
    """Refuse layers whose function depends on their position."""
    zeroed, plain = _logit_changes(Key.of(config), sources, identities)
    if not zeroed <= TOLERANCE:
        raise RequestError(
            f"config.json: identity copies change the logits of a small {family.model_type} by "
            f"{zeroed:.1e}: the function of its layers depends on their position; other positions "
            "may fit"
        )
    if not plain > TOLERANCE:
        raise RequestError(
            f"config.json: plain copies do not change the logits of a small {family.model_type}, "
            "so identity copies could not be verified"
        )


@lru_cache(maxsize=64)
@one_thread()
def _logit_changes(
    key: Key, sources: tuple[int, ...], identities: frozenset[int]
) -> tuple[float, float]:
    """Return the largest change of a twin's float64 logits by copies of its layers.

    Args:
        key: config of the model.
        sources: source layer of each target layer.
        identities: target layers that are identities.

    Returns:
        The change with identity copies, and with plain copies (the negative control).
    """
    config = key.config
    family, twin = DiscoveredFamily.of(config), Twin.of(config)
    before, small = twin.logits(), twin.config.to_dict()
    layers = layer_list(twin.model)
    model = twin.sibling(_with_layers(small, sources))
    state = twin.model.state_dict()
    changes = []
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for writers in (family.live_writers, {}):
        copies = dict(_copies(state, f"{layers}.", sources, identities, writers))
        for name in copies.keys() & shapes.keys():
            copies[name] = _with_blocks(copies[name], shapes[name], sources)
        model.load_state_dict(copies, strict=False)
        changes.append(float((twin.logits(model) - before).abs().max()))
    return changes[0], changes[1]


def _with_blocks(value: torch.Tensor, shape: Sequence[int], sources: Sequence[int]) -> torch.Tensor:
    """Return a tensor outside the layers of a deeper model, which has a block per layer."""
    for axis, length in enumerate(shape):
        if value.shape[axis] != length:
            blocks = value.unflatten(axis, (len(set(sources)), -1))
            value = blocks.index_select(axis, torch.tensor(sources)).flatten(axis, axis + 1)
    return value


def _copies(
    state: Mapping[str, torch.Tensor],
    layers: str,
    sources: Sequence[int],
    identities: Collection[int],
    writers: Mapping[str, float],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a deeper model; the writers of identities write nothing."""
    for target, source in enumerate(sources):
        for name, value in state.items():
            split = in_layer(name, layers)
            if split is None:
                yield name, value
            elif split[0] == source:
                zero = writers.get(split[1]) if target in identities else None
                copy = value if zero is None else torch.full_like(value, zero)
                yield f"{layers}{target}.{split[1]}", copy
