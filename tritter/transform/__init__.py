"""Apply expansions: source folder → maps → destination folder, or on a live model."""

from tritter.transform.change import Change, PlannedExpansion, declared
from tritter.transform.folder import (
    DiskNeeds,
    Expanded,
    check_disk_space,
    disk_needs,
    expand,
    free_bytes,
    plan_by_tables,
    plan_expansion,
    planned,
    size_text,
    state_stream,
)

__all__ = [
    "Change",
    "DiskNeeds",
    "Expanded",
    "PlannedExpansion",
    "check_disk_space",
    "declared",
    "disk_needs",
    "expand",
    "free_bytes",
    "plan_by_tables",
    "plan_expansion",
    "planned",
    "size_text",
    "state_stream",
]
