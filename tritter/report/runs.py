"""Finished runs, groups of runs that differ only in the seed, and their statistics.

All numbers come from the files of the runs: summary.json, the metrics and the settings of run.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeGuard

from tritter.report.drawing import GREY, truncate
from tritter.report.rows import DomainRow, domain_rows
from tritter.report.summary import MAX_NUMBER, Attempt, Summary
from tritter.report.table import MISSING

if TYPE_CHECKING:
    from tritter.evaluation.statistics import PairedScores

_SEED = "seed"
_MAX_NAMED = 8  # settings in the name of a group, in addition to the methods
# Stages that belong to a method as its training does
_PREPARED = ("importance", "self_replay", "choose", "distill", "adapt")
_NAME_CHARACTERS = 400
_NAMED_BY_GROWTH = ("growth.trigger", "growth.initialiser")
_NOT_OF_CONTROLS: dict[str, Any] = {
    **dict.fromkeys(("control", "expanded", "growth", "experts", "matrix")),
    "expansion": [],
    "rounds": [],
    "flops": {},
    "seconds": {},
}
_MAX_COUNT = 10**9  # largest plausible batch size or sequence length
_GROWTH_FLOPS = "growth/flops"


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps at which it was logged."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, str]]) -> tuple[Self, ...]:
        """Return every loss in rows of a metrics.csv, and the FLOPs of a training run with growth.

        Step -1 is the model before its expansion.
        """
        table = [row for row in rows if row.get("step")]
        found = dict.fromkeys(name for row in table for name in row)
        names = [
            name for name in found if name and (name.endswith("/loss") or name == _GROWTH_FLOPS)
        ]
        curves = []
        for name in names:
            rows = [row for row in table if row.get(name)]
            steps = tuple(int(float(row["step"])) for row in rows)
            if steps:
                curves.append(cls(name, steps, tuple(float(row[name]) for row in rows)))
        return tuple(curves)


@dataclass(frozen=True)
class EndedRun:
    """One finished run.

    Args:
        name: A name that is unique in the report.
        summary: Its summary.
        settings: Dotted key → value of its configuration.
        curves: Its losses over the steps of all rounds.
        control: Those of the control (not grown).
        pretraining: Those of the pretraining of its base.
        history: The lineage of its checkpoint, a line each, oldest first.
        scores: The scores of its final model, item by item; None if they are missing.
        missing_reason: Why they are missing.
        peak_memory: Peak memory of its process or device in bytes; None if not recorded.
    """

    name: str
    summary: Summary
    settings: Mapping[str, Any]
    curves: tuple[Curve, ...] = ()
    control: tuple[Curve, ...] = ()
    pretraining: tuple[Curve, ...] = ()
    history: tuple[str, ...] = ()
    scores: Mapping[str, PairedScores] | None = None
    missing_reason: str = ""
    peak_memory: float | None = None

    @cached_property
    def rows(self) -> tuple[DomainRow, ...]:
        """One row per domain: the last attempt, or all rounds from the base to their end."""
        summary = self.summary
        if len(self._parts) > 1:
            # A round is compared with the previous one, the control with the base of the run
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
        """The rows of losses, without those of accuracies."""
        return tuple(row for row in self.rows if not row.change.in_points)

    @property
    def control_rows(self) -> tuple[DomainRow, ...]:
        return tuple(row for row in domain_rows(self.summary) if row.is_control)

    @property
    def seed(self) -> Any:
        return self.settings.get(_SEED, self.summary.seed)

    def setting(self, key: str, most: int | None = None) -> str:
        """Return a setting as text of at most `most` characters."""
        value = self.settings.get(key)
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        text = MISSING if value is None else str(value)
        return text if most is None else truncate(text, most)

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self._parts)

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of an optimizer step; None if the settings do not determine them."""
        keys = ("data.batch_size", "data.sequence_length", "trainer.accumulate_grad_batches")
        batch, length, accumulated = (self.settings.get(key) for key in keys)
        if not _is_count(batch) or not _is_count(length):
            return None
        if (windows := self.summary.windows) is not None:  # about as many tokens, in long windows
            batch, length = max(1, round(batch * length / windows.length)), windows.length
        return batch * length * (accumulated if _is_count(accumulated) else 1)

    @property
    def tokens(self) -> int | None:
        """Training tokens, without the base's; None if the settings do not determine them."""
        return None if self.tokens_per_step is None else self.tokens_per_step * self.steps

    def costs(self) -> dict[str, float | None]:
        """Return name → cost of the training, and of the whole run."""
        summary = self.summary
        total_seconds = summary.seconds.get("total")
        if total_seconds is None:
            total_seconds = sum(filter(None, summary.seconds.values())) or None
        return {
            "training_flops": self.cost("flops"),
            "total_flops": summary.flops.get("total"),
            "training_tokens": self.tokens,
            "steps": self.steps,
            "training_seconds": self.cost("seconds"),
            "total_seconds": total_seconds,
            "peak_memory_bytes": self.peak_memory,
            "parameters_before": summary.parameters.get("baseline"),
            "parameters_after": summary.parameters.get("final"),
        }

    @property
    def expansions(self) -> tuple[int, ...]:
        """Steps of the expansions: before the first, and at the end of each round but the last."""
        return (0, *self.summary.round_ends) if self.summary.expansion else ()

    @property
    def births(self) -> tuple[int, ...]:
        """Steps at which neurons were born, in the last round."""
        growth, first = self.summary.growth, self.steps - self.last_steps
        return () if growth is None else tuple(first + step for step in growth.event_steps)

    @property
    def last_steps(self) -> int:
        """Steps of its last round, or of its last attempt."""
        return self._parts[-1].steps

    @property
    def last_flops(self) -> float | None:
        """The last logged FLOPs of a training run with growth, the sum of those of its tasks."""
        total = 0.0
        for curve in (each for each in self.curves if each.name == _GROWTH_FLOPS):
            points = [*zip(curve.steps, curve.values, strict=True)]
            for begin, end in pairwise((-1, *self.summary.borders, curve.steps[-1])):
                total += max((value for step, value in points if begin < step <= end), default=0.0)
        return total if 0 < total < MAX_NUMBER else None

    def cost(self, of: Literal["flops", "seconds"]) -> float | None:
        """Return the FLOPs or seconds of its training and of the preparation of its methods.

        They are those of all rounds or of the last attempt, without the base; None if an older
        summary does not have them.
        """
        stages, trained = getattr(self.summary, of), [getattr(part, of) for part in self._parts]
        known = [value for value in trained if isinstance(value, int | float)]
        if len(known) < len(trained):
            return stages.get("fit")
        return sum(known) + sum(stages.get(name) or 0.0 for name in _PREPARED)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _MAX_COUNT


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    Args:
        name: The settings in which it differs from other groups.
        runs: Its runs.
        is_control: The runs are the controls (not grown) of the previous group.
        color: Its colour in figures.
        marker: Its mark; the pair of colour and mark is unique for 60 groups.
        style: Style of its lines.
    """

    name: str
    runs: tuple[EndedRun, ...]
    is_control: bool = False
    color: str = GREY
    marker: str = "o"
    style: str = "-"

    @property
    def filling(self) -> str:
        """The colour inside its marks."""
        return "white" if self.is_control else self.color

    @property
    def label(self) -> str:
        """Its name and the number of its seeds, for legends."""
        number = len(self.seeds)
        return self.name if number < 2 else f"{self.name} ({number} seeds)"

    def change(self, domain: str) -> Interval | None:
        """Return the change of a domain's loss over the seeds.

        That of a single run has the bounds of its gate, which are over documents, for figures.
        """
        rows = [row for run in self.runs for row in run.rows if row.domain == domain]
        known = [row.change for row in rows if row.change.value is not None]
        if len(known) == 1 and len(rows) == 1:
            (change,) = known
            assert change.value is not None
            return Interval(change.value, change.lower, change.upper, values=(change.value,))
        return self.mean(lambda run: _at(run, domain, lambda row: row.change.value))

    @property
    def seeds(self) -> tuple[str, ...]:
        """The different seeds of the runs."""
        return tuple(dict.fromkeys(repr(run.seed) for run in self.runs))

    def mean(self, of: Callable[[EndedRun], float | None]) -> Interval | None:
        """Return the mean of a number over the seeds."""
        return Interval.of([*self.by_seed(of).values()])

    def by_seed(self, of: Callable[[EndedRun], float | None]) -> dict[str, float]:
        """Return seed → number; the mean where several runs have the same seed."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            if (value := of(run)) is not None:
                found.setdefault(repr(run.seed), []).append(value)
        return {seed: fmean(values) for seed, values in found.items()}

    def difference(self, reference: Group, domain: str) -> Interval | None:
        """Return the difference to another group on a domain, paired by seed.

        It is relative for a loss per byte after training (0.01: 1 % above the reference), and
        absolute for an accuracy. Seeds that only one of the groups has do not count.
        """
        own, other = (each.by_seed(partial(_trained, domain=domain)) for each in (self, reference))
        seeds = [seed for seed in own if seed in other]
        if any(_is_accuracy(run, domain) for run in self.runs):
            return Interval.of([own[seed] - other[seed] for seed in seeds])
        return Interval.of([own[seed] / other[seed] - 1 for seed in seeds if other[seed]])

    @classmethod
    def of_runs(cls, runs: Iterable[EndedRun]) -> tuple[Self, ...]:
        """Return groups of runs that differ only in the seed, named by the settings that differ."""
        by_settings: dict[str, list[EndedRun]] = {}
        for run in runs:
            key = repr(sorted((k, repr(v)) for k, v in run.settings.items() if k != _SEED))
            by_settings.setdefault(key, []).append(run)
        groups = [tuple(each) for each in by_settings.values()]
        firsts = [each[0] for each in groups]
        keys = [
            key for key in differing_keys(firsts) if key != _SEED and differs_between(key, firsts)
        ]
        ways = {"growth": any(run.summary.growth is not None for run in firsts)}
        ways["experts"] = any(run.summary.experts is not None for run in firsts)
        named = [way for way, is_there in ways.items() if is_there]
        names = [_name(run, keys, ways=named) for run in firsts]
        return tuple(
            cls(name if names.count(name) == 1 else f"{name} ({each[0].name})", each)
            for name, each in zip(names, groups, strict=True)
        )

    @classmethod
    def with_controls(cls, groups: Iterable[Self]) -> tuple[Self, ...]:
        """Return each group, then its controls; equal controls (of other expansions) once."""
        found: list[Self] = []
        seen: list[list[Any]] = []
        for group in groups:
            found.append(group)
            controls = (run.summary.control for run in group.runs)
            scores = [
                control.final for control in controls if control is not None and control.final
            ]
            if scores and scores not in seen:
                seen.append(scores)
                runs = []
                for run in group.runs:
                    if run.control_rows and (control := run.summary.control) is not None:
                        own = {"attempts": [control], "tasks": control.tasks}
                        summary = run.summary.model_copy(update={**_NOT_OF_CONTROLS, **own})
                        runs.append(EndedRun(run.name, summary, run.settings, run.control))
                words = group.name.split(" ")[1:]
                rest = " ".join(
                    word for word in words if not word.startswith(("growth=", "experts="))
                )
                found.append(cls(f"control (not grown) {rest}", tuple(runs), is_control=True))
        return tuple(found)


