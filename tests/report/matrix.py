"""A matrix as summary.json has it, of tasks in a row, each of which teaches one domain."""

from typing import Any

from tritter.evaluation.statistics import transfer_matrix


def matrix(*stream: str, old: str = "prose") -> dict[str, Any]:
    """Return that of a stream of domains: what is learned falls by a half, the others rise."""
    losses = {old: 1.0} | dict.fromkeys(stream, 2.0)
    rows, tasks = [dict(losses)], []
    for domain in stream:
        losses = {name: v * (0.5 if name == domain else 1.1) for name, v in losses.items()}
        rows.append(losses)
    records = [{n: {"loss": 3 * v, "loss_per_byte": v} for n, v in row.items()} for row in rows]
    tasks = [([n], row) for n, row in zip(stream, records[1:], strict=True)]
    return transfer_matrix(records[0], tasks, learned_before=[old])
