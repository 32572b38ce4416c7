"""Kinds of state that Tritter has not: registered by who leaves them, followed by everyone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tritter.checkpoints.location import check_replaceable
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import LlamaPro, Width
from tritter.core.parameter_map import Quantity
from tritter.core.parameter_map.carry import STATE_KINDS, StateKind, register
from tritter.errors import RequestError, TritterError
from tritter.storage.records import signed_text
from tritter.storage.writer import TensorStream
from tritter.transform import expand

RULE = StateKind(Quantity.SQUARED_GRADIENT, "zero")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with `sigma` and the Fisher; afterwards nobody has registered sigma."""
    model = oracle.tiny_llama()
    folder = oracle.saved(model, tmp_path / "source")
    values = {name: p.detach().square() for name, p in model.named_parameters()}
    register("sigma", RULE)
    try:
        kinds = {kind: TensorStream.of(values.items()) for kind in ("sigma", "fisher")}
        write_state(folder, kinds, step=3)
    finally:
        del STATE_KINDS["sigma"]
    return folder


def head_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state/state.json").read_text())


def test_a_kind_follows_expansions_and_copies_without_who_left_it(
    source: Path, tmp_path: Path
) -> None:
    assert "sigma" not in STATE_KINDS
    specs = [Width(init="net2net", intermediate_size=60), LlamaPro()]
    result = expand(source, tmp_path / "grown", specs)
    state = State.read(result.folder)
    assert state is not None and state.rules["sigma"] == RULE
    sigma, fisher = (dict(state.kinds[kind]) for kind in ("sigma", "fisher"))
    assert sigma.keys() == fisher.keys()
    assert all(torch.equal(sigma[name], fisher[name]) for name in sigma)
    stated = {"quantity": "squared_gradient", "new_entries": "zero"}
    assert head_of(source)["rules"] == head_of(result.folder)["rules"] == {"sigma": stated}
    assert "state/sigma/model.safetensors" in result.lineage.file_digests
    check_replaceable(result.folder)
    (tmp_path / "copy").mkdir()
    state.write(tmp_path / "copy")
    copied = State.read(tmp_path / "copy")
    assert copied is not None and copied.rules == state.rules


def test_a_folder_of_an_unknown_kind_beside_a_plain_model_is_not_replaced(source: Path) -> None:
    with pytest.raises(RequestError, match="state/sigma/"):
        check_replaceable(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": {}}, "names an unknown kind of state without a mapping rule: 'sigma'"),
        ({"rules": []}, r"rules = \[\]; must be"),
        (
            {"rules": {"sigma": {"quantity": "noise", "new_entries": "zero"}}},
            "rules.sigma.quantity = 'noise'; must be 'weight'",
        ),
        ({"rules": {"sigma": {"quantity": "penalty", "new_entries": []}}}, "new_entries = "),
        ({"rules": {"sigma": "zero"}}, "rules.sigma = 'zero'"),
        (
            {
                "kinds": ["fisher"],
                "rules": {"fisher": {"quantity": "weight", "new_entries": "zero"}},
            },
            "the rule of fisher differs",
        ),
        (
            {
                "kinds": ["../source"],
                "rules": {"../source": {"quantity": "weight", "new_entries": "zero"}},
            },
            r"without a mapping rule: '\.\./source'",
        ),
    ],
)
def test_a_rule_that_is_none_is_refused(
    source: Path, changes: dict[str, Any], message: str
) -> None:
    path = source / "state/state.json"
    path.write_text(signed_text({**head_of(source), **changes}))
    with pytest.raises(TritterError, match=message):
        State.read(source)


@pytest.mark.parametrize("name", ["", "Omega", "../sigma", "sigma/x", "state.json", "o" * 61])
def test_a_kind_has_a_name_that_is_a_folders(name: str) -> None:
    with pytest.raises(TritterError, match="is not a kind of state"):
        register(name, RULE)


def test_a_kind_has_one_rule() -> None:
    register("fisher", STATE_KINDS["fisher"])
    with pytest.raises(TritterError, match="fisher is already registered with a different rule"):
        register("fisher", StateKind(Quantity.WEIGHT, "zero"))
