"""Attention heads: what may be asked for.

Query heads stand in groups, one per key/value head. `fresh` puts new heads beside the old ones of
a group and new groups behind them; `copy` clones whole groups; `gqa` clones query heads within
their group, or spreads them over copies of its key/value head; `split` makes two heads of half
the size out of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from tritter.core.families import Dimensions
from tritter.core.parameter_map import AxisFactor, AxisMap
from tritter.errors import key_name, refused

if TYPE_CHECKING:
    from torch import Tensor

Strategy = Literal["fresh", "copy", "gqa", "split"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def head_targets(
    old: Dimensions,
    *,
    hidden_size: int,
    strategy: Strategy,
    heads: int | None,
    kv_heads: int | None,
) -> Dimensions:
    """Return `old` with the head counts and the head size that a strategy leads to.

    Args:
        hidden_size: of the target; counts that are not asked for follow it where the proportion
            is whole. Under `gqa` key/value heads stay.
        heads: query heads that are asked for, if any; `kv_heads` likewise.
    """
    if strategy == "split":
        return replace(
            old,
            num_attention_heads=heads or 2 * old.num_attention_heads,
            num_key_value_heads=kv_heads or 2 * old.num_key_value_heads,
            head_dim=old.head_dim // 2,
        )
    count = _followed(old.num_attention_heads, old.hidden_size, hidden_size)
    kv_count = old.num_key_value_heads
    if strategy == "gqa":
        count = count if count and count % (kv_heads or kv_count) == 0 else None
    else:
        kv_count = _followed(kv_count, old.hidden_size, hidden_size) or 0
    if not (count and kv_count):
        count, kv_count = old.num_attention_heads, old.num_key_value_heads
    return replace(
        old, num_attention_heads=heads or count, num_key_value_heads=kv_heads or kv_count
    )


def check_heads(old: Dimensions, new: Dimensions, *, strategy: Strategy) -> None:
    """Check head counts that are no smaller than the old ones.

    Raises:
        RequestError: the strategy cannot make them; names the nearest that it can.
    """
    if strategy == "split":
        if old.head_dim % 4:
            raise refused(
                "expansion.width.head_strategy",
                "split",
                "it halves the size of a head, and rotary positions need an even one: "
                f"head_dim {old.head_dim} is no multiple of 4. fresh, copy and gqa "
                "keep the size",
            )
        for name in ("num_attention_heads", "num_key_value_heads"):
            asked, made = getattr(new, name), 2 * getattr(old, name)
            if asked != made:
                raise refused(
                    f"expansion.width.{name}",
                    asked,
                    f"{key_name('expansion.width.head_strategy')}=split makes two heads of "
                    f"each, so it can only be {made}; leave it out",
                )
        return
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    heads_key, kv_key, strategy_key = _keys()
    if heads % kv_heads:
        multiples = (heads // kv_heads * kv_heads, -(-heads // kv_heads) * kv_heads)
        possible = [
            count
            for count in multiples
            if count >= old.num_attention_heads and replace(new, num_attention_heads=count) != old
        ]
        raise refused(
            "expansion.width.num_attention_heads",
            heads,
            f"it is not a multiple of {kv_key} = {kv_heads}; nearest: "
            f"{' or '.join(map(str, possible))}",
        )
    if strategy == "copy" and group_size(new) != group_size(old):
        raise refused(
            "expansion.width.num_attention_heads",
            f"{heads} with {kv_key} = {kv_heads}",
            f"{strategy_key}=copy clones whole groups of {group_size(old)} query heads, so it must "
            f"be {group_size(old) * kv_heads} (or use {strategy_key}=gqa, which copies within a "
            "group, or fresh)",
        )
    copies = kv_heads // old.num_key_value_heads if strategy == "gqa" else 1
    least = -(-group_size(old) // copies)
    if group_size(new) < least:
        raise refused(
            "expansion.width.num_key_value_heads",
            f"{kv_heads} with {heads_key} = {heads}",
            f"it leaves {group_size(new)} query heads a group where the model has "
            f"{group_size(old)}; {heads_key} must be at least {least * kv_heads}",
        )


def check_normed_heads(
    model_type: str, old: Dimensions, new: Dimensions, *, strategy: Strategy
) -> None:
    """Check head counts of a model whose queries are normed over all heads, and its keys.

    The mean square over all heads stays what it is where each is copied as often as the others.

    Raises:
        RequestError: it would not stay; says which counts can be had.
    """
    if strategy == "split" or are_copied_alike(old, new, strategy=strategy):
        return
    heads, kv_heads = old.num_attention_heads, old.num_key_value_heads
    _, kv_key, strategy_key = _keys()
    raise refused(
        "expansion.width.num_attention_heads",
        f"{new.num_attention_heads} with {kv_key} = {new.num_key_value_heads}",
        f"{model_type} norms the queries of all heads together, and the keys, so each head is "
        f"copied equally often or none; allowed are {strategy_key}=copy with {heads} and "
        f"{kv_heads} times a whole number, {strategy_key}=gqa with a multiple of {heads}, or the "
        "counts that the model has",
    )


def check_filling_heads(
    model_type: str, old: Dimensions, new: Dimensions, *, strategy: Strategy
) -> None:
    """Check heads of a model in which they have no size of their own, nor fewer keys than queries.

    Raises:
        RequestError: says which counts can be had.
    """
    if strategy in ("gqa", "split"):
        raise refused(
            "expansion.width.head_strategy",
            strategy,
            f"{model_type} has a key and a value for each query head, and the "
            "three lie together in one tensor; use copy or fresh",
        )
    allowed = new.hidden_size // old.head_dim
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(new, name) != allowed:
            hidden_size = key_name("expansion.width.hidden_size")
            raise refused(
                f"expansion.width.{name}",
                getattr(new, name),
                f"the heads of {model_type} are together as wide as the stream and "
                f"keep their size of {old.head_dim}, so at {hidden_size} = "
                f"{new.hidden_size} allowed is only {allowed}; leave it out",
            )


def are_copied_alike(old: Dimensions, new: Dimensions, *, strategy: Strategy) -> bool:
    """Return whether every head, of queries and of keys, has the same number of copies."""
    counts = (new.num_attention_heads, new.num_key_value_heads)
    if counts == (old.num_attention_heads, old.num_key_value_heads):
        return True
    if new.num_attention_heads % old.num_attention_heads:
        return False
    if strategy == "fresh" or new.num_key_value_heads % old.num_key_value_heads:
        return False
    return spreads_groups(old, new) or group_size(new) % group_size(old) == 0


def spreads_groups(old: Dimensions, new: Dimensions) -> bool:
    """Return whether groups are smaller than they were: no new one holds all of its source."""
    return group_size(new) < group_size(old)


def _keys() -> tuple[str, str, str]:
    """Return what a person types for the two counts of heads, and for the strategy."""
    names = ("num_attention_heads", "num_key_value_heads", "head_strategy")
    heads, kv_heads, strategy = (key_name(f"expansion.width.{name}") for name in names)
    return heads, kv_heads, strategy


def group_size(dimensions: Dimensions) -> int:
    """Return how many query heads a key/value head serves."""
    return dimensions.num_attention_heads // dimensions.num_key_value_heads


def _followed(count: int, old_size: int, new_size: int) -> int | None:
    """Return the count in proportion to a size, where that is a whole number."""
    return count * new_size // old_size if count * new_size % old_size == 0 else None


UNEQUAL_RATIO = 9.0  # shares .9/.1 for two copies; clones of equal share never diverge


@dataclass(frozen=True, slots=True)
class HeadMaps:
    """The maps of the spaces of attention.

    Args:
        query: of what q writes and o reads.
        key_value: of what k and v write.
        together: of what q, k and v of one head write below one another, head by head.
        per_head: factor of the gains that all heads share (norms on q and k); None keeps them.
    """

    query: AxisMap
    key_value: AxisMap
    together: AxisMap | None = None
    per_head: AxisFactor | None = None


def head_maps(
    old: Dimensions, new: Dimensions, *, strategy: Strategy, equal_shares: bool
) -> HeadMaps:
    """Return the maps from the old heads to the new ones, which `check_heads` has let through."""
    import torch

    if strategy == "split":
        return split_heads(old)
    if strategy != "fresh":
        return copied_heads(old, new, equal_shares=equal_shares)
    # Each old head stays at its place in its key/value group; heads beside it are new
    old_group, new_group = group_size(old), group_size(new)
    query = torch.full((new.num_attention_heads,), -1)
    for head in range(old.num_key_value_heads):
        start = head * new_group
        query[start : start + old_group] = torch.arange(old_group) + head * old_group
    query_map = AxisMap.copied(old.num_attention_heads, query, torch.ones(len(query)))
    key_value = AxisMap.padded(old.num_key_value_heads, new.num_key_value_heads)
    return _of_heads(query_map, key_value, head_dim=old.head_dim)


def copied_heads(old: Dimensions, new: Dimensions, *, equal_shares: bool) -> HeadMaps:
    """Copy query heads into groups whose key/value head is a copy of their own.

    While a new group holds all query heads of its source, their shares add up to the same for
    each of them there, so the moments of k and v follow exactly. In smaller groups they cannot:
    the share of a key/value head is then the mean of what its queries carry.
    """
    import torch

    old_group, new_group = group_size(old), group_size(new)
    key_value = torch.arange(new.num_key_value_heads) % old.num_key_value_heads
    place = torch.arange(new_group)
    if not spreads_groups(old, new):
        position = (place % old_group).expand(new.num_key_value_heads, -1)
        kv_share = split_shares(key_value, old.num_key_value_heads, equal=equal_shares)
        within = split_shares(place % old_group, old_group, equal=equal_shares)
        share = torch.outer(kv_share, within)
        source = key_value[:, None] * old_group + position
    else:
        copy = torch.arange(new.num_key_value_heads) // old.num_key_value_heads
        position = (copy[:, None] * new_group + place) % old_group
        source = key_value[:, None] * old_group + position
        share = split_shares(source.flatten(), old.num_attention_heads, equal=equal_shares)
        share = share.view(source.shape)
        kv_share = share.sum(dim=1) / old_group
    query_map = AxisMap.copied(old.num_attention_heads, source.flatten(), share.flatten())
    kv_map = AxisMap.copied(old.num_key_value_heads, key_value, kv_share)
    return _of_heads(query_map, kv_map, head_dim=old.head_dim)


def split_heads(old: Dimensions) -> HeadMaps:
    """Make two heads of every other rotary pair each out of one head, gains from the first.

    Rotary positions turn coordinates i and i + head_dim/2 together, ever slower as i grows. In
    heads of half the size pair i turns as pair 2i did: the even pairs keep their frequency, the
    odd ones turn as their neighbour does. Nothing is copied, all weights only move.
    """
    import torch

    size = old.head_dim
    even = torch.cat([torch.arange(0, size // 2, 2), torch.arange(size // 2, size, 2)])
    halves = torch.stack([even, even + 1])  # [2, size/2]
    key_values = torch.arange(old.num_key_value_heads) * size
    queries = torch.arange(old.num_attention_heads).view(old.num_key_value_heads, -1) * size
    key_value = key_values[:, None, None] + halves  # [kv_head, half, coordinate]
    query = queries[:, None, :, None] + halves[:, None, :]  # [kv_head, half, group, coordinate]
    ones = torch.ones(len(even), dtype=torch.float64)
    return HeadMaps(
        AxisMap.copied(old.query_size, query.flatten(), torch.ones(query.numel())),
        AxisMap.copied(old.key_value_size, key_value.flatten(), torch.ones(key_value.numel())),
        per_head=AxisFactor(even, ones, ones),
    )


def _of_heads(query: AxisMap, key_value: AxisMap, *, head_dim: int) -> HeadMaps:
    """Return the maps of coordinates for maps of whole heads."""
    together = key_value.repeated(3 * head_dim)
    return HeadMaps(query.repeated(head_dim), key_value.repeated(head_dim), together)


def copied_sources(old_size: int, new_size: int, *, seed: int) -> Tensor:
    """Return which old neuron each new one copies: whole rounds, each in a random order."""
    import torch

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
    import torch

    in_order, order = torch.sort(source, stable=True)
    copy = torch.empty_like(source)
    copy[order] = torch.arange(len(source)) - torch.searchsorted(in_order, in_order)
    weight = torch.full((len(source),), 1.0 if equal else UNEQUAL_RATIO, dtype=torch.float64)
    weight = weight.pow(-copy)
    total = torch.zeros(old_size, dtype=torch.float64).index_add_(0, source, weight)
    return weight / total[source]
