"""Finished runs side by side: what they were asked to do, and groups that differ in the seed alone.

Everything is read from what runs leave: summary.json, their metrics and the settings of run.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, Literal, TypeGuard

from tritter.report.drawing import cut
from tritter.report.plots import Curve
from tritter.report.rows import DomainRow, domain_rows
from tritter.report.summary import Attempt, Summary, ends_of
from tritter.report.wording import MISSING

_SEED = "seed"
_MOST_NAMED = 3  # settings in the name of a group, besides the methods
CONFIDENCE = 0.95  # of the intervals over seeds, two-sided
# Stages that belong to a method as its training does
_PREPARED = ("importance", "self_replay", "choose", "distill", "adapt")
_NAME_CHARACTERS = 100
_NAMED_BY_GROWTH = ("growth.trigger", "growth.initialiser")
_NOT_OF_CONTROLS: dict[str, Any] = {
    **dict.fromkeys(("control", "expanded", "growth", "experts", "matrix")),
    "expansion": [],
    "rounds": [],
    "flops": {},
    "seconds": {},
}
_MOST = 10**9  # of rows and tokens; larger ones are no setting of a run


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        name: that tells it from the others of the report.
        settings: dotted key → value of its configuration, as its fingerprint has them.
        curves: its losses over the steps, those of all rounds in a row.
        control: those of the base that did not grow.
        pretraining: those of the base before.
        history: its checkpoint's chain, a line each, oldest first.
    """

    name: str
    summary: Summary
    settings: Mapping[str, Any]
    curves: tuple[Curve, ...] = ()
    control: tuple[Curve, ...] = ()
    pretraining: tuple[Curve, ...] = ()
    history: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> tuple[DomainRow, ...]:
        """One row per domain: the last attempt, or all rounds from the base to their end."""
        summary = self.summary
        if len(self._parts) > 1:
            # What a round was held against is the round before it, the control's base the run's
            first, last = self._parts[0], self._parts[-1]
            joined = Attempt.model_construct(final=last.final, expanded=first.expanded)
            summary = summary.model_copy(update={"attempts": [joined]})
        return tuple(row for row in domain_rows(summary) if not row.is_control)

    @property
    def _parts(self) -> Sequence[Attempt]:
        """Its rounds, or its last attempt."""
        return self.summary.rounds or [self.summary.last_attempt]

    @property
    def losses(self) -> tuple[DomainRow, ...]:
        """Those of them that are about a loss; what a task gains or loses is counted in points."""
        return tuple(row for row in self.rows if not row.change.in_points)

    @property
    def control_rows(self) -> tuple[DomainRow, ...]:
        return tuple(row for row in domain_rows(self.summary) if row.is_control)

    @property
    def seed(self) -> Any:
        return self.settings.get(_SEED, self.summary.seed)

    def setting(self, key: str, most: int | None = None) -> str:
        """Return a setting as a person reads it, cut to so many characters."""
        value = self.settings.get(key)
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        text = MISSING if value is None else str(value)
        return text if most is None else cut(text, most)

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self._parts)

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of an optimizer step; None where the settings don't say."""
        keys = ("data.batch_size", "data.sequence_length", "trainer.accumulate_grad_batches")
        batch, length, accumulated = (self.settings.get(key) for key in keys)
        if not _is_count(batch) or not _is_count(length):
            return None
        return batch * length * (accumulated if _is_count(accumulated) else 1)

    @property
    def expansions(self) -> tuple[int, ...]:
        """Steps at which it grew: before the first, and at the end of each round but the last."""
        return (0, *ends_of(self.summary.rounds)) if self.summary.expansion else ()

    @property
    def births(self) -> tuple[int, ...]:
        """Steps at which neurons grew; of several rounds those of the last."""
        growth, first = self.summary.growth, self.steps - self.last_steps
        return () if growth is None else tuple(first + step for step in growth.event_steps)

    @property
    def last_steps(self) -> int:
        """Steps of its last round, or of its last attempt."""
        return self._parts[-1].steps

    def cost(self, of: Literal["flops", "seconds"]) -> float | None:
        """Return `flops` or `seconds` of its training, and of what its methods prepare for it.

        Of all rounds or of the last attempt, without the base; None where an older summary does
        not say.
        """
        stages, trained = getattr(self.summary, of), [getattr(part, of) for part in self._parts]
        known = [value for value in trained if isinstance(value, int | float)]
        if len(known) < len(trained):
            return stages.get("fit")
        return sum(known) + sum(stages.get(name) or 0.0 for name in _PREPARED)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _MOST


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Args:
        name: what sets it apart.
        is_control: they are the bases that did not grow, beside the group before.
    """

    name: str
    runs: tuple[Run, ...]
    is_control: bool = False

    def change(self, domain: str) -> Interval | None:
        """Return the mean change of a domain's loss over the seeds."""
        rows = [row for run in self.runs for row in run.rows if row.domain == domain]
        values = [row.change.value for row in rows if row.change.value is not None]
        if len(values) == 1 and len(rows) == 1:
            change = rows[0].change
            return Interval(values[0], change.lower, change.upper)
        return Interval.of(values)

    def mean(self, of: Callable[[Run], float | None]) -> Interval | None:
        """Return the mean of a number that runs have."""
        return Interval.of([value for run in self.runs if (value := of(run)) is not None])


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with Student's interval at `CONFIDENCE`, or one run's value with its own.

    Args:
        lower: None where it is not known.
    """

    value: float
    lower: float | None
    upper: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        finite = [value for value in values if math.isfinite(value)]
        if not finite or len(finite) < len(values):
            return None
        mean, n = fmean(finite), len(finite)
        if n == 1:
            return cls(mean, None, None)
        from scipy.special import stdtrit  # half a second, which a single run does not need

        half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(finite) / math.sqrt(n)
        return cls(mean, mean - half, mean + half)


def grouped(runs: Iterable[Run]) -> tuple[Group, ...]:
    """Return the runs in groups that differ in the seed alone, each named by what differs."""
    held: dict[str, list[Run]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.settings.items() if k != _SEED))
        held.setdefault(key, []).append(run)
    groups = [tuple(each) for each in held.values()]
    firsts = [each[0] for each in groups]
    keys = [key for key in differing_keys(firsts) if key != _SEED and tells(key, firsts)]
    ways = {"growth": any(run.summary.growth is not None for run in firsts)}
    ways["experts"] = any(run.summary.experts is not None for run in firsts)
    beside = [way for way, is_there in ways.items() if is_there]
    names = [_name(run, keys, beside=beside) for run in firsts]
    return tuple(
        Group(name if names.count(name) == 1 else f"{name} ({each[0].name})", each)
        for name, each in zip(names, groups, strict=True)
    )


def with_controls(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Return each group, and after it its controls; equal ones (other expansions) once."""
    found: list[Group] = []
    seen: list[list[Any]] = []
    for group in groups:
        found.append(group)
        controls = (run.summary.control for run in group.runs)
        scores = [control.final for control in controls if control is not None and control.final]
        if scores and scores not in seen:
            seen.append(scores)
            runs = []
            for run in group.runs:
                if run.control_rows and (control := run.summary.control) is not None:
                    own = {"attempts": [control], "tasks": control.tasks}
                    summary = run.summary.model_copy(update={**_NOT_OF_CONTROLS, **own})
                    runs.append(Run(run.name, summary, run.settings, run.control))
            words = group.name.split(" ")[1:]
            rest = " ".join(word for word in words if not word.startswith(("growth=", "experts=")))
            found.append(Group(f"control, not grown: {rest}", tuple(runs), is_control=True))
    return tuple(found)


