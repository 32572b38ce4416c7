"""Paired comparison of two models on the same documents."""

from dataclasses import replace

import torch

from tritter.errors import TritterError
from tritter.evaluation.estimate import Estimate, bounded_ratio
from tritter.evaluation.losses import DocumentLosses


def relative_change(before: DocumentLosses, after: DocumentLosses) -> Estimate:
    """Estimate the relative change of mean cross-entropy per byte, paired by document.

    Both models scored the same bytes, so the ratio of losses per byte is the ratio of summed nats.
    Documents are the clusters: tokens of one document succeed or fail together, and errors per
    token would be several times too small.

    Returns:
        0.01 for a loss that rose by one per cent.

    Raises:
        TritterError: the two did not score the same bytes of the same documents, or a loss is not
            a positive number.
    """
    _check_paired(before, after)
    total = before.nats.sum()
    if not (torch.isfinite(total) and total > 0 and torch.isfinite(after.nats).all()):
        raise TritterError(
            f"evaluation: a relative change needs finite losses above zero, "
            f"got {float(total):g} nats before and {float(after.nats.sum()):g} after"
        )
    ratio = bounded_ratio(after.nats, before.nats)
    return replace(ratio, value=ratio.value - 1)


def carrying_documents(before: DocumentLosses, after: DocumentLosses) -> tuple[str, ...]:
    """Return the fewest documents whose changes make up half of the spread, the largest first.

    The spread is the sum of squares behind the standard error; where few documents make it, the
    bounds rest on what those few happened to be.
    """
    ratio = after.nats.sum() / before.nats.sum()
    squares = (after.nats - ratio * before.nats).square()
    if not squares.sum() > 0:
        return ()
    largest = squares.sort(descending=True)
    number = int((largest.values.cumsum(0) < squares.sum() / 2).sum()) + 1
    return tuple(before.identifiers[index] for index in largest.indices[:number].tolist())


def _check_paired(before: DocumentLosses, after: DocumentLosses) -> None:
    if len(before) != len(after):
        raise TritterError(
            f"evaluation: {len(before)} documents were scored before and {len(after)} after; "
            "a paired comparison needs the same documents"
        )
    for first, second in zip(before.identifiers, after.identifiers, strict=True):
        if first != second:
            raise TritterError(
                f"evaluation: document {first!r} before stands against {second!r} after; "
                "a paired comparison needs the same documents in the same order"
            )
    if not torch.equal(before.num_bytes, after.num_bytes):
        index = int((before.num_bytes != after.num_bytes).nonzero()[0])
        raise TritterError(
            f"evaluation: document {before.identifiers[index]!r} has "
            f"{int(before.num_bytes[index])} bytes before and {int(after.num_bytes[index])} after; "
            "both must score the same text"
        )
