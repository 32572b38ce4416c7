"""Checkpoint folders: what stock transformers loads, plus the lineage in tritter.json."""

from tritter.checkpoint.folder import read_lineage, write_checkpoint, write_lineage
from tritter.checkpoint.record import FORMAT_VERSION, ExpansionRecord, Lineage

__all__ = [
    "FORMAT_VERSION",
    "ExpansionRecord",
    "Lineage",
    "read_lineage",
    "write_checkpoint",
    "write_lineage",
]