def differing_keys(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the settings in which some runs differ, in their order."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return tuple(k for k in keys if len({repr(run.settings.get(k)) for run in runs}) > 1)


def _name(run: Run, keys: Sequence[str], *, beside: Collection[str]) -> str:
    """Name a group by its methods and by what else differs.

    Args:
        beside: `growth` where some of all runs may grow while they are trained, `experts` where
            some have them.
    """
    summary = run.summary
    methods = {"expansion": summary.expansion, "forgetting": summary.forgetting}
    if "growth" in beside:
        methods["growth"] = [] if summary.growth is None else [_short(summary.growth.name)]
    if "experts" in beside:
        methods["experts"] = [] if summary.experts is None else [_short(summary.experts.kind)]
    parts = [f"{key}={'+'.join(names) or 'none'}" for key, names in methods.items()]
    most = len(parts) + _MOST_NAMED
    told = [key for key in keys if run.settings.get(key) is not None]
    own = [key for key in told if key.removesuffix(".name") not in _NAMED_BY_GROWTH]
    parts += [f"{key.rpartition('.')[2]}={_short(run.settings[key])}" for key in own]
    name = " ".join(parts[:most]) + (" …" if len(parts) > most else "")
    return cut(name, _NAME_CHARACTERS)


def tells(key: str, runs: Sequence[Run]) -> bool:
    """Tell whether a setting says more than the methods do: those that have it differ in it."""
    values = {repr(run.settings[key]) for run in runs if key in run.settings}
    return len(values) > 1 and not key.endswith(".methods")


def _short(value: Any) -> str:
    return cut(f"{value:g}" if isinstance(value, float) else str(value), 24)
