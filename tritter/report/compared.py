"""Runs compared number by number, for the terminal, the page and the files of `compare`.

A difference between two runs has bounds if both scored the same documents: those of the gate's
paired bootstrap. A difference between two groups of runs is paired by seed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

from tritter.errors import TritterError
from tritter.evaluation.gate import Check
from tritter.evaluation.statistics import (
    finite_or_none,
)
from tritter.report.drawing import CYCLE
from tritter.report.rows import LossUnit, ScoreChange
from tritter.report.runs import (
    EndedRun,
    Group,
    Interval,
    differing_keys,
    differs_between,
)
from tritter.report.summary import MAX_NUMBER
from tritter.report.table import MISSING, Table, count_text, number_text, si_text
from tritter.report.tables import SummaryTables

_CONFIDENCE = f"{Interval.CONFIDENCE:.0%}"
_MEAN_OR_SEEDS = (
    f"mean with Student's {_CONFIDENCE} interval, below {Interval.MIN_SEEDS} seeds each seed's "
    "value"
)
_CSV_HEADER = ("run", "subject", "quantity", "value", "lower", "upper")
_CELL_CHARACTERS = 60
_MARKERS = "osD^vPX*<>"
_STYLES = ("-", ":", "-.")  # of the first 12 groups, the next 12, and so on
_FEW_RUNS = 6  # that are columns of a table; more are rows
_FEW_SETTINGS = 5  # that are columns of a table with many runs


@dataclass(frozen=True, slots=True)
class _PairedDifference:
    """The difference of a run to the first on one subject, paired by document.

    Args:
        subject: A domain, or its accuracy.
        run: Name of the run.
        change: Relative difference of the loss per byte, or difference of the accuracy.
        n: Number of documents or questions.
        missing_reason: Why there is no difference.
    """

    subject: str
    run: str
    change: ScoreChange = field(default_factory=lambda: ScoreChange(None, None, None))
    n: int = 0
    missing_reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison; the others are compared with the first."""

    MAX_GROUPS: ClassVar[int] = 40  # in figures with a row per group; the table has all

    runs: tuple[EndedRun, ...]

    def with_letters(self) -> "Comparison":
        """Return the same with a letter as the name of each run, for narrow terminals."""
        return Comparison(tuple(replace(r, name=_letter(n)) for n, r in enumerate(self.runs)))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return Group.of_runs(self.runs)

    @cached_property
    def styled(self) -> tuple[Group, ...]:
        """The groups and their controls, each with a style; a control has that of its group."""
        styled: list[Group] = []
        number = -1
        for group in Group.with_controls(self.groups):
            number += not group.is_control
            color, marker = CYCLE[number % len(CYCLE)], _MARKERS[number % len(_MARKERS)]
            style = "--" if group.is_control else _STYLES[number // len(CYCLE) % len(_STYLES)]
            styled.append(replace(group, color=color, marker=marker, style=style))
        return tuple(styled)

    @property
    def reference(self) -> Group:
        """The group that figures compare all others with: the first control, else the first."""
        return next((group for group in self.styled if group.is_control), self.styled[0])

    @cached_property
    def paired(self) -> tuple[_PairedDifference, ...]:
        """Return the differences of every other run to the first, subject by subject."""
        first, *others = self.runs
        subjects = dict.fromkeys(row.domain for each in self.runs for row in each.rows)
        return tuple(_difference(s, first, other) for s in subjects for other in others)

    def tables(self, *, on_page: bool = False) -> dict[str, Table]:
        """Return title → table, without empty ones, and without those that every page has."""
        tables = {
            "Settings that differ": self._settings(),
            "Verdicts and size": self._verdicts(),
            "Losses": self._scores(),
            f"Differences to {self.runs[0].name}, paired by document": self._differences(),
            "Over seeds": None if on_page else self._seeds(),
            "Differences to the reference group, paired by seed": (
                None if on_page else self._by_seed()
            ),
            "Cost": self._costs(),
        }
        return {title: table for title, table in tables.items() if table and table.rows}

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain values for JSON."""
        return {
            "reference": self.runs[0].name,
            "confidence": Interval.CONFIDENCE,
            "runs": [
                {
                    "name": each.name,
                    "status": each.summary.status,
                    "seed": each.seed,
                    **each.costs(),
                    "subjects": [
                        {
                            "subject": row.domain,
                            "role": row.role,
                            "before": row.before.value,
                            "expanded": None if row.expanded is None else row.expanded.value,
                            "trained": row.trained.value,
                            "change": asdict(row.change),
                            "verdict": row.verdict,
                        }
                        for row in each.rows
                    ],
                }
                for each in self.runs
            ],
            "settings": {
                key: {each.name: each.settings.get(key) for each in self.runs} for key in self._keys
            },
            "paired": [
                {
                    "subject": each.subject,
                    "run": each.run,
                    **asdict(each.change),
                    "n": each.n,
                    "why_not": each.missing_reason or None,
                }
                for each in self.paired
            ],
            "groups": [
                {"name": group.name, "runs": [run.name for run in group.runs]}
                for group in self.groups
            ],
            "paired_by_seed": [
                {"subject": domain, "group": group.name, "reference": self.groups[0].name}
                | asdict(difference)
                for domain, group, difference in self._seed_differences
            ],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return all numbers as rows of a CSV file, its header first."""
        found: list[tuple[str, ...]] = [_CSV_HEADER]
        for each in self.runs:
            found += [(each.name, "", "status", each.summary.status, "", "")]
            found += [(each.name, "", k, _number(v), "", "") for k, v in each.costs().items()]
            for row in each.rows:
                for stage in ("before", "expanded", "trained"):
                    score = getattr(row, stage)
                    value = None if score is None else score.value
                    found.append((each.name, row.domain, stage, _number(value), "", ""))
                found.append((each.name, row.domain, "change", *_bounds(row.change)))
        for pair in self.paired:
            quantity = f"difference to {self.runs[0].name}, paired by document"
            found.append((pair.run, pair.subject, quantity, *_bounds(pair.change)))
        quantity = f"difference to {self.groups[0].name}, paired by seed"
        for domain, group, by_seed in self._seed_differences:
            numbers = map(_number, (by_seed.value, by_seed.lower, by_seed.upper))
            found.append((group.name, domain, quantity, *numbers))
        for key in self._keys:
            found += [(each.name, "", key, each.setting(key), "", "") for each in self.runs]
        return found

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        return differing_keys(self.runs)

    def _settings(self) -> Table:
        """Return the settings that differ, by run; with many runs, only the independent ones."""
        runs, keys = self.runs, self._keys
        if len(runs) <= _FEW_RUNS:
            columns = ((key, *(r.setting(key, _CELL_CHARACTERS) for r in runs)) for key in keys)
            return Table(("setting", *(each.name for each in runs)), tuple(columns))
        independent = _independent_keys(keys, runs)
        shorter = "without settings that follow from others; --json has all"
        caption = "" if independent == keys else shorter
        if len(independent) <= _FEW_SETTINGS:
            below = (
                (r.name, *(r.setting(key, _CELL_CHARACTERS) for key in independent)) for r in runs
            )
            return Table(
                ("run", *independent), tuple(below) if independent else (), caption=caption
            )
        rows = []
        for key in independent:
            by_value: dict[str, list[EndedRun]] = {}
            for each in runs:
                by_value.setdefault(repr(each.settings.get(key)), []).append(each)
            for those in by_value.values():
                value = those[0].setting(key, _CELL_CHARACTERS)
                rows.append((key, value, " ".join(each.name for each in those)))
        return Table(("setting", "value", "runs"), tuple(rows), caption=caption)

    def _verdicts(self) -> Table:
        rows = []
        for each in self.runs:
            failed = [
                f"{check.check} of {check.subject}"
                for check in each.summary.last_attempt.gate
                if check.verdict in ("failed", "undecided")
            ]
            costs = each.costs()
            sizes = (count_text(costs["parameters_before"]), SummaryTables(each.summary).size)
            shown = (each.summary.status.replace("_", " "), ", ".join(failed) or MISSING)
            rows.append((each.name, *shown, *sizes))
        header = ("run", "status", "failed or undecided", "parameters before", "after")
        return Table(header, tuple(rows), (3, 4))

    def _scores(self) -> Table:
        subjects = dict.fromkeys((r.domain, r.role) for each in self.runs for r in each.rows)
        has_grown = any(each.summary.expansion for each in self.runs)
        unit = LossUnit(each.summary for each in self.runs)
        stages = ("before", "expanded", "trained") if has_grown else ("before", "trained")
        rows = tuple(
            (
                domain,
                role,
                each.name,
                *(unit.text(getattr(row, stage)) for stage in stages),
                row.change.text(),
                row.verdict or MISSING,
            )
            for domain, role in subjects
            for each in self.runs
            for row in each.rows
            if (row.domain, row.role) == (domain, role)
        )
        header = ("domain", "role", "run", *stages, "change", "verdict")
        caption = (
            f"loss [nats/{unit.name}] or accuracy; change from before to trained [% per byte] with "
            "the one-sided bounds of the gate: forgetting on old domains, gain on new ones"
        )
        return Table(header, rows, tuple(range(3, 4 + len(stages))), caption)

    def _differences(self) -> Table:
        rows = []
        for each in self.paired:
            change, text = each.change, each.change.text()
            if change.in_points and change.lower is not None and change.upper is not None:
                bounds = f"[{100 * change.lower:+.1f}, {100 * change.upper:+.1f}]"
                text = text.replace(" points", f" {bounds} points")
            rows.append(
                (each.subject, each.run, text, number_text(each.n or None), each.missing_reason)
            )
        caption = (
            f"loss per byte relative to {self.runs[0].name} on the same documents [%], with the "
            f"two-sided {_CONFIDENCE} interval of the paired bootstrap; below zero is better "
            "(accuracy: above zero)"
        )
        header = ("domain", "run", "difference", "documents", "")
        return Table(header, tuple(rows), (2, 3), caption)

    def _seeds(self) -> Table:
        """Return each group's change over its seeds; empty if every group has one run."""
        rows = []
        for domain in self._domains:
            for group in (group for group in self.groups if len(group.runs) > 1):
                if (mean := group.change(domain)) is not None:
                    rows.append((domain, group.name, str(len(group.seeds)), mean.text()))
        caption = f"change of the loss per byte [%]: {_MEAN_OR_SEEDS}"
        return Table(("domain", "group", "seeds", "change"), tuple(rows), (2, 3), caption)

    def _by_seed(self) -> Table:
        """Return each group's difference to the first; empty if every group has one run."""
        rows = [
            (domain, group.name, str(len(each.values)), each.text())
            for domain, group, each in self._seed_differences
            if any(len(group.runs) > 1 for group in self.groups)
        ]
        caption = (
            f"loss per byte after training relative to {self.groups[0].name} at the same seed "
            f"[%]: {_MEAN_OR_SEEDS}; below zero is better"
        )
        return Table(("domain", "group", "pairs", "difference"), tuple(rows), (2, 3), caption)

    @cached_property
    def _domains(self) -> tuple[str, ...]:
        """The domains that have a loss."""
        rows = (row for each in self.runs for row in each.losses)
        return tuple(dict.fromkeys(row.domain for row in rows))

    @cached_property
    def _seed_differences(self) -> list[tuple[str, Group, Interval]]:
        """The differences of all groups to the first: domain, group, difference."""
        first, *others = self.groups
        pairs = ((domain, group) for domain in self._domains for group in others)
        found = ((*pair, pair[1].difference(first, pair[0])) for pair in pairs)
        return [(domain, group, each) for domain, group, each in found if each is not None]

    def _costs(self) -> Table:
        header = (
            *("run", "train FLOPs", "all FLOPs", "tokens", "steps"),
            *("train [s]", "all [s]", "memory [B]"),
        )
        rows = []
        for each in self.runs:
            cells = [
                si_text(value) if name.endswith(("flops", "bytes")) else count_text(value)
                for name, value in list(each.costs().items())[:7]
            ]
            rows.append((each.name, *cells))
        caption = "train: last attempt or all rounds, all: whole run; times depend on the load"
        return Table(header, tuple(rows), tuple(range(1, 8)), caption)


def _letter(number: int) -> str:
    """Return A for 0, B for 1, and so on: AA comes after Z."""
    rest, last = divmod(number, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("A") + last)


def _independent_keys(keys: Sequence[str], runs: Sequence[EndedRun]) -> tuple[str, ...]:
    """Return the keys without those that follow from a choice in another column."""
    found: dict[str, tuple[str, tuple[bool, ...]]] = {}
    for key in keys:
        group = key.partition(".")[0]
        group_pattern = (group, tuple(key in run.settings for run in runs))
        is_implied = f"{group}.methods" in keys and key != f"{group}.methods"
        if differs_between(key, runs) or not (is_implied or group_pattern in found.values()):
            found[key] = group_pattern
    return tuple(found)


def _difference(subject: str, first: EndedRun, other: EndedRun) -> _PairedDifference:
    missing = partial(_PairedDifference, subject, other.name)
    for each in (first, other):
        if each.scores is None:
            return missing(missing_reason=f"{each.name}: {each.missing_reason}")
        if subject not in each.scores:
            return missing(missing_reason=f"{each.name}: no scores")
    assert first.scores is not None and other.scores is not None
    before, after = first.scores[subject], other.scores[subject]
    kinds = [(each.unit, each.chance, each.identifiers) for each in (before, after)]
    sizes = [each.weights[each.per] for each in (before, after)]  # such as the bytes of each
    if kinds[0] != kinds[1] or not (sizes[0] == sizes[1]).all():
        return missing(missing_reason="not paired: different documents")
    try:
        is_loss = before.unit == "nats"
        estimate = before.relative_forgetting(after) if is_loss else before.drop_in_points(after)
    except TritterError as error:
        return missing(missing_reason=str(error))
    side = (1 + Interval.CONFIDENCE) / 2
    bounds = [finite_or_none(each(side)) for each in (estimate.lower, estimate.upper)]
    if len(before) < Check.MIN_DOCUMENTS:  # as in the gate, no bound
        bounds = [None, None]
    sign = 1 if is_loss else -1
    lower, upper = [None if b is None else sign * b for b in bounds][::sign]
    value = finite_or_none(sign * estimate.value + 0.0)  # which makes 0 of -0
    if value is None or abs(value) > MAX_NUMBER:
        return missing(missing_reason="not finite")
    change = ScoreChange(value, lower, upper, in_points=not is_loss)
    return _PairedDifference(subject, other.name, change, len(before))


def _bounds(change: ScoreChange) -> tuple[str, str, str]:
    return _number(change.value), _number(change.lower), _number(change.upper)


def _number(value: float | None) -> str:
    return "" if value is None else repr(value)
