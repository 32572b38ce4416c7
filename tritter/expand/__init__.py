"""Expansion carried out: source folder → maps → destination folder, or on a live model."""

from tritter.expand.change import Change, declared
from tritter.expand.folder import (
    Expanded,
    PlannedExpansion,
    expand,
    plan_expansion,
    planned,
    state_stream,
)

__all__ = [
    "Change",
    "Expanded",
    "PlannedExpansion",
    "declared",
    "expand",
    "plan_expansion",
    "planned",
    "state_stream",
]
