"""`tritter expand --method moe-add --domain-data`: one folder, trained, with its record."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import VOCABULARY, Run, snapshot
from tests.cli.test_train import write_texts
from tests.core.stock_routers.models import shared_names, tiny_moe
from tests.oracle import logits, saved, stock, tokens
from tests.oracle.moe import is_settled
from tritter.checkpoints import Lineage
from tritter.core.models import load_model, save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.pipeline import domain

ADD = "expand --checkpoint base --method moe-add --num-experts 2"
TRAIN = f"{ADD} --domain code --domain-data data/code --steps 3 --learning-rate 1e-3"
TEXT = "the model grows a layer where data asks for one and keeps what it knew\n"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain folder with experts and a tokenizer; text at `data/code` and `old`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    folder = saved(tiny_moe("mixtral", vocab_size=VOCABULARY), tmp_path / "base")
    tokenizer = train_tokenizer([Document("d", TEXT * 20)], vocab_size=VOCABULARY)
    save_tokenizer(tokenizer, folder, end_of_text=END_OF_TEXT)
    write_texts(tmp_path / "data/code", "and now")
    write_texts(tmp_path / "old", "of old")
    return folder


@pytest.mark.full
def test_experts_are_added_and_trained_in_one_go(run: Run, base: Path) -> None:
    """The command of the specification."""
    result = run(TRAIN)
    assert result.code == 0, result.err
    assert sorted(path.name for path in base.parent.iterdir()) == [
        "base", "base-moe-add", "data", "old",
    ]  # fmt: skip
    text = " ".join(result.out.split())
    assert "exact yes: function-preserving at step 0" in text
    assert "open to all tokens" in text and "[% of assignments], 2 per token" in text
    folder = base.with_name("base-moe-add")
    assert is_settled(folder)
    model, before = load_model(folder), load_model(base)
    assert torch.equal(logits(stock(folder), tokens()), logits(model, tokens()))
    for name in shared_names(model):
        assert torch.equal(model.get_parameter(name)[:4], before.get_parameter(name))
    lineage = Lineage.read(folder)
    assert lineage is not None and lineage.stock_loadable == "yes"
    record = lineage.expansion_history[-1]
    assert record.method == "moe_add" and record.continued_training_steps > 3
    assert set(record.performance_delta) == {"code"} and record.step0_error == 0
    new = lineage.training_config["new"]["code"]
    assert new["num_documents"] == 12 and len(new["sha256"]) == 64
    assert new["paths"] == [str(base.parent / "data/code")]
    assert lineage.parent_path == "../base"
    history = run("history base-moe-add --verify")
    assert history.code == 0 and "2 intact" in history.out


@pytest.mark.full
def test_old_text_is_mixed_in_and_the_best_expert_cloned(run: Run, base: Path) -> None:
    result = run(f"{TRAIN} --old-data old --expert-init best --output grown --json")
    assert result.code == 0, result.err
    plain = result.json
    assert set(plain["experts"]["usage"]) == set(plain["scores"]["after"]) == {"old", "code"}
    assert plain["experts"]["new"] == [4, 5] and plain["step0_error"] == 0
    chosen = plain["steps"][0]["options"]
    assert chosen["init"] == "best" and len(chosen["clone_from"]) == 3
    lineage = Lineage.read(Path("grown"))
    assert lineage is not None and plain["model_hash"] == lineage.model_hash
    record = lineage.expansion_history[-1]
    assert plain["steps"][0]["map_digest"] == record.map_digest
    assert lineage.training_config["old"]["old"]["num_documents"] == 12


@pytest.mark.full
def test_a_name_that_was_taken_is_not_told_of_other_text(run: Run, base: Path) -> None:
    assert run(TRAIN).code == 0
    write_texts(base.parent / "data/other", "and then")
    again = TRAIN.replace("base ", "base-moe-add ").replace("data/code", "data/other")
    result = run(f"{again} --output twice")
    assert result.code == 0, result.err
    assert "on code_2: " in result.out and "on code: " not in result.out


@pytest.mark.full
def test_a_teacher_is_learnt_from(run: Run, base: Path) -> None:
    result = run(f"{TRAIN} --expert-init distill --teacher base --output grown --json")
    assert result.code == 0, result.err
    assert result.json["steps"][0]["options"]["teacher"] == "base"


REFUSED = {
    f"{ADD} --domain code": "--domain-data is missing",
    f"{ADD} --steps 3": "--domain-data is missing",
    f"{ADD} --domain-data nowhere": "nowhere: there is no such file",
    f"{TRAIN} --output deep/er/out --old-data missing.jsonl": "missing.jsonl: there is no such",
    f"{TRAIN} --domain-data gone.jsonl --expert-init best --output deep/er/out": "gone.jsonl",
    # Data is checked before the hub is contacted
    f"{ADD} --domain-data nowhere".replace("base", "owner/other"): "nowhere: there is no such file",
    f"{ADD} --domain-data data/empty": "the folder is empty",
    f"{ADD} --domain-data data/code --dtype bfloat16": "--dtype = bfloat16: not allowed with",
    f"{TRAIN} --old-data old --domain old": "--domain = old: the old data already has",
    f"{ADD} --expert-init best": "--expert-init = best: domain data selects the expert",
    f"{ADD} --expert-init distill --teacher base": "--expert-init = distill: new experts learn",
    f"{TRAIN} --expert-init distill": "--teacher = null: --expert-init=distill requires a",
    f"{TRAIN} --expert-init distill --teacher x": "--teacher = x: no such folder",
    "expand --checkpoint base --method moe-add --addition replicate --domain-data data/code":
        "appends no experts",
    "expand --checkpoint base --method width --domain-data data/code":
        "--method width appends no experts",
    "expand --checkpoint base --method width --steps 3": "--method width appends no experts",
    f"{TRAIN} --learning-rate 0": "--learning-rate = 0",
}  # fmt: skip


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    run: Run, base: Path, words: str
) -> None:
    (base.parent / "data/empty").mkdir()
    before = snapshot(base.parent)
    result = run(words)
    assert result.code == 2, result.out
    assert REFUSED[words] in " ".join(result.err.split())
    assert snapshot(base.parent) == before


def test_text_that_cannot_be_read_is_listed_and_nothing_written(run: Run, base: Path) -> None:
    (base.parent / "old/bad.txt").write_bytes(b"caf\xe9")
    (base.parent / "data/code/bad.jsonl").write_text("3\n")
    before = snapshot(base.parent)
    result = run(f"{TRAIN} --old-data old")
    assert result.code == 2
    assert "the data has 2 problems:" in result.err
    lines = " ".join(result.err.split())
    assert f"--domain-data: {base.parent}/data/code/bad.jsonl, line 1 is a number" in lines
    assert f"--old-data: {base.parent}/old/bad.txt is not UTF-8" in lines
    assert snapshot(base.parent) == before


def test_what_cannot_fit_is_refused_in_words_of_this_command(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritter.planning.run_memory.machine_memory", lambda: 1000)
    before = snapshot(base.parent)
    result = run(TRAIN)
    assert result.code == 2
    assert result.err.startswith("error: training the grown model with ")
    assert "trainer." not in result.err and "at most about " in result.err
    assert snapshot(base.parent) == before


def test_without_a_tokenizer_nothing_is_written(run: Run, base: Path) -> None:
    (base / "tokenizer.json").unlink()
    before = snapshot(base.parent)
    result = run(TRAIN)
    assert result.code == 2 and "tokenizer.json" in result.err
    assert snapshot(base.parent) == before


def test_text_that_is_too_short_is_refused(run: Run, base: Path) -> None:
    Path("data/short.txt").write_text("too short\n")
    before = snapshot(base.parent)
    result = run(f"{ADD} --domain-data data/short.txt")
    assert result.code == 2, result.out
    assert snapshot(base.parent) == before


@pytest.mark.full
def test_what_the_source_learned_is_old_and_its_split_goes_on(run: Run, base: Path) -> None:
    assert run(TRAIN).code == 0
    again = "--checkpoint base-moe-add --method moe-add --num-experts 1 --output again --steps 3"
    result = run(f"expand {again} --domain code --domain-data old --seed 4")
    assert result.code == 0, result.err
    said = " ".join(result.out.split())
    assert "Old data and split from the checkpoint's lineage: code." in said
    assert "The domain code is renamed code_2: another code was learned before." in said
    before, after = (
        Lineage.read(base.with_name("base-moe-add")),
        Lineage.read(base.with_name("again")),
    )
    assert before is not None and after is not None and after.split is not None
    assert list(before.domains) == ["code"] and list(after.domains) == ["code", "code_2"]
    assert after.split == before.split and after.split.seed == 0
    told = after.training_config
    assert (list(told["old"]), list(told["new"])) == (["code"], ["code_2"])
    assert [method["name"] for method in told["forgetting"]] == ["replay"]


@pytest.mark.full
def test_a_source_that_changes_is_refused_before_the_training(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the training would be lost, because its result could not name its parent."""
    assert run(TRAIN).code == 0
    weights = base.with_name("base-moe-add") / "model.safetensors"

    def change(pipeline_run: object) -> None:
        tensors = load_file(weights)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)

    monkeypatch.setattr(domain, "run_baseline", change)
    monkeypatch.setattr(domain, "run_branch", lambda *arguments: pytest.fail("it was trained"))
    again = TRAIN.replace("base ", "base-moe-add ").replace("data/code", "old")
    result = run(f"{again} --output twice")
    assert result.code == 2 and "--ignore-lineage" in result.err, result
    assert not Path("twice").exists()
