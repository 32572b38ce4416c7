"""Width expansions of hidden size, FFN and attention heads, mostly function-preserving.

`fresh` keeps the old model as a block and adds new directions: producers write zero to them,
consumers are random at natural scale. `net2net` (arXiv 1511.05641) copies neurons and heads and
splits the weights of consumers between the copies; the residual stream is repeated as a whole.
`zero_pad` copies neurons and heads and pads the residual stream as `fresh` does. In all of them the
RMS of the stream shrinks by √(k·d/D) (k copies of d coordinates among D). So the gain of an RMSNorm
is scaled by that factor and eps by k·d/D. Norms per head after q and k share this eps, so q and k
are scaled as well. `aki` (arXiv 2110.07143) works like `net2net`, but further copies take their
weights from the layer above, so the function changes.

A LayerNorm also subtracts the mean over the stream, which zero directions would change. Only whole
copies of the stream preserve mean, deviation and eps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field

from tritter.core.expansions.heads import HeadGrowth, Strategy, copied_axis
from tritter.core.families import (
    Axis,
    Config,
    Dimensions,
    Family,
    LogicalTensor,
    Model,
    Port,
    Space,
    segments,
)
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused
from tritter.limits import MAX_WIDTH
from tritter.options import options
from tritter.seeds import derived_seed

# Spaces of units between a read from the stream and a write to it
_UNITS = ("ffn", "shared_ffn", "query", "heads")
_KEPT = ("vocab", "positions", "routes", "shared_gate")
Init = Literal["fresh", "net2net", "zero_pad", "aki"]
Shares = Literal["unequal", "equal"]
_USUAL_MULTIPLE = 64  # a block of bitsandbytes' nf4, and two of llama.cpp's Q8_0
_LEAST_HEAD_SIZE = 64  # that attention kernels of all engines have
_FINEST_ROUNDING = 8  # round to multiples of at most an eighth of the size
_REPEATING = ("net2net", "aki")  # methods that repeat the residual stream as a whole
_FACTORS = ("short_factor", "long_factor")  # of LongRoPE, one per rotary pair


class _Spaces:
    """The maps of all spaces under one width expansion.

    Args:
        spec: the expansion.
        source: the model.
        target: the grown model.
        seed: of the choice of copied neurons.
    """

    def __init__(self, spec: Width, source: Model, target: Model, seed: int) -> None:
        old, new = source.sizes, target.sizes
        residual = AxisMap.tiled if spec.init in _REPEATING else AxisMap.padded
        self._residual = residual(old.hidden_size, new.hidden_size)
        self._rms_ratio = spec.rms_ratio(old, new)
        self._head_dim, self._is_tied = old.head_dim, source.is_tied
        heads, self._equal_shares = HeadGrowth(old, new, spec.strategy), spec.shares == "equal"
        self._within_head = heads.within_head
        # A norm over all heads mixes their gradients: with unequal shares the moments could not be
        # mapped
        equal = self._equal_shares or source.family.norms_all_heads
        self._of_heads = heads.maps(equal_shares=equal)
        # Of the embedding, if the model multiplies it by the root of the hidden size
        ports = [axis.port for tensor in source.tensors for axis in tensor.axes]
        is_scaled = Port.WRITE_SCALED in ports
        self._embedding_scale = (old.hidden_size / new.hidden_size) ** 0.5 if is_scaled else 1.0
        self._are_units_copied, self._seed = spec.init != "fresh", seed
        self._units: dict[Space, AxisMap] = {}

    def factors(
        self,
        tensor: LogicalTensor,
        old_shape: Sequence[int],
        new_shape: Sequence[int],
        grown: LogicalTensor | None = None,
    ) -> tuple[AxisFactor | None, ...]:
        """Return the factor of each axis of a tensor; None for an unchanged axis.

        Args:
            tensor: of the source.
            old_shape: of the tensor.
            new_shape: of the same tensor in the target.
            grown: that tensor, in a family without a table.
        """
        factors: list[AxisFactor | None] = []
        sizes = list(zip(old_shape, new_shape, strict=True))
        for number, (axis, (old_size, new_size)) in enumerate(zip(tensor.axes, sizes, strict=True)):
            if axis.space.kind in (*_KEPT, "head_dim"):
                factors.append(self._within_head if axis.space.kind == "head_dim" else None)
                continue
            is_scaled = axis.port in (Port.GAIN, Port.ABSORBED)
            if grown is not None and old_size == new_size and not is_scaled:
                factors.append(None)
                continue
            if grown is not None:
                axis_map = self._discovered_map(axis, grown.axes[number])
            else:
                axis_map = self._axis_map(axis.space, old_size, new_size)
            match axis.port:
                case Port.WRITE:
                    factor = AxisFactor.writes(axis_map)
                case Port.WRITE_SCALED:
                    factor = AxisFactor.writes(axis_map.rebalanced(scale=self._embedding_scale))
                case Port.WRITE_NONLINEAR:
                    factor = AxisFactor.writes_nonlinear(axis_map)
                case Port.ABSORBED:
                    factor = AxisFactor.writes_into_norm(axis_map, scale=self._rms_ratio)
                case Port.READ:
                    factor = AxisFactor.reads(axis_map)
                case Port.GAIN:
                    # q and k are already scaled for the new eps; copies keep the mean square
                    is_of_heads = axis.space.kind in ("query", "key_value", "heads", "ffn")
                    ratio = 1.0 if is_of_heads else self._rms_ratio
                    factor = AxisFactor.gain(axis_map, rms_ratio=ratio)
            is_kept = factor.is_identity and axis_map.is_identity
            factors.append(None if is_kept else factor)
        return tuple(factors)

    def _discovered_map(self, old: Axis, new: Axis) -> AxisMap:
        """Return the map of an axis in a family without a table."""
        before, after = int(old.space.size), int(new.space.size)
        if old.length == new.length and (old.length or before == after):
            return AxisMap.identity(old.length or before)
        entries, part = divmod(new.length - old.length, after - before or 1)
        widths = segments(old.arrangement, entries, self._head_dim)
        rest = old.length - entries * before
        if not old.length or before == after or part or widths is None or rest < 0:
            raise RequestError(f"the axes of {old.space.name} do not follow the size")
        return self._axis_map(old.space, before, after).arranged(widths, rest)

    def _axis_map(self, space: Space, old_size: int, new_size: int) -> AxisMap:
        match space.kind:
            case "heads" | "query" | "key_value" | "qkv":
                return self._of_heads[space.kind]
            case "head_input" if self._is_tied:
                # A tied embedding has the same weights as the head, so the gain of the final norm
                # absorbs the shares of the copies and the scale of the embedding
                scale = 1 / (self._residual.num_copies * self._embedding_scale)
                return self._residual.rebalanced(scale=scale)
            case "ffn" | "shared_ffn":
                if not self._are_units_copied:
                    return AxisMap.padded(old_size, new_size)
                if space not in self._units:
                    seed = derived_seed(self._seed, "copies", space.name)
                    self._units[space] = copied_axis(
                        old_size, new_size, seed=seed, equal=self._equal_shares
                    )
                return self._units[space]
            case "attention_input" | "ffn_input" | "head_input":
                return self._residual
            case _:
                assert space.is_stream, f"width does not know the space {space.name}"
                return self._residual


def _width_fill(
    tensor: LogicalTensor, shape: Sequence[int], factors: Sequence[AxisFactor | None], *, seed: int
) -> Fill:
    """Return the fill of new coordinates, which preserves the function.

    New directions of the residual stream have zero producers and random consumers. New neurons and
    heads have random producers and zero consumers. The random side gives the zero side a gradient.
    """
    if tensor.is_norm:
        return Fill(kind="mean")
    kinds = set()
    for axis, factor in zip(tensor.axes, factors, strict=True):
        if factor:
            reads_new_unit = axis.port is Port.READ and axis.space.kind in _UNITS
            reads_stream = axis.port is Port.READ and axis.space.is_stream
            is_zero = reads_new_unit or (axis.space.is_stream and not reads_stream)
            kinds.add("zero" if is_zero else "random")
    if "random" not in kinds or "zero" in kinds or len(shape) < 2:
        return Fill()
    if len(shape) > 2:  # experts in one tensor, or a convolution
        return Fill(kind="matched", seed=derived_seed(seed, "fill", tensor.name))
    std = 1 / math.sqrt(shape[-1])
    return Fill(kind="random", std=std, seed=derived_seed(seed, "fill", tensor.name))


def _tensors_above(tensors: Sequence[LogicalTensor]) -> dict[str, str]:
    """Return tensor → tensor of the same kind in the next layer above that has it."""
    above: dict[str, str] = {}
    nearest: dict[tuple[str, int | None], str] = {}
    for tensor in reversed([tensor for tensor in tensors if tensor.layer is not None]):
        within_layer = tensor.kind, tensor.expert
        if within_layer in nearest:
            above[tensor.name] = nearest[within_layer]
        nearest[within_layer] = tensor.name
    return above


@options
class Width:
    """Wider layers: hidden size, FFN, heads, each alone or together.

    Args:
        hidden_size: Default: doubled if no other target is set, else unchanged.
        intermediate_size: of the widest FFN, or of each expert; other FFNs are scaled by the same
            ratio. Default: scaled with the hidden size.
        num_attention_heads: Default: scaled with the hidden size if query and key/value heads stay
            integers, else unchanged.
        num_key_value_heads: as `num_attention_heads`; unchanged under `gqa`.
        multiple_of: FFN and expert sizes that follow by ratio are rounded to multiples of it, which
            kernels and quantisers need. Default: 64 for current multiples of 64, if that changes
            the size by at most a sixteenth; else 1.
        head_strategy: `fresh` adds heads with zero output columns, `copy` clones whole key/value
            groups, `gqa` clones query heads within their groups, `split` splits each head into
            two of half the size (not exact). Default: derived from `init`.
        init: `fresh` (new random directions), `net2net` (copies), `zero_pad` (copied neurons and
            heads, new directions in the residual stream) or `aki` (copies with weights of the
            layer above; not exact).
        shares: of the copies of a neuron or head: `unequal` (.9/.1, they diverge) or `equal`
            (without noise they stay equal).
        noise: relative noise on further copies; changes the function accordingly.
    """

    name: ClassVar[str] = "width"
    new_blocks_only: ClassVar[bool] = False
    expansion_type: ClassVar[str] = "width"
    hidden_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None = None
    multiple_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    head_strategy: Strategy | None = None
    init: Init = "fresh"
    shares: Shares = "unequal"
    noise: Annotated[float, Field(ge=0)] = 0.0

    @property
    def is_exact(self) -> bool:
        return self.noise == 0 and self.init != "aki" and self.strategy != "split"

    @property
    def strategy(self) -> Strategy:
        """The head strategy, by default derived from `init`."""
        implied = "fresh" if self.init == "fresh" else "copy"
        return cast(Strategy, self.head_strategy or implied)

    def target_config(self, source: Model) -> Config:
        family, old, ffns = source.family, source.sizes, source.ffn_sizes
        new = self._target_dimensions(family, old)
        if self.noise and self.init == "fresh" and self.strategy in ("fresh", "split"):
            init = key_name("expansion.width.init")
            raise refused(
                "expansion.width.noise",
                self.noise,
                f"only copies get noise, and {init}=fresh makes none; use {init}=net2net or "
                f"{init}=zero_pad, or {key_name('expansion.width.noise')}=0",
            )
        if self.init == "aki" and ffns:
            raise refused(
                "expansion.width.init",
                "aki",
                "it copies neurons from the layer above, but the FFN widths of the layers differ; "
                "use fresh, net2net or zero_pad",
            )
        _check_grows(old, new)
        self._check_mean(family, old, new)
        if not family.has_table:
            self._check_discovered(family, old, new)
        HeadGrowth(old, new, self.strategy).check(family)
        _check_rotary(source, new, is_split=self.strategy == "split")
        self._check_hidden_size(family, old, new)
        target = family.with_dimensions(source.config, new)
        if not family.subtracts_mean:
            target = family.with_rms(target, self.rms_ratio(old, new))
        widest, grown = old.intermediate_size, new.intermediate_size
        sizes = [min(self._scaled(size, grown, widest), grown) for size in ffns]
        return family.with_ffn_sizes(target, sizes) if sizes else target

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        import torch

        family, logical = source.family, source.tensors
        grown = {} if family.has_table else {t.name: t for t in target.tensors}
        spaces = _Spaces(self, source, target, seed)
        shapes, grown_shapes = source.shapes, target.shapes
        maps = dict[str, TensorMap]()
        for tensor in logical:
            before, shape = shapes[tensor.name], grown_shapes[tensor.name]
            factors = spaces.factors(tensor, before, shape, grown.get(tensor.name))
            is_scaled_gain = tensor.is_norm and any(
                factor is not None and bool((factor.weight != 1).any()) for factor in factors
            )
            maps[tensor.name] = TensorMap(
                source=tensor.name,
                axes=factors,
                fill=_width_fill(tensor, shape, factors, seed=seed),
                noise=self.noise,
                noise_seed=derived_seed(seed, "noise", tensor.name),
                offset=family.offset_of(tensor) if is_scaled_gain else 0.0,
            )
        if self.init == "aki":
            # Norms connect the stream with readers of the same layer, so they are not replaced
            above = _tensors_above([tensor for tensor in logical if not tensor.is_of_norm])
            for name, donor in above.items():
                # Further copies take their weights from the layer above, with fresh state
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
        return ParameterMap(
            tensors=maps, layer_sources=tuple(range(source.sizes.num_hidden_layers))
        )

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        old, new, keys = source.sizes, target.sizes, source.family.sizes
        grown = {
            keys[name]: f"{keys[name]} {getattr(old, name)} → {getattr(new, name)}"
            for name in Dimensions.GROWING
            if name in keys and getattr(old, name) != getattr(new, name)
        }
        counts = ("num_attention_heads", "num_key_value_heads")
        kept = all(getattr(old, name) == getattr(new, name) for name in counts)
        notes = ["head counts unchanged"] if kept else []
        if target.ffn_sizes:
            notes.append("narrower FFNs are scaled by the same ratio")
        if self.strategy == "split" and new.head_dim < _LEAST_HEAD_SIZE:
            notes.append(
                f"warning: head size {new.head_dim}, and some attention kernels lack sizes below "
                f"{_LEAST_HEAD_SIZE}"
            )
        sizes = "; ".join([*grown.values(), *notes])
        if self.strategy == "split" or new.group_size >= old.group_size:
            return (sizes,)
        return sizes, "fewer queries per key/value head: moments of k and v are averaged"

    def rms_ratio(self, old: Dimensions, new: Dimensions) -> float:
        """Return the RMS of the expanded stream divided by that of the old one: √(k·d/D)."""
        copies = new.hidden_size // old.hidden_size if self.init in _REPEATING else 1
        return math.sqrt(copies * old.hidden_size / new.hidden_size)

    def _check_discovered(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        """Refuse what a family without a table does not support."""
        if self.init == "aki":
            reason = f"{family.model_type} has no table; use fresh, net2net or zero_pad"
            raise refused("expansion.width.init", "aki", reason)
        if self.strategy in ("gqa", "split"):
            reason = f"{family.model_type} has no table; use fresh or copy"
            raise refused("expansion.width.head_strategy", self.strategy, reason)
        family.check_growth(old, new)
        if new.group_size != old.group_size:
            reason = (
                f"the heads of {family.model_type} grow by whole groups of {old.group_size}; with "
                f"{key_name('expansion.width.num_key_value_heads')} = {new.num_key_value_heads} "
                f"it must be {old.group_size * new.num_key_value_heads}"
            )
            raise refused("expansion.width.num_attention_heads", new.num_attention_heads, reason)
        heads, hidden_size = new.num_attention_heads, old.hidden_size
        hidden_size = hidden_size * heads // old.num_attention_heads
        if family.heads_fill_hidden and hidden_size != new.hidden_size:
            reason = (
                f"the heads of {family.model_type} fill the hidden size, so with "
                f"{heads} of them it must be {hidden_size}"
            )
            raise refused("expansion.width.hidden_size", new.hidden_size, reason)

    def _check_mean(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        """Refuse new directions other than whole copies if norms subtract the mean."""
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
            "directions would change its output, but whole copies of the stream would not: use "
            f"{init}=net2net with {key_name('expansion.width.hidden_size')}={nearest}. FFN "
            f"({key_name('expansion.width.intermediate_size')}) and depth grow by any amount",
        )

    def _check_hidden_size(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        heads = new.num_attention_heads
        if not family.heads_divide_hidden or new.hidden_size % heads == 0:
            return
        if self.hidden_size is None:
            # The hidden size is not set: name head counts that divide it
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
            grown, base = self.intermediate_size, old.ffn_size
        heads = HeadGrowth.of(
            old,
            hidden_size=hidden_size,
            strategy=self.strategy,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
        )
        is_set = self.num_attention_heads is not None or self.num_key_value_heads is not None
        are_kept = family.keeps_heads and not is_set
        if family.norms_all_heads and self.strategy != "split" and not is_set:
            are_kept |= not heads.has_equal_copies
        return replace(
            old if are_kept else heads.new,
            hidden_size=hidden_size,
            intermediate_size=self._scaled(old.intermediate_size, grown, base),
            expert_size=self._scaled(old.expert_size, grown, base),
            shared_expert_size=self._scaled(old.shared_expert_size, grown, base),
        )

    def _scaled(self, size: int, grown: int, base: int) -> int:
        """Return an FFN size scaled by `grown / base`, rounded unless it is the target itself."""
        exact = size * grown / base
        is_target = self.intermediate_size is not None and size == base
        if is_target or grown == base:
            return round(exact)
        multiple = self.multiple_for(size)
        nearest = round(exact / multiple) * multiple
        return nearest if nearest >= size else max(size, math.ceil(exact / multiple) * multiple)

    def multiple_for(self, size: int) -> int:
        """Return the multiple to which sizes that follow from `size` are rounded."""
        if self.multiple_of is not None:
            return self.multiple_of
        is_usual = size % _USUAL_MULTIPLE == 0 and size >= _FINEST_ROUNDING * _USUAL_MULTIPLE
        return _USUAL_MULTIPLE if is_usual else 1


def _check_grows(old: Dimensions, new: Dimensions) -> None:
    """Refuse a size that shrinks, and targets that change nothing."""
    for name, before, after in (
        ("hidden_size", old.hidden_size, new.hidden_size),
        ("intermediate_size", old.ffn_size, new.ffn_size),
        ("num_attention_heads", old.num_attention_heads, new.num_attention_heads),
        ("num_key_value_heads", old.num_key_value_heads, new.num_key_value_heads),
    ):
        if after < before:
            raise refused(
                f"expansion.width.{name}",
                after,
                f"it is smaller than the model's {before}; must be at least {before}",
            )
    if old == new:
        reason = f"every target equals the current size (hidden_size {old.hidden_size}, "
        reason += f"intermediate_size {old.ffn_size}, num_attention_heads "
        reason += f"{old.num_attention_heads}); set a larger one"
        raise RequestError(Problem("expansion.width", reason=reason))


def _check_rotary(source: Model, new: Dimensions, *, is_split: bool) -> None:
    """Refuse sizes that would change the rotary embeddings.

    Args:
        source: the model.
        new: sizes of the target.
        is_split: heads are split in two.
    """
    old, config = source.sizes, source.family.decoder(source.config)
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    rope: Mapping[str, object] = parameters if isinstance(parameters, Mapping) else {}
    has_factors = any(rope.get(key) for key in _FACTORS)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if is_split and (source.family.has_interleaved_rope or has_factors or share not in (None, 1)):
        reason = (
            f"{source.model_type} rotates coordinates 2i and 2i + 1 together"
            if source.family.has_interleaved_rope
            else f"{source.model_type} has a factor for each pair (LongRoPE)"
            if has_factors
            else f"only a fraction of {share} of each head is rotated"
        )
        raise refused(
            "expansion.width.head_strategy",
            "split",
            "it assumes that rotary embeddings pair coordinates i and i + head_dim/2, but "
            f"{reason}; use fresh, copy or gqa",
        )
    before = old.hidden_size // old.num_attention_heads
    after = new.hidden_size // new.num_attention_heads
    if has_factors and after != before:
        heads = key_name("expansion.width.num_attention_heads")
        raise refused(
            "expansion.width.hidden_size",
            f"{new.hidden_size} with {heads} = {new.num_attention_heads}",
            f"{source.model_type} derives the number of LongRoPE factors from hidden_size // "
            f"num_attention_heads = {before}, which would become {after}; scale both in proportion",
        )
