"""What a config says of rotary positions, held against sizes that are to change."""

from collections.abc import Mapping

from tritter.errors import RequestError
from tritter.families import Config, Dimensions, Family

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
    if is_split and (family.turns_neighbours or has_factors or share not in (None, 1)):
        reason = (
            f"{family.model_type} turns coordinates 2i and 2i + 1 together"
            if family.turns_neighbours
            else f"{family.model_type} has a factor for each pair (LongRoPE)"
            if has_factors
            else f"of each head {share} is turned"
        )
        raise RequestError(
            "expansion.width.head_strategy = split takes coordinates i and i + head_dim/2 for "
            f"pairs that rotary positions turn, and {reason}; use fresh, copy or gqa."
        )
    before = old.hidden_size // old.num_attention_heads
    after = new.hidden_size // new.num_attention_heads
    if has_factors and after != before:
        raise RequestError(
            f"expansion.width.hidden_size = {new.hidden_size} with num_attention_heads = "
            f"{new.num_attention_heads}: {family.model_type} counts the factors of its LongRoPE by "
            f"hidden_size // num_attention_heads = {before}, which would be {after}; let them grow "
            "in proportion."
        )
