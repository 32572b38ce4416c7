"""What summary.json of a run has to be, and its records of growth and LoRA experts.

It may come from anywhere and from any version: it may hold more than is read here, and less.
Numbers are bounded by what drawing and adding them can bear.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from statistics import fmean
from typing import Annotated, Any, Literal, Required, TypeVar, dataclass_transform

from pydantic import Field
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.report.bounds import Count, Number
from tritter.report.matrix import MatrixSummary
from tritter.storage.records import validated

BASE = "base"  # the gate of a base without an adapter
_MOST = 1000  # experts, and domains
_MOST_EVENTS = 100_000
_MOST_LAYERS = 1024

Kind = TypeVar("Kind")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def _part(kind: type[Kind]) -> type[Kind]:
    """Make a class a part of a summary: frozen, by keyword only; other keys are passed over."""
    kind.__pydantic_config__ = {"extra": "ignore", "strict": True}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(kind)


# Growth

_Width = Annotated[int, Field(ge=1, le=10**9)]
_Widths = Annotated[tuple[_Width, ...], Field(min_length=1, max_length=_MOST_LAYERS)]


@_part
class GrowthEvent:
    """One layer that grew after a step.

    Args:
        neurons: the layer's, afterwards.
        died: found dead, and left as they are.
        pressure: of the layer, as its trigger was shown it.
        function_change: of the logits, in their standard deviation.
        parameters: of the whole model, afterwards.
        flops: of the training, until then.
    """

    step: Count
    layer: Count
    neurons: _Width
    born: Count
    replaced: Count = 0
    died: Count = 0
    pressure: Number | None = None
    function_change: Number | None = None
    parameters: Count | None = None
    flops: Number | None = None


@dataclass(frozen=True, slots=True)
class GrownLayer:
    """What all events made of one layer."""

    layer: int
    before: int
    after: int
    events: tuple[GrowthEvent, ...]

    @property
    def born(self) -> int:
        return sum(event.born for event in self.events)

    @property
    def replaced(self) -> int:
        return sum(event.replaced for event in self.events)

    @property
    def died(self) -> int:
        return sum(event.died for event in self.events)

    @property
    def function_change(self) -> float | None:
        """The largest of its events."""
        known = (e.function_change for e in self.events if e.function_change is not None)
        return max(known, default=None)


@_part
class _Neurons:
    before: _Widths
    after: _Widths


@_part
class _GrowthMap:
    steps: tuple[Count, ...] = ()
    neurons: tuple[tuple[_Width, ...], ...] = ()
    pressure: tuple[tuple[Number | None, ...], ...] = ()


@_part
class GrowthRecord:
    """A run's growth.

    Args:
        options: of `growth`, as they were asked for.
        advice: of its trigger, what to try where nothing grew.
        checks: how often the trigger was asked.
        neurons: of each layer, before and after.
        parameters: of the model that grew, before and after.
        young: neurons that were not mature at the end.
        map: pressure and neurons of each layer at each check.
        update_norms: mean norm of a `young` and an `old` neuron's update.
    """

    events: Annotated[tuple[GrowthEvent, ...], Field(max_length=_MOST_EVENTS)]
    born: Count
    neurons: _Neurons
    options: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
    replaced: Count = 0
    died: Count = 0
    checks: Count = 0
    parameters: Mapping[str, Count] = field(default_factory=dict)
    young: Count | None = None
    map: _GrowthMap | None = None
    function_change: Number | None = None
    update_norms: Mapping[str, Number | None] | None = None

    def __post_init__(self) -> None:
        number = len(self.before)
        if len(self.after) != number:
            raise ValueError("neurons after are of another number of layers than those before")
        steps = [event.step for event in self.events]
        if steps != sorted(steps):
            raise ValueError("the steps of its events do not ascend")
        if any(event.layer >= number for event in self.events):
            raise ValueError(f"an event is in a layer that is none of {number}")
        if any(later <= earlier for earlier, later in pairwise(self.steps)):
            raise ValueError("the steps of its map do not ascend")
        seen = self.map or _GrowthMap()
        for name, rows in (("neurons", seen.neurons), ("pressure", seen.pressure)):
            if len(rows) != len(seen.steps) or any(len(row) != number for row in rows):
                raise ValueError(f"{name} of its map are not of {number} layers at each step")

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "GrowthRecord | None":
        """Return what a summary says of growth; None of a run that was not to grow."""
        found = summary.get("growth")
        return validated(found, cls, what="it is no summary of a run: growth") if found else None

    @property
    def before(self) -> tuple[int, ...]:
        """Neurons of each layer."""
        return self.neurons.before

    @property
    def after(self) -> tuple[int, ...]:
        return self.neurons.after

    @property
    def parameters_before(self) -> int | None:
        return self.parameters.get("before")

    @property
    def parameters_after(self) -> int | None:
        return self.parameters.get("after")

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the checks."""
        return () if self.map is None else self.map.steps

    @property
    def pressure(self) -> Sequence[Sequence[float | None]]:
        """Pressure of each layer, at each check."""
        return () if self.map is None else self.map.pressure

    @property
    def young_norm(self) -> float | None:
        return (self.update_norms or {}).get("young")

    @property
    def old_norm(self) -> float | None:
        return (self.update_norms or {}).get("old")

    @property
    def name(self) -> str:
        """Its trigger and its initialiser."""
        return "+".join(_name(self.options.get(key)) for key in ("trigger", "initialiser"))

    @property
    def event_steps(self) -> tuple[int, ...]:
        """Steps after which it grew, each once."""
        return tuple(dict.fromkeys(event.step for event in self.events))

    @property
    def layers(self) -> tuple[GrownLayer, ...]:
        """The layers that grew, from the first one on."""
        of_layer: dict[int, list[GrowthEvent]] = {}
        for event in self.events:
            of_layer.setdefault(event.layer, []).append(event)
        return tuple(
            GrownLayer(layer, self.before[layer], self.after[layer], tuple(of_layer[layer]))
            for layer in sorted(of_layer)
        )


