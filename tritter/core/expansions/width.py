"""Width: hidden size, FFN and attention heads grown, as a rule without changing the function.

`fresh` keeps the old model as a block and gives everything beside it new directions: producers
write zero, consumers are random at natural scale. `net2net` (arXiv 1511.05641) copies neurons and
heads and splits what consumers read between the copies; the residual stream is repeated as a
whole. `zero_pad` copies neurons and heads and pads the residual stream as `fresh` does. In all of
them the RMSNorm sees a root mean square that shrank by √(k·d/D) (k copies of d coordinates among
D), so its gain is scaled by that and eps by k·d/D. Norms per head behind q and k share that eps,
so q and k are scaled with it. `aki` (arXiv 2110.07143) reads as `net2net` does, but what its
second copies compute comes from the layer above, so the function changes.

A LayerNorm subtracts the mean over the stream besides, which directions of zeros would move. Whole
copies of the stream alone, the same number of each coordinate, leave mean, deviation and eps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field

from tritter.core.expansions.heads import (
    HeadMaps,
    Strategy,
    are_copied_alike,
    check_filling_heads,
    check_heads,
    check_normed_heads,
    copied_sources,
    head_maps,
    head_targets,
    split_shares,
    spreads_groups,
)
from tritter.core.families import (
    Config,
    Dimensions,
    Family,
    LogicalTensor,
    Port,
    Space,
    ffn_sizes,
    with_ffn_sizes,
)
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused
from tritter.limits import MAX_WIDTH
from tritter.options import options
from tritter.seeds import derived_seed

# Spaces of units that are computed from the stream and read back into it
_UNITS = ("ffn", "shared_ffn", "query")
_KEPT = ("vocab", "positions", "routes", "shared_gate")


@dataclass(frozen=True, slots=True)
class Spaces:
    """The maps of all spaces under one width expansion.

    Args:
        residual: of the residual stream, and of all that a norm stands between it and.
        rms_ratio: the grown stream's root mean square over the old one's.
        heads: of attention.
        is_tied: the embedding is the head as well.
        embedding_scale: what the embedding is multiplied with, so that it writes the same stream
            where the model scales it by the root of the hidden size; 1 where it does not.
        units_are_copied: new neurons of an FFN copy old ones.
        equal_shares: copies divide what reads them equally.
        seed: of the choice which neurons are copied.
    """

    residual: AxisMap
    rms_ratio: float
    heads: HeadMaps
    is_tied: bool
    embedding_scale: float
    units_are_copied: bool
    equal_shares: bool
    seed: int
    _units: dict[Space, AxisMap] = field(default_factory=dict, repr=False)

    def factors(
        self, tensor: LogicalTensor, old_shape: Sequence[int], new_shape: Sequence[int]
    ) -> tuple[AxisFactor | None, ...]:
        """Return the factors along each axis of a tensor, None where nothing changes."""
        factors: list[AxisFactor | None] = []
        for axis, old_size, new_size in zip(tensor.axes, old_shape, new_shape, strict=True):
            if axis.space.kind in (*_KEPT, "head_dim"):
                factors.append(self.heads.per_head if axis.space.kind == "head_dim" else None)
                continue
            axis_map = self._axis_map(axis.space, old_size, new_size)
            match axis.port:
                case Port.WRITE:
                    factor = AxisFactor.writes(axis_map)
                case Port.WRITE_SCALED:
                    factor = AxisFactor.writes(axis_map.rebalanced(scale=self.embedding_scale))
                case Port.WRITE_NONLINEAR:
                    factor = AxisFactor.writes_nonlinear(axis_map)
                case Port.ABSORBED:
                    factor = AxisFactor.writes_into_norm(axis_map, scale=self.rms_ratio)
                case Port.READ:
                    factor = AxisFactor.reads(axis_map)
                case Port.GAIN:
                    # q and k have the new eps's scale already, and their copies the old mean square
                    is_of_heads = axis.space.kind in ("query", "key_value")
                    ratio = 1.0 if is_of_heads else self.rms_ratio
                    factor = AxisFactor.gain(axis_map, rms_ratio=ratio)
            is_kept = factor.is_identity and axis_map.is_identity
            factors.append(None if is_kept else factor)
        return tuple(factors)

    def _axis_map(self, space: Space, old_size: int, new_size: int) -> AxisMap:
        match space.kind:
            case "query":
                return self.heads.query
            case "key_value":
                return self.heads.key_value
            case "qkv":
                assert self.heads.together is not None, "such heads are never split"
                return self.heads.together
            case "head_input" if self.is_tied:
                # A tied embedding has one value in both of its roles: what the head's columns would
                # have to lose to the copies, and to the embedding's own scale, goes into the final
                # norm's gain
                scale = 1 / (self.residual.num_copies * self.embedding_scale)
                return self.residual.rebalanced(scale=scale)
            case "ffn" | "shared_ffn":
                if not self.units_are_copied:
                    return AxisMap.padded(old_size, new_size)
                if space not in self._units:
                    seed = derived_seed(self.seed, "copies", space.name)
                    source = copied_sources(old_size, new_size, seed=seed)
                    share = split_shares(source, old_size, equal=self.equal_shares)
                    self._units[space] = AxisMap.copied(old_size, source, share)
                return self._units[space]
            case "attention_input" | "ffn_input" | "head_input":
                return self.residual
            case _:
                assert space.is_stream, f"width does not know the space {space.name}"
                return self.residual


def width_fill(
    tensor: LogicalTensor,
    shape: Sequence[int],
    factors: Sequence[AxisFactor | None],
    *,
    seed: int,
) -> Fill:
    """Choose what new coordinates hold: whatever they write to old ones, or old ones to them, is 0.

    New directions of the residual stream are written by nobody and read at random; new neurons
    and heads are computed at random and read by nobody. So one side of each is always zero, the
    function is kept, and the other side gives the zero one a gradient.
    """
    if tensor.is_norm:
        return Fill(kind="mean")
    kinds = set()
    for axis, factor in zip(tensor.axes, factors, strict=True):
        if factor:
            reads_new_unit = axis.port is Port.READ and axis.space.kind in _UNITS
            kinds.add("zero" if axis.space.is_stream or reads_new_unit else "random")
    if "random" not in kinds or "zero" in kinds or len(shape) != 2:
        return Fill()
    std = 1 / math.sqrt(shape[-1])
    return Fill(kind="random", std=std, seed=derived_seed(seed, "fill", tensor.name))


def tensors_above(tensors: Sequence[LogicalTensor]) -> dict[str, str]:
    """Return for each tensor of a layer the same one of the next layer up that has it."""
    above: dict[str, str] = {}
    nearest: dict[tuple[str, int | None], str] = {}
    for tensor in reversed([tensor for tensor in tensors if tensor.layer is not None]):
        within_layer = tensor.kind, tensor.expert
        if within_layer in nearest:
            above[tensor.name] = nearest[within_layer]
        nearest[within_layer] = tensor.name
    return above


Init = Literal["fresh", "net2net", "zero_pad", "aki"]
Shares = Literal["unequal", "equal"]
_REPEATING = ("net2net", "aki")  # these repeat the residual stream as a whole
_GROWING = (
    "hidden_size",
    "intermediate_size",
    "expert_size",
    "shared_expert_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@options
class Width:
    """Wider layers: hidden size, FFN, heads, each alone or together.

    Args:
        hidden_size: Default: doubled when no other target is given, else unchanged.
        intermediate_size: of the FFN (of the widest, where layers differ); in a model of experts,
            of each expert, and whatever else is an FFN there follows by ratio. Default: follows
            the hidden size by ratio.
        num_attention_heads: Default: follows the hidden size where the proportion is a whole
            number for query and key/value heads, else unchanged.
        num_key_value_heads: as above; under `gqa` unchanged.
        head_strategy: `fresh` adds new heads with zero output columns, `copy` clones whole
            key/value groups, `gqa` clones query heads within their groups, `split` makes two
            heads of half the size out of each (not exact). Default: what `init` implies.
        init: `fresh` (new random directions beside the old block), `net2net` (copies),
            `zero_pad` (copied neurons and heads, new directions in the residual stream) or `aki`
            (copies whose values come from the layer above; not exact).
        shares: of the copies of a neuron or head: `unequal` (.9/.1, they diverge) or `equal`
            (they stay equal for ever without noise).
        noise: relative noise on second copies; breaks exactness by as much.
    """

    name: ClassVar[str] = "width"
    new_blocks_only: ClassVar[bool] = False
    expansion_type: ClassVar[str] = "width"
    hidden_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    head_strategy: Strategy | None = None
    init: Init = "fresh"
    shares: Shares = "unequal"
    noise: Annotated[float, Field(ge=0)] = 0.0

    @property
    def is_exact(self) -> bool:
        return self.noise == 0 and self.init != "aki" and self.strategy != "split"

    @property
    def strategy(self) -> Strategy:
        """The strategy that is asked for, or the one that `init` implies."""
        implied = "fresh" if self.init == "fresh" else "copy"
        return cast(Strategy, self.head_strategy or implied)

    def target_config(self, family: Family, config: Config) -> Config:
        old, ffns = family.dimensions(config), ffn_sizes(config)
        new = self._target_dimensions(family, old)
        if self.noise and self.init == "fresh" and self.strategy in ("fresh", "split"):
            init = key_name("expansion.width.init")
            raise refused(
                "expansion.width.noise",
                self.noise,
                f"it goes on copies, and {init}=fresh makes none; use {init}=net2net or "
                f"{init}=zero_pad, or {key_name('expansion.width.noise')}=0",
            )
        if self.init == "aki" and ffns:
            raise refused(
                "expansion.width.init",
                "aki",
                "neurons come from the layer above, and here the FFNs of the layers "
                "differ in width; use fresh, net2net or zero_pad",
            )
        _check_grows(old, new)
        self._check_mean(family, old, new)
        if family.heads_fill_hidden:
            check_filling_heads(family.model_type, old, new, strategy=self.strategy)
        check_heads(old, new, strategy=self.strategy)
        if family.norms_all_heads:
            check_normed_heads(family.model_type, old, new, strategy=self.strategy)
        check_rotary(family, config, old, new, is_split=self.strategy == "split")
        self._check_hidden_size(family, old, new)
        target: Config = {
            **config,
            **{key: getattr(new, name) for name, key in family.sizes.items() if name in _GROWING},
        }
        if not family.subtracts_mean:
            eps = float(config["rms_norm_eps"]) * self._rms_ratio(old, new) ** 2  # type: ignore[arg-type]
            target["rms_norm_eps"] = float(f"{eps:.15g}")  # 8e-07, not 7.999999999999999e-07
        widest, grown = old.intermediate_size, new.intermediate_size
        sizes = [round(size * grown / widest) for size in ffns]
        key = family.sizes["intermediate_size"]
        return with_ffn_sizes(target, sizes, key=key) if sizes else target

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        import torch

        old, new = family.dimensions(source), family.dimensions(target)
        is_scaled = any(a.port is Port.WRITE_SCALED for t in family.tensors for a in t.axes)
        residual = AxisMap.tiled if self.init in _REPEATING else AxisMap.padded
        equal_shares = self.shares == "equal"
        spaces = Spaces(
            residual=residual(old.hidden_size, new.hidden_size),
            rms_ratio=self._rms_ratio(old, new),
            # A norm over all heads hands the gradient of each on to all: shares that differ between
            # copies would be mixed, and moments could not follow
            heads=head_maps(
                old,
                new,
                strategy=self.strategy,
                equal_shares=equal_shares or family.norms_all_heads,
            ),
            is_tied=bool(source.get("tie_word_embeddings")),
            embedding_scale=(old.hidden_size / new.hidden_size) ** 0.5 if is_scaled else 1.0,
            units_are_copied=self.init != "fresh",
            equal_shares=equal_shares,
            seed=seed,
        )
        logical, maps = family.logical_tensors(source), dict[str, TensorMap]()
        for tensor in logical:
            shape = family.shape(tensor, target)
            factors = spaces.factors(tensor, family.shape(tensor, source), shape)
            is_scaled_gain = tensor.is_norm and any(
                factor is not None and bool((factor.weight != 1).any()) for factor in factors
            )
            maps[tensor.name] = TensorMap(
                source=tensor.name,
                axes=factors,
                fill=width_fill(tensor, shape, factors, seed=seed),
                noise=self.noise,
                noise_seed=derived_seed(seed, "noise", tensor.name),
                offset=family.norm_offset if is_scaled_gain else 0.0,
            )
        if self.init == "aki":
            # Norms stand between a stream that is written and readers that stay the layer's own
            above = tensors_above([tensor for tensor in logical if not tensor.is_of_norm])
            for name, donor in above.items():
                # What second copies compute comes from the layer above; their state starts anew
                output, *inputs = maps[name].axes
                if output is None or not bool((is_copy := output.is_duplicate).any()):
                    continue
                first = AxisFactor(
                    torch.where(is_copy, -1, output.index),
                    output.weight * ~is_copy,
                    output.gradient * ~is_copy,
                )
                fill = Fill(kind="copy", donor=replace(maps[name], source=donor))
                maps[name] = replace(maps[name], axes=(first, *inputs), fill=fill)
        return ParameterMap(tensors=maps, layer_sources=tuple(range(old.num_hidden_layers)))

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        old, new = family.dimensions(source), family.dimensions(target)
        grown = {
            family.sizes[name]: f"{family.sizes[name]} {getattr(old, name)} → {getattr(new, name)}"
            for name in _GROWING
            if name in family.sizes and getattr(old, name) != getattr(new, name)
        }
        counts = ("num_attention_heads", "num_key_value_heads")
        kept = all(getattr(old, name) == getattr(new, name) for name in counts)
        said = ["head counts stay"] if kept else []
        if ffn_sizes(target):
            said.append("FFNs that are narrower than the widest follow by ratio")
        sizes = "; ".join([*grown.values(), *said])
        if self.strategy == "split" or not spreads_groups(old, new):
            return (sizes,)
        return sizes, "a key/value head serves fewer queries: moments of k and v carry the mean"

    def _rms_ratio(self, old: Dimensions, new: Dimensions) -> float:
        """Return the grown stream's root mean square over the old one's: √(k·d/D)."""
        copies = new.hidden_size // old.hidden_size if self.init in _REPEATING else 1
        return math.sqrt(copies * old.hidden_size / new.hidden_size)

    def _check_mean(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        """Refuse other directions of the stream than whole copies where norms take their mean."""
        hidden_size = old.hidden_size
        copies, rest = divmod(new.hidden_size, hidden_size)
        are_copies = self.init in _REPEATING and not rest
        if not family.subtracts_mean or new.hidden_size == hidden_size or are_copies:
            return
        multiples = {copies * hidden_size, -(-new.hidden_size // hidden_size) * hidden_size}
        nearest = " or ".join(str(size) for size in sorted(multiples) if size > hidden_size)
        init = key_name("expansion.width.init")
        raise refused(
            "expansion.width.hidden_size",
            f"{new.hidden_size} with {init} = {self.init}",
            f"{family.model_type} has LayerNorm, which subtracts the mean over the stream, so new "
            "directions beside the old ones would change what it computes, and whole copies of "
            f"the stream would not: use {init}=net2net with "
            f"{key_name('expansion.width.hidden_size')}={nearest}. FFN "
            f"({key_name('expansion.width.intermediate_size')}) and depth grow by any amount",
        )

    def _check_hidden_size(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        heads = new.num_attention_heads
        if not family.heads_divide_hidden or new.hidden_size % heads == 0:
            return
        if self.hidden_size is None:
            # Nobody asked for the hidden size: name head counts that fit it
            counts = range(old.num_attention_heads + 1, new.hidden_size + 1)
            fitting = [
                count
                for count in counts
                if not (new.hidden_size % count or count % new.num_key_value_heads)
            ]
            near = [n for n in fitting if n < heads][-1:] + [n for n in fitting if n > heads][:1]
            raise refused(
                "expansion.width.num_attention_heads",
                heads,
                f"{family.model_type} accepts only head counts that divide its hidden size of "
                f"{new.hidden_size}; nearest: {' or '.join(map(str, near)) or 'none'}",
            )
        multiples = (new.hidden_size // heads * heads, -(-new.hidden_size // heads) * heads)
        nearest = " or ".join(
            str(size)
            for size in multiples
            if size >= old.hidden_size
            and replace(self, hidden_size=size)._target_dimensions(family, old) != old
        )
        raise refused(
            "expansion.width.hidden_size",
            new.hidden_size,
            f"{family.model_type} accepts only multiples of its {heads} attention "
            f"heads; nearest: {nearest}",
        )

    def _target_dimensions(self, family: Family, old: Dimensions) -> Dimensions:
        targets = (
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        is_default = self.strategy != "split" and all(target is None for target in targets)
        hidden_size = 2 * old.hidden_size if is_default else self.hidden_size or old.hidden_size
        grown, base = hidden_size, old.hidden_size
        if self.intermediate_size is not None:
            grown, base = self.intermediate_size, ffn_size(old)
        with_heads = head_targets(
            old,
            hidden_size=hidden_size,
            strategy=self.strategy,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
        )
        is_asked = self.num_attention_heads is not None or self.num_key_value_heads is not None
        if family.norms_all_heads and self.strategy != "split" and not is_asked:
            are_kept = not are_copied_alike(old, with_heads, strategy=self.strategy)
            with_heads = old if are_kept else with_heads
        return replace(
            with_heads,
            hidden_size=hidden_size,
            intermediate_size=round(old.intermediate_size * grown / base),
            expert_size=round(old.expert_size * grown / base),
            shared_expert_size=round(old.shared_expert_size * grown / base),
        )


def ffn_size(dimensions: Dimensions) -> int:
    """Return the size that `intermediate_size` is about: of the FFN, or of an expert."""
    return dimensions.expert_size or dimensions.intermediate_size


def _check_grows(old: Dimensions, new: Dimensions) -> None:
    """Refuse a size that shrinks, and sizes that are all what they were."""
    for name, before, after in (
        ("hidden_size", old.hidden_size, new.hidden_size),
        ("intermediate_size", ffn_size(old), ffn_size(new)),
        ("num_attention_heads", old.num_attention_heads, new.num_attention_heads),
        ("num_key_value_heads", old.num_key_value_heads, new.num_key_value_heads),
    ):
        if after < before:
            raise refused(
                f"expansion.width.{name}",
                after,
                f"it is smaller than the model's {before}; an expansion only grows: at "
                f"least {before}",
            )
    if old == new:
        raise RequestError(
            Problem(
                "expansion.width",
                reason="every target equals what the model has already (hidden_size "
                f"{old.hidden_size}, intermediate_size {ffn_size(old)}, num_attention_heads "
                f"{old.num_attention_heads}); ask for a larger one",
            )
        )


_FACTORS = ("short_factor", "long_factor")  # of LongRoPE, one for each pair that is turned


def check_rotary(
    family: Family, config: Config, old: Dimensions, new: Dimensions, *, is_split: bool
) -> None:
    """Refuse sizes with which rotary positions would turn something else.

    Args:
        is_split: heads are split in two.

    Raises:
        RequestError: says what stands against it.
    """
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    rope: Mapping[str, object] = stated if isinstance(stated, Mapping) else {}
    has_factors = any(rope.get(key) for key in _FACTORS)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if is_split and (family.has_interleaved_rope or has_factors or share not in (None, 1)):
        reason = (
            f"{family.model_type} turns coordinates 2i and 2i + 1 together"
            if family.has_interleaved_rope
            else f"{family.model_type} has a factor for each pair (LongRoPE)"
            if has_factors
            else f"of each head {share} is turned"
        )
        raise refused(
            "expansion.width.head_strategy",
            "split",
            "it takes coordinates i and i + head_dim/2 for pairs that rotary "
            f"positions turn, and {reason}; use fresh, copy or gqa",
        )
    before = old.hidden_size // old.num_attention_heads
    after = new.hidden_size // new.num_attention_heads
    if has_factors and after != before:
        heads = key_name("expansion.width.num_attention_heads")
        raise refused(
            "expansion.width.hidden_size",
            f"{new.hidden_size} with {heads} = {new.num_attention_heads}",
            f"{family.model_type} counts the factors of its LongRoPE by hidden_size // "
            f"num_attention_heads = {before}, which would be {after}; let them grow in proportion",
        )
