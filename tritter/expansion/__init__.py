"""Expansions: pure functions from a config and options to a target config and a parameter map."""

from typing import Any

from tritter.expansion.depth import Dus, LlamaPro
from tritter.expansion.specification import (
    ExpansionSpec,
    ExpansionStep,
    build_steps,
    target_config,
)
from tritter.expansion.width import Width

EXPANSIONS: dict[str, type[Any]] = {spec.name: spec for spec in (Dus, LlamaPro, Width)}

__all__ = [
    "EXPANSIONS",
    "Dus",
    "ExpansionSpec",
    "ExpansionStep",
    "LlamaPro",
    "Width",
    "build_steps",
    "target_config",
]
