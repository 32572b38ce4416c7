"""What summary.json says of LoRA experts: what it has to be, and read once for all that show it.

Any part of it may be missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from statistics import fmean
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.report.rows import Count, Number

BASE = "base"  # the gate of a base without an adapter
_MOST = 1000  # experts, and domains
_MOST_EVENTS = 100_000
_Shares = dict[str, Number | None]
_Series = Annotated[list[Number | None], Field(max_length=_MOST_EVENTS)]
_Steps = Annotated[list[Count], Field(max_length=_MOST_EVENTS)]
_ENDS = ("evicted", "merged")
# Kind of an event → what an expert is from then on
_STATES = {"spawned": "young", "mature": "mature", "frozen": "frozen"} | {e: e for e in _ENDS}


class _Spawn(TypedDict, total=False):
    step: Count | None
    task: Count | None
    expert: str | None
    skill: str | None
    domain: str | None
    similarity: _Shares | None
    score: Number | None
    threshold: Number | None
    batches: Count | None
    samples: Count | None


class _Event(TypedDict, total=False):
    step: Count | None
    task: Count | None
    kind: str | None
    expert: str | None
    gone: str | None
    why: str | None


class _Gates(TypedDict, total=False):
    steps: _Steps
    gates: Annotated[dict[str, _Series], Field(max_length=_MOST)]


class _Ranks(TypedDict, total=False):
    steps: _Steps
    ranks: Annotated[dict[str, _Series], Field(max_length=_MOST)]


class _Parameters(TypedDict, total=False):
    base: Count | None
    trainable: Count | None
    share: Number | None


class _Routing(TypedDict, total=False):
    top_k: Count | None
    temperature: Number | None


class _Experts(TypedDict, total=False):
    kind: str | None
    number: Count | None
    names: Annotated[list[str], Field(max_length=_MOST)] | None
    spawned: Annotated[list[_Spawn], Field(max_length=_MOST_EVENTS)] | None
    events: Annotated[list[_Event], Field(max_length=_MOST_EVENTS)] | None
    usage: Annotated[dict[str, _Shares], Field(max_length=_MOST)] | None
    usage_over_time: _Gates | None
    ranks: dict[str, Count | None] | None
    ranks_over_time: _Ranks | None
    parameters: _Parameters | None
    batches: dict[str, Count | None] | None
    routing: _Routing | None


def _consistent(experts: _Experts) -> _Experts:
    """Refuse courses whose parts are not as long as their steps, or whose time runs backwards."""
    courses: tuple[tuple[str, Mapping[str, Any], str], ...] = (
        ("usage_over_time", experts.get("usage_over_time") or {}, "gates"),
        ("ranks_over_time", experts.get("ranks_over_time") or {}, "ranks"),
    )
    for name, course, values in courses:
        steps = course.get("steps", [])
        if any(later < earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"the steps of {name} do not ascend")
        if any(len(each) != len(steps) for each in course.get(values, {}).values()):
            raise ValueError(f"{name} has not one number for each of its {len(steps)} steps")
    return experts


ExpertsSummary = Annotated[_Experts, AfterValidator(_consistent)]


@dataclass(frozen=True, slots=True)
class Spawn:
    """An expert that was spawned.

    Args:
        step: of the run, counted over all tasks.
        domain: of the text that was being trained on.
        similarity: known skill → how like it the batches were.
        score: their novelty, and the `threshold` that it passed.
        batches: that the decision took.
    """

    expert: str
    step: int | None = None
    domain: str | None = None
    similarity: Mapping[str, float | None] = field(default_factory=dict)
    score: float | None = None
    threshold: float | None = None
    batches: int | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class ExpertEvent:
    """What happened to an expert, and why.

    Args:
        gone: the one that is no more, where another went on for both.
    """

    step: int | None
    kind: str
    expert: str
    why: str
    gone: str | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """A number of each expert over the steps; None before it exists and where it is not known."""

    steps: Sequence[int]
    values: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One expert: what made it, and what became of it.

    Args:
        usage: its mean gate over all domains.
        state: young, mature, frozen, evicted or merged; nothing where no event says.
    """

    name: str
    spawn: Spawn | None
    rank: int | None
    usage: float | None
    state: str