def _at(run: EndedRun, domain: str, of: Callable[[DomainRow], float | None]) -> float | None:
    return next((of(row) for row in run.rows if row.domain == domain), None)


def _trained(run: EndedRun, domain: str) -> float | None:
    def score(row: DomainRow) -> float | None:
        trained = row.trained
        return trained.accuracy if row.change.in_points else trained.loss_per_byte

    return _at(run, domain, score)


def _is_accuracy(run: EndedRun, domain: str) -> bool:
    return any(row.domain == domain and row.change.in_points for row in run.rows)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with Student's interval, or the value of one run with its own bounds.

    Args:
        lower: Lower bound at `CONFIDENCE`; None below `MIN_SEEDS`, or if unknown.
        upper: Upper bound, likewise.
        values: The values of the seeds.
    """

    CONFIDENCE: ClassVar[float] = 0.95  # of the intervals over seeds, two-sided
    MIN_SEEDS: ClassVar[int] = 3  # for an interval; below, the values of the seeds are shown

    value: float
    lower: float | None
    upper: float | None
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        finite = [value for value in values if math.isfinite(value)]
        if not finite or len(finite) < len(values):
            return None
        mean, n = fmean(finite), len(finite)
        if n < cls.MIN_SEEDS:
            return cls(mean, None, None, tuple(finite))
        from scipy.special import stdtrit  # half a second, which a single run does not need

        half = float(stdtrit(n - 1, (1 + cls.CONFIDENCE) / 2)) * stdev(finite) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, tuple(finite))

    @property
    def is_of_seeds(self) -> bool:
        """Whether the values of the seeds stand for the mean: there are too few for an interval."""
        return 1 < len(self.values) < self.MIN_SEEDS

    def text(self) -> str:
        """Return the mean with its bounds over seeds, or the values of the seeds, in per cent."""
        if len(self.values) < self.MIN_SEEDS or self.lower is None or self.upper is None:
            return ", ".join(f"{100 * value:+.2f}" for value in self.values)
        return f"{100 * self.value:+.2f} [{100 * self.lower:+.2f}, {100 * self.upper:+.2f}]"


def differing_keys(runs: Sequence[EndedRun]) -> tuple[str, ...]:
    """Return the settings in which some runs differ, in their order."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return tuple(k for k in keys if len({repr(run.settings.get(k)) for run in runs}) > 1)


