"""Expansion carried out: source folder → maps → destination folder, or on a live model."""

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
    "Expanded",
    "PlannedExpansion",
    "Room",
    "check_room",
    "declared",
    "expand",
    "free_bytes",
    "plan_by_tables",
    "plan_expansion",
    "planned",
    "room_for",
    "size_text",
    "state_stream",
]
