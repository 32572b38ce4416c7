"""Family tables: one data file per architecture, and what can be counted from its shapes."""

from tritter.families.family import (
    Axis,
    Config,
    Dimensions,
    Family,
    LogicalTensor,
    Port,
    find_family,
)
from tritter.families.llama import LLAMA, llama_config
from tritter.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN3)}


def family_of(config: Config) -> Family:
    """Return the family that a config.json names.

    Raises:
        RequestError: no table for its `model_type`; names the tables there are.
    """
    return find_family(FAMILIES, str(config.get("model_type")))


__all__ = [
    "FAMILIES",
    "LLAMA",
    "QWEN3",
    "Axis",
    "Config",
    "Dimensions",
    "Family",
    "LogicalTensor",
    "Port",
    "family_of",
    "llama_config",
]
