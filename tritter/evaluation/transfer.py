"""What learning one task after another does to every domain: the matrix of scores, and transfer.

R[k, d] is the score of domain d after task k, R[0, d] that before the first one. Lopez-Paz and
Ranzato 2017 (arXiv 1706.08840, section 2) fill it with accuracies and compare with a model that
has learned nothing. Here it holds losses per byte, so that negative is good, and R[0] is the base's
own, which may know much already. What was learned before the run has the base's row as its own and
counts in backward transfer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

ScoreRecords = Mapping[str, Mapping[str, Any]]  # domain or task → record, as in summary.json


@dataclass(frozen=True, slots=True)
class LearnedTask:
    """A task that was learned.

    Args:
        domains: that it was about.
        scores: of every domain afterwards.
    """

    domains: Sequence[str]
    scores: ScoreRecords


def transfer_matrix(
    baseline: ScoreRecords, tasks: Sequence[LearnedTask], *, learned_before: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the matrix and its transfers, as summary.json has them.

    A domain's own task is the first that was about it. Backward transfer is R[last] − R[own], of
    what was learned before the last task; forward transfer R[own − 1] − R[0], of what was not
    learned in the first one. A score that is not known is None, and so is what is computed of it.

    Args:
        baseline: scores before the first task.
        learned_before: domains that the model had learned already.
    """
    rows = [baseline, *(task.scores for task in tasks)]
    domains = [name for name, record in baseline.items() if "loss" in record]
    losses = {name: [row[name].get("loss_per_byte") for row in rows] for name in domains}
    own = {name: 0 for name in learned_before if name in losses}
    for number, task in enumerate(tasks, start=1):
        for name in task.domains:
            own.setdefault(name, number)
    last = len(tasks)
    met = [(name, own[name], losses[name]) for name in domains if name in own]
    backward = {name: _less(each[last], each[k]) for name, k, each in met if k < last}
    forward = {name: _less(each[k - 1], each[0]) for name, k, each in met if k > 1}
    return {
        "rows": ["baseline", *(f"task {number}" for number in range(1, last + 1))],
        "trained": [[], *(list(task.domains) for task in tasks)],
        "domains": domains,
        "loss_per_byte": [list(row) for row in zip(*losses.values(), strict=True)],
        "accuracy": {
            name: [row[name].get("accuracy") for row in rows]
            for name, record in baseline.items()
            if "accuracy" in record
        },
        "own": {name: k for name, k, _ in met},
        "backward_transfer": backward,
        "forward_transfer": forward,
        "mean_backward_transfer": _mean(backward),
        "mean_forward_transfer": _mean(forward),
    }


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _mean(transfer: Mapping[str, float | None]) -> float | None:
    known = [value for value in transfer.values() if value is not None]
    return fmean(known) if known and len(known) == len(transfer) else None
