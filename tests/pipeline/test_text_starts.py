"""Everything that reads text begins it as the tokenizer does: scores, methods, whole runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tritter
from tests import oracle
from tests.data.test_text_bounds import (
    BOUNDS,
    DOCUMENTS,
    END,
    START_ID,
    STOCK,
    TEXTS,
    TOKENIZER,
    tokenizer_of,
)
from tests.pipeline.tiny import FIXTURES
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.data.batches import read_sequences
from tritter.data.chat import START, ids_of
from tritter.data.datasets import DatasetName
from tritter.data.mixed_rows import _FIELDS, PackedText
from tritter.data.packing import IGNORED, DocumentMask, MarkedText, packed
from tritter.data.skills import Question
from tritter.data.split import SplitRule
from tritter.data.stream import StreamedSequences
from tritter.data.tokens import TextBounds, parsed_tokenizer
from tritter.errors import RequestError, TritterError
from tritter.evaluation.statistics import PairedScores
from tritter.evaluation.tasks import QuestionTask, Reader
from tritter.methods.experts.mixture import Evidence
from tritter.methods.forgetting.replay import _write_text
from tritter.pipeline import run_pipeline

WORDS = [f"{text} {number}" for number in range(12) for text in TEXTS]


def tiny(**changes: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "initializer_range": 0.3, "max_position_embeddings": 256}
    return oracle.tiny_llama(**{**sizes, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer puts <bos> in front."""
    folder = tmp_path_factory.mktemp("base") / "base"
    oracle.saved(tiny(), folder)
    STOCK.save_pretrained(folder)
    return folder


def stock_loss(folder: Path, texts: list[str], *, front: int | None = None) -> float:
    """Return nats per token, as stock transformers computes them text by text."""
    model, tokenizer = oracle.stock(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text).input_ids
        ids = torch.tensor([ids if front is None else [front, *ids[1:]]])
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return nats / count


@pytest.mark.parametrize("reading", [DocumentMask, MarkedText, None])
def test_a_model_writes_after_the_start(reading: type[MarkedText] | None) -> None:
    model = tiny(initializer_range=0.02)
    bounds = TextBounds(END, BOUNDS.start, (9,))
    if reading is not None:
        reading(bounds).attach(model)
    rows, nats = _write_text(
        model, num_sequences=64, sequence_length=40, bounds=bounds, sequences_per_text=2, seed=3
    )
    starts = rows >= START
    assert starts[:, 0].all() and (rows[starts] == BOUNDS.marked_start[0]).all()
    ends = (rows == END)[:, :-1]
    assert ends.any() and starts[:, 1:][ends].all()  # each end of text is followed by a start
    assert not (rows == 9).any() and nats.isfinite().all()


def test_questions_are_read_after_the_start() -> None:
    model, reader = tiny(), Reader(TOKENIZER, BOUNDS, batch_size=2)
    question = Question("q", "the model", " grows", (" grows", " keeps a layer"))
    nats = []
    for choice in question.choices:
        prompt = STOCK("the model").input_ids
        ids = torch.tensor([STOCK(f"the model{choice}").input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
        nats.append(
            -sum(float(logits[at - 1, ids[0, at]]) for at in range(len(prompt), ids.numel()))
        )
    right = question.choices[nats.index(min(nats))] == question.answer
    assert QuestionTask("t", None, (question,)).score(model, reader).values.tolist() == [right]
    read = model.generate(
        torch.tensor([STOCK("a layer").input_ids]), do_sample=False, max_new_tokens=5,
        eos_token_id=END, pad_token_id=END,
    )[0, len(STOCK("a layer").input_ids) :]  # fmt: skip
    written = [token for token in read.tolist() if token != END]
    assert reader.continuation(model, "a layer", max_new_tokens=5) == TOKENIZER.decode(written)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_stream_of_data_has_the_same_sequences(tmp_path: Path, packing: Any) -> None:
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in WORDS))
    options = {
        "rule": SplitRule(seed=0, validation_fraction=0.2), "chat": None, "packing": packing,
        "tokenizer": parsed_tokenizer(TOKENIZER.to_str()),
        "sequence_length": 16, "bounds": BOUNDS,
    }  # fmt: skip
    sources = [DatasetName.named("data.new", str(tmp_path / "all.jsonl"))]
    stream = StreamedSequences(sources, key="data.new", **options, seed=0)
    rows = stream.next_sequences(20)
    assert rows.shape == (20, 16) and (rows[:, :2] >= START).any(dim=1).all()


