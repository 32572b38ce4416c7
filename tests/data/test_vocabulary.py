"""New tokens are merges: text without them is tokenised as before, and decoding is lossless."""

import json
from functools import cache
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from tritter.data.chat import ANSWER
from tritter.data.documents import Document
from tritter.data.tokens import TextBounds, train_tokenizer
from tritter.data.vocabulary import BpeTokenizer, ExtendedTokenizer, pursuit_rows, retokenised
from tritter.errors import RequestError

PROSE = "the quick brown fox jumps over the lazy dog and the bear sleeps in the sun\n" * 20
CODE = "def jump(self, dog):\n    return self.dog.jump(dog) if dog else None\n" * 20


@cache
def byte_level() -> Tokenizer:
    tokenizer = train_tokenizer([Document("d", PROSE)], vocab_size=300)
    tokenizer.add_special_tokens(["<|end|>"])  # its id follows those of the model
    return tokenizer


@cache
def sentence_piece(
    text: str = PROSE, *, vocab_size: int = 330, specials: tuple[str, ...] = ("<unk>",)
) -> Tokenizer:
    """A tokenizer like Llama 2's: no words before the merges, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(text.replace("\n", " ").split(), trainer=trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][
        : len(specials)
    ]  # bytes are no special tokens
    return Tokenizer.from_str(json.dumps(content))


@cache
def extended(kind: str) -> tuple[Tokenizer, ExtendedTokenizer, Tokenizer]:
    old = byte_level() if kind == "bytes" else sentence_piece()
    merges = BpeTokenizer(old).learn([CODE], num_tokens=12)
    made = ExtendedTokenizer(BpeTokenizer(old).content, merges)
    return old, made, made.tokenizer()


TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(["the ", "dog", "self", ".jump", "(dog)", " return", "\n    ", "é", "<|end|>"])
).map("".join)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@given(text=TEXTS)
@example("return self.dog.jump(dog)")
@settings(deadline=None, max_examples=60)
def test_new_tokens_consist_of_the_old_tokens_of_the_same_text(kind: str, text: str) -> None:
    old, made, new = extended(kind)
    before = old.encode(text, add_special_tokens=False).ids
    after = new.encode(text, add_special_tokens=False).ids
    parts = [part for each in after for part in made.parts.get(each, (each,))]
    assert parts == before
    assert new.decode(after) == old.decode(before)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_frequent_pairs_of_the_data_become_tokens(kind: str) -> None:
    old, made, new = extended(kind)
    size = old.get_vocab_size()  # no id is left out
    assert made.new_ids == [*range(size, size + 12)]
    lengths = [len(each.encode(CODE).ids) for each in (old, new)]
    assert lengths[1] < 0.75 * lengths[0]
    assert len(new.encode(PROSE).ids) == len(old.encode(PROSE).ids)
    kept = json.loads(made.text)
    assert (
        kept["model"]["merges"][: -len(made.merges)] == BpeTokenizer(old).content["model"]["merges"]
    )
    # No token joins two words, or a single byte with something else
    texts = [made.surfaces[number] for number in made.new_ids]
    assert not any("▁" in text[1:] or "<0x" in text for text in texts)


def test_the_most_frequent_pair_is_the_first_merge() -> None:
    old = byte_level()
    ids = old.encode("xq xq xq xq zz zz").ids
    (pair,) = BpeTokenizer(old).learn(["xq xq xq xq zz zz"], num_tokens=1)
    assert pair in pairwise(ids)
    assert old.decode(list(pair)).endswith("xq")


def test_learning_does_not_depend_on_the_order_of_documents() -> None:
    lines = CODE.splitlines(keepends=True) + PROSE.splitlines(keepends=True)
    shuffled = Random(0).sample(lines, len(lines))
    first, second = (
        BpeTokenizer(byte_level()).learn(each, num_tokens=8) for each in (lines, shuffled)
    )
    assert first == second


def test_too_few_pairs_are_refused_with_their_number() -> None:
    with pytest.raises(RequestError, match=r"new_tokens = 5: .*only 1 frequent"):
        BpeTokenizer(byte_level()).learn(["xq xq"], num_tokens=5)
    merges = BpeTokenizer(byte_level()).learn(["xq xq"], num_tokens=5, is_at_most=True)
    assert len(merges) == 1


def test_a_special_token_is_never_a_merge() -> None:
    text = "a <|end|> b <|end|> " * 20
    merges = BpeTokenizer(byte_level()).learn([text], num_tokens=9, is_at_most=True)
    made = ExtendedTokenizer(BpeTokenizer(byte_level()).content, merges)
    assert "<|end|>" not in [made.surfaces[number] for number in made.new_ids]
    assert made.tokenizer().encode("<|end|>").ids == byte_level().encode("<|end|>").ids


def test_given_texts_become_single_tokens() -> None:
    for old in (byte_level(), sentence_piece()):
        merges = BpeTokenizer(old).merges_of([" return", " returns", "dog"], key="tokens")
        made = ExtendedTokenizer(BpeTokenizer(old).content, merges)
        new = made.tokenizer()
        for text in (" return", " returns"):
            ids = new.encode(f"x{text}").ids
            assert ids[-1] in made.new_ids and new.decode(ids) == f"x{text}"
        assert old.decode(list(made.parts[ids[-1]])).strip() == "returns"


@pytest.mark.parametrize("text", ["haha", "zqzq", "=====", "ababab", "aaaa"])
def test_a_text_with_a_repeated_pair_becomes_one_token(text: str) -> None:
    for old in (byte_level(), sentence_piece()):
        surface = text if old is byte_level() else f" {text}"
        try:
            merges = BpeTokenizer(old).merges_of([surface], key="tokens")
        except RequestError:  # characters that this tokenizer does not know
            continue
        new = ExtendedTokenizer(BpeTokenizer(old).content, merges).tokenizer()
        assert len(new.encode(text).ids) == 1


def test_a_token_can_not_cross_words() -> None:
    with pytest.raises(RequestError, match="splits it into 2 words"):
        BpeTokenizer(byte_level()).merges_of(["the dog"], key="expansion.vocab.tokens")
    assert not BpeTokenizer(byte_level()).merges_of(["the dog"], key="k", is_lenient=True)
    with pytest.raises(RequestError, match="can't cross words"):
        BpeTokenizer(sentence_piece()).merges_of(["the dog"], key="expansion.vocab.tokens")
    with pytest.raises(RequestError, match="single bytes"):
        BpeTokenizer(sentence_piece()).merges_of(["日本"], key="expansion.vocab.tokens")


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(RequestError, match="BPE"):
        BpeTokenizer(words).learn([CODE], num_tokens=2)
    with pytest.raises(RequestError, match=r"expansion\.vocab\.tokenizer: .*BPE"):
        BpeTokenizer(words, key="expansion.vocab.tokenizer")


def chain(*merges: tuple[int, int]) -> ExtendedTokenizer:
    content = {"model": {"vocab": {"a": 0, "b": 1, "ab": 2, "abab": 3, "zz": 4}, "merges": []}}
    return ExtendedTokenizer(content, merges)


def test_rows_are_means_of_the_parts() -> None:
    made = chain((2, 0), (5, 0), (0, 1))  # aba, abaa, and ab, which exists
    assert made.new_ids == [5, 6]
    assert made.mean_rows() == [{2: 0.5, 0: 0.5}, {2: 1 / 3, 0: 2 / 3}]
    index, weights = made.row_weights("mean", fitted={})
    assert index.tolist() == [[2, 0], [2, 0]]
    assert weights.sum(dim=1).tolist() == pytest.approx([1, 1])


def test_overlap_prefers_tokens_with_the_same_characters() -> None:
    made = chain((2, 2), (2, 0), (4, 4))
    aba, zzzz = made.overlap_rows()[-2:]
    assert set(aba) <= {2, 3} and sum(aba.values()) == pytest.approx(1)
    assert zzzz == {4: pytest.approx(1)}


def test_matching_pursuit_finds_a_sparse_combination() -> None:
    draws = torch.Generator().manual_seed(0)
    dictionary = torch.randn(40, 64, generator=draws)
    target = 2 * dictionary[3] - 0.5 * dictionary[17] + 0.25 * dictionary[31]
    (row,) = pursuit_rows(target[None], dictionary, range(100, 140), size=3)
    assert row == {
        103: pytest.approx(2, abs=1e-5),
        117: pytest.approx(-0.5, abs=1e-5),
        131: pytest.approx(0.25, abs=1e-5),
    }


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_stored_sequences_get_the_new_tokens(packing: str) -> None:
    old, _, new = extended("bytes")
    text = "def jump(self, dog): return dog"
    ids = [*old.encode(text).ids, 0] * 20
    length = 32
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    again = retokenised(rows, old, new, bounds=TextBounds(0), packing=packing)  # type: ignore[arg-type]
    assert again.shape[1] == length and len(again) < len(rows)
    assert text in new.decode(again.flatten().tolist(), skip_special_tokens=False)
    short = retokenised(rows[:1, :8], old, new, bounds=TextBounds(0), packing=packing)  # type: ignore[arg-type]
    assert short.shape[1] == 8
    nothing = torch.zeros(3, 8, dtype=torch.int32)  # ends of text alone
    assert torch.equal(
        retokenised(nothing, old, new, bounds=TextBounds(0), packing=packing),  # type: ignore[arg-type]
        nothing,
    )
    with pytest.raises(RequestError, match="conversations"):
        retokenised(rows + ANSWER, old, new, bounds=TextBounds(0), packing=packing)  # type: ignore[arg-type]


def test_a_row_of_a_stream_that_ends_within_a_document_gets_no_end_of_text() -> None:
    old, _, new = extended("bytes")
    ids = old.encode("return self.dog.jump(dog) and the quick brown fox jumps").ids
    rows = torch.tensor([*ids, 0] * 16)[: (len(ids) + 1) * 16 // 12 * 12].view(-1, 12)
    again = retokenised(rows, old, new, bounds=TextBounds(0), packing="stream")
    ends = [int((each == 0).sum()) for each in (rows, again)]
    assert 0 < ends[1] <= ends[0]
