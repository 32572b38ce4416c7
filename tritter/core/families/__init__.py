"""Family tables: one per architecture, with counts of parameters and FLOPs from shapes."""

from tritter.core.families.config_file import (
    check_config,
    check_size,
    with_live_sizes,
)
from tritter.core.families.dimensions import Config, Dimensions, ffn_sizes, on_disk, with_ffn_sizes
from tritter.core.families.family import Family
from tritter.core.families.flops import (
    NO_ADAPTERS,
    Adapters,
    Flops,
    Gating,
    LowRank,
    backward_flops,
    forward_flops,
    training_flops,
)
from tritter.core.families.layout import (
    LayoutKind,
    ParameterSelection,
    StoredTensor,
    layout,
    match,
    pack_all,
    padded_shapes,
    unpack_all,
)
from tritter.core.families.logical import Axis, LogicalTensor, Port, Space, logical_name
from tritter.core.families.tables import (
    FAMILIES,
    LLAMA,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    count_parameters,
    family_of,
    llama_config,
    position_limit,
)

__all__ = [
    "FAMILIES",
    "LLAMA",
    "MIXTRAL",
    "NO_ADAPTERS",
    "QWEN2_MOE",
    "QWEN3_MOE",
    "Adapters",
    "Axis",
    "Config",
    "Dimensions",
    "Family",
    "Flops",
    "Gating",
    "LayoutKind",
    "LogicalTensor",
    "LowRank",
    "ParameterSelection",
    "Port",
    "Space",
    "StoredTensor",
    "backward_flops",
    "check_config",
    "check_size",
    "count_parameters",
    "family_of",
    "ffn_sizes",
    "forward_flops",
    "layout",
    "llama_config",
    "logical_name",
    "match",
    "on_disk",
    "pack_all",
    "padded_shapes",
    "position_limit",
    "training_flops",
    "unpack_all",
    "with_ffn_sizes",
    "with_live_sizes",
]