def test_rows_of_other_trainers() -> None:
    """Text gets the start, tokenised rows that have it do not get it twice; it is no label."""
    rows = Dataset.from_list([{"input_ids": STOCK(text).input_ids} for text in TEXTS])
    ends = SimpleNamespace(eos_token_id=[STOCK.eos_token_id, 3])
    whole = PackedText(STOCK, config=None, generation=ends, rows=rows, sequence_length=16)
    assert whole.bounds == replace(BOUNDS, stops=(3,))
    own = PackedText(STOCK, config=None, rows=rows, sequence_length=16)
    wanted = packed(DOCUMENTS, packing="stream", sequence_length=16, bounds=BOUNDS)
    assert own.bounds == BOUNDS
    assert torch.equal(own.sequences("old", tuple(TEXTS)), wanted)
    assert torch.equal(own.sequences("old", rows), wanted)
    ids, labels = (_FIELDS[name](wanted[0]) for name in ("input_ids", "labels"))
    assert ids == ids_of(wanted[0]).tolist()
    assert labels == [IGNORED if token == START_ID else token for token in ids]


def test_the_importance_of_weights_is_that_of_whole_texts(base: Path) -> None:
    text = TEXTS[0]
    ids = torch.tensor([[*STOCK(text).input_ids, END]])
    found, wanted = (
        tritter.protect(
            tritter.load(base), "ewc", data, num_sequences=1, sequence_length=200, **more
        )
        for data, more in (([text], {"tokenizer": base}), (ids, {}))
    )
    for name, value in found.importance.items():
        torch.testing.assert_close(value, wanted.importance[name])


def test_the_gate_has_the_sign_of_the_model_as_it_is_run(base: Path, tmp_path: Path) -> None:
    """The start's embedding is damaged: behind an end of text, the model seems unchanged."""
    after = shutil.copytree(base, tmp_path / "after")
    model = oracle.stock(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[START_ID] += 3.0
    model.save_pretrained(after)
    wanted = stock_loss(after, WORDS) / stock_loss(base, WORDS) - 1
    assert abs(wanted) > 0.01
    assert stock_loss(after, WORDS, front=END) == pytest.approx(stock_loss(base, WORDS, front=END))
    (check,) = tritter.gate(base, after, {"old": WORDS}).checks
    assert check.value == pytest.approx(wanted, rel=1e-3)
    model.config.eos_token_id = [END]  # and the tokenizer names none
    silent = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of())
    silent.save_pretrained(tmp_path / "silent")
    for tokenizer in (silent, tmp_path / "silent"):
        (same,) = tritter.gate(model, model, {"old": WORDS}, tokenizer=tokenizer).checks
        assert same.value == 0
        tritter.protect(model, "ewc", WORDS, tokenizer=tokenizer, num_sequences=1)


def test_evidence_of_experts_begins_at_the_start() -> None:
    evidence = Evidence(300, end_of_text_id=END, start_ids=BOUNDS.start, inner_prior=-3.0)
    evidence.add_row()
    evidence.add_row()
    evidence.count(0, torch.tensor([5, 5, START_ID | START, END]))
    assert evidence.counts[0].nonzero().flatten().tolist() == [5]
    ids = torch.tensor([[7, 7, START_ID, 5, 5]])
    alone = torch.tensor([[START_ID, 5, 5]])
    torch.testing.assert_close(evidence(ids)[:, 2:], evidence(alone))


