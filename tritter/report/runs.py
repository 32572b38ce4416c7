"""Finished runs side by side: what they were asked to do, and groups that differ in the seed alone.

Everything is read from what runs leave: summary.json, metrics.csv and the settings of run.json.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from scipy import stats
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.errors import TritterError
from tritter.report.plots import Curve
from tritter.report.rows import DomainRow, domain_rows, last_attempt

_SEED = "seed"
_MOST_NAMED = 3  # settings in the name of a group, besides the methods
CONFIDENCE = 0.95  # of the intervals over seeds, two-sided


class _Score(TypedDict, total=False):
    loss: float | None
    loss_per_byte: float | None
    standard_error: float | None
    accuracy: float | None


_Scores = dict[str, _Score]


class _Check(TypedDict, total=False):
    check: str
    subject: str
    verdict: str
    detail: str
    value: float | None
    bound: float | None
    interval: tuple[float | None, float | None] | None


class _Task(TypedDict):
    domains: list[str]
    final: _Scores
    steps: int


class _Trained(TypedDict, total=False):
    final: _Scores
    expanded: _Scores
    baseline: _Scores
    gate: list[_Check]
    steps: int
    tasks: list[_Task]


class _Sample(TypedDict, total=False):
    domain: str
    prompt: str
    before: str
    after: str


class _More(TypedDict, total=False):
    expansion: list[str]
    forgetting: list[str]
    seed: int
    control: _Trained
    tasks: list[_Task]
    flops: dict[str, float]
    seconds: dict[str, float]
    parameters: dict[str, int]
    samples: list[_Sample]
    notes: list[str]


class _Summary(_More):
    status: Literal["kept", "rolled_back", "undecided"]
    domains: dict[str, list[str]]
    baseline: _Scores
    attempts: list[_Trained]


def check_summary(summary: Mapping[str, Any]) -> None:
    """Refuse what is no summary of a run; it may have more than is read here.

    Raises:
        TritterError: says where, and what is wrong.
    """
    try:
        TypeAdapter(_Summary).validate_python(summary, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise TritterError(f"it is no summary of a run: {place}: {first['msg']}") from error


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        name: that tells it from the others of the report.
        summary: the contents of summary.json.
        settings: dotted key → value of its configuration, as its fingerprint has them.
        curves: its losses over the steps, as metrics.csv has them.
        history: its checkpoint's chain, a line each, oldest first.
    """

    name: str
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    curves: tuple[Curve, ...] = ()
    history: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> tuple[DomainRow, ...]:
        """One row per domain of the last attempt."""
        return tuple(row for row in domain_rows(self.summary) if not row.is_control)

    @property
    def losses(self) -> tuple[DomainRow, ...]:
        """Those of them that are about a loss; what a task gains or loses is counted in points."""
        return tuple(row for row in self.rows if not row.change.in_points)

    @property
    def control_rows(self) -> tuple[DomainRow, ...]:
        return tuple(row for row in domain_rows(self.summary) if row.is_control)

    @property
    def seed(self) -> Any:
        return self.settings.get(_SEED, self.summary.get(_SEED))

    @property
    def steps(self) -> int:
        return int(last_attempt(self.summary).get("steps") or 0)

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of an optimizer step; None where the settings don't say."""
        keys = ("data.batch_size", "data.sequence_length", "trainer.accumulate_grad_batches")
        batch, length, accumulated = (self.settings.get(key) for key in keys)
        if not isinstance(batch, int) or not isinstance(length, int):
            return None
        return batch * length * (accumulated if isinstance(accumulated, int) else 1)

    @property
    def borders(self) -> tuple[int, ...]:
        """Steps at which it went on to its next task."""
        taken, borders = 0, []
        for task in self.summary.get("tasks") or ():
            taken += int(task.get("steps") or 0)
            borders.append(taken)
        return tuple(borders[:-1])


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Args:
        name: what sets it apart.
    """

    name: str
    runs: tuple[Run, ...]

    def change(self, domain: str) -> "Interval | None":
        """Return the mean change of a domain's loss over the seeds."""
        rows = [row for run in self.runs for row in run.rows if row.domain == domain]
        values = [row.change.value for row in rows if row.change.value is not None]
        if len(values) == 1 and len(rows) == 1:
            change = rows[0].change
            return Interval(values[0], change.lower, change.upper, is_over_seeds=False)
        return Interval.of(values)

    def mean(self, of: Callable[[Run], float | None]) -> "Interval | None":
        """Return the mean of a number that runs have."""
        return Interval.of([value for run in self.runs if (value := of(run)) is not None])


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with Student's interval at `CONFIDENCE`, or one run's value with its own.

    Args:
        lower: None where it is not known.
        is_over_seeds: False: the one-sided bounds of one run's gate, over its documents.
    """

    value: float
    lower: float | None
    upper: float | None
    is_over_seeds: bool = True

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval | None":
        finite = [value for value in values if math.isfinite(value)]
        if not finite or len(finite) < len(values):
            return None
        mean, n = fmean(finite), len(finite)
        if n == 1:
            return cls(mean, None, None)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(finite) / math.sqrt(n)
        return cls(mean, mean - half, mean + half)


def grouped(runs: Iterable[Run]) -> tuple[Group, ...]:
    """Return the runs in groups that differ in the seed alone, each named by what differs."""
    held: dict[str, list[Run]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.settings.items() if k != _SEED))
        held.setdefault(key, []).append(run)
    groups = [tuple(each) for each in held.values()]
    keys = [key for key in differing_keys([each[0] for each in groups]) if key != _SEED]
    names = [_name(each[0], keys) for each in groups]
    return tuple(
        Group(name if names.count(name) == 1 else f"{name} ({each[0].name})", each)
        for name, each in zip(names, groups, strict=True)
    )


def differing_keys(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the settings in which some runs differ, in their order."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return tuple(k for k in keys if len({repr(run.settings.get(k)) for run in runs}) > 1)


def _name(run: Run, keys: Sequence[str]) -> str:
    """Name a group by its methods and by what else differs, but for options of methods it lacks."""
    methods = {key: _methods(run, key) for key in ("expansion", "forgetting")}
    parts = [f"{key}={'+'.join(names) or 'none'}" for key, names in methods.items()]
    own = [key for key in keys if not key.endswith(".methods") and key in run.settings]
    shared = [key for key in own if run.settings[key] is not None]
    parts += [f"{key.rpartition('.')[2]}={_short(run.settings[key])}" for key in shared]
    return " ".join(parts[: 2 + _MOST_NAMED]) + (" …" if len(parts) > 2 + _MOST_NAMED else "")


def _methods(run: Run, key: str) -> list[str]:
    return [str(name) for name in run.summary.get(key) or ()]


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else text[:22] + ".."
