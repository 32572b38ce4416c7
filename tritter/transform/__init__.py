"""Apply expansions: source folder → maps → destination folder, or on a live model."""

from tritter.transform.change import Change, PlannedExpansion, declared
from tritter.transform.folder import (
    DiskNeeds,
    Expanded,
    expand,
    free_bytes,
    plan_by_tables,
    plan_expansion,
    planned,
    size_text,
)

__all__ = [
    "Change",
    "DiskNeeds",
    "Expanded",
    "PlannedExpansion",
    "declared",
    "expand",
    "free_bytes",
    "plan_by_tables",
    "plan_expansion",
    "planned",
    "size_text",
]
