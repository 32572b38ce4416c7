"""A text begins as its tokenizer begins it: the start is read and never predicted."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests import oracle
from tritter.data.batches import lengthened
from tritter.data.chat import CONTEXT, START, ids_of
from tritter.data.documents import Document
from tritter.data.packing import (
    IGNORED,
    DocumentMask,
    MarkedText,
    Windows,
    labels_of,
    packed,
    padding_fraction,
)
from tritter.data.tokens import (
    PretrainedTokenizer,
    TextBounds,
    TokenisedDocuments,
    train_tokenizer,
)
from tritter.data.vocabulary import retokenised
from tritter.errors import RequestError
from tritter.evaluation.inference import sample_text
from tritter.evaluation.losses import document_losses

TEXTS = [
    "the model grows a layer where data asks for one",
    "and keeps what it knew",
    "déjà vu, a layer of the model " * 5,
    "one",
]
BOS, EOS, SECOND = "<bos>", "<eos>", "<second>"
FORMS = {
    "nothing": ("$A", ""),
    "start": ("<bos> $A", BOS),
    "start and end": ("<bos> $A <eos>", BOS),
    "end": ("$A <eos>", ""),
    "two": ("<bos> <second> $A", BOS + SECOND),
    "end in front, as OPT": ("<eos> $A", ""),
}


def tokenizer_of(form: str = "start") -> Tokenizer:
    tokenizer = train_tokenizer([Document("d", " ".join(TEXTS))], vocab_size=280)
    tokenizer.add_special_tokens([EOS, BOS, SECOND])
    template, _ = FORMS[form]
    names = [word for word in template.split() if word != "$A"]
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def written(folder: Path, form: str, **settings: object) -> Path:
    stock = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(form), eos_token=EOS)
    stock.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": BOS, **settings}))
    return folder


TOKENIZER = tokenizer_of()
BOUNDS = TextBounds.of(TOKENIZER, TOKENIZER.token_to_id(EOS))
STOCK = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(), eos_token=EOS, bos_token=BOS)
DOCUMENTS = TokenisedDocuments.of_texts(TEXTS, TOKENIZER)
START_ID, END = BOUNDS.start[0], BOUNDS.end


def tiny() -> torch.nn.Module:
    torch.manual_seed(1)
    return oracle.tiny_llama(vocab_size=300, initializer_range=0.3, max_position_embeddings=256)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        *(({}, form) for form in FORMS),
        # transformers 5 takes what tokenizer.json says, whatever these say
        ({"add_bos_token": False}, "start"),
        ({"add_bos_token": True, "add_eos_token": True}, "nothing"),
        ({"tokenizer_class": "GPTNeoXTokenizer"}, "start"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "start"),
    ],
)
def test_the_start_is_what_transformers_puts_in_front(
    tmp_path: Path, settings: dict[str, object], form: str
) -> None:
    folder = written(tmp_path, form, **settings)
    bounds = PretrainedTokenizer.read(folder, vocab_size=300).bounds
    stock = AutoTokenizer.from_pretrained(folder)
    ids, bare = stock("model").input_ids, stock("model", add_special_tokens=False).input_ids
    in_front = tuple(ids[: len(ids) - len(bare) - (ids[-1] == stock.eos_token_id)])
    assert bounds.end == stock.eos_token_id
    assert bounds.start == (() if in_front == (bounds.end,) else in_front)
    assert bounds.prefix == (bounds.start or (bounds.end,))
    assert PretrainedTokenizer.of(stock).bounds == bounds


def test_every_declared_end_ends_a_generated_text(tmp_path: Path) -> None:
    folder = written(tmp_path, "start")
    second = TOKENIZER.token_to_id(SECOND)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [second, END]}))
    bounds = PretrainedTokenizer.read(folder, vocab_size=300).bounds
    assert (bounds.end, bounds.stops) == (END, (second,)) and bounds.ends == (END, second)


def test_special_tokens_without_an_embedding_are_no_obstacle(tmp_path: Path) -> None:
    """As <image_soft_token> of Gemma 3, which no text contains."""
    written(tmp_path, "start")
    size, second = TOKENIZER.get_vocab_size(), TOKENIZER.token_to_id(SECOND)
    assert second == size - 1
    assert PretrainedTokenizer.read(tmp_path, vocab_size=size - 1).bounds == BOUNDS
    with pytest.raises(RequestError, match="embeddings"):
        PretrainedTokenizer.read(tmp_path, vocab_size=100)


def stock_stream() -> list[int]:
    return [token for text in TEXTS for token in [*STOCK(text).input_ids, END]]


@pytest.mark.parametrize("length", [2, 7, 16, 50])
def test_a_stream_is_that_of_the_stock_tokenizer(length: int) -> None:
    rows = DOCUMENTS.pack(sequence_length=length, bounds=BOUNDS)
    wanted = torch.tensor(stock_stream()[: rows.numel()]).view(-1, length)
    # Only the first token of a sequence within a document differs, and it is never predicted
    is_inner = (wanted[:, :2] != START_ID).all(dim=1)
    assert is_inner.any()
    wanted[is_inner, 0] = START_ID
    assert torch.equal(ids_of(rows).long(), wanted)
    assert torch.equal(rows >= START, wanted == START_ID)
    model = MarkedText(BOUNDS).attach(tiny())
    labels = labels_of(model, rows.long())
    assert torch.equal(labels, wanted.masked_fill(wanted == START_ID, IGNORED))
    with torch.no_grad():
        assert torch.equal(model(rows.long()).logits, tiny()(wanted).logits)
    assert BOUNDS.begun(rows) is rows
    assert (lengthened(rows, 4)[:, 0] >= START).sum() < len(BOUNDS.begun(lengthened(rows, 4)))


@pytest.mark.parametrize("length", [3, 8, 24, 200])
def test_documents_are_packed_with_their_starts(length: int) -> None:
    rows = packed(DOCUMENTS, packing="documents", sequence_length=length, bounds=BOUNDS).long()
    mask = DocumentMask(BOUNDS)
    model = mask.attach(tiny().double())
    labels, found = labels_of(model, rows), []
    with torch.no_grad():
        logits, alone = model(rows).logits, tiny().double()
        for row, label, output in zip(rows, labels, logits, strict=True):
            begins = [*(row >= START).nonzero().flatten().tolist(), length]
            assert begins[0] == 0
            for first, end in pairwise(begins):
                kept = int((label[first:end] != IGNORED).sum()) + 1
                ids = ids_of(row[first : first + kept])
                found.append(ids.tolist())
                assert label[first] == IGNORED and (label[first + kept : end] == IGNORED).all()
                wanted = alone(ids[None]).logits[0]
                torch.testing.assert_close(output[first : first + kept], wanted)
    pieces = []
    for text in TEXTS:
        ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        for at in range(0, len(ids), length - 1):
            piece = ids[at : at + length - 1]
            pieces.append([START_ID, *piece, *([END] if len(piece) < length - 1 else [])])
    assert sorted(found) == sorted(pieces)
    share = float(mask.padding(rows).double().mean())
    assert padding_fraction(DOCUMENTS, sequence_length=length, bounds=BOUNDS) == pytest.approx(
        share
    )
    counts = mask.length_counts(rows)
    assert int(counts.sum()) == len(pieces) and counts[:1].item() == 0


@pytest.mark.parametrize("form", ["nothing", "start", "two"])
@pytest.mark.parametrize("length", [5, 16, 300])
def test_losses_are_those_of_stock_transformers(form: str, length: int) -> None:
    tokenizer = tokenizer_of(form)
    bounds, model = TextBounds.of(tokenizer, END), tiny()
    scores = document_losses(model, DOCUMENTS, sequence_length=length, bounds=bounds, batch_size=3)
    nats, count = 0.0, 0
    stride = length + 1 - len(bounds.prefix)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        count += len(ids)
        for at in range(0, len(ids), stride):
            is_begun = bool(bounds.start) or at == 0
            front = [*bounds.prefix] if is_begun else [ids[at - 1]]
            piece = ids[at : at + stride]
            with torch.no_grad():
                logits = model(torch.tensor([[*front, *piece[:-1]]])).logits[0, len(front) - 1 :]
            nats += float(cross_entropy(logits.double(), torch.tensor(piece), reduction="sum"))
    assert int(scores.weights["tokens"].sum()) == count and scores.start == bounds.start
    assert float(scores.values.sum()) == pytest.approx(nats, rel=1e-5)
    if form == "start" and length == 300:  # one window: the loss of `model(ids, labels=ids)`
        ids = torch.tensor([STOCK(TEXTS[0]).input_ids])
        with torch.no_grad():
            stock = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        assert float(scores.values[0]) == pytest.approx(stock, rel=1e-5)


def test_windows_of_validation_begin_with_the_start() -> None:
    windows = Windows(DOCUMENTS, sequence_length=8, bounds=BOUNDS)
    inputs, targets = windows.tensors(windows[:4])
    assert (inputs[:, 0] == START_ID).all() and not (targets == START_ID).any()


def test_samples_begin_with_the_start_and_end_at_any_end() -> None:
    read, second = list[list[int]](), TOKENIZER.token_to_id(SECOND)

    class Speaker(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            read.append(input_ids[0].tolist())
            logits = torch.zeros(1, input_ids.shape[1], 300)
            logits[0, -1, 7 if len(read) < 3 else second] = 1
            return type("Output", (), {"logits": logits})

    bounds = TextBounds(END, (START_ID,), (second,))
    assert sample_text(Speaker(), prompt_ids=[4], max_new_tokens=9, bounds=bounds) == [7, 7]
    assert read[0] == [START_ID, 4]
    read.clear()
    chat = [START_ID | CONTEXT | START, 4]
    sample_text(Speaker(), prompt_ids=chat, max_new_tokens=1, bounds=bounds)
    assert read[0] == [START_ID, 4]  # not twice


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_another_vocabulary_keeps_the_start(packing: str) -> None:
    rows = packed(DOCUMENTS, packing=packing, sequence_length=16, bounds=BOUNDS)  # type: ignore[arg-type]
    again = retokenised(rows, TOKENIZER, TOKENIZER, bounds=BOUNDS, packing=packing)  # type: ignore[arg-type]
    assert (again[:, 0] >= START).all() == (rows[:, 0] >= START).all()
    assert set(again[again >= START].tolist()) == {BOUNDS.marked_start[0]}
    before, after = (
        sum((ids_of(each) == END).sum().item() for each in tensor) for tensor in (rows, again)
    )
    assert before >= after > 0


def test_a_live_tokenizer_is_read_like_a_folder() -> None:
    own = PretrainedTokenizer.of(STOCK)
    assert isinstance(own, PretrainedTokenizer) and own.bounds == BOUNDS


def test_the_model_says_the_end_if_the_tokenizer_does_not() -> None:
    """As tokenizers of which only tokenizer.json is left, and live ones made from it."""
    silent = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of())
    further = replace(BOUNDS, stops=(3,))
    for ends, bounds in (([END], BOUNDS), ([END, 3], further), ([10**6, END], BOUNDS)):
        known = PretrainedTokenizer.of(silent, ends=ends)
        assert known.bounds == bounds and known.tokenizer.id_to_token(bounds.end) == EOS
    assert PretrainedTokenizer.of(STOCK, ends=[3, END]).bounds == further
    unknown = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(), eos_token=EOS)
    unknown._special_tokens_map["eos_token"] = "no token"  # as after a vocabulary was cut
    assert PretrainedTokenizer.of(unknown, ends=[END]).bounds == BOUNDS
    for ends in ([], [None], [10**6]):
        with pytest.raises(RequestError) as caught:
            PretrainedTokenizer.of(silent, ends=ends)
        assert caught.value.problems[0].key == "tokenizer"
