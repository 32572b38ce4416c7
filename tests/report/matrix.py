"""A matrix as summary.json has it, of tasks in a row, each of which teaches one domain."""

from typing import Any

from tritter.report.summary import Matrix, Score, TaskRecord


def matrix(*stream: str, old: str = "prose") -> dict[str, Any]:
    """Return that of a stream of domains: what is learned falls by a half, the others rise."""
    losses = {old: 1.0} | dict.fromkeys(stream, 2.0)
    rows = [dict(losses)]
    for domain in stream:
        losses = {name: v * (0.5 if name == domain else 1.1) for name, v in losses.items()}
        rows.append(losses)
    scores = [{n: Score(loss=3 * v, loss_per_byte=v) for n, v in row.items()} for row in rows]
    tasks = [
        TaskRecord(domains=[name], final=final, steps=1)
        for name, final in zip(stream, scores[1:], strict=True)
    ]
    return Matrix.of(scores[0], tasks, learned_before=[old]).plain()
