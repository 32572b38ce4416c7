import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tritter.data import tokens
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, TextBounds, TokenisedDocuments, train_tokenizer
from tritter.errors import RequestError


def test_tokens_and_bytes_of_whole_documents(documents, tokenizer):
    tokenised = TokenisedDocuments.of([*documents, Document("empty", "")], tokenizer)
    assert len(tokenised) == len(documents) + 1
    assert tokenised.tokens.dtype == torch.int32 and tokenised.offsets.dtype == torch.int64
    for index, document in enumerate(documents):
        assert tokenizer.decode(tokenised.document(index).tolist()) == document.text
        assert int(tokenised.num_bytes[index]) == len(document.text.encode())
    assert tokenised.document(len(documents)).numel() == 0
    assert tokenised.num_tokens == sum(
        tokenised.document(index).numel() for index in range(len(tokenised))
    )
    with pytest.raises(IndexError):
        tokenised.document(len(tokenised))


@pytest.mark.parametrize("limit", [None, 30])
def test_documents_are_the_same_whatever_is_tokenised_at_a_time(
    documents, tokenizer, limit, monkeypatch
):
    several = [*documents, Document("empty", "")]
    whole = TokenisedDocuments.of(several, tokenizer, max_tokens_per_document=limit)
    packed = whole.pack(sequence_length=7, bounds=TextBounds(0))
    monkeypatch.setattr(tokens, "_ENCODED_CHARACTERS", 500)
    monkeypatch.setattr(tokens, "_PACKED_DOCUMENTS", 3)
    parts = TokenisedDocuments.of(several, tokenizer, max_tokens_per_document=limit)
    for name in ("tokens", "offsets", "num_bytes"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    assert torch.equal(parts.pack(sequence_length=7, bounds=TextBounds(0)), packed)
    laid = [id_ for n in range(len(whole)) for id_ in [*whole.document(n).tolist(), 0]]
    assert packed.flatten().tolist() == laid[: len(laid) // 7 * 7]


@pytest.mark.parametrize("limit", range(4, 30))
def test_a_cut_document_counts_the_bytes_it_keeps(limit):
    # Bytes only, so that almost every cut would fall into a character.
    tokenizer = train_tokenizer([], vocab_size=257)
    document = Document("x", "aé猫 🐈‍⬛ bß" * 3)
    tokenised = TokenisedDocuments.of([document], tokenizer, max_tokens_per_document=limit)
    kept = tokenizer.decode(tokenised.document(0).tolist())
    assert document.text.startswith(kept) and kept
    assert limit - 3 <= tokenised.num_tokens <= limit
    assert int(tokenised.num_bytes[0]) == len(kept.encode())


def test_bytes_of_a_cut_document_under_another_kind_of_tokenizer():
    words = Tokenizer(models.WordLevel({"un": 0, "deux": 1, "été": 2}, unk_token="un"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("un $A", special_tokens=[("un", 0)])
    document = Document("x", "été deux  été deux été")
    tokenised = TokenisedDocuments.of([document], words, max_tokens_per_document=4)
    assert tokenised.document(0).tolist() == [2, 1, 2, 1]
    assert int(tokenised.num_bytes[0]) == len("été deux  été deux".encode())


def test_a_short_document_is_not_cut(documents, tokenizer):
    whole = TokenisedDocuments.of(documents, tokenizer)
    same = TokenisedDocuments.of(documents, tokenizer, max_tokens_per_document=10_000)
    assert torch.equal(whole.tokens, same.tokens)
    assert torch.equal(whole.num_bytes, same.num_bytes)


def test_a_text_cannot_forge_the_end_of_a_text(tokenizer):
    forged = Document("x", f"a{END_OF_TEXT}b")
    tokens = TokenisedDocuments.of([forged], tokenizer).tokens.tolist()
    assert 0 not in tokens and tokenizer.decode(tokens) == forged.text
    assert 0 in tokenizer.encode(forged.text).ids  # the tokenizer is unchanged


@pytest.mark.parametrize("sequence_length", [2, 7, 64])
def test_packing_against_a_loop(documents, tokenizer, sequence_length):
    tokenised = TokenisedDocuments.of(
        [*documents[:5], Document("empty", ""), *documents[5:]], tokenizer
    )
    stream = []
    for index in range(len(tokenised)):
        stream += [*tokenised.document(index).tolist(), 0]
    packed = tokenised.pack(sequence_length=sequence_length, bounds=TextBounds(0))
    assert packed.dtype == torch.int32
    assert packed.shape == (len(stream) // sequence_length, sequence_length)
    assert packed.flatten().tolist() == stream[: packed.numel()]


def test_packing_refuses_what_fills_no_sequence(documents, tokenizer):
    short = TokenisedDocuments.of([Document("x", "a")], tokenizer)
    assert short.pack(sequence_length=2, bounds=TextBounds(0)).tolist() == [
        [tokenizer.token_to_id("a"), 0]
    ]
    with pytest.raises(RequestError, match=r"data\.sequence_length=3.*2 tokens"):
        short.pack(sequence_length=3, bounds=TextBounds(0))
    with pytest.raises(RequestError, match=r"data\.sequence_length=1"):
        short.pack(sequence_length=1, bounds=TextBounds(0))


def test_byte_level_offsets_are_what_the_cut_relies_on():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    offsets = train_tokenizer([], vocab_size=257).encode("é").offsets
    assert offsets == [(0, 1), (0, 1)]
