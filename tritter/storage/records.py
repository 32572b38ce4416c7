"""JSON records that carry a digest of themselves: one changed bit in them is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritter.errors import TritterError
from tritter.storage.reading import read_object, read_text

LINEAGE_NAME = "tritter.json"
RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"  # of a run folder
LEDGER_NAME = "ledger.json"  # of a run folder: what its stages left
_DIGEST = "record_digest"


def record_text(plain: Mapping[str, Any]) -> str:
    """Return the one text that a record has on disk, its own digest included."""
    held = json.loads(json.dumps(plain))  # as it is read again: tuples are lists
    rest = {key: value for key, value in held.items() if key != _DIGEST}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, _DIGEST: digest}, indent=1) + "\n"


def read_record(path: Path, *, format_version: int) -> dict[str, Any]:
    """Return what `record_text` was given, without the digest.

    Raises:
        TritterError: it can't be read, is of another format, or was changed since it was written.
    """
    plain = read_object(path)
    found = plain.get("format_version")
    if found != format_version:
        raise TritterError(
            f"{path}: format_version {found!r}; this Tritter reads {format_version}."
        )
    if read_text(path) != record_text(plain):
        raise TritterError(f"{path} was changed since it was written: its digest does not fit.")
    return {key: value for key, value in plain.items() if key != _DIGEST}
