"""More experts on the command line: expand, look at it, export it or be told why not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run, snapshot
from tests.core.stock_routers.models import num_experts, tiny_moe
from tests.oracle import logits, relative_difference, saved, stock, tokens
from tests.oracle.moe import is_settled
from tritter.checkpoints import Lineage, write_lineage
from tritter.core.models import load_model, read_model
from tritter.core.stock_routers import AddedExperts

ADD = "expand --checkpoint base --method moe-add"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return saved(tiny_moe("mixtral"), tmp_path / "base")


def test_append_is_measured_exact_and_told_to_be_ours_alone(run: Run, base: Path) -> None:
    result = run(f"{ADD} --num-experts 3 --clone-from 1,0,2 --noise 0.1")
    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    assert "experts 4 → 7" in text.replace("->", "→") and "exact yes" in text
    assert "stock transformers" in text
    folder = base.with_name("base-moe-add")
    lineage = Lineage.read(folder)
    assert lineage is not None and lineage.stock_loadable == "after adaptation"
    record = lineage.expansion_history[-1]
    assert record.step0_error is not None and record.step0_error < 1e-4
    assert record.options["clone_from"] == [1, 0, 2]
    assert "not fully open" in (folder / "README.md").read_text()
    inspected = run("inspect base-moe-add")
    assert inspected.code == 0 and "after adaptation" in inspected.out
    assert run("inspect base-moe-add --json").json["last_map"]["problem"] is None
    assert run("history base-moe-add --verify").code == 0


def test_replicate_is_stock_loadable(run: Run, base: Path) -> None:
    plain = run(f"{ADD} --addition replicate --noise 0 --json").json
    assert plain["step0_error"] < 1e-4 and plain["steps"][0]["is_exact"]
    grown = stock(base.with_name("base-moe-add"))
    assert num_experts(grown) == 8
    assert relative_difference(stock(base), grown, tokens()) < 1e-4
    assert run("export --checkpoint base-moe-add --output out").code == 0


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--clone-from 4", "--clone-from"),
        ("--clone-from x", "--clone-from = [x]: must be a list of whole numbers"),
        ("--expert-init mean --clone-from 1", "does not clone an expert; use --expert-init=clone"),
        ("--expert-init distill", "--expert-init=distill requires a teacher"),
        ("--expert-init best-of", "--expert-init"),
        ("--addition twice", "--addition"),
        ("--addition replicate --num-experts 3", "--num-experts = 3: --addition=replicate"),
        ("--experts-per-token 3", "--experts-per-token"),
    ],
)
def test_what_cannot_be_had_speaks_of_the_option(
    run: Run, base: Path, words: str, told: str
) -> None:
    before = snapshot(base.parent)
    result = run(f"{ADD} {words}")
    assert result.code == 2 and told in result.err
    assert snapshot(base.parent) == before


def test_a_sparse_model_is_sent_to_the_method_by_its_option(run: Run, base: Path) -> None:
    refused = run(f"{ADD.replace('moe-add', 'moe')} --num-experts 4")
    assert refused.code == 2 and "use --method=moe_add" in refused.err


def test_target_params_choose_how_many(run: Run, base: Path) -> None:
    wanted = run(f"{ADD} --num-experts 6 --dry-run --json").json["parameters"]["after"]
    plain = run(f"{ADD} --target-params {wanted} --dry-run --json").json
    assert plain["parameters"]["after"] == wanted
    assert plain["steps"][0]["options"]["num_experts"] == 6


def test_a_dense_model_is_sent_to_moe_first(run: Run, sources: Path, tmp_path: Path) -> None:
    words = f"expand --checkpoint {sources / 'llama'} --output {tmp_path / 'out'}"
    refused = run(f"{words} --method moe-add")
    assert refused.code == 2 and "moe first" in refused.err
    assert run(f"{words} --method moe,moe-add --noise 0").code == 2  # both would take it
    assert run(f"{words} --method moe,moe-add").code == 0


def test_export_refuses_closed_experts_and_leaves_them_out_when_asked(run: Run, base: Path) -> None:
    assert run(f"{ADD} --num-experts 2 --expert-init random").code == 0
    before = snapshot(base.parent)
    refused = run("export --checkpoint base-moe-add --output out")
    assert refused.code == 2
    for words in ("experts 4 to 5", "-inf", "--drop-new-experts"):
        assert words in refused.err
    assert snapshot(base.parent) == before
    grown = base.with_name("base-moe-add")
    scored = replace(Lineage.of(grown), benchmark_scores={"prose": 1.5})
    write_lineage(grown, scored, read_model(grown).config)
    result = run("export --checkpoint base-moe-add --output out --drop-new-experts --dtype float32")
    assert result.code == 0 and "without the 2 appended experts" in result.out
    out = base.with_name("out")
    card = (out / "README.md").read_text()
    assert "not fully open" not in card and "1.5000" not in card
    dropped = stock(out)
    assert num_experts(dropped) == 4
    assert torch.equal(logits(dropped, tokens()), logits(stock(base), tokens()))


@pytest.mark.full
def test_export_of_experts_that_are_open(run: Run, base: Path) -> None:
    assert run(f"{ADD} --num-experts 1 --no-measure --output grown").code == 0
    folder = base.with_name("grown")
    assert not is_settled(folder)
    _set_offset(folder, 0.0)
    assert is_settled(folder) and is_settled(base)
    ours, theirs = load_model(folder), stock(folder)
    assert torch.equal(logits(ours, tokens()), logits(theirs, tokens()))
    for words in ("--drop-new-experts", "--drop-new-experts --dtype float32"):
        refused = run(f"export --checkpoint grown --output out {words}")
        assert refused.code == 2 and "no appended experts" in refused.err
    plain = run("export --checkpoint base --output out --drop-new-experts")
    assert plain.code == 2 and "no appended experts" in plain.err


def _set_offset(folder: Path, offset: float) -> None:
    """Write an offset into a folder's state and its digest into the record, as a training would."""
    added = AddedExperts.read(folder)
    assert added is not None
    AddedExperts(experts=added.experts, offset=offset, step=9, anneal_steps=9).write(folder)
    path = folder / "tritter.json"
    plain = json.loads(path.read_text())
    del plain["file_digests"]["state/router.json"]
    path.write_text(json.dumps(plain))
