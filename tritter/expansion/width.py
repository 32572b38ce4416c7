"""Width: hidden size, FFN and attention heads grown without changing the function.

`fresh` keeps the old model as a block and gives everything beside it new directions: producers
write zero, consumers are random at natural scale. `net2net` (arXiv 1511.05641) copies neurons and
heads and splits what consumers read between the copies; the residual stream is repeated as a
whole. `zero_pad` copies neurons and heads and pads the residual stream as `fresh` does. In all of
them the RMSNorm sees a root mean square that shrank by √(k·d/D) (k copies of d coordinates among
D), so its gain is scaled by that and eps by k·d/D. Norms per head behind q and k share that eps,
so q and k are scaled with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tritter.errors import RequestError
from tritter.families import Axis, Config, Dimensions, Family, LogicalTensor, Port
from tritter.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.seeds import derived_seed

UNEQUAL_RATIO = 9.0  # shares .9/.1 for two copies; clones of equal share never diverge


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Wider layers: hidden size, FFN, heads, each alone or together.

    Args:
        hidden_size: Default: doubled when no other target is given, else unchanged.
        intermediate_size: Default: follows the hidden size by ratio.
        num_attention_heads: Default: follows the hidden size where the proportion is a whole
            number for query and key/value heads, else unchanged.
        num_key_value_heads: as above.
        head_strategy: `fresh` adds new heads with zero output columns, `copy` clones whole
            key/value groups. Default: what `init` implies.
        init: `fresh` (new random directions beside the old block), `net2net` (copies) or
            `zero_pad` (copied neurons and heads, new directions in the residual stream).
        shares: of the copies of a neuron or head: `unequal` (.9/.1, they diverge) or `equal`
            (they stay equal for ever without noise).
        noise: relative noise on second copies; breaks exactness by as much.
    """

    name: ClassVar[str] = "width"
    expansion_type: ClassVar[str] = "width"
    hidden_size: int | None = field(default=None, metadata={"minimum": 1})
    intermediate_size: int | None = field(default=None, metadata={"minimum": 1})
    num_attention_heads: int | None = field(default=None, metadata={"minimum": 1})
    num_key_value_heads: int | None = field(default=None, metadata={"minimum": 1})
    head_strategy: str | None = field(default=None, metadata={"choices": ("fresh", "copy")})
    init: str = field(default="fresh", metadata={"choices": ("fresh", "net2net", "zero_pad")})
    shares: str = field(default="unequal", metadata={"choices": ("unequal", "equal")})
    noise: float = field(default=0.0, metadata={"minimum": 0.0})

    @property
    def is_exact(self) -> bool:
        return self.noise == 0

    @property
    def new_blocks_only(self) -> bool:
        return False

    @property
    def heads_are_copied(self) -> bool:
        return (self.head_strategy or ("fresh" if self.init == "fresh" else "copy")) == "copy"

    def target_config(self, family: Family, config: Config) -> Config:
        old = family.dimensions(config)
        new = self._target_dimensions(old)
        self._check_noise()
        _check_not_smaller(old, new)
        _check_heads(old, new, heads_are_copied=self.heads_are_copied)
        self._check_hidden_size(family, old, new)
        ratio = residual_map(old.hidden_size, new.hidden_size, init=self.init)
        return {
            **config,
            "hidden_size": new.hidden_size,
            "intermediate_size": new.intermediate_size,
            "num_attention_heads": new.num_attention_heads,
            "num_key_value_heads": new.num_key_value_heads,
            "head_dim": new.head_dim,
            "rms_norm_eps": float(config["rms_norm_eps"]) * rms_ratio(ratio) ** 2,  # type: ignore[arg-type]
        }

    def _check_noise(self) -> None:
        if self.noise and self.init == "fresh" and not self.heads_are_copied:
            raise RequestError(
                f"expansion.width.noise = {self.noise} goes on copies, and init=fresh makes none; "
                "use init=net2net or init=zero_pad, or noise=0."
            )

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        spaces = _Spaces(
            options=self,
            old=family.dimensions(source),
            new=family.dimensions(target),
            is_tied=bool(source.get("tie_word_embeddings")),
            seed=seed,
        )
        tensors: dict[str, TensorMap] = {}
        for tensor in family.logical_tensors(source):
            axes = tuple(spaces.factor(axis) for axis in tensor.axes)
            tensors[tensor.name] = TensorMap(
                source=tensor.name,
                axes=axes,
                fill=_fill(tensor, family.shape(tensor, target), axes, seed=seed),
                noise=self.noise,
                noise_seed=derived_seed(seed, "noise", tensor.name),
            )
        layers = spaces.old.num_hidden_layers
        return ParameterMap(tensors=tensors, layer_sources=tuple(range(layers)))

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        old, new = family.dimensions(source), family.dimensions(target)
        grown = [
            f"{name} {getattr(old, name)} → {getattr(new, name)}"
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
            )
            if getattr(old, name) != getattr(new, name)
        ]
        kept = [] if old.num_attention_heads != new.num_attention_heads else ["head counts stay"]
        return ("; ".join(grown + kept),)

    def _check_hidden_size(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        heads = new.num_attention_heads
        if not family.heads_divide_hidden or new.hidden_size % heads == 0:
            return
        multiples = (new.hidden_size // heads * heads, -(-new.hidden_size // heads) * heads)
        nearest = " or ".join(
            str(size)
            for size in multiples
            if size >= old.hidden_size
            and replace(self, hidden_size=size)._target_dimensions(old) != old
        )
        raise RequestError(
            f"expansion.width.hidden_size = {new.hidden_size}: {family.model_type} accepts only "
            f"multiples of its {heads} attention heads; nearest: {nearest}."
        )

    def _target_dimensions(self, old: Dimensions) -> Dimensions:
        is_default = all(
            target is None
            for target in (
                self.hidden_size,
                self.intermediate_size,
                self.num_attention_heads,
                self.num_key_value_heads,
            )
        )
        hidden_size = 2 * old.hidden_size if is_default else self.hidden_size or old.hidden_size
        heads, kv_heads = old.num_attention_heads, old.num_key_value_heads
        grown_heads = heads * hidden_size % old.hidden_size == 0
        grown_kv_heads = kv_heads * hidden_size % old.hidden_size == 0
        if grown_heads and grown_kv_heads:
            heads = heads * hidden_size // old.hidden_size
            kv_heads = kv_heads * hidden_size // old.hidden_size
        return Dimensions(
            num_hidden_layers=old.num_hidden_layers,
            hidden_size=hidden_size,
            intermediate_size=self.intermediate_size
            or round(old.intermediate_size * hidden_size / old.hidden_size),
            num_attention_heads=self.num_attention_heads or heads,
            num_key_value_heads=self.num_key_value_heads or kv_heads,
            head_dim=old.head_dim,
            vocab_size=old.vocab_size,
        )


@dataclass(frozen=True)
class _Spaces:
    """The axis maps of all spaces under one set of width options."""

    options: Width
    old: Dimensions
    new: Dimensions
    is_tied: bool
    seed: int

    def factor(self, axis: Axis) -> AxisFactor | None:
        """Return the factors along one axis, or None where nothing changes."""
        if axis.space in ("vocab", "head_dim"):
            return None
        axis_map = self.axis_map(axis.space)
        match axis.port:
            case Port.WRITE:
                factor = AxisFactor.writes(axis_map)
            case Port.WRITE_NONLINEAR:
                factor = AxisFactor.writes_nonlinear(axis_map)
            case Port.ABSORBED:
                scale = rms_ratio(self.residual)
                factor = AxisFactor.writes_into_norm(axis_map, scale=scale)
            case Port.READ:
                factor = AxisFactor.reads(axis_map)
            case Port.GAIN:
                factor = AxisFactor.gain(axis_map, rms_ratio=rms_ratio(self.residual))
        return None if factor.is_identity and axis_map.is_identity else factor

    def axis_map(self, space: str) -> AxisMap:
        match space.rsplit(".", 1)[-1]:
            case "residual" | "attention_input" | "ffn_input":
                return self.residual
            case "head_input":
                # A tied embedding is copied unscaled in both of its roles, so what the head's
                # columns would have to lose goes into the final norm's gain.
                copies = self.residual.num_copies
                return self.residual.rebalanced(scale=1 / copies if self.is_tied else 1.0)
            case "ffn":
                return self._ffn(space)
            case "query":
                return self._heads[0].repeated(self.old.head_dim)
            case "key_value":
                return self._heads[1].repeated(self.old.head_dim)
        raise AssertionError(f"width does not know the space {space}")

    @cached_property
    def residual(self) -> AxisMap:
        return residual_map(self.old.hidden_size, self.new.hidden_size, init=self.options.init)

    @cached_property
    def _heads(self) -> tuple[AxisMap, AxisMap]:
        """The maps of query heads and of key/value heads, in heads."""
        if self.options.heads_are_copied:
            return copied_heads(self.old, self.new, equal=self.options.shares == "equal")
        return fresh_heads(self.old, self.new)

    def _ffn(self, space: str) -> AxisMap:
        old_size, new_size = self.old.intermediate_size, self.new.intermediate_size
        if self.options.init == "fresh":
            return AxisMap.padded(old_size, new_size)
        seed = derived_seed(self.seed, "copies", space)
        source = copied_sources(old_size, new_size, seed=seed)
        share = split_shares(source, old_size, equal=self.options.shares == "equal")
        return AxisMap.copied(old_size, source, share)


def residual_map(old_size: int, new_size: int, *, init: str) -> AxisMap:
    """Return the map of the residual stream: one block and new directions, or whole repeats."""
    if init == "net2net":
        return AxisMap.tiled(old_size, new_size)
    return AxisMap.padded(old_size, new_size)


def rms_ratio(residual: AxisMap) -> float:
    """Return the grown stream's root mean square over the old one's: √(k·d/D)."""
    return math.sqrt(residual.num_copies * residual.old_size / residual.new_size)


def fresh_heads(old: Dimensions, new: Dimensions) -> tuple[AxisMap, AxisMap]:
    """Keep each old head at its place in its key/value group; heads beside it are new."""
    old_group = old.num_attention_heads // old.num_key_value_heads
    new_group = new.num_attention_heads // new.num_key_value_heads
    query = torch.full((new.num_attention_heads,), -1)
    for head in range(old.num_key_value_heads):
        start = head * new_group
        query[start : start + old_group] = torch.arange(old_group) + head * old_group
    query_map = AxisMap.copied(old.num_attention_heads, query, torch.ones(len(query)))
    return query_map, AxisMap.padded(old.num_key_value_heads, new.num_key_value_heads)


def copied_heads(old: Dimensions, new: Dimensions, *, equal: bool) -> tuple[AxisMap, AxisMap]:
    """Clone whole key/value groups: each copy of a query head meets a copy of its key/value head.

    Within a new group every query has the same share, without which the moments of k and v
    could not follow exactly.
    """
    group = old.num_attention_heads // old.num_key_value_heads
    source = torch.arange(new.num_key_value_heads) % old.num_key_value_heads
    share = split_shares(source, old.num_key_value_heads, equal=equal)
    key_value = AxisMap.copied(old.num_key_value_heads, source, share)
    return key_value.repeated(group), key_value


def copied_sources(old_size: int, new_size: int, *, seed: int) -> Tensor:
    """Return which old neuron each new one copies: whole rounds, each in a random order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.arange(old_size)]
    while sum(map(len, rounds)) < new_size:
        rounds.append(torch.randperm(old_size, generator=generator))
    return torch.cat(rounds)[:new_size]


def split_shares(source: Tensor, old_size: int, *, equal: bool) -> Tensor:
    """Return the share of each copy; the copies of one source add up to 1.

    Unequal shares fall by a factor of nine from copy to copy (.9/.1 for two), so that no two
    copies of a source have the same.
    """
    in_order, order = torch.sort(source, stable=True)
    copy = torch.empty_like(source)
    copy[order] = torch.arange(len(source)) - torch.searchsorted(in_order, in_order)
    weight = torch.full((len(source),), 1.0 if equal else UNEQUAL_RATIO, dtype=torch.float64)
    weight = weight.pow(-copy)
    total = torch.zeros(old_size, dtype=torch.float64).index_add_(0, source, weight)
    return weight / total[source]


def _fill(
    tensor: LogicalTensor,
    shape: tuple[int, ...],
    axes: Sequence[AxisFactor | None],
    *,
    seed: int,
) -> Fill:
    """Choose what new coordinates hold: whatever they write to old ones, or old ones to them, is 0.

    New directions of the residual stream are written by nobody and read at random; new neurons
    and heads are computed at random and read by nobody. So one side of each is always zero, the
    function is kept, and the other side gives the zero one a gradient.
    """
    if tensor.axes[0].port is Port.GAIN:
        return Fill(kind="mean")
    kinds = {_fill_kind(axis) for axis, factor in zip(tensor.axes, axes, strict=True) if factor}
    if "random" not in kinds or "zero" in kinds:
        return Fill()
    fan_in = shape[-1] if len(shape) == 2 else 1
    std = 1 / math.sqrt(fan_in) if len(shape) == 2 else 0.0
    return Fill(kind="random", std=std, seed=derived_seed(seed, "fill", tensor.name))


def _fill_kind(axis: Axis) -> Literal["zero", "random"]:
    writes_residual = axis.space == "residual"
    reads_new_unit = axis.port is Port.READ and axis.space.rsplit(".", 1)[-1] in ("ffn", "query")
    return "zero" if writes_residual or reads_new_unit else "random"


def _check_not_smaller(old: Dimensions, new: Dimensions) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for name in names:
        before, after = getattr(old, name), getattr(new, name)
        if after < before:
            raise RequestError(
                f"expansion.width.{name} = {after} is smaller than the model's {before}; an "
                f"expansion only grows: at least {before}."
            )
    if old == new:
        raise RequestError(
            "expansion.width: every target equals what the model has already "
            f"(hidden_size {old.hidden_size}, intermediate_size {old.intermediate_size}, "
            f"num_attention_heads {old.num_attention_heads}); ask for a larger one."
        )


def _check_heads(old: Dimensions, new: Dimensions, *, heads_are_copied: bool) -> None:
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    old_group = old.num_attention_heads // old.num_key_value_heads
    if heads % kv_heads:
        multiples = (heads // kv_heads * kv_heads, -(-heads // kv_heads) * kv_heads)
        nearest = " or ".join(
            str(count)
            for count in multiples
            if count >= old.num_attention_heads and replace(new, num_attention_heads=count) != old
        )
        raise RequestError(
            f"expansion.width.num_attention_heads = {heads} is not a multiple of "
            f"num_key_value_heads = {kv_heads}; nearest: {nearest}."
        )
    group = heads // kv_heads
    if heads_are_copied and group != old_group:
        raise RequestError(
            f"expansion.width.num_attention_heads = {heads} with num_key_value_heads = {kv_heads}: "
            f"head_strategy=copy clones whole groups of {old_group} query heads, so "
            f"num_attention_heads must be {old_group * kv_heads} (or use head_strategy=fresh)."
        )
    if group < old_group:
        raise RequestError(
            f"expansion.width.num_key_value_heads = {kv_heads} with num_attention_heads = {heads} "
            f"leaves {group} query heads a group where the model has {old_group}; "
            f"num_attention_heads must be at least {old_group * kv_heads}."
        )
