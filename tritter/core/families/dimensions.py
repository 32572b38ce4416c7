"""Sizes of a decoder's config, under the same names for all families."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
FFN_SIZES = "ffn_sizes"


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a decoder; the sizes of experts are 0 for dense models.

    Args:
        intermediate_size: of a dense FFN; of an expert if every layer has experts.
        num_experts: routed experts per layer.
        experts_per_token: experts that a token is routed to (top-k).
        expert_size: intermediate size of a routed expert.
        shared_expert_size: intermediate size of the shared expert, which processes every token.
        max_position_embeddings: rows of the learned position embedding; 0 if there is none.
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

    GROWING: ClassVar[tuple[str, ...]] = (  # sizes that growth in width changes
        "hidden_size",
        "intermediate_size",
        "expert_size",
        "shared_expert_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )

    @classmethod
    def read(cls, config: Config, sizes: Mapping[str, str], *, ffn_ratio: int = 0) -> "Dimensions":
        """Read the sizes from a config, with the defaults that transformers would derive.

        Args:
            config: the config.json.
            sizes: attribute of `Dimensions` → config key.
            ffn_ratio: default of the FFN width, as a multiple of the hidden size; 0 if the config
                must set it.
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
                f"config.json: {sizes['experts_per_token']} = {values['experts_per_token']}; must "
                f"be at most {sizes['num_experts']} = {values['num_experts']}."
            )
        read = cls(**values)
        if max(read.query_size, read.key_value_size) > MAX_WIDTH:
            raise RequestError(
                f"config.json: {max(heads, read.num_key_value_heads)} heads of head_dim = "
                f"{read.head_dim} exceed the total width of {MAX_WIDTH:,}."
            )
        return read

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

    @property
    def ffn_size(self) -> int:
        """The size that `intermediate_size` sets: of an expert, or of the FFN."""
        return self.expert_size or self.intermediate_size

    @property
    def aspect_ratio(self) -> float:
        """Hidden size per layer."""
        return self.hidden_size / self.num_hidden_layers

    @property
    def group_size(self) -> int:
        """Number of query heads per key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


def require_size(name: str, key: str, value: object) -> int:
    """Return a size after checking it.

    Args:
        name: attribute of `Dimensions`.
        key: its key in the config.
        value: its value in the config.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"config.json: {key} = {brief(value)}; must be a whole number ≥ 1.")
    limit = _LIMITS.get(name, MAX_WIDTH)
    if value > limit:
        raise RequestError(f"config.json: {key} = {brief(value)}; must be at most {limit:,}.")
    return value


# FFNs of different width in one model: listed per layer in memory, padded to the widest on disk.
#
# In memory a config may have `ffn_sizes`, the width of each layer's FFN; `intermediate_size` (or
# the family's name for it) is the largest. Stock classes support one width only, so narrower FFNs
# are zero-padded on disk, which preserves their function. tritter.json has the key, config.json
# never does.


def ffn_sizes(config: Config) -> tuple[int, ...]:
    """Return the FFN width of each layer; empty if all layers have the same."""
    sizes = config.get(FFN_SIZES)
    return tuple(sizes) if isinstance(sizes, list | tuple) else ()


def on_disk(config: Config) -> Config:
    """Return the config of the padded model, which stock classes can build."""
    return {key: value for key, value in config.items() if key != FFN_SIZES}


def plain_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which infinities are numbers: files have them as {"__float__": text}."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"__float__"}:
                return float(value["__float__"])
            return plain_floats(value)
        return [plain(each) for each in value] if isinstance(value, list) else value

    nested = dict | list
    return {n: plain(value) if isinstance(value, nested) else value for n, value in config.items()}
