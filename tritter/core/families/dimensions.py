"""The sizes that a decoder's config states, whatever its family calls them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tritter.errors import RequestError, brief
from tritter.limits import MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH

Config = dict[str, object]

DENSE_SIZES: Mapping[str, str] = {
    name: name
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
}

_LIMITS: Mapping[str, int] = {
    "num_hidden_layers": MAX_LAYERS,
    "vocab_size": MAX_VOCABULARY,
    "num_experts": MAX_EXPERTS,
    "experts_per_token": MAX_EXPERTS,
    "max_position_embeddings": MAX_POSITIONS,
}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a decoder; those of experts are 0 where it has none.

    Args:
        intermediate_size: of a dense FFN; where every layer has experts, of an expert.
        num_experts: routed experts of a layer.
        experts_per_token: experts that a token is routed to, k.
        expert_size: intermediate size of a routed expert.
        shared_expert_size: intermediate size of the expert that every token meets.
        max_position_embeddings: rows of the table of learned positions; 0: there is none.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    max_position_embeddings: int = 0

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of q, k and v together."""
        return self.query_size + 2 * self.key_value_size

    @property
    def single(self) -> int:
        """The size of a space of one coordinate, such as the shared expert's gate."""
        return 1


def require_size(name: str, key: str, value: object) -> int:
    """Return a size that a config states.

    Args:
        name: attribute of `Dimensions`.
        key: what the config calls it.

    Raises:
        RequestError: it is no positive whole number, or above its limit.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"config.json: {key} = {brief(value)}; a whole number ≥ 1 is needed.")
    limit = _LIMITS.get(name, MAX_WIDTH)
    if value > limit:
        raise RequestError(f"config.json: {key} = {brief(value)}; allowed is at most {limit:,}.")
    return value


def read_dimensions(config: Config, sizes: Mapping[str, str], *, ffn_ratio: int = 0) -> Dimensions:
    """Read the sizes from a config, with the defaults that transformers would derive.

    Args:
        sizes: attribute of `Dimensions` → config key.
        ffn_ratio: of an FFN that the config does not state; 0: it has to.

    Raises:
        RequestError: a size is missing, no positive whole number, or above its limit; or heads
            that have no size of their own don't divide the hidden size.
    """

    def size(name: str, default: int | None = None) -> int:
        value = config.get(sizes[name])
        return require_size(name, sizes[name], default if value is None else value)

    heads, hidden_size = size("num_attention_heads"), size("hidden_size")
    derived = {"num_key_value_heads": heads, "head_dim": hidden_size // heads}
    if ffn_ratio:
        derived["intermediate_size"] = ffn_ratio * hidden_size
    if "head_dim" not in sizes and hidden_size % heads:
        raise RequestError(
            f"config.json: {sizes['hidden_size']} = {hidden_size} is not a multiple of "
            f"{sizes['num_attention_heads']} = {heads}."
        )
    values = {**derived, **{name: size(name, derived.get(name)) for name in sizes}}
    if values.get("experts_per_token", 0) > values.get("num_experts", 0):
        raise RequestError(
            f"config.json: {sizes['experts_per_token']} = {values['experts_per_token']}; allowed "
            f"is at most {sizes['num_experts']} = {values['num_experts']}."
        )
    read = Dimensions(**values)
    if max(read.query_size, read.key_value_size) > MAX_WIDTH:
        raise RequestError(
            f"config.json: {max(heads, read.num_key_value_heads)} heads of head_dim = "
            f"{read.head_dim} are wider than {MAX_WIDTH:,} together, which is allowed at most."
        )
    return read


# FFNs of different width in one model: stated per layer in memory, padded to the widest on disk.
#
# In memory a config may state `ffn_sizes`, the width of each layer's FFN; `intermediate_size`, or
# what its family calls it, is the widest of them. Stock classes know one width for all, so on
# disk the narrower FFNs are padded with zeros, which changes nothing that they compute:
# config.json never holds the key, tritter.json does.

FFN_SIZES = "ffn_sizes"


def ffn_sizes(config: Config) -> tuple[int, ...]:
    """Return the width of each layer's FFN; nothing where all are alike."""
    stated = config.get(FFN_SIZES)
    return tuple(stated) if isinstance(stated, list | tuple) else ()


def with_ffn_sizes(
    config: Config, sizes: Sequence[int], *, key: str = "intermediate_size"
) -> Config:
    """Return the config of a model whose layers' FFNs have these widths.

    Args:
        key: what the config calls the widest.
    """
    same: Config = {**on_disk(config), key: max(sizes)}
    return same if min(sizes) == max(sizes) else {**same, FFN_SIZES: list(sizes)}


def on_disk(config: Config) -> Config:
    """Return the config of the padded model, which stock classes build."""
    return {key: value for key, value in config.items() if key != FFN_SIZES}
