from typing import Annotated, Literal

import pytest
from pydantic import Field

from tritter.config.components import Reader
from tritter.errors import Problem, RequestError, raise_problems
from tritter.methods.growth.triggers import TRIGGERS, Plateau, Scheduled, Trigger
from tritter.options import Text, options, read_part
from tritter.targets import identity, plain


@options
class Thing:
    count: Annotated[int, Field(ge=1, le=9)] = 1
    rate: Annotated[float, Field(gt=0, lt=1)]
    is_on: bool = False
    mode: Literal["a-b", "off"] = "off"
    kind: Literal["x", "true"] = "true"
    label: Text | None = None
    places: tuple[Annotated[int, Field(ge=0)], ...] | None = None


GOOD: dict[str, object] = {"count": 2, "rate": 0.5, "is_on": True, "mode": "off"}
GOOD |= {"kind": "x", "label": "x", "places": [0, 3]}
KEYS = tuple(f"thing.{name}" for name in GOOD)


def read(**changes: object) -> tuple[Thing | None, list[Problem]]:
    reader = Reader(lambda: KEYS)
    return reader.read(Thing, GOOD | changes, prefix="thing"), reader.problems


def test_good_values_become_a_record() -> None:
    assert read()[0] == Thing(
        count=2, rate=0.5, is_on=True, mode="off", kind="x", label="x", places=(0, 3)
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"count": 3.0}, ("count", 3)),
        ({"places": None}, ("places", None)),
        ({"mode": "a_b"}, ("mode", "a-b")),
        ({"mode": False}, ("mode", "off")),  # YAML 1.1 reads `off` so
        ({"kind": True}, ("kind", "true")),
        ({"label": None}, ("label", None)),
    ],
)
def test_equal_spellings_are_accepted(change: dict, expected: tuple[str, object]) -> None:
    record, problems = read(**change)
    assert problems == []
    assert getattr(record, expected[0]) == expected[1]
    assert type(getattr(record, expected[0])) is type(expected[1])


@pytest.mark.parametrize(
    "change",
    [
        {"count": True},
        {"count": 2.5},
        {"count": "2"},
        {"count": 0},
        {"count": 10},
        {"count": None},
        {"count": float("inf")},
        {"count": 10**5000},
        {"count": object()},
        {"label": "\ud800"},
        {"rate": float("nan")},
        {"rate": 0},
        {"rate": 1.0},
        {"rate": "fast"},
        {"is_on": 1},
        {"is_on": "true"},
        {"mode": "c"},
        {"mode": True},
        {"label": 3},
        {"label": ""},
        {"places": 3},
        {"places": [1, "x"]},
        {"places": [-1]},
    ],
)
def test_wrong_values_are_named(change: dict) -> None:
    record, problems = read(**change)
    (key,) = change
    assert record is None
    assert len(problems) == 1
    assert (problems[0].key, problems[0].value) == (f"thing.{key}", change[key])
    assert str(problems[0]).startswith(f"thing.{key} = ")
    assert problems[0].reason.startswith("must be ")


def test_all_problems_are_reported_at_once() -> None:
    _, problems = read(count="x", rate="y", cuont=3)
    assert len(problems) == 3
    assert {problem.key: problem.nearest for problem in problems}["thing.cuont"] == "thing.count"


def test_a_missing_key_is_a_problem() -> None:
    reader = Reader(lambda: KEYS)
    raw = {name: value for name, value in GOOD.items() if name != "rate"}
    assert reader.read(Thing, raw, prefix="thing") is None
    assert str(reader.problems[0]).startswith("thing.rate: it is missing")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("count", "a whole number at least 1 and at most 9"),
        ("rate", "a number above 0 and below 1"),
        ("is_on", "true or false"),
        ("mode", "one of a-b, off"),
        ("label", "text (quote numbers), or null"),
        ("places", "a list of whole numbers at least 0, as in [a,b], or null"),
    ],
)
def test_what_is_allowed_is_said_in_words(name: str, expected: str) -> None:
    _, (problem,) = read(**{name: [["x"]]})
    assert problem.reason == f"must be {expected}"


def test_refusals_hold_their_problems() -> None:
    _, problems = read(count="x", rate="y")
    with pytest.raises(RequestError) as caught:
        raise_problems(problems)
    assert [problem.key for problem in caught.value.problems] == ["thing.count", "thing.rate"]
    assert str(caught.value).startswith("2 things are wrong with the request:\n  thing.count = x")


@options
class Own(Trigger):
    """A third-party class without growth."""

    patience: Annotated[int, Field(ge=1)] = 3

    def decide(self, view: object) -> dict[int, int]:
        return {}


@pytest.mark.parametrize(
    ("typed", "made", "recorded"),
    [
        ("plateau", Plateau(), "plateau"),
        ({"name": "plateau"}, Plateau(), "plateau"),
        (
            {"name": "schedule", "at": [3, 5]},
            Scheduled(at=(3, 5)),
            {"name": "schedule", "at": [3, 5]},
        ),
        (
            {"_target_": f"{__name__}.Own", "patience": 2},
            Own(patience=2),
            {"_target_": f"{__name__}.Own", "patience": 2, **identity(Own)},
        ),
    ],
)
def test_a_part_is_a_name_or_a_class_with_options(
    typed: object, made: Trigger, recorded: object
) -> None:
    part = read_part("growth.trigger", typed, TRIGGERS, base=Trigger)
    assert part == made and plain(part) == recorded
    assert read_part("growth.trigger", part, TRIGGERS, base=Trigger) is part


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("platau", "Did you mean plateau?"),
        (None, "allowed: percentile"),
        ({"name": "plateau", "treshold": 1}, "Did you mean threshold?"),
        ({"name": "plateau", "threshold": 0}, r"growth\.trigger\.threshold = 0: .*above 0"),
        ({"_target_": "tritter.options.options"}, "not a subclass of"),
    ],
)
def test_a_part_that_there_is_not_is_refused(typed: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_part("growth.trigger", typed, TRIGGERS, base=Trigger)


def test_methods_of_records_may_call_those_of_their_base() -> None:
    @options
    class Patient(Own):
        def decide(self, view: object) -> dict[int, int]:
            return super().decide(view)

    assert Patient().decide(None) == {}
