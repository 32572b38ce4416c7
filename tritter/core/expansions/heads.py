"""Expansion of attention heads.

Query heads form groups, one per key/value head. `fresh` appends new heads to each group and new
groups after them. `copy` clones whole groups. `gqa` clones query heads within their group, or
distributes them over copies of its key/value head. `split` splits each head into two of half the
size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from tritter.core.families import Dimensions, Family
from tritter.core.parameter_map import AxisFactor, AxisMap
from tritter.errors import key_name, refused

if TYPE_CHECKING:
    from torch import Tensor

Strategy = Literal["fresh", "copy", "gqa", "split"]
_UNEQUAL_RATIO = 9.0  # shares .9/.1 for two copies; copies of equal share never diverge


class HeadGrowth:
    """The growth of attention heads.

    Args:
        old: sizes of the source.
        new: sizes of the target.
        strategy: see the module.
    """

    def __init__(self, old: Dimensions, new: Dimensions, strategy: Strategy) -> None:
        self.old, self.new, self.strategy = old, new, strategy

    @classmethod
    def of(
        cls,
        old: Dimensions,
        *,
        hidden_size: int,
        strategy: Strategy,
        heads: int | None,
        kv_heads: int | None,
    ) -> HeadGrowth:
        """Return the growth to the head counts and the head size of a strategy.

        Args:
            old: sizes of the source.
            hidden_size: of the target. Head counts that are not set are scaled with it if the
                result is an integer; under `gqa` key/value heads stay.
            strategy: see the module.
            heads: number of query heads, if set.
            kv_heads: number of key/value heads, if set.
        """
        if strategy == "split":
            split = replace(
                old,
                num_attention_heads=heads or 2 * old.num_attention_heads,
                num_key_value_heads=kv_heads or 2 * old.num_key_value_heads,
                head_dim=old.head_dim // 2,
            )
            return cls(old, split, strategy)
        count = _scaled(old.num_attention_heads, old.hidden_size, hidden_size)
        kv_count = old.num_key_value_heads
        if strategy == "gqa":
            count = count if count and count % (kv_heads or kv_count) == 0 else None
        else:
            kv_count = _scaled(kv_count, old.hidden_size, hidden_size) or 0
        if not (count and kv_count):
            count, kv_count = old.num_attention_heads, old.num_key_value_heads
        new = replace(
            old, num_attention_heads=heads or count, num_key_value_heads=kv_heads or kv_count
        )
        return cls(old, new, strategy)

    def check(self, family: Family) -> None:
        """Check head counts that are not smaller than the old ones."""
        if family.heads_fill_hidden and family.has_table:
            self._check_filling(family.model_type)
        self._check_groups()
        if family.norms_all_heads:
            self._check_normed(family.model_type)

    @property
    def has_equal_copies(self) -> bool:
        """All query heads, and all key heads, have the same number of copies."""
        old, new = self.old, self.new
        counts = (new.num_attention_heads, new.num_key_value_heads)
        if counts == (old.num_attention_heads, old.num_key_value_heads):
            return True
        if new.num_attention_heads % old.num_attention_heads:
            return False
        if self.strategy == "fresh" or new.num_key_value_heads % old.num_key_value_heads:
            return False
        return new.group_size < old.group_size or new.group_size % old.group_size == 0

    @property
    def within_head(self) -> AxisFactor | None:
        """The factor of the gains that all heads share (norms of q and k); None keeps them."""
        import torch

        if self.strategy != "split":
            return None
        even = _even_pairs(self.old.head_dim)
        ones = torch.ones(len(even), dtype=torch.float64)
        return AxisFactor(even, ones, ones)

    def maps(self, *, equal_shares: bool) -> dict[str, AxisMap]:
        """Return space → its map from the old heads to the new ones, after `check`."""
        import torch

        old, new = self.old, self.new
        if self.strategy == "split":
            return _split_heads(old)
        if self.strategy != "fresh":
            return _copy_heads(old, new, equal_shares=equal_shares)
        # Each old head keeps its position in its key/value group; the other heads are new
        old_group, new_group = old.group_size, new.group_size
        query = torch.full((new.num_attention_heads,), -1)
        for head in range(old.num_key_value_heads):
            start = head * new_group
            query[start : start + old_group] = torch.arange(old_group) + head * old_group
        query_map = AxisMap.copied(old.num_attention_heads, query, torch.ones(len(query)))
        key_value = AxisMap.padded(old.num_key_value_heads, new.num_key_value_heads)
        return _of_heads(query_map, key_value, head_dim=old.head_dim)

    def _check_groups(self) -> None:
        """Check that the query heads form groups that the strategy can make."""
        old, new, strategy = self.old, self.new, self.strategy
        if strategy == "split":
            if old.head_dim % 4:
                raise refused(
                    "expansion.width.head_strategy",
                    "split",
                    "it halves the head size, and rotary embeddings need an even size: "
                    f"head_dim {old.head_dim} is not a multiple of 4. fresh, copy and gqa "
                    "keep the size",
                )
            for name in ("num_attention_heads", "num_key_value_heads"):
                count, doubled = getattr(new, name), 2 * getattr(old, name)
                if count != doubled:
                    raise refused(
                        f"expansion.width.{name}",
                        count,
                        f"{key_name('expansion.width.head_strategy')}=split makes two heads of "
                        f"each, so it must be {doubled}; omit it",
                    )
            return
        heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
        heads_key, kv_key, strategy_key = _keys()
        if heads % kv_heads:
            multiples = (heads // kv_heads * kv_heads, -(-heads // kv_heads) * kv_heads)
            possible = [
                count
                for count in multiples
                if count >= old.num_attention_heads
                and replace(new, num_attention_heads=count) != old
            ]
            raise refused(
                "expansion.width.num_attention_heads",
                heads,
                f"it is not a multiple of {kv_key} = {kv_heads}; nearest: "
                f"{' or '.join(map(str, possible))}",
            )
        if strategy == "copy" and new.group_size != old.group_size:
            raise refused(
                "expansion.width.num_attention_heads",
                f"{heads} with {kv_key} = {kv_heads}",
                f"{strategy_key}=copy clones whole groups of {old.group_size} query heads, so it "
                f"must be {old.group_size * kv_heads} (or use {strategy_key}=gqa, which copies "
                "within a group, or fresh)",
            )
        copies = kv_heads // old.num_key_value_heads if strategy == "gqa" else 1
        least = -(-old.group_size // copies)
        if new.group_size < least:
            raise refused(
                "expansion.width.num_key_value_heads",
                f"{kv_heads} with {heads_key} = {heads}",
                f"it leaves groups of {new.group_size} query heads, and the model has groups of "
                f"{old.group_size}; {heads_key} must be at least {least * kv_heads}",
            )

    def _check_normed(self, model_type: str) -> None:
        """Check head counts of a model that normalises queries and keys over all heads.

        The mean square over all heads is preserved if all heads have the same number of copies.
        """
        if self.strategy == "split" or self.has_equal_copies:
            return
        old, new = self.old, self.new
        heads, kv_heads = old.num_attention_heads, old.num_key_value_heads
        _, kv_key, strategy_key = _keys()
        raise refused(
            "expansion.width.num_attention_heads",
            f"{new.num_attention_heads} with {kv_key} = {new.num_key_value_heads}",
            f"{model_type} normalises queries and keys over all heads, so each head needs the same "
            f"number of copies; use {strategy_key}=copy with a multiple of {heads} and {kv_heads}, "
            f"{strategy_key}=gqa with a multiple of {heads}, or the current counts",
        )

    def _check_filling(self, model_type: str) -> None:
        """Check heads of a model without `head_dim` and without grouped queries."""
        old, new = self.old, self.new
        if self.strategy in ("gqa", "split"):
            raise refused(
                "expansion.width.head_strategy",
                self.strategy,
                f"{model_type} has a key and a value for each query head and stores all "
                "three in one tensor; use copy or fresh",
            )
        allowed = new.hidden_size // old.head_dim
        for name in ("num_attention_heads", "num_key_value_heads"):
            if getattr(new, name) != allowed:
                hidden_size = key_name("expansion.width.hidden_size")
                raise refused(
                    f"expansion.width.{name}",
                    getattr(new, name),
                    f"the heads of {model_type} fill the hidden size and keep their size of "
                    f"{old.head_dim}, so with {hidden_size} = {new.hidden_size} it must be "
                    f"{allowed}; omit it",
                )


def _keys() -> tuple[str, str, str]:
    """Return the option names of query heads, key/value heads and strategy."""
    names = ("num_attention_heads", "num_key_value_heads", "head_strategy")
    heads, kv_heads, strategy = (key_name(f"expansion.width.{name}") for name in names)
    return heads, kv_heads, strategy


def _scaled(count: int, old_size: int, new_size: int) -> int | None:
    """Return the count scaled with a size, or None if the result is not an integer."""
    return count * new_size // old_size if count * new_size % old_size == 0 else None


def _copy_heads(old: Dimensions, new: Dimensions, *, equal_shares: bool) -> dict[str, AxisMap]:
    """Copy query heads into groups whose key/value head is a copy of their own.

    If a new group contains all query heads of its source, they have equal total shares, and the
    moments of k and v map exactly. In smaller groups the share of a key/value head is the mean of
    the shares of its queries.
    """
    import torch

    old_group, new_group = old.group_size, new.group_size
    key_value = torch.arange(new.num_key_value_heads) % old.num_key_value_heads
    slot = torch.arange(new_group)
    if new_group >= old_group:
        position = (slot % old_group).expand(new.num_key_value_heads, -1)
        kv_share = _split_shares(key_value, old.num_key_value_heads, equal=equal_shares)
        within = _split_shares(slot % old_group, old_group, equal=equal_shares)
        share = torch.outer(kv_share, within)
        source = key_value[:, None] * old_group + position
    else:
        copy = torch.arange(new.num_key_value_heads) // old.num_key_value_heads
        position = (copy[:, None] * new_group + slot) % old_group
        source = key_value[:, None] * old_group + position
        share = _split_shares(source.flatten(), old.num_attention_heads, equal=equal_shares)
        share = share.view(source.shape)
        kv_share = share.sum(dim=1) / old_group
    query_map = AxisMap.copied(old.num_attention_heads, source.flatten(), share.flatten())
    kv_map = AxisMap.copied(old.num_key_value_heads, key_value, kv_share)
    return _of_heads(query_map, kv_map, head_dim=old.head_dim)


def _split_heads(old: Dimensions) -> dict[str, AxisMap]:
    """Split each head into two, with alternating rotary pairs.

    RoPE rotates coordinates i and i + head_dim/2 together, with a frequency that falls with i. In
    heads of half the size, pair i rotates as pair 2i did: even pairs keep their frequency, odd
    pairs take that of their neighbour. Weights are only moved, not copied.
    """
    import torch

    size, even = old.head_dim, _even_pairs(old.head_dim)
    halves = torch.stack([even, even + 1])  # [2, size/2]
    key_values = torch.arange(old.num_key_value_heads) * size
    queries = torch.arange(old.num_attention_heads).view(old.num_key_value_heads, -1) * size
    key_value = key_values[:, None, None] + halves  # [kv_head, half, coordinate]
    query = queries[:, None, :, None] + halves[:, None, :]  # [kv_head, half, group, coordinate]
    return {
        "query": AxisMap.copied(old.query_size, query.flatten(), torch.ones(query.numel())),
        "key_value": AxisMap.copied(
            old.key_value_size, key_value.flatten(), torch.ones(key_value.numel())
        ),
        "heads": AxisMap.identity(old.num_key_value_heads),
    }


def _even_pairs(head_dim: int) -> Tensor:
    """Return the coordinates of a head's even rotary pairs: those of its first half."""
    import torch

    half = head_dim // 2
    return torch.cat([torch.arange(0, half, 2), torch.arange(half, head_dim, 2)])


