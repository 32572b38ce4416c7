"""`expansion=context` through a whole job: short and long windows, resume, stored sequences."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import oracle
from tests.pipeline.plug import WORK
from tests.pipeline.tiny import TINY
from tritter.checkpoints.record import Lineage
from tritter.checkpoints.run_text import RunText
from tritter.checkpoints.state import KeptSequences
from tritter.config.launch.composition import load_config
from tritter.core.families import Model, forward_flops
from tritter.core.models import read_model
from tritter.data.tokens import PretrainedTokenizer, TextBounds
from tritter.errors import RequestError
from tritter.evaluation.statistics import PairedScores
from tritter.pipeline import Outcome, run_pipeline, validate, windows
from tritter.pipeline.evaluate import DomainsToScore
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run
from tritter.pipeline.stages.baseline import _base_made_from
from tritter.planning.run_memory import RunMemory, batch_size_at, tokens_note
from tritter.terminal import Console
from tritter.training.fitting import start_method

SHORT, LONG = 32, 128
WORDS = ("expansion=context", f"model.max_position_embeddings={SHORT}")


def job(run_tiny: Callable[..., Outcome], folder: Path, *words: str) -> dict[str, Any]:
    run_tiny(folder, *WORDS, *words)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.fixture(scope="module")
def done(run_tiny: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context") / "run"
    words = ("forgetting=[ewc,replay]", "forgetting.replay.keep=3", "gate=default")
    job(run_tiny, folder, *words, "pipeline.keep_stages=true", "control=true")
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.mark.full
def test_training_reads_long_windows_with_as_many_tokens(done: Path) -> None:
    record = json.loads((done / "checkpoint/tritter.json").read_text("utf-8"))
    assert record["training_config"]["data"]["sequence_length"] == LONG
    kept = KeptSequences.read(done / "checkpoint")
    assert {each.shape[1] for each in kept.sequences.values()} == {LONG}
    assert oracle.stock(done / "checkpoint").config.max_position_embeddings == LONG
    control = summary_of(done)["control"]
    assert control["steps"] == summary_of(done)["attempts"][0]["steps"]


def test_both_windows_are_scored_and_gated(done: Path) -> None:
    summary = summary_of(done)
    windows, checks = summary["windows"], {(c["check"], c["subject"]) for c in summary["gate"]}
    assert (windows["source_length"], windows["length"]) == (SHORT, LONG)
    assert {("retention", "old"), ("new_capability", "new")} <= checks
    assert {("long_windows", "old"), ("long_windows", "new")} <= checks
    for scores in windows["scores"].values():
        assert scores.keys() == {"source", "source_long", "expanded", "final"}
        assert len({score["n"] for score in scores.values()}) == 1
    assert (done / "plots/positions.png").is_file()


def test_loss_by_position_is_that_of_the_stock_model(done: Path) -> None:
    """An independent computation from the folders: a document a time, no windows of ours."""
    summary = summary_of(done)
    positions = summary["windows"]["positions"]["old"]["final"]
    assert positions["end"] == sorted(positions["end"]) and positions["end"][-1] <= LONG
    total = sum(a * b for a, b in zip(positions["loss"], positions["tokens"], strict=True))
    mean = total / sum(positions["tokens"])
    assert mean == pytest.approx(summary["windows"]["scores"]["old"]["final"]["loss"])
    first = positions["end"][0]
    assert positions["tokens"][0] == first * summary["windows"]["scores"]["old"]["final"]["n"]


@pytest.mark.full
def test_each_model_counts_its_own_flops(
    run_tiny: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    real = windows.flops
    monkeypatch.setattr(
        windows, "flops", lambda *a, **k: found.append(value := real(*a, **k)) or value
    )
    words = ("expansion=[context,width]", "forgetting=none", "pipeline.keep_stages=true")
    job(run_tiny, tmp_path / "run", *words)
    source, source_long, grown, *_ = found[3:]  # three are of the time that is announced
    configs = [read_model(tmp_path / "run" / f).config for f in ("baseline", "attempt_1/expanded")]
    small, large = (forward_flops(Model(config)).of(SHORT) for config in configs)
    assert large > 2 * small  # the control: one reading for both models would be the same
    assert source < source_long < 0.8 * grown


def test_position_sums_match_plain_torch() -> None:
    from tritter.data.tokens import TokenisedDocuments
    from tritter.evaluation.losses import document_losses

    model = oracle.tiny_llama()
    tokens = oracle.tokens(97, batch=1, length=30)[0]
    documents = TokenisedDocuments(
        tokens=tokens.int(),
        offsets=torch.tensor([0, 12, 30]),
        num_bytes=torch.tensor([12, 18]),
        identifiers=["a", "b"],
    )
    sums = torch.zeros(2, 20, dtype=torch.float64)
    document_losses(
        model, documents, sequence_length=20, bounds=TextBounds(0), batch_size=2, positions=sums
    )
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for text in (tokens[:12], tokens[12:]):
        ids = torch.cat([torch.tensor([0]), text])[None]
        losses = torch.nn.functional.cross_entropy(
            oracle.logits(model, ids[:, :-1])[0], text, reduction="none"
        )
        expected[0, : len(text)] += losses.double()
        expected[1, : len(text)] += 1
    assert torch.equal(sums[1], expected[1])
    assert torch.allclose(sums[0], expected[0], atol=1e-4)


def test_memory_is_counted_for_long_windows() -> None:
    activations = {}
    for name, length in (("context", 4096), ("none", 0)):
        words = [f"expansion.context.target_length={length}"] if length else ["expansion=none"]
        config = load_config([*TINY, *WORDS, *words])
        *_, need = RunMemory(config, config.base_model()).needs()
        activations[name] = need.activations
    assert activations["context"] > 2 * activations["none"]


DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


@pytest.mark.parametrize(
    ("words", "length", "expected"),
    [
        ((), LONG, 1),
        (("data.batch_size=1",), LONG, 1),
        (("data.batch_size=6",), LONG, 2),
        (DDP, LONG, 2),
        ((*DDP, "data.batch_size=20"), LONG, 4),
        ((*DDP, "data.batch_size=16"), 64, 8),
    ],
)
def test_each_process_gets_long_windows(words: tuple[str, ...], length: int, expected: int) -> None:
    assert batch_size_at(length, load_config([*TINY, *WORDS, *words])) == expected


@pytest.mark.parametrize(
    ("words", "change", "fits"),
    [
        (("data.batch_size=1",), "+300%", 4),
        (("data.batch_size=6",), "+33%", 8),
        (("data.batch_size=10",), "-20%", 11),
        (DDP, "+100%", 8),
        ((), "", 0),
        (("data.batch_size=15",), "", 0),
    ],
)
def test_other_tokens_per_batch_are_noted(words: tuple[str, ...], change: str, fits: int) -> None:
    note = tokens_note(LONG, load_config([*TINY, *WORDS, *words]))
    assert bool(note) == bool(change)
    if note:
        assert f"by {change} (" in note and note.endswith(f"data.batch_size={fits}")
        again = load_config([*TINY, *WORDS, *words, f"data.batch_size={fits}"])
        assert not tokens_note(LONG, again)


@pytest.mark.full
@pytest.mark.skipif(start_method("cpu") != "fork", reason="spawning takes seconds")
def test_two_processes_train_on_long_windows(
    run_tiny: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = job(run_tiny, tmp_path / "run", *DDP, "forgetting=replay")
    assert summary["windows"]["length"] == LONG and summary["attempts"][0]["steps"] == 6
    assert "change the tokens per batch by +100%" in capsys.readouterr().out


def test_data_that_is_too_small_is_refused_before_training(
    run_tiny: Callable[..., Outcome], tmp_path: Path
) -> None:
    words = "expansion.context.target_length=100000000"
    with pytest.raises(RequestError, match=rf"^{words}: .* have only .*\(Domain"):
        job(run_tiny, tmp_path / "run", words)
    assert not (tmp_path / "run/baseline").exists()


def test_long_documents_are_among_those_that_are_scored(tmp_path: Path) -> None:
    config = load_config([*TINY, *WORDS, "evaluation.max_documents=2", f"cache_dir={tmp_path}"])
    context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
    found = windows._long_documents(context.data.reading(LONG), SHORT)
    assert {name: len(each) for name, each in found.items()} == {"old": 2, "new": 2}


def write_book(path: Path) -> None:
    paragraphs = (f"{number} " + "word " * (number % 90) for number in range(9_000))
    path.write_text("\n\n".join(paragraphs), "utf-8")


def test_the_size_of_pieces_is_part_of_the_split(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each piece of a book has a side, so a lineage keeps their size; a new one may choose it."""
    write_book(tmp_path / "book.txt")
    words = [word for word in TINY if not word.startswith("data.")]
    words += ["data=text", f"data.old={tmp_path}/book.txt", f"data.new={tmp_path}/book.txt"]
    words += [f"data.sequence_length={SHORT}", *WORDS, "expansion.context.target_length=8000"]
    for own, size in ([], 20_000), (["data.piece_characters=40000"], 40_000):
        config = load_config([*words, *own, f"cache_dir={tmp_path}"])
        config = replace(config, fallbacks=(config, config))  # the notes are the same for all
        run = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
        sizes = sorted(len(each.text) for each in run.data.text.documents()["new"])
        assert size <= sizes[1] and sizes[-1] <= 2 * size
        windows.check(run)
        said = capsys.readouterr().out
        assert said.count("of a new lineage: data.piece_characters=40000") == (size == 20_000)
        assert said.count("long windows change the tokens per batch") == 1
    for size in (20_000, None):
        data = replace(config.data, piece_characters=size)
        text = RunText.of(str(done / "checkpoint"), data, seed=0)
        assert {each.piece_characters for each in text.domains.values()} == {20_000}
    with pytest.raises(RequestError, match=r"^data.piece_characters = 40000: .* uses 20000;"):
        RunText.of(str(done / "checkpoint"), config.data, seed=0)


