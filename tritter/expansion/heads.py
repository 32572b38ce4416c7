"""Attention heads: what may be asked for.

Query heads stand in groups, one per key/value head. `fresh` puts new heads beside the old ones of
a group and new groups behind them; `copy` clones whole groups; `gqa` clones query heads within
their group, or spreads them over copies of its key/value head; `split` makes two heads of half
the size out of each.
"""

from dataclasses import replace
from typing import Literal, get_args

from tritter.errors import RequestError
from tritter.families import Dimensions

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
        _check_split(old, new)
        return
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    if heads % kv_heads:
        multiples = (heads // kv_heads * kv_heads, -(-heads // kv_heads) * kv_heads)
        possible = [
            count
            for count in multiples
            if count >= old.num_attention_heads and replace(new, num_attention_heads=count) != old
        ]
        raise RequestError(
            f"expansion.width.num_attention_heads = {heads} is not a multiple of "
            f"num_key_value_heads = {kv_heads}; nearest: {' or '.join(map(str, possible))}."
        )
    if strategy == "copy" and group_size(new) != group_size(old):
        raise RequestError(
            f"expansion.width.num_attention_heads = {heads} with num_key_value_heads = {kv_heads}: "
            f"head_strategy=copy clones whole groups of {group_size(old)} query heads, so "
            f"num_attention_heads must be {group_size(old) * kv_heads} (or use head_strategy=gqa, "
            "which copies within a group, or fresh)."
        )
    copies = kv_heads // old.num_key_value_heads if strategy == "gqa" else 1
    least = -(-group_size(old) // copies)
    if group_size(new) < least:
        raise RequestError(
            f"expansion.width.num_key_value_heads = {kv_heads} with num_attention_heads = {heads} "
            f"leaves {group_size(new)} query heads a group where the model has {group_size(old)}; "
            f"num_attention_heads must be at least {least * kv_heads}."
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
    raise RequestError(
        f"expansion.width.num_attention_heads = {new.num_attention_heads} with "
        f"num_key_value_heads = {new.num_key_value_heads}: {model_type} norms the queries of all "
        "heads together, and the keys, so each head is copied equally often or none; allowed are "
        f"head_strategy=copy with {heads} and {kv_heads} times a whole number, head_strategy=gqa "
        f"with a multiple of {heads}, or the counts that the model has."
    )


def check_filling_heads(
    model_type: str, old: Dimensions, new: Dimensions, *, strategy: Strategy
) -> None:
    """Check heads of a model in which they have no size of their own, nor fewer keys than queries.

    Raises:
        RequestError: says which counts can be had.
    """
    if strategy in ("gqa", "split"):
        raise RequestError(
            f"expansion.width.head_strategy = {strategy}: {model_type} has a key and a value for "
            "each query head, and the three lie together in one tensor; use copy or fresh."
        )
    allowed = new.hidden_size // old.head_dim
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(new, name) != allowed:
            raise RequestError(
                f"expansion.width.{name} = {getattr(new, name)}: the heads of {model_type} are "
                f"together as wide as the stream and keep their size of {old.head_dim}, so at "
                f"hidden_size = {new.hidden_size} allowed is only {allowed}; leave it out."
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


def group_size(dimensions: Dimensions) -> int:
    """Return how many query heads a key/value head serves."""
    return dimensions.num_attention_heads // dimensions.num_key_value_heads


def _check_split(old: Dimensions, new: Dimensions) -> None:
    if old.head_dim % 4:
        raise RequestError(
            "expansion.width.head_strategy = split halves the size of a head, and rotary positions "
            f"need an even one: head_dim {old.head_dim} is no multiple of 4. fresh, copy and gqa "
            "keep the size."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        asked, made = getattr(new, name), 2 * getattr(old, name)
        if asked != made:
            raise RequestError(
                f"expansion.width.{name} = {asked}: head_strategy=split makes two heads of each, "
                f"so it can only be {made}; leave it out."
            )


def _followed(count: int, old_size: int, new_size: int) -> int | None:
    """Return the count in proportion to a size, where that is a whole number."""
    return count * new_size // old_size if count * new_size % old_size == 0 else None