def _name(option: object) -> str:
    """Return what an option is called: by a name of ours, or the class of somebody's own."""
    if isinstance(option, Mapping):
        option = option.get("name") or str(option.get("_target_", "")).rpartition(".")[2]
    return str(option or "?")


# LoRA experts: any part may be missing, or null

_ENDS = ("evicted", "merged")
# Kind of an event → what an expert is from then on
_STATES = {"spawned": "young", "mature": "mature", "frozen": "frozen"} | {e: e for e in _ENDS}


_Shares = dict[str, Number]
_Rows = Annotated[
    Mapping[str, Annotated[tuple[Number | None, ...], Field(max_length=_MOST_EVENTS)]],
    Field(max_length=_MOST),
]


@_part
class Spawn:
    """An expert that was spawned.

    Args:
        step: of the run, counted over all tasks.
        domain: of the text that was being trained on.
        similarity: known skill → how like it the batches were.
        score: their novelty, and the `threshold` that it passed.
        batches: that the decision took.
    """

    expert: str = "?"
    step: Count | None = None
    domain: str | None = None
    similarity: _Shares = field(default_factory=dict)
    score: Number | None = None
    threshold: Number | None = None
    batches: Count | None = None
    samples: Count | None = None


@_part
class ExpertEvent:
    """What happened to an expert, and why.

    Args:
        gone: the one that is no more, where another went on for both.
    """

    step: Count | None = None
    kind: str = "?"
    expert: str = "?"
    why: str = ""
    gone: str | None = None


@_part
class Course:
    """A number of each expert over the steps; None before it exists and where it is not known."""

    steps: Annotated[tuple[Count, ...], Field(max_length=_MOST_EVENTS)] = ()
    gates: _Rows = field(default_factory=dict)
    ranks: _Rows = field(default_factory=dict)

    @property
    def values(self) -> Mapping[str, Sequence[float | None]]:
        """The gates, or the ranks."""
        return self.gates or self.ranks


@_part
class _Parameters:
    base: Count | None = None
    trainable: Count | None = None
    share: Number | None = None


@_part
class _Routing:
    top_k: Count | None = None
    temperature: Number | None = None


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


_MOST_OF_THEM = Field(max_length=_MOST_EVENTS)


