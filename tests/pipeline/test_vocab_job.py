"""`expansion=vocab` through a whole job: scores per byte, old rows, stored and written text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from tests import oracle
from tests.pipeline.plug import WORK
from tests.pipeline.tiny import FIXTURES, TINY
from tritter.checkpoints import Source
from tritter.checkpoints.state import KeptSequences
from tritter.cli import main
from tritter.config.launch.composition import load_config
from tritter.core.expansions import Vocab
from tritter.core.models import read_model, save_tokenizer
from tritter.data.tokens import END_OF_TEXT
from tritter.errors import RequestError
from tritter.evaluation.statistics import PairedScores
from tritter.pipeline import Outcome, run_pipeline
from tritter.pipeline.branch import Branch
from tritter.pipeline.stages.fit import Fit
from tritter.pipeline.stages.vocabulary import with_example
from tritter.terminal import Console
from tritter.transform.folder import plan_expansion

EMBEDDING = "model.embed_tokens.weight"


def job(run_tiny: Callable[..., Outcome], folder: Path, *words: str) -> dict[str, Any]:
    run_tiny(folder, "expansion=vocab", *words)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def scores_of(folder: Path, name: str) -> dict[str, PairedScores]:
    plain = json.loads((folder / "scores" / f"{name}.json").read_text(encoding="utf-8"))
    return {subject: PairedScores.from_dict(each) for subject, each in plain.items()}


def tokenizer_in(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def done(run_tiny: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocab") / "run"
    words = ("expansion.vocab.new_tokens=40", "forgetting=[ewc,replay]", "gate=off")
    words += ("evaluation.max_documents=3",)
    job(run_tiny, folder, *words, "forgetting.replay.keep=3", "evaluation.prompts=[the line]")
    return folder


def test_both_tokenizers_score_the_same_bytes(done: Path) -> None:
    before, after = (scores_of(done, name) for name in ("baseline", "attempt_1-trained"))
    for domain in ("old", "new"):
        old, new = before[domain], after[domain]
        assert old.identifiers == new.identifiers and len(old.identifiers) == 3
        assert torch.equal(old.weights["bytes"], new.weights["bytes"])
    assert after["new"].weights["tokens"].sum() < 0.9 * before["new"].weights["tokens"].sum()


def test_the_summary_and_the_table_are_per_byte(done: Path) -> None:
    from tritter.report.summary import Summary
    from tritter.report.tables import SummaryTables

    summary = Summary.read(done / "summary.json")
    assert summary.jump is not None and 0 < summary.jump.new_token_mass < 1
    assert summary.jump.relative_to_std < 1e-4
    tables = SummaryTables(summary)
    table = tables.results(tables.rows)
    assert table.title.startswith("Loss [nats/byte]")
    assert table.rows[0][2] == f"{summary.baseline['old'].loss_per_byte:.3f}"
    lines = {label: text.plain for label, text in tables._lines(Console())}
    assert "new 0." in lines["tokens/byte"] and "→" in lines["tokens/byte"]
    assert {each.prompt for each in summary.samples} >= {"the line"}


def test_a_comparison_with_another_tokenizer_is_per_byte(
    done: Path,
    run_tiny: Callable[..., Outcome],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tmp_path / "plain"
    run_tiny(plain, "expansion=none", "forgetting=none", "gate=off", "evaluation.sample_tokens=0")
    capsys.readouterr()
    assert main(["compare", str(plain), str(done)]) == 0
    text = capsys.readouterr().out
    summary = json.loads((plain / "summary.json").read_text(encoding="utf-8"))
    assert "loss [nats/byte]" in text
    assert f"{summary['baseline']['new']['loss_per_byte']:.3f}" in text


def test_the_checkpoint_has_the_new_tokens(done: Path) -> None:
    first, last = (tokenizer_in(done / each) for each in ("baseline", "checkpoint"))
    assert last.get_vocab_size() == first.get_vocab_size() + 40
    record = json.loads((done / "checkpoint/tritter.json").read_text("utf-8"))
    options = record["expansion_history"][-1]["options"]
    assert len(options["merges"]) >= 80 and options["new_tokens"] == 40
    kept = KeptSequences.read(done / "checkpoint")
    assert int(kept.sequences["new"].max()) >= first.get_vocab_size()


@pytest.mark.full
def test_a_later_run_continues_with_the_new_tokens(done: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    texts = tmp_path / "third.jsonl"
    lines = [json.dumps({"text": f"the third text has line {n} of many " * 9}) for n in range(60)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    words = [word for word in TINY if not word.startswith(("model.", "data.vocab", "data.new"))]
    words += ["model=hf", f"model.path={done / 'checkpoint'}", f"data.new={{third: {texts}}}"]
    words += ["expansion=vocab", "expansion.vocab.new_tokens=5", f"cache_dir={cache}"]
    run_pipeline(load_config(words), run_folder=folder)
    checkpoints = (done / "checkpoint", folder / "checkpoint")
    sizes = [tokenizer_in(each).get_vocab_size() for each in checkpoints]
    assert sizes[1] == sizes[0] + 5


@pytest.mark.full
@pytest.mark.parametrize("method", ["replay", "freeze"])
def test_old_rows_are_frozen_bit_by_bit(
    run_tiny: Callable[..., Outcome], tmp_path: Path, method: str
) -> None:
    words = ["expansion.vocab.new_tokens=40", "expansion.vocab.freeze_old_rows=true", "gate=off"]
    summary = job(
        run_tiny, tmp_path / "run", *words, f"forgetting={method}", "pipeline.keep_stages=true"
    )
    rows = [
        load_file(tmp_path / "run" / f / "model.safetensors")[EMBEDDING]
        for f in ("baseline", "attempt_1/expanded", "checkpoint")
    ]
    size = len(rows[0])
    assert torch.equal(rows[2][:size], rows[0])
    assert not torch.equal(rows[2][size : size + 40], rows[1][size : size + 40])
    assert summary["status"] == "ungated"


@pytest.mark.full
def test_text_written_by_the_model_is_tokenised_again(
    run_tiny: Callable[..., Outcome], tmp_path: Path
) -> None:
    words = ("forgetting=self_replay", "forgetting.self_replay.num_sequences=8", "gate=off")
    summary = job(run_tiny, tmp_path / "run", "expansion.vocab.new_tokens=40", *words)
    assert summary["status"] == "ungated"


class Killed(Exception):
    pass


@pytest.mark.full
@pytest.mark.parametrize("words", [[], ["control=true"]])
@pytest.mark.parametrize("stage", ["evaluate", "expand", "fit"])
def test_a_kill_between_stages_is_resumed(
    run_tiny: Callable[..., Outcome], tmp_path: Path, stage: str, words: list[str]
) -> None:
    words = ["expansion.vocab.new_tokens=40", "forgetting=replay", "gate=off", *words]
    whole = job(run_tiny, tmp_path / "whole", *words)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*WORK[stage], die)
        with pytest.raises(Killed):
            job(run_tiny, tmp_path / "parts", *words)
    parts = job(run_tiny, tmp_path / "parts", *words)
    assert parts["lineage"]["model_hash"] == whole["lineage"]["model_hash"]
    assert parts["final"] == whole["final"]


@pytest.mark.full
def test_tasks_in_sequence_learn_tokens_of_the_first_and_resume(
    run_tiny: Callable[..., Outcome], tmp_path: Path
) -> None:
    third = tmp_path / "third.jsonl"
    lines = [json.dumps({"text": f"qzqz part {n} of a third kind " * 9}) for n in range(60)]
    third.write_text("\n".join(lines), encoding="utf-8")
    new = FIXTURES / "text/new.jsonl"
    words = ["expansion.vocab.new_tokens=40", "forgetting=replay", "data.new=null"]
    words += [f"data.tasks=[{{new: {new}}},{{third: {third}}}]"]
    train, runs = Fit.work, []

    def die_in_the_second(*arguments: Any, **options: Any) -> Any:
        runs.append(arguments)
        if len(runs) == 2:
            raise Killed
        return train(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "work", die_in_the_second)
        with pytest.raises(Killed):
            job(run_tiny, tmp_path / "run", *words)
    summary = job(run_tiny, tmp_path / "run", *words)
    before, after = summary["baseline"], summary["final"]
    fertility = {
        name: after[name]["loss_per_byte"]
        / after[name]["loss"]
        / (before[name]["loss_per_byte"] / before[name]["loss"])
        for name in ("new", "third")
    }
    assert fertility["new"] < 0.9 < fertility["third"]


@pytest.mark.full
def test_the_control_keeps_its_tokenizer(run_tiny: Callable[..., Outcome], tmp_path: Path) -> None:
    words = ("expansion.vocab.new_tokens=40", "control=true", "gate=off", "forgetting=replay")
    summary = job(run_tiny, tmp_path / "run", *words)
    before, after, control = (
        summary["baseline"]["new"],
        summary["final"]["new"],
        summary["control"]["final"]["new"],
    )
    fertility = [each["loss_per_byte"] / each["loss"] for each in (before, after, control)]
    assert fertility[1] < 0.9 * fertility[0] and fertility[2] == pytest.approx(fertility[0])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["forgetting=distill"], "changes the tokens; use replay or self_replay"),
        (["expansion=none", "forgetting=freeze", "forgetting.freeze.old_rows=true"],
         "no expansion adds rows"),
        (["expansion.vocab.head_init=quiet"], "the head is the embedding"),
    ],
)  # fmt: skip
def test_what_can_not_be_combined_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        load_config([*TINY, "expansion=vocab", *words])


def test_the_rest_is_checked_where_the_last_token_twice_is_a_token(tmp_path: Path) -> None:
    oracle.saved(oracle.tiny_llama(vocab_size=8), tmp_path / "base")
    merges = [("a", "a")]
    tokenizer = Tokenizer(models.BPE(vocab={END_OF_TEXT: 0, "aa": 1, "a": 2}, merges=merges))
    save_tokenizer(tokenizer, tmp_path / "base", end_of_text=END_OF_TEXT)
    source = Source.open(tmp_path / "base", read_model(tmp_path / "base"))
    branch = with_example(Branch("given", (Vocab(multiple_of=1),)), source)
    plan = plan_expansion(source, branch.specs)
    assert plan.vocabulary is not None and len(plan.vocabulary.new_ids) == 1
