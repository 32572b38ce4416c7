from dataclasses import dataclass, field

import pytest

from tritter.config.reading import Reader


@dataclass(frozen=True, slots=True)
class Thing:
    count: int = field(default=1, metadata={"minimum": 1, "maximum": 9})
    rate: float = field(default=0.1, metadata={"above": 0, "below": 1})
    is_on: bool = False
    mode: str = field(default="a", metadata={"choices": ("a-b", "off")})
    kind: str = field(default="true", metadata={"choices": ("x", "true")})
    label: str | None = None
    places: tuple[int, ...] | None = field(default=None, metadata={"minimum": 0})


GOOD: dict[str, object] = {"count": 2, "rate": 0.5, "is_on": True, "mode": "off"}
GOOD |= {"kind": "x", "label": "x", "places": [0, 3]}
KEYS = tuple(f"thing.{name}" for name in GOOD)


def read(**changes: object) -> tuple[Thing | None, list[str]]:
    reader = Reader(KEYS)
    return reader.read(Thing, GOOD | changes, prefix="thing"), reader.problems


def test_good_values_become_a_record() -> None:
    assert read()[0] == Thing(2, 0.5, True, "off", "x", "x", (0, 3))


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
    assert problems[0].startswith(f"thing.{key} = ")
    assert "allowed is" in problems[0]


def test_all_problems_are_reported_at_once() -> None:
    _, problems = read(count="x", rate="y", cuont=3)
    assert len(problems) == 3
    assert any("Did you mean thing.count?" in problem for problem in problems)


def test_a_missing_key_is_a_problem() -> None:
    reader = Reader(KEYS)
    raw = {name: value for name, value in GOOD.items() if name != "rate"}
    assert reader.read(Thing, raw, prefix="thing") is None
    assert "thing.rate is missing" in reader.problems[0]