def test_scores_of_another_start_are_not_compared() -> None:
    ones = torch.ones(40, dtype=torch.int64)
    names = tuple(map(str, range(40)))
    weights = {"tokens": ones, "bytes": ones}
    before = PairedScores(names, ones.double(), weights, "nats")
    after = PairedScores(names, ones.double(), weights, "nats", start=(START_ID,))
    assert PairedScores.from_dict(after.to_dict()).start == (START_ID,)
    assert "start" not in before.to_dict()
    with pytest.raises(TritterError, match="begin"):
        before.relative_forgetting(after)
    counts = {"tokens": 2 * ones, "bytes": ones}  # of another tokenizer
    other = PairedScores(names, ones.double(), counts, "nats")
    other.relative_forgetting(after)


RUN = (
    "model=hf",
    "data=text",
    "expansion=none",
    "data.sequence_length=24",
    "data.batch_size=4",
    "training.max_steps=3",
    "evaluation.every_n_steps=2",
    "evaluation.max_tokens_per_document=48",
    "evaluation.sample_tokens=3",
    "trainer.progress=off",
    "trainer.precision=32-true",
    "gate=off",
    "logger=csv",
)


def run(base: Path, folder: Path, *words: str) -> dict[str, Any]:
    folder.mkdir()
    paths = [f"data.old={FIXTURES / 'text/old'}", f"data.new={FIXTURES / 'text/new.jsonl'}"]
    all_words = [*RUN, f"model.path={base}", f"cache_dir={folder.parent / 'cache'}", *paths, *words]
    outcome = run_pipeline(load_config(all_words), run_folder=folder)
    return json.loads(outcome.summary_path.read_text())


@pytest.mark.full
def test_a_run_and_the_next_one(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary = run(base, tmp_path / "run", "forgetting=[ewc,replay]", "forgetting.replay.keep=5")
    scores = json.loads((tmp_path / "run/scores/baseline.json").read_text())
    assert {tuple(each["start"]) for each in scores.values()} == {BOUNDS.start}
    result = tmp_path / "run/checkpoint"
    lineage = Lineage.read(result)
    assert lineage is not None
    assert lineage.training_config["data"]["start_of_text"] == [START_ID]
    kept = read_sequences(result / "state/replay.safetensors")
    for sequences in (kept["sequences/old"], kept["sequences/new"]):
        assert torch.equal(BOUNDS.begun(sequences), sequences)
        assert not (ids_of(sequences)[:, 1:][sequences[:, :-1] == END] != START_ID).any()
    assert not any("earlier version" in note for note in summary["notes"])


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ["forgetting=self_replay", "forgetting.self_replay.num_sequences=16",
         "forgetting.self_replay.min_distinct=0"],
        ["forgetting=[replay,self_replay]", "forgetting.self_replay.num_sequences=16",
         "forgetting.self_replay.min_distinct=0"],
        ["forgetting=[distill,si]", "data.packing=documents"],
        ["forgetting=[l2sp,replay]", "data=hf", "data.streaming=true"],
        ["forgetting=replay", "experts=dylora", "experts.min_samples=4", "data.packing=documents"],
        ["expansion=vocab", "expansion.vocab.new_tokens=8", "forgetting=replay"],
        ["expansion=moe", "forgetting=replay"],
        ["expansion=context", "expansion.context.target_length=512", "forgetting=replay"],
        ["growth=gradmax", "forgetting=[online_ewc,replay]"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_methods_read_and_train_marked_sequences(
    base: Path, tmp_path: Path, words: list[str]
) -> None:
    summary = run(base, tmp_path / "run", *words)
    assert summary["final"]["new"]["loss"] > 0


@pytest.mark.full
def test_a_run_of_an_earlier_version_is_not_resumed(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "run", "forgetting=replay")
    path = tmp_path / "run/scores/baseline.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({n: {**each, "start": []} for n, each in scores.items()}))
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises((RequestError, TritterError)):
        run_pipeline(
            load_config([*RUN, f"model.path={base}", f"cache_dir={tmp_path / 'cache'}",
                f"data.old={FIXTURES / 'text/old'}", f"data.new={FIXTURES / 'text/new.jsonl'}",
                "forgetting=replay"]),
            run_folder=tmp_path / "run",
        )  # fmt: skip
