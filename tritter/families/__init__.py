"""Family tables: one data file per architecture, and what can be counted from its shapes."""

from tritter.families.checks import check_config, check_size, check_values, with_live_sizes
from tritter.families.dimensions import Config, Dimensions
from tritter.families.family import Family, find_family
from tritter.families.flops import Flops, backward_flops, forward_flops, training_flops
from tritter.families.gemma3 import GEMMA3_TEXT
from tritter.families.layer_sizes import ffn_sizes, on_disk, with_ffn_sizes
from tritter.families.layout import (
    LayoutKind,
    StoredTensor,
    layout,
    match,
    pack_all,
    padded_shapes,
    unpack_all,
)
from tritter.families.llama import LLAMA, llama_config
from tritter.families.logical import Axis, LogicalTensor, Port, Space, logical_name
from tritter.families.mistral import MISTRAL, MIXTRAL
from tritter.families.qwen2 import QWEN2, QWEN2_MOE
from tritter.families.qwen3 import QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3_TEXT, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
}


def family_of(config: Config) -> Family:
    """Return the family that a config.json names.

    Raises:
        RequestError: no table for its `model_type`; names the tables there are.
    """
    return find_family(FAMILIES, str(config.get("model_type")))


__all__ = [
    "FAMILIES",
    "GEMMA3_TEXT",
    "LLAMA",
    "MISTRAL",
    "MIXTRAL",
    "QWEN2",
    "QWEN2_MOE",
    "QWEN3",
    "QWEN3_MOE",
    "Axis",
    "Config",
    "Dimensions",
    "Family",
    "Flops",
    "LayoutKind",
    "LogicalTensor",
    "Port",
    "Space",
    "StoredTensor",
    "backward_flops",
    "check_config",
    "check_size",
    "check_values",
    "family_of",
    "ffn_sizes",
    "find_family",
    "forward_flops",
    "layout",
    "llama_config",
    "logical_name",
    "match",
    "on_disk",
    "pack_all",
    "padded_shapes",
    "training_flops",
    "unpack_all",
    "with_ffn_sizes",
    "with_live_sizes",
]