@dataclass(frozen=True, slots=True)
class ExpertsRecord:
    """A run's LoRA experts.

    Args:
        number: of adapters at the end.
        names: of those that are there at the end, in the order of their gates.
        usage: domain → expert → mean gate on held-out text.
        ranks: expert → rank at the end.
        base: parameters of the frozen base; `trainable` those of the adapters and the router.
        share: of the trainable among all.
        batches: what novelty said of the batches → how many.
    """

    kind: str
    number: int
    names: tuple[str, ...]
    spawned: tuple[Spawn, ...]
    events: tuple[ExpertEvent, ...]
    usage: Mapping[str, Mapping[str, float | None]]
    gates: Course
    ranks: Mapping[str, int | None]
    ranks_over_time: Course
    base: int | None
    trainable: int | None
    share: float | None
    batches: Mapping[str, int]
    top_k: int | None
    temperature: float | None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "ExpertsRecord | None":
        """Return what a summary says of LoRA experts; None of a run that has none."""
        held = summary.get("experts")
        if not held:
            return None
        usage = {name: shares or {} for name, shares in (held.get("usage") or {}).items()}
        ranks, sizes = held.get("ranks") or {}, held.get("parameters") or {}
        routing = held.get("routing") or {}
        found = dict.fromkeys(chain(*usage.values(), ranks))
        names = tuple(dict.fromkeys(held.get("names") or found))
        number = held.get("number")
        return cls(
            kind=held.get("kind") or "?",
            number=len(names) - (BASE in names) if number is None else number,
            names=names,
            spawned=tuple(map(_spawn, held.get("spawned") or ())),
            events=tuple(map(_event, held.get("events") or ())),
            usage=usage,
            gates=_course(held.get("usage_over_time"), "gates"),
            ranks=ranks,
            ranks_over_time=_course(held.get("ranks_over_time"), "ranks"),
            base=sizes.get("base"),
            trainable=sizes.get("trainable"),
            share=sizes.get("share"),
            batches={kind: n for kind, n in (held.get("batches") or {}).items() if n is not None},
            top_k=routing.get("top_k"),
            temperature=routing.get("temperature"),
        )

    @property
    def rows(self) -> tuple[ExpertRow, ...]:
        """Those that are there, and those that were and are gone."""
        gone = (spawn.expert for spawn in self.spawned)
        return tuple(self._row(name) for name in dict.fromkeys((*self.names, *gone)))

    def mean_usage(self, name: str) -> float | None:
        """Return the mean gate of an expert over the domains that have one for it."""
        return _mean(shares.get(name) for shares in self.usage.values())

    @property
    def by_usage(self) -> tuple[str, ...]:
        """The experts that are there, most used first."""
        return tuple(sorted(self.names, key=lambda name: -(self.mean_usage(name) or 0.0)))

    @property
    def similarities(self) -> tuple[tuple[str, Mapping[str, float | None]], ...]:
        """Spawned expert and its similarity to what was known, where some is recorded."""
        return tuple((each.expert, each.similarity) for each in self.spawned if each.similarity)

    @property
    def refused(self) -> tuple[ExpertEvent, ...]:
        """Spawns that were refused."""
        return tuple(event for event in self.events if event.kind == "refused")

    def _row(self, name: str) -> ExpertRow:
        # A name may come again after an eviction: the last is the one that is there
        spawn = next((each for each in reversed(self.spawned) if each.expert == name), None)
        state = "" if spawn is None else "young"
        for event in self.events:
            if name == (event.gone or event.expert):
                state = _STATES.get(event.kind, state)
        if name in self.names and state in _ENDS:
            state = ""
        return ExpertRow(name, spawn, self.ranks.get(name), self.mean_usage(name), state)


def _spawn(held: Mapping[str, Any]) -> Spawn:
    return Spawn(
        expert=held.get("expert") or "?",
        step=held.get("step"),
        domain=held.get("domain"),
        similarity=held.get("similarity") or {},
        score=held.get("score"),
        threshold=held.get("threshold"),
        batches=held.get("batches"),
        samples=held.get("samples"),
    )


def _event(held: Mapping[str, Any]) -> ExpertEvent:
    kind, expert = (held.get(name) or "?" for name in ("kind", "expert"))
    return ExpertEvent(held.get("step"), kind, expert, held.get("why") or "", held.get("gone"))


def _course(held: Mapping[str, Any] | None, of: str) -> Course:
    held = held or {}
    return Course(held.get("steps") or (), held.get(of) or {})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