def _name(run: EndedRun, keys: Sequence[str], *, ways: Collection[str]) -> str:
    """Return the name of a group: its methods and the other settings that differ.

    Args:
        run: A run of the group.
        keys: The settings that differ between groups.
        ways: `growth` and `experts`, if some run has them.
    """
    summary = run.summary
    methods = {"expansion": summary.expansion, "forgetting": summary.forgetting}
    if "growth" in ways:
        methods["growth"] = [] if summary.growth is None else [_short(summary.growth.name)]
    if "experts" in ways:
        methods["experts"] = [] if summary.experts is None else [_short(summary.experts.kind)]
    parts = [f"{key}={'+'.join(names) or 'none'}" for key, names in methods.items()]
    most = len(parts) + _MAX_NAMED
    tails = [key.rpartition(".")[2] for key in keys]  # not enough for training.max_steps
    for key, tail in zip(keys, tails, strict=True):
        if run.settings.get(key) is not None and key.removesuffix(".name") not in _NAMED_BY_GROWTH:
            parts.append(f"{tail if tails.count(tail) == 1 else key}={_short(run.settings[key])}")
    return truncate(" ".join(parts[:most]) + " …" * (len(parts) > most), _NAME_CHARACTERS)


def differs_between(key: str, runs: Sequence[EndedRun]) -> bool:
    """Return whether a setting differs between the runs that have it, methods excluded."""
    values = {repr(run.settings[key]) for run in runs if key in run.settings}
    return len(values) > 1 and not key.endswith(".methods")


def _short(value: Any) -> str:
    return truncate(f"{value:g}" if isinstance(value, float) else str(value), 60)
