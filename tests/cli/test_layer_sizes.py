"""What the commands say of a model whose FFNs differ in width."""

from pathlib import Path

import pytest

from tests import oracle
from tests.cli.conftest import Run
from tests.oracle.sizes import SIZES, uneven, written
from tritter.core.models import load_model


@pytest.fixture
def folder(place: Path) -> Path:
    return written(uneven("llama", SIZES), place / "uneven")


def test_counts_are_of_the_live_model_and_of_the_files(run: Run, folder: Path) -> None:
    live = sum(parameter.numel() for parameter in load_model(folder).parameters())
    stock = oracle.stock(folder).num_parameters()
    content = run("inspect uneven --json").json
    assert content["parameters"]["total"] == live < stock == content["parameters_on_disk"]
    assert content["ffn_sizes"] == list(SIZES) and content["shapes"]["intermediate_size"] == 40
    lines = [" ".join(line.split()) for line in run("inspect uneven").out.splitlines()]
    assert "FFN of each layer 12 40 7" in lines
    (link,) = run("history uneven --json").json["chain"]
    assert (link["parameters"], link["parameters_on_disk"]) == (live, stock)


def test_the_map_of_an_expansion_on_top_is_rebuilt(run: Run, folder: Path) -> None:
    grown = run("expand --checkpoint uneven --output grown --method llama-pro,width --json").json
    assert grown["parameters"]["after"] < grown["parameters_on_disk"]["after"]
    last = run("inspect grown --json").json["last_map"]
    assert last["problem"] is None
    gates = [row for row in last["rows"] if row["kind"] == "ffn.gate"]
    assert {tuple(row["target_shape"]) for row in gates} == {(24, 48), (80, 48), (14, 48)}
    assert run("history grown --verify").code == 0


def test_an_export_has_no_widths(run: Run, folder: Path) -> None:
    made = run("export --checkpoint uneven --output out --format hf --dtype float32 --json").json
    assert made["parameters"] == oracle.stock(folder.parent / "out").num_parameters()
    assert run("inspect out --json").json["ffn_sizes"] == []


def test_moe_is_refused_with_the_way_out(run: Run, folder: Path) -> None:
    result = run("expand --checkpoint uneven --output sparse --method moe")
    assert result.code == 2 and "pad the FFNs with export --format hf" in result.err
