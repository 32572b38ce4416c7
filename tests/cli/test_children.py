"""`tritter expand --method moe --experts-from A,B,C`: what is written, printed and refused."""

from pathlib import Path

import pytest

from tests.cli.conftest import Run, snapshot
from tests.oracle.children import child
from tritter.core.models import read_model

EXPAND = "expand base --method moe --experts-from a,b"


@pytest.fixture
def family(place: Path) -> Path:
    for number, name in enumerate("ab"):
        child(place / name, place / "base", seed=number)
    return place


def test_experts_from_children(run: Run, family: Path) -> None:
    before = snapshot(family / "base")
    result = run(f"{EXPAND} --output mixed")
    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    assert "2 experts per layer, 2 per token" in text and "experts from a, b" in text
    assert "attention, norms, embeddings and head from the average of a, b" in text
    assert "the function is preserved for no model in the list" in text
    assert "router: random rows, because the lineage of a records no training data" in text
    assert "exact no: moe" in text
    assert read_model(family / "mixed").config["num_local_experts"] == 2
    assert run("history mixed --verify").code == 0
    assert snapshot(family / "base") == before
    assert run(f"{EXPAND} --output mixed --dry-run --attention-from a").code == 0
    assert "map experts are the FFNs of /" in " ".join(run("inspect mixed").out.split())
    shown = run("history mixed --recipe")
    assert shown.code == 0 and "experts_from" in shown.out and "expert_hashes" in shown.out
    recipe = family / "grow.yaml"
    recipe.write_text(shown.out, encoding="utf-8")
    assert run("expand base --recipe grow.yaml --output again").code == 0
    first, second = (snapshot(family / name)["model.safetensors"] for name in ("mixed", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--experts-from a,nowhere", "--experts-from = nowhere: no such folder"),
        ("--experts-from a", "--experts-from = [a]: list 2 to"),
        ("--experts-from a,b --num-experts 3", "--num-experts = 3: --experts-from lists 2"),
        ("--experts-from a,b --attention-from c", "--attention-from = c: must be one of average"),
        ("--experts-from a,b --router data", "--router = data: the lineage of a records no"),
        ("--experts-from a,b --router best", "--router = best"),
        ("--router data", "--router = data: it is an option of --experts-from, which is not set"),
        ("--experts-from a,b --target-params 7B", "a target (experts_from [a, b])"),
    ],
)
def test_refusals_name_the_option(run: Run, family: Path, words: str, reason: str) -> None:
    before = snapshot(family)
    result = run(f"expand base --method moe {words}")
    assert result.code == 2 and reason in " ".join(result.err.split()), result.err
    assert snapshot(family) == before