@pytest.mark.full
def test_all_that_reads_a_lineage_cuts_as_it_does(tmp_path: Path) -> None:
    """Later runs, scores and checks of any files; a base of another size is another."""
    write_book(tmp_path / "book.txt")
    code = "\n\n".join(f"def f{number}():\n    return {number}" for number in range(30_000))
    (tmp_path / "code.txt").write_text(code, "utf-8")
    words = [word for word in TINY if not word.startswith(("data.old", "data.new"))]
    words = ["data=text", *(word for word in words if not word.startswith("data="))]
    words += [f"data.old={tmp_path}/book.txt", f"data.new={tmp_path}/code.txt"]
    words += ["expansion=none", "data.piece_characters=40000", f"cache_dir={tmp_path}/cache"]
    (tmp_path / "run").mkdir()
    config = load_config(words)
    run_pipeline(config, run_folder=tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint"
    lineage = Lineage.of(checkpoint)
    assert lineage.split is not None and lineage.split.piece_characters == 40_000
    later = RunText.of(str(checkpoint), replace(config.data, piece_characters=None), seed=0)
    assert later.split == lineage.split and not any("has changed" in each for each in later.notes)
    tokenizer = PretrainedTokenizer.read(
        checkpoint, vocab_size=read_model(checkpoint).sizes.vocab_size
    )
    scored = DomainsToScore.learned(checkpoint, lineage, tokenizer, length=SHORT).documents
    for name, domain in later.documents().items():
        _, held_out = lineage.split.split({name: domain})[name]
        assert list(scored[name].identifiers) == [each.identifier for each in held_out]
        assert max(len(each.text) for each in domain) > 40_000
        files = {name: [f"{tmp_path}/{'book' if name == 'old' else 'code'}.txt"]}
        names = [each.identifier for each in domain]
        found = DomainsToScore.named(
            files, tokenizer, folder=checkpoint, lineage=lineage, length=SHORT
        )
        assert list(found.documents[name].identifiers) == names
        checked, _ = validate._read("kept", None, lineage, named=files, limit=1000)
        assert [each.identifier for each in checked[name]] == names
    made = []
    for own in ("data.piece_characters=null", "data.piece_characters=40000"):
        config = load_config([*words, own])
        run = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
        made.append(_base_made_from(run)["data"])
    assert "piece_characters" not in made[0] and made[1] == made[0] | {"piece_characters": 40_000}


@pytest.mark.parametrize(
    ("num", "after", "verdict"),
    [(29, 1.0, "reported"), (30, 1.0, "passed"), (30, 2.0, "failed"), (29, math.nan, "failed")],
)
def test_few_long_documents_do_not_decide(
    monkeypatch: pytest.MonkeyPatch, num: int, after: float, verdict: str
) -> None:
    def scores(loss: float) -> PairedScores:
        values = torch.full((num,), loss, dtype=torch.float64)
        ones = torch.ones(num, dtype=torch.int64)
        weights = {"tokens": ones, "bytes": ones}
        return PairedScores(tuple(map(str, range(num))), values, weights, "nats")

    found = {"first-source-windows": scores(1.0), "last-trained-long": scores(after)}
    monkeypatch.setattr(windows.LongWindows, "is_longer", True)
    read = lambda _, name: SimpleNamespace(scores={"old": found[name]})  # noqa: E731
    monkeypatch.setattr(windows.LongScores, "read", read)
    gate = SimpleNamespace(retention=0.05, confidence=0.95)
    context: Any = SimpleNamespace(config=SimpleNamespace(gate=gate))
    branches: Any = [SimpleNamespace(name="first"), SimpleNamespace(name="last")]
    (check,) = windows.LongWindows(context, branches[0]).checks(branches[-1])
    assert (check.name, check.verdict, check.documents_needed) == ("long_windows", verdict, None)
    assert check.bound == (None if verdict == "reported" else 0.05)


class Killed(Exception):
    pass


@pytest.mark.full
@pytest.mark.parametrize("stage", ["evaluate", "expand", "fit"])
def test_a_kill_between_stages_is_resumed(
    run_tiny: Callable[..., Outcome], tmp_path: Path, stage: str
) -> None:
    words = ["forgetting=replay", "gate=off"]
    whole = job(run_tiny, tmp_path / "whole", *words)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*WORK[stage], die)
        with pytest.raises(Killed):
            job(run_tiny, tmp_path / "parts", *words)
    parts = job(run_tiny, tmp_path / "parts", *words)
    assert parts["lineage"]["model_hash"] == whole["lineage"]["model_hash"]
    assert parts["windows"] == whole["windows"]


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ["forgetting=self_replay", "forgetting.self_replay.num_sequences=8"],
        ["forgetting=[ewc,replay]", "data.packing=documents"],
        ["experts=single_lora", "forgetting=replay"],
        ["expansion=[context,llama_pro]", "forgetting=distill"],
        # In the new tokens, some documents fit into the context of the source
        [
            *("expansion=[vocab,context]", "expansion.vocab.new_tokens=40", "gate=default"),
            *("model.max_position_embeddings=100", "expansion.context.target_length=128"),
        ],
        ["expansion=[context,width]", "growth=foam", "growth.trigger=within_layer"],
    ],
)
def test_it_composes(
    run_tiny: Callable[..., Outcome],
    tmp_path: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = job(run_tiny, tmp_path / "run", *words)
    assert f" x {LONG} tokens; validation" in capsys.readouterr().out
    assert summary["status"] != "failed" and summary["windows"]["length"] == LONG
    scores = summary["windows"]["scores"].values()
    assert {len({score["n"] for score in each.values()}) for each in scores} == {1}


@pytest.mark.full
def test_a_later_run_continues_at_the_new_length(done: Path, cache: Path, tmp_path: Path) -> None:
    """Stored sequences have the new length, and can be joined to longer ones again.

    A later task starts with those of the task before, which have that length already.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("third", "fourth")}
    for name, path in paths.items():
        texts = (f"the {name} text has line {n} of many " * 40 for n in range(60))
        path.write_text("\n".join(json.dumps({"text": each}) for each in texts), encoding="utf-8")
    words = [word for word in TINY if not word.startswith(("model.", "data.vocab", "data.new"))]
    words = [word for word in words if not word.startswith(("data.old", "data.sequence"))]
    tasks = ", ".join(f"{{{name}: {path}}}" for name, path in paths.items())
    words += ["model=hf", f"model.path={done / 'checkpoint'}", f"data.tasks=[{tasks}]"]
    words += [f"data.sequence_length={LONG}", "data.old={}", "expansion=context"]
    words += ["forgetting=replay", f"cache_dir={cache}"]
    run_pipeline(load_config(words), run_folder=folder)
    assert oracle.stock(folder / "checkpoint").config.max_position_embeddings == 4 * LONG
