"""What summary.json says of growth: what it has to be, and read once for all that show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Required

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.report.rows import Count, Number

_MOST_LAYERS = 1024
_Width = Annotated[int, Field(ge=1, le=10**9)]
_Widths = Annotated[list[_Width], Field(min_length=1, max_length=_MOST_LAYERS)]


class _Event(TypedDict, total=False):
    step: Required[Count]
    layer: Required[Count]
    neurons: Required[_Width]
    born: Required[Count]
    replaced: Count
    died: Count
    pressure: Number | None
    function_change: Number | None
    parameters: Count | None
    flops: Number | None


class _BeforeAndAfter(TypedDict):
    before: _Widths
    after: _Widths


class _Map(TypedDict):
    steps: list[Count]
    neurons: list[list[_Width]]
    pressure: list[list[Number | None]]


class _Growth(TypedDict, total=False):
    events: Required[Annotated[list[_Event], Field(max_length=100_000)]]
    born: Required[Count]
    neurons: Required[_BeforeAndAfter]
    options: dict[str, Any]
    replaced: Count
    died: Count
    checks: Count
    parameters: dict[str, Count]
    young: Count | None
    map: _Map | None
    function_change: Number | None
    update_norms: dict[str, Number | None] | None


def _consistent(growth: _Growth) -> _Growth:
    """Refuse lists of lengths that do not belong together, and a time that runs backwards."""
    number = len(growth["neurons"]["before"])
    if len(growth["neurons"]["after"]) != number:
        raise ValueError("neurons after are of another number of layers than those before")
    steps = [event["step"] for event in growth["events"]]
    if steps != sorted(steps):
        raise ValueError("the steps of its events do not ascend")
    if any(event["layer"] >= number for event in growth["events"]):
        raise ValueError(f"an event is in a layer that is none of {number}")
    if (seen := growth.get("map")) is not None:
        if any(later <= earlier for earlier, later in pairwise(seen["steps"])):
            raise ValueError("the steps of its map do not ascend")
        for name, rows in (("neurons", seen["neurons"]), ("pressure", seen["pressure"])):
            if len(rows) != len(seen["steps"]) or any(len(row) != number for row in rows):
                raise ValueError(f"{name} of its map are not of {number} layers at each step")
    return growth


GrowthSummary = Annotated[_Growth, AfterValidator(_consistent)]


@dataclass(frozen=True, slots=True)
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

    step: int
    layer: int
    neurons: int
    born: int
    replaced: int
    died: int
    pressure: float | None
    function_change: float | None
    parameters: int | None
    flops: float | None

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> "GrowthEvent":
        """Return one that a summary holds."""
        return cls(
            step=event["step"],
            layer=event["layer"],
            neurons=event["neurons"],
            born=event["born"],
            replaced=event.get("replaced", 0),
            died=event.get("died", 0),
            pressure=event.get("pressure"),
            function_change=event.get("function_change"),
            parameters=event.get("parameters"),
            flops=event.get("flops"),
        )


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
        return max((e.function_change for e in self.events if e.function_change is not None),
                   default=None)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GrowthRecord:
    """A run's growth.

    Args:
        options: of `growth`, as they were asked for.
        checks: how often the trigger was asked.
        before: neurons of each layer; `after` likewise.
        parameters_before: of the model that grew; None: not known.
        young: neurons that were not mature at the end.
        steps: of the checks.
        pressure: at each check, of each layer.
        young_norm: mean norm of a young neuron's update; `old_norm` likewise.
    """

    options: Mapping[str, Any]
    events: tuple[GrowthEvent, ...]
    born: int
    replaced: int
    died: int
    checks: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    parameters_before: int | None
    parameters_after: int | None
    young: int | None
    steps: tuple[int, ...]
    pressure: Sequence[Sequence[float | None]]
    young_norm: float | None
    old_norm: float | None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "GrowthRecord | None":
        """Return what a summary says of growth; None of a run that was not to grow."""
        growth = summary.get("growth")
        if not growth:
            return None
        parameters, norms = growth.get("parameters") or {}, growth.get("update_norms") or {}
        seen = growth.get("map") or {"steps": (), "pressure": ()}
        return cls(
            options=growth.get("options") or {},
            events=tuple(map(GrowthEvent.of, growth["events"])),
            born=growth["born"],
            replaced=growth.get("replaced", 0),
            died=growth.get("died", 0),
            checks=growth.get("checks", len(seen["steps"])),
            before=tuple(growth["neurons"]["before"]),
            after=tuple(growth["neurons"]["after"]),
            parameters_before=parameters.get("before"),
            parameters_after=parameters.get("after"),
            young=growth.get("young"),
            steps=tuple(seen["steps"]),
            pressure=seen["pressure"],
            young_norm=norms.get("young"),
            old_norm=norms.get("old"),
        )

    @property
    def name(self) -> str:
        """Its trigger and its initialiser."""
        return "+".join(_name(self.options.get(key)) for key in ("trigger", "initialiser"))

    @property
    def trigger(self) -> str:
        return _name(self.options.get("trigger"))

    @property
    def event_steps(self) -> tuple[int, ...]:
        """Steps after which it grew, each once."""
        return tuple(dict.fromkeys(event.step for event in self.events))

    @property
    def layers(self) -> tuple[GrownLayer, ...]:
        """The layers that grew, from the first one on."""
        held: dict[int, list[GrowthEvent]] = {}
        for event in self.events:
            held.setdefault(event.layer, []).append(event)
        return tuple(
            GrownLayer(layer, self.before[layer], self.after[layer], tuple(held[layer]))
            for layer in sorted(held)
        )


def _name(option: object) -> str:
    """Return what an option is called: by a name of ours, or the class of somebody's own."""
    if isinstance(option, Mapping):
        option = str(option.get("_target_", "")).rpartition(".")[2]
    return str(option or "?")
