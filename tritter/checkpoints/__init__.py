"""Checkpoint folders: the files that stock transformers loads, plus the lineage in tritter.json."""

from tritter.checkpoints.folder import write_checkpoint, write_lineage
from tritter.checkpoints.record import ExpansionRecord, Lineage
from tritter.checkpoints.source import Source

__all__ = [
    "ExpansionRecord",
    "Lineage",
    "Source",
    "write_checkpoint",
    "write_lineage",
]
