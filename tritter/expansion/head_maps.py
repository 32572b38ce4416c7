"""Attention heads: which old one each new one is, under every strategy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritter.expansion.heads import Strategy, group_size, spreads_groups
from tritter.families import Dimensions
from tritter.parameter_map import AxisFactor, AxisMap

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
    match strategy:
        case "fresh":
            return fresh_heads(old, new)
        case "copy" | "gqa":
            return copied_heads(old, new, equal_shares=equal_shares)
        case "split":
            return split_heads(old)


def fresh_heads(old: Dimensions, new: Dimensions) -> HeadMaps:
    """Keep each old head at its place in its key/value group; heads beside it are new."""
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
