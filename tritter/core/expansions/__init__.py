"""Expansions: pure functions from a config and options to a target config and parameter map."""

from typing import Any

from tritter.core.expansions.context import Context
from tritter.core.expansions.depth import Dus, Interpolate, Layers, LlamaPro, Stack
from tritter.core.expansions.moe import Moe
from tritter.core.expansions.moe_add import MoeAdd
from tritter.core.expansions.moe_children import BoundMoe, children_place
from tritter.core.expansions.specification import (
    ExpansionSpec,
    ResolvedExpansion,
    build_steps,
    check_specs,
    target_model,
)
from tritter.core.expansions.vocab import BoundVocab, Vocab, vocab_place
from tritter.core.expansions.width import Width

EXPANSIONS: dict[str, type[Any]] = {
    spec.name: spec
    for spec in (Dus, Stack, Interpolate, LlamaPro, Layers, Width, Moe, MoeAdd, Vocab, Context)
}

__all__ = [
    "EXPANSIONS",
    "BoundMoe",
    "BoundVocab",
    "Context",
    "Dus",
    "ExpansionSpec",
    "Interpolate",
    "Layers",
    "LlamaPro",
    "Moe",
    "MoeAdd",
    "ResolvedExpansion",
    "Stack",
    "Vocab",
    "Width",
    "build_steps",
    "check_specs",
    "children_place",
    "target_model",
    "vocab_place",
]
