"""What the lineage of a checkpoint says of neurons that grew."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from tritter.checkpoint import ExpansionRecord
from tritter.families import Config, family_of
from tritter.training.parameters import Entry

GROWTH = "growth"  # type and method in the lineage, reason in a training's journal


def map_digest(journal: Iterable[Entry]) -> str:
    """Return the SHA-256 over the maps of all events of growth in a journal."""
    maps = (entry["map_digest"] for entry in journal if entry["reason"] == GROWTH)
    return sha256("".join(maps).encode()).hexdigest()


def growth_record(
    before: Config,
    after: Config,
    *,
    options: Mapping[str, Any],
    seed: int,
    digest: str,
    is_exact: bool,
    function_change: float | None = None,
) -> ExpansionRecord:
    """Return the record of what grew in one training.

    Args:
        before: config when it began; `after` when it ended.
        digest: of its maps.
        is_exact: every event claims to keep the function.
        function_change: the largest that was measured.
    """
    return ExpansionRecord(
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        expansion_type=GROWTH,
        method=GROWTH,
        options=options,
        seed=seed,
        source_config=before,
        target_config=after,
        layer_sources=tuple(range(family_of(after).dimensions(after).num_hidden_layers)),
        map_digest=digest,
        claims_exact=is_exact,
        step0_error=function_change,
    )
