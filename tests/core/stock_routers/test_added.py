"""`state/router.json`: the schedule of the offset, and invalid files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import oracle
from tests.core.stock_routers.models import tiny_moe
from tritter.core.stock_routers import AddedExperts, RouterControl, _router_offset
from tritter.errors import TritterError
from tritter.storage.records import signed_text

ADDED = AddedExperts(experts=(4, 5))


def test_the_offset_rises_from_closed_to_open() -> None:
    offsets = [_router_offset(step, anneal_steps=4) for step in range(6)]
    assert offsets == [-math.inf, -15, -10, -5, 0, 0]
    assert _router_offset(1, anneal_steps=10**6) == pytest.approx(-20, abs=1e-3)


@pytest.mark.parametrize("added", [ADDED, ADDED.at(3, anneal_steps=8), ADDED.at(8, anneal_steps=8)])
def test_round_trip(tmp_path: Path, added: AddedExperts) -> None:
    added.write(tmp_path)
    text = (tmp_path / "state" / "router.json").read_text()
    plain = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert plain["new_experts"] == [4, 5] and plain["format_version"] == 1
    assert AddedExperts.read(tmp_path) == added


def test_settled_when_open() -> None:
    assert not ADDED.is_settled and not ADDED.at(7, anneal_steps=8).is_settled
    assert ADDED.at(8, anneal_steps=8).is_settled
    assert ADDED.num_settled_experts == 4


def test_no_file_no_experts(tmp_path: Path) -> None:
    assert AddedExperts.read(tmp_path) is None


def test_it_is_set_in_a_live_model() -> None:
    model = tiny_moe("mixtral", num_local_experts=6)
    ADDED.at(1, anneal_steps=2).apply(model)
    routing = RouterControl.of(model)
    assert routing is not None and routing.offset(2).tolist() == [0, 0, 0, 0, -10, -10]


def test_a_model_that_has_no_such_experts() -> None:
    with pytest.raises(TritterError, match="the model has none"):
        ADDED.apply(oracle.tiny_llama())
    with pytest.raises(TritterError, match="does not match the model"):
        ADDED.apply(tiny_moe("mixtral"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format_version": 2}, "format_version 2; this Tritter reads 1"),
        ({"new_experts": []}, "consecutive"),
        ({"new_experts": [4, 6]}, "consecutive"),
        ({"new_experts": ["4"]}, "new_experts"),
        ({"new_experts": 4}, "new_experts"),
        ({"offset": 1.0}, "offset"),
        ({"offset": "-infinity"}, "offset"),
        ({"offset": True}, "offset"),
        ({"step": -1}, "step"),
        ({"anneal_steps": 2.5}, "anneal_steps"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    ADDED.write(tmp_path)
    path = tmp_path / "state" / "router.json"
    path.write_text(signed_text({**json.loads(path.read_text()), **change}))
    with pytest.raises(TritterError, match=word) as error:
        AddedExperts.read(tmp_path)
    assert "router.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "[" * 2])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    ADDED.write(tmp_path)
    (tmp_path / "state" / "router.json").write_text(text)
    with pytest.raises(TritterError, match=r"router\.json"):
        AddedExperts.read(tmp_path)