def _of_heads(query: AxisMap, key_value: AxisMap, *, head_dim: int) -> dict[str, AxisMap]:
    """Return the maps of coordinates for maps of whole heads; `qkv` has all three by head."""
    return {
        "query": query.repeated(head_dim),
        "key_value": key_value.repeated(head_dim),
        "heads": key_value,
        "qkv": key_value.repeated(3 * head_dim),
    }


def copied_axis(old_size: int, new_size: int, *, seed: int, equal: bool) -> AxisMap:
    """Return the map that copies neurons in whole rounds, each in a random order.

    Args:
        old_size: number of neurons.
        new_size: number of neurons after the growth.
        seed: of the orders.
        equal: the copies of a neuron have equal shares.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.arange(old_size)]
    while sum(map(len, rounds)) < new_size:
        rounds.append(torch.randperm(old_size, generator=generator))
    source = torch.cat(rounds)[:new_size]
    return AxisMap.copied(old_size, source, _split_shares(source, old_size, equal=equal))


def _split_shares(source: Tensor, old_size: int, *, equal: bool) -> Tensor:
    """Return the share of each copy; the shares of one source add up to 1.

    Unequal shares fall by a factor of nine from copy to copy (.9/.1 for two), so all copies of a
    source differ.
    """
    import torch

    in_order, order = torch.sort(source, stable=True)
    copy = torch.empty_like(source)
    copy[order] = torch.arange(len(source)) - torch.searchsorted(in_order, in_order)
    weight = torch.full((len(source),), 1.0 if equal else _UNEQUAL_RATIO, dtype=torch.float64)
    weight = weight.pow(-copy)
    total = torch.zeros(old_size, dtype=torch.float64).index_add_(0, source, weight)
    return weight / total[source]