@_part
class ExpertsRecord:
    """A run's LoRA experts.

    Args:
        number: of adapters at the end.
        names: of the gates at the end, in their order.
        usage: domain → expert → mean gate on held-out text.
        ranks: expert → rank at the end.
        parameters: of the frozen base, and of the adapters and the router.
        batches: what novelty said of the batches → how many.
    """

    kind: str = "?"
    number: Count | None = None
    names: Annotated[tuple[str, ...], Field(max_length=_MOST)] = ()
    spawned: Annotated[tuple[Spawn, ...], _MOST_OF_THEM] = ()
    events: Annotated[tuple[ExpertEvent, ...], _MOST_OF_THEM] = ()
    usage: Annotated[dict[str, _Shares], Field(max_length=_MOST)] = field(default_factory=dict)
    usage_over_time: Course = field(default_factory=Course)
    ranks: dict[str, Count] = field(default_factory=dict)
    ranks_over_time: Course = field(default_factory=Course)
    parameters: _Parameters = field(default_factory=_Parameters)
    batches: dict[str, Count] = field(default_factory=dict)
    routing: _Routing = field(default_factory=_Routing)

    def __post_init__(self) -> None:
        courses = (
            ("usage_over_time", self.usage_over_time),
            ("ranks_over_time", self.ranks_over_time),
        )
        for name, course in courses:
            if any(later < earlier for earlier, later in pairwise(course.steps)):
                raise ValueError(f"the steps of {name} do not ascend")
            if any(len(each) != len(course.steps) for each in course.values.values()):
                number = len(course.steps)
                raise ValueError(f"{name} has not one number for each of its {number} steps")

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "ExpertsRecord | None":
        """Return what a summary says of LoRA experts; None of a run that has none."""
        found = summary.get("experts")
        if not found:
            return None
        what = "it is no summary of a run: experts"
        read = validated(_without_nulls(found), cls, what=what)
        names = read.names or tuple(dict.fromkeys(chain(*read.usage.values(), read.ranks)))
        number = len(names) - (BASE in names) if read.number is None else read.number
        return replace(read, names=names, number=number)

    @property
    def gates(self) -> Course:
        return self.usage_over_time

    @property
    def base(self) -> int | None:
        """Parameters of the frozen base."""
        return self.parameters.base

    @property
    def trainable(self) -> int | None:
        """Parameters of the adapters and the router."""
        return self.parameters.trainable

    @property
    def share(self) -> float | None:
        """Share of the trainable parameters among all."""
        return self.parameters.share

    @property
    def top_k(self) -> int | None:
        return self.routing.top_k

    @property
    def temperature(self) -> float | None:
        return self.routing.temperature

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


def _without_nulls(plain: object) -> object:
    """Return plain values without keys whose value is null: they are as good as missing."""
    if isinstance(plain, Mapping):
        return {key: _without_nulls(value) for key, value in plain.items() if value is not None}
    return [_without_nulls(item) for item in plain] if isinstance(plain, list | tuple) else plain


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# The summary

_Costs = dict[str, Number | None]


class _Score(TypedDict, total=False):
    loss: Number | None
    loss_per_byte: Number | None
    standard_error: Number | None
    accuracy: Number | None
    accuracy_standard_error: Number | None


_Scores = dict[str, _Score]


class _Check(TypedDict, total=False):
    check: Required[str]
    verdict: Required[str]
    subject: str
    detail: str
    value: Number | None
    bound: Number | None
    interval: tuple[Number | None, Number | None] | None


class _Task(TypedDict):
    domains: list[str]
    final: _Scores
    steps: Count


class _Trained(TypedDict, total=False):
    final: Required[_Scores]
    status: str
    expansion: list[str]
    overrides: list[str]
    expanded: _Scores | None
    baseline: _Scores
    gate: list[_Check]
    steps: Count
    tasks: list[_Task]
    flops: Number | _Costs
    seconds: Number | _Costs


class _Sample(TypedDict, total=False):
    domain: str
    prompt: str
    before: str
    after: str


class _Domains(TypedDict, total=False):
    old: list[str]
    new: list[str]


class _Summary(TypedDict, total=False):
    status: Required[Literal["kept", "rolled_back", "undecided", "ungated"]]
    domains: Required[_Domains]
    baseline: Required[_Scores]
    attempts: Required[list[_Trained]]
    expansion: list[str]
    forgetting: list[str]
    seed: int
    expanded: _Scores | None
    control: _Trained
    rounds: list[_Trained]
    tasks: list[_Task]
    flops: _Costs
    seconds: _Costs
    parameters: dict[str, Count]
    samples: list[_Sample]
    notes: list[str]
    growth: GrowthRecord | None
    experts: ExpertsRecord | None
    matrix: MatrixSummary | None


def check_summary(summary: Mapping[str, Any]) -> None:
    """Refuse what is no summary of a run; it may have more than is read here, and less.

    Raises:
        TritterError: says where, and what is wrong.
    """
    plain = {**summary, "experts": _without_nulls(summary.get("experts"))}
    validated(plain, _Summary, what="it is no summary of a run")
