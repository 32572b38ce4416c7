"""`tritter evaluate`: losses on text that is named, benchmarks from files, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Run, snapshot
from tests.evaluation.programs import HUMANEVAL_ROWS
from tests.evaluation.published import PUBLISHED
from tests.evaluation.test_benchmark_files import written
from tests.oracle import stock
from tests.real import real_checkpoint
from tritter.data.tokens import PretrainedTokenizer
from tritter.errors import RequestError
from tritter.pipeline.evaluate import DomainsToScore

SHARED = Path(__file__).resolve().parents[3] / "shared"
TEXT = "the model grows a layer where data asks for one\n"


@pytest.fixture
def tasks(place: Path) -> Path:
    """The current folder, with `base` and the files of two benchmarks below `files`."""
    written(place / "files/arc/arc_easy_test.jsonl", PUBLISHED["arc_easy"])
    written(place / "files/humaneval.jsonl", HUMANEVAL_ROWS)
    return place


def _loss(folder: Path, text: str) -> float:
    """Return nats per token behind an end of text, token by token."""
    model, tokenizer = stock(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    nats = 0.0
    with torch.no_grad():
        for at in range(1, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:at]])).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[ids[at]])
    return nats / (len(ids) - 1)


def test_losses_of_named_text(run: Run, place: Path) -> None:
    (place / "notes.txt").write_text(TEXT)
    before = snapshot(place)
    result = run("evaluate --checkpoint base --data notes=notes.txt --json")
    assert result.code == 0, result.err
    record = result.json["losses"]["notes"]
    assert math.isclose(record["loss"], _loss(place / "base", TEXT), rel_tol=1e-5)
    assert record["n"] == 1 and result.json["model_hash"] is None
    assert snapshot(place) == before
    rows = [json.dumps({"body": text}) for text in (TEXT, TEXT + "more", "other words")]
    (place / "rows.jsonl").write_text("\n".join(rows))
    words = "--data notes.txt --data rows.jsonl --text-field body --limit 2"
    plain = run(f"evaluate --checkpoint base {words} --json").json
    assert plain["losses"]["notes"] == record and plain["losses"]["rows"]["n"] == 2
    assert "rows: 2 of 3 documents are scored." in plain["notes"]
    missing = run("evaluate --checkpoint base --data rows.jsonl")
    assert missing.code == 2 and "Did you mean --text-field=body?" in missing.err
    (place / "rows.jsonl").unlink()
    table = run("evaluate --checkpoint base --data notes=notes.txt")
    assert f"{record['loss']:.3f}" in table.out and "per byte" in table.out


def test_long_documents_are_scored_up_to_a_window(place: Path) -> None:
    (place / "long.txt").write_text(" ".join(f"word {number}" for number in range(3000)))
    tokenizer = PretrainedTokenizer.read(place / "base", vocab_size=512)
    for length, most in ((64, 1024), (2048, 2048)):
        found = DomainsToScore.named(
            {"long": ["long.txt"]}, tokenizer, folder=place / "base", lineage=None, length=length
        ).first(None, length=length)
        assert found.documents["long"].num_tokens == most
        said = f"long: only the first {most:,} tokens of 1 documents are scored."
        assert found.notes[-1] == said


def test_benchmarks_from_files(run: Run, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "notes.txt").write_text(TEXT)
    words = "evaluate --checkpoint base --tasks arc_easy --tasks-path files --data n=notes.txt"
    result = run(f"{words} --limit 3 --output found.json")
    assert result.code == 0, result.err
    assert "uniform" in result.out and "Scored 3 of 4 questions" in result.out
    assert "written  found.json" in result.out
    found = json.loads((tasks / "found.json").read_text())
    held = found["benchmarks"]["arc_easy"]
    assert (held["n"], held["metric"], held["source"]) == (
        3,
        "acc_norm",
        ["arc/arc_easy_test.jsonl"],
    )
    assert (
        set(held["metrics"]) == {"acc", "acc_norm"} and held["score"] == held["metrics"]["acc_norm"]
    )
    assert held["null_models"]["uniform"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert "standard_error" in held and found["losses"]["n"]["n"] == 1
    again = run(f"{words} --output found.json")
    assert again.code == 2 and "found.json" in again.err
    assert (
        run(f"{words} --output found.json --overwrite --json").json["benchmarks"]["arc_easy"]["n"]
        == 4
    )


def test_programs_are_run_only_when_allowed_by_name(run: Run, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    words = "evaluate --checkpoint base --tasks humaneval --tasks-path files"
    refused = run(words)
    assert refused.code == 2 and "--allow-code humaneval" in refused.err
    allowed = run(f"{words} --allow-code humaneval --limit 1 --json")
    if "sandbox of this system leaks" in allowed.err or "can't be set up" in allowed.err:
        pytest.skip(allowed.err)
    assert allowed.code == 0, allowed.err
    held = allowed.json["benchmarks"]["humaneval"]
    assert (held["n"], held["score"], held["null_models"]["empty"]) == (1, 0.0, 0.0)
    broken = run(f"{words} --allow-code humaneval --code-sandbox cat")
    assert broken.code == 2 and "--code-sandbox = cat" in broken.err


def test_without_a_sandbox_no_program_is_run(
    run: Run, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise RequestError("code: the sandbox of this system leaks; --code-sandbox CMD.")

    monkeypatch.setattr("tritter.evaluation.code.sandbox.NamespaceSandbox.check", refuse)
    words = "evaluate --checkpoint base --tasks humaneval --tasks-path files --allow-code humaneval"
    result = run(words)
    assert result.code == 2 and "sandbox of this system leaks" in result.err


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--data PATH, or benchmarks with --tasks NAMES"),
        ("--data notes", "--data notes = notes: "),
        ("--data a=nowhere.txt", "nowhere.txt"),
        ("--data 1a=notes.txt", "--data = 1a=notes.txt: use PATH or NAME=PATH"),
        ("--data a=", "--data = a=: use PATH or NAME=PATH"),
        ("--tasks arc_eazy", "Did you mean arc_easy?"),
        (
            "--tasks arc_easy --tasks-path nowhere",
            "--tasks-path = nowhere: there is no such folder",
        ),
        ("--tasks piqa --tasks-path files", "it has no file of piqa"),
        ("--tasks-path files", "requires --tasks NAMES"),
        ("--tasks arc_easy --allow-code piqa", "--allow-code = piqa: allowed are humaneval, mbpp"),
        ("--tasks arc_easy --limit 0", "'--limit'"),
        ("--tasks arc_easy --output base", "base"),
    ],
)
def test_what_cannot_be_done_is_refused(run: Run, tasks: Path, words: str, said: str) -> None:
    before = snapshot(tasks)
    result = run(f"evaluate --checkpoint base {words}")
    assert result.code == 2 and said in result.err, result.err
    assert snapshot(tasks) == before


@pytest.mark.slow
def test_gemma_is_scored_as_everybody_runs_it(run: Run, place: Path) -> None:
    """Twelve texts of the web; behind an end of text, each token costs a nat more."""
    folder, source = real_checkpoint("gemma3"), SHARED / "data/text/c4_demo_300.jsonl"
    if not source.is_file():
        pytest.skip(f"it needs {source}")
    texts = [json.loads(line)["text"][:800] for line in source.read_text().splitlines()[:12]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (place / "web.jsonl").write_text(lines)
    result = run(f"evaluate --checkpoint {folder} --data web=web.jsonl --batch-size 1 --json")
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, size = {"<bos>": 0.0, "<eos>": 0.0}, 0
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        size += len(ids) - 1
        for name in nats:
            row = torch.tensor([[tokenizer.convert_tokens_to_ids(name), *ids[1:]]])
            with torch.no_grad():
                nats[name] += float(model(row, labels=row).loss) * (len(ids) - 1)
    loss = result.json["losses"]["web"]["loss"]
    assert loss == pytest.approx(nats["<bos>"] / size, rel=1e-4)
    assert loss < nats["<eos>"] / size - 0.8
