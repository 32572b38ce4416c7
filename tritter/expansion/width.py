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

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import Field

from tritter.errors import RequestError
from tritter.expansion.heads import (
    Strategy,
    are_copied_alike,
    check_filling_heads,
    check_heads,
    check_normed_heads,
    head_targets,
    spreads_groups,
)
from tritter.expansion.rotary import check_rotary
from tritter.families import (
    Config,
    Dimensions,
    Family,
    ffn_sizes,
    with_ffn_sizes,
)
from tritter.limits import MAX_WIDTH
from tritter.options import options

if TYPE_CHECKING:
    from tritter.parameter_map import ParameterMap

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
        old = family.dimensions(config)
        new = self._target_dimensions(family, old)
        self._check_noise()
        self._check_layers(config)
        _check_not_smaller(old, new)
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
            ratio = planned_rms_ratio(old.hidden_size, new.hidden_size, init=self.init)
            eps = float(config["rms_norm_eps"]) * ratio**2  # type: ignore[arg-type]
            target["rms_norm_eps"] = float(f"{eps:.15g}")  # 8e-07, not 7.999999999999999e-07
        widest, grown = old.intermediate_size, new.intermediate_size
        sizes = [round(size * grown / widest) for size in ffn_sizes(config)]
        key = family.sizes["intermediate_size"]
        return with_ffn_sizes(target, sizes, key=key) if sizes else target

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> "ParameterMap":
        from tritter.expansion.width_map import width_map  # a plan needs no maps, nor torch

        return width_map(
            family,
            source,
            target,
            init=self.init,
            strategy=self.strategy,
            is_repeated=self.init in _REPEATING,
            equal_shares=self.shares == "equal",
            noise=self.noise,
            seed=seed,
        )

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

    def _check_noise(self) -> None:
        if self.noise and self.init == "fresh" and self.strategy in ("fresh", "split"):
            raise RequestError(
                f"expansion.width.noise = {self.noise} goes on copies, and init=fresh makes none; "
                "use init=net2net or init=zero_pad, or noise=0."
            )

    def _check_layers(self, config: Config) -> None:
        if self.init == "aki" and ffn_sizes(config):
            raise RequestError(
                "expansion.width.init = aki: neurons come from the layer above, and here the FFNs "
                "of the layers differ in width; use fresh, net2net or zero_pad."
            )

    def _check_mean(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        """Refuse other directions of the stream than whole copies where norms take their mean."""
        hidden_size = old.hidden_size
        copies, rest = divmod(new.hidden_size, hidden_size)
        are_copies = self.init in _REPEATING and not rest
        if not family.subtracts_mean or new.hidden_size == hidden_size or are_copies:
            return
        multiples = {copies * hidden_size, -(-new.hidden_size // hidden_size) * hidden_size}
        nearest = " or ".join(str(size) for size in sorted(multiples) if size > hidden_size)
        raise RequestError(
            f"expansion.width.hidden_size = {new.hidden_size} with init = {self.init}: "
            f"{family.model_type} has LayerNorm, which subtracts the mean over the stream, so new "
            "directions beside the old ones would change what it computes, and whole copies of "
            f"the stream would not: use init=net2net with hidden_size={nearest}. FFN "
            "(intermediate_size) and depth grow by any amount."
        )

    def _check_hidden_size(self, family: Family, old: Dimensions, new: Dimensions) -> None:
        heads = new.num_attention_heads
        if not family.heads_divide_hidden or new.hidden_size % heads == 0:
            return
        if self.hidden_size is None:
            raise RequestError(self._uneven_heads(family, old, new))
        multiples = (new.hidden_size // heads * heads, -(-new.hidden_size // heads) * heads)
        nearest = " or ".join(
            str(size)
            for size in multiples
            if size >= old.hidden_size
            and replace(self, hidden_size=size)._target_dimensions(family, old) != old
        )
        raise RequestError(
            f"expansion.width.hidden_size = {new.hidden_size}: {family.model_type} accepts only "
            f"multiples of its {heads} attention heads; nearest: {nearest}."
        )

    def _uneven_heads(self, family: Family, old: Dimensions, new: Dimensions) -> str:
        """Say which head counts fit a hidden size that was not asked for."""
        heads, hidden_size = new.num_attention_heads, new.hidden_size
        counts = range(old.num_attention_heads + 1, hidden_size + 1)
        fitting = [n for n in counts if not (hidden_size % n or n % new.num_key_value_heads)]
        near = [n for n in fitting if n < heads][-1:] + [n for n in fitting if n > heads][:1]
        return (
            f"expansion.width.num_attention_heads = {heads}: {family.model_type} accepts only head "
            f"counts that divide its hidden size of {hidden_size}; nearest: "
            f"{' or '.join(map(str, near)) or 'none'}."
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


def planned_rms_ratio(old_size: int, new_size: int, *, init: str) -> float:
    """Return the grown stream's root mean square over the old one's, √(k·d/D)."""
    copies = new_size // old_size if init in _REPEATING else 1
    return math.sqrt(copies * old_size / new_size)


def _check_not_smaller(old: Dimensions, new: Dimensions) -> None:
    for name, before, after in (
        ("hidden_size", old.hidden_size, new.hidden_size),
        ("intermediate_size", ffn_size(old), ffn_size(new)),
        ("num_attention_heads", old.num_attention_heads, new.num_attention_heads),
        ("num_key_value_heads", old.num_key_value_heads, new.num_key_value_heads),
    ):
        if after < before:
            raise RequestError(
                f"expansion.width.{name} = {after} is smaller than the model's {before}; an "
                f"expansion only grows: at least {before}."
            )
    if old == new:
        raise RequestError(
            "expansion.width: every target equals what the model has already "
            f"(hidden_size {old.hidden_size}, intermediate_size {ffn_size(old)}, "
            f"num_attention_heads {old.num_attention_heads}); ask for a larger one."
        )
