"""Streamed data sets: each training document once per epoch, from any saved position."""

import gzip
import io
import json
import pickle
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer

from tests.oracle import chat as fixtures
from tritter.data import stream
from tritter.data.batches import BatchStream, Sequences, SequenceStream
from tritter.data.chat import ANSWER, Chat
from tritter.data.datasets import _LOCK, DatasetName
from tritter.data.documents import text_key
from tritter.data.local_files import Reading, TextFileError
from tritter.data.packing import Packing, packed
from tritter.data.replay import ReplayBuffer
from tritter.data.sources import TextRequest
from tritter.data.split import SplitRule
from tritter.data.stream import StreamedSequences
from tritter.data.tokens import TextBounds, TokenisedDocuments, parsed_tokenizer

LENGTH, END = 16, 0
RULE = SplitRule(seed=0, validation_fraction=0.2)
TEXTS = [f"document {number} keeps the number {number}" for number in range(700)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The same texts in a plain file, and in a packed one and a folder."""
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    with gzip.open(tmp_path / "first.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[:400]))
    (tmp_path / "rest").mkdir()
    for number, start in enumerate((400, 600)):
        content = "\n".join(rows[start : start + 200])
        (tmp_path / f"rest/{number}.jsonl").write_text(content)
    return tmp_path


def streamed(
    names: list[Path | str],
    tokenizer: Tokenizer,
    *,
    packing: Packing = "stream",
    seed: int = 0,
    buffer_sequences: int = 64,
) -> StreamedSequences:
    options = {
        "rule": RULE,
        "tokenizer": parsed_tokenizer(tokenizer.to_str()),
        "chat": None,
        "packing": packing,
        "sequence_length": LENGTH,
        "bounds": TextBounds(END),
    }
    return StreamedSequences(
        [DatasetName.named("data.new", str(name)) for name in names],
        key="data.new",
        **options,
        seed=seed,
        buffer_sequences=buffer_sequences,
    )


def in_order(tokenizer: Tokenizer) -> torch.Tensor:
    """The training sequences of an epoch, in the order of the texts."""
    kept = [text for text in TEXTS if RULE.side(text_key(text)) == "train"]
    documents = TokenisedDocuments.of_texts(kept, tokenizer)
    return packed(documents, packing="stream", sequence_length=LENGTH, bounds=TextBounds(END))


def rows_of(sequences: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in sequences.tolist()]


def test_an_epoch_has_every_training_sequence_once(place: Path, tokenizer: Tokenizer) -> None:
    wanted = rows_of(in_order(tokenizer))
    found = rows_of(streamed([place / "all.jsonl"], tokenizer).next_sequences(len(wanted)))
    assert sorted(found) == sorted(wanted)
    assert found != wanted
    # The file, a packed file and a folder are the same stream
    parts = streamed([place / "first.jsonl.gz", place / "rest"], tokenizer)
    assert sorted(rows_of(parts.next_sequences(len(wanted)))) == sorted(wanted)
    # The next epoch begins with what was left of the last sequence
    again = rows_of(streamed([place / "all.jsonl"], tokenizer).next_sequences(2 * len(wanted)))
    assert again[: len(wanted)] == found
    assert again[len(wanted) :] != found


def test_the_order_depends_on_the_seed_alone(place: Path, tokenizer: Tokenizer) -> None:
    orders = {
        seed: [
            rows_of(streamed([place / "all.jsonl"], tokenizer, seed=seed).next_sequences(200))
            for _ in range(2)
        ]
        for seed in (0, 1)
    }
    assert orders[0][0] == orders[0][1] != orders[1][0] == orders[1][1]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize(
    "names", [["all.jsonl"], ["first.jsonl.gz", "rest"], ["all.jsonl[50:650]"]]
)
def test_a_stream_continues_from_every_batch(
    place: Path, tokenizer: Tokenizer, names: list[str], packing: Packing
) -> None:
    """Also across epochs; the state survives torch.save with weights_only, and pickling."""
    files: list[Path | str] = [f"{place}/{name}" for name in names]

    def mixture() -> BatchStream:
        both: dict[str, Sequences] = {
            "streamed": streamed(files, tokenizer, packing=packing),
            "fixed": SequenceStream(in_order(tokenizer)[:30], seed=1),
        }
        return BatchStream(ReplayBuffer(both, weights={"streamed": 3}), batch_size=7)

    whole = mixture()
    batches, states = [], []
    for batch, _ in zip(whole, range(230), strict=False):
        batches.append(batch["input_ids"])
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        states.append(file)
    for at in (0, 1, 17, 60, 133, 228):
        resumed = pickle.loads(pickle.dumps(mixture()))
        states[at].seek(0)
        resumed.load_state_dict(torch.load(states[at], weights_only=True))
        for wanted, batch in zip(batches[at + 1 :], resumed, strict=False):
            assert torch.equal(batch["input_ids"], wanted)


def test_a_position_continues_with_the_next_rows(place: Path) -> None:
    source = DatasetName.named("data.new", str(place / "rest"))
    reading = Reading(key="data.new")
    whole = list(source.batches(reading, is_streamed=True))
    for at, (_, position) in enumerate(whole):
        later = source.batches(reading, is_streamed=True, position=position)
        assert [texts for texts, _ in later] == [texts for texts, _ in whole[at + 1 :]]


def test_data_without_a_sequence_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a"}')
    with pytest.raises(TextFileError, match=r"data\.new: .*do not fill one sequence of 16 tokens"):
        streamed([tmp_path / "one.jsonl"], tokenizer).next_sequences(1)


def test_statistics_read_the_first_rows_only(tmp_path: Path) -> None:
    rows = (json.dumps({"text": f"row {n}"}) for n in range(DatasetName.HEAD_ROWS + 50))
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    name = f"hf:{tmp_path}/long.jsonl"
    head = TextRequest([name], key="data.new", text_field="text", is_head=True).documents()
    assert len(head) == DatasetName.HEAD_ROWS
    (recorded,) = TextRequest([name], key="data.new", is_head=True).recorded_paths
    assert recorded == f"{name}:train[:{DatasetName.HEAD_ROWS}]#text"
    again = TextRequest([recorded], key="data.new", text_field="text").documents()
    assert list(again.keys()) == list(head.keys())


def test_conversations_that_are_refused_cut_or_unanswered_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DatasetName, "HEAD_ROWS", 20)
    turns = [fixtures.messages(number) for number in range(40)]
    system = [{"role": "system", "content": "Be kind."}, *turns[0]]
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
    long = [*turns[1][:-1], {"role": "assistant", "content": "word " * 90}]
    talks = (*turns[:20], system, asked, long, *turns[20:])
    rows = [json.dumps({"messages": each}) for each in talks]
    (tmp_path / "talks.jsonl").write_text("\n".join(rows))
    stock = fixtures.tokenizer(fixtures.INSTRUCT)  # refuses a system message
    options = {
        "rule": SplitRule(seed=3, validation_fraction=1e-9),
        "tokenizer": stock.backend_tokenizer,
        "chat": Chat(stock),
        "packing": "documents",
        "sequence_length": 64,
        "bounds": TextBounds(END),
    }
    source = DatasetName.named("data.new", str(tmp_path / "talks.jsonl"))
    sequences = StreamedSequences([source], key="data.new", **options, seed=0)
    found = sequences.next_sequences(30)
    assert (found >= ANSWER).any()
    skipped, cut, unanswered = sequences.notes
    assert "Skipped 1 of 43 records" in skipped and "the template fails" in skipped
    assert "1 of 42 training conversations of all rows" in cut and "is cut" in cut
    assert "1 of 42 conversations (1 with an empty answer)" in unanswered


def test_texts_are_cut_as_the_lineage_does(tokenizer: Tokenizer) -> None:
    book = "\n\n".join(f"{number} " + "word " * 80 for number in range(170))
    for size, count in (20_000, 3), (40_000, 1):
        rule = SplitRule(seed=3, validation_fraction=1e-9, piece_characters=size)
        options = {
            "rule": rule,
            "tokenizer": tokenizer,
            "chat": None,
            "packing": "documents",
            "sequence_length": LENGTH,
            "bounds": TextBounds(END),
        }
        tokens = StreamedSequences([], key="data.new", seed=0, **options)._tokenised(
            [book], stream._LeftOut("data.new")
        )
        assert len(tokens.identifiers) == count


def test_rows_that_are_left_out_after_the_head_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, also over a resume and a second epoch."""
    monkeypatch.setattr(DatasetName, "HEAD_ROWS", 300)
    values: list[object] = [
        number if number % 100 == 99 else f"row {number}" for number in range(600)
    ]
    values[250] = values[550] = ""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": v}) for v in values))
    whole = streamed([tmp_path / "rows.jsonl"], tokenizer)
    whole.next_sequences(1)
    assert not whole.notes  # the notes on the head say it
    whole.next_sequences(40)
    state = whole.state_dict()
    whole.next_sequences(400)
    resumed = pickle.loads(pickle.dumps(streamed([tmp_path / "rows.jsonl"], tokenizer)))
    resumed.load_state_dict(state)
    resumed.next_sequences(400)
    skipped, dropped = whole.notes
    assert resumed.notes == whole.notes
    assert "all rows" in skipped and "Skipped 6 of 600 records" in skipped and "row 99 " in skipped
    assert "dropped of 594 documents: 2 empty" in dropped
    mixed = ReplayBuffer({"a": whole, "b": SequenceStream(in_order(tokenizer), seed=1)})
    assert BatchStream(mixed, batch_size=2).notes == whole.notes


def test_settings_of_the_library_are_those_of_before(place: Path) -> None:
    """Between two batches, though both sources are being read."""

    def settings() -> tuple[int, bool]:
        with _LOCK:  # no stream of another test is reading
            log = datasets.utils.logging
            return log.get_verbosity(), datasets.is_progress_bar_enabled()

    before, source = settings(), DatasetName.named("data.new", str(place / "all.jsonl"))
    one, other = (source.batches(Reading(key="data.new"), is_streamed=True) for _ in range(2))
    next(one), next(other)
    assert settings() == before
    assert len([*one, *other]) == 4
    assert settings() == before


def test_long_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    rows = (json.dumps({"text": "word " * 40_000}) for _ in range(60))
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    source = DatasetName.named("data.new", str(tmp_path / "long.jsonl"))
    batches = list(source.batches(Reading(key="data.new"), is_streamed=True))
    assert [len(texts) for texts, _ in batches] == [10] * 6
