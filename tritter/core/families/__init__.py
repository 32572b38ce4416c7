"""Family tables: one per architecture, with counts of parameters and FLOPs from shapes."""

from tritter.core.families.config_file import check_config
from tritter.core.families.dimensions import Config, Dimensions, ffn_sizes, on_disk
from tritter.core.families.family import Family
from tritter.core.families.flops import (
    Adapters,
    Flops,
    LowRank,
    forward_flops,
    training_flops,
)
from tritter.core.families.layout import (
    LayoutKind,
    ParameterSelection,
    StoredTensor,
    pack_all,
    unpack_all,
)
from tritter.core.families.logical import Axis, LogicalTensor, Port, Space, logical_name, segments
from tritter.core.families.model import Model
from tritter.core.families.tables import (
    FAMILIES,
    SIGMOID_ROUTERS,
    family_of,
    find_family,
    llama_config,
)

__all__ = [
    "FAMILIES",
    "SIGMOID_ROUTERS",
    "Adapters",
    "Axis",
    "Config",
    "Dimensions",
    "Family",
    "Flops",
    "LayoutKind",
    "LogicalTensor",
    "LowRank",
    "Model",
    "ParameterSelection",
    "Port",
    "Space",
    "StoredTensor",
    "check_config",
    "family_of",
    "ffn_sizes",
    "find_family",
    "forward_flops",
    "llama_config",
    "logical_name",
    "on_disk",
    "pack_all",
    "segments",
    "training_flops",
    "unpack_all",
]
