"""Checkpoint folders: what stock transformers loads, plus the lineage in tritter.json."""

from tritter.checkpoint.folder import (
    lineage_of,
    read_lineage,
    record_step0_error,
    write_checkpoint,
    write_lineage,
)
from tritter.checkpoint.record import ExpansionRecord, Lineage
from tritter.checkpoint.source import Source

__all__ = [
    "ExpansionRecord",
    "Lineage",
    "Source",
    "lineage_of",
    "read_lineage",
    "record_step0_error",
    "write_checkpoint",
    "write_lineage",
]
