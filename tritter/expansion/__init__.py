"""Expansions: pure functions from a config and options to a target config and a parameter map."""

from typing import Any

from tritter.expansion.depth import Dus, Interpolate, LlamaPro, Stack
from tritter.expansion.moe import Moe
from tritter.expansion.moe_add import MoeAdd
from tritter.expansion.specification import (
    ExpansionSpec,
    ResolvedExpansion,
    build_steps,
    checked_specs,
    composed,
    target_config,
)
from tritter.expansion.width import Width

EXPANSIONS: dict[str, type[Any]] = {
    spec.name: spec for spec in (Dus, Stack, Interpolate, LlamaPro, Width, Moe, MoeAdd)
}

__all__ = [
    "EXPANSIONS",
    "Dus",
    "ExpansionSpec",
    "Interpolate",
    "LlamaPro",
    "Moe",
    "MoeAdd",
    "ResolvedExpansion",
    "Stack",
    "Width",
    "build_steps",
    "checked_specs",
    "composed",
    "target_config",
]
