"""Tokenizers as the hub has them: each family's normaliser, splitter, start, ends and decoder."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as split
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig

from tritter.data.chat import ids_of
from tritter.data.documents import Document
from tritter.data.tokens import (
    PretrainedTokenizer,
    TextBounds,
    TokenisedDocuments,
    encoded_texts,
    ends_of,
    train_tokenizer,
    unencoded_note,
)
from tritter.errors import RequestError

TEXTS = [
    "the model grows a layer where data asks for one",
    "déjà vu in 2024:\n\n  a layer,\r\n\tof the model 12345 times",
    "a  model 🙂 漢字",
    "one",
]
DIGITS_OF_DEEPSEEK = split.Split(Regex(r"\p{N}{1,3}"), "isolated")
WORDS_OF_QWEN = split.Split(Regex(r"\p{N}| ?[^\s\p{N}]+|\s+(?!\S)|\s+"), "isolated")


@dataclass(frozen=True)
class Convention:
    """What the files of a family say, and what follows from it."""

    model_type: str
    tokenizer_class: str
    specials: tuple[str, ...]
    end: str
    front: tuple[str, ...] = ()  # what the post-processor puts in front
    start: tuple[str, ...] = ()  # of a text
    stops: tuple[str, ...] = ()  # further ones of generation_config.json
    splitter: Any = None
    normalizer: Any = None
    is_sentencepiece: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


def metaspace(scheme: str) -> Any:
    return split.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
CONVENTIONS = {
    "falcon": Convention(
        "falcon", "PreTrainedTokenizerFast", (">>TITLE<<", "<|endoftext|>"), "<|endoftext|>",
        splitter=split.Sequence([
            split.Punctuation("contiguous"), split.ByteLevel(add_prefix_space=False),
            split.Digits(individual_digits=False),
            split.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]),
    ),
    "bloom": Convention(
        "bloom", "BloomTokenizerFast", ("<unk>", "<s>", "</s>", "<pad>"), "</s>",
        splitter=split.Sequence([
            split.Split(Regex(" ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+"), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]),
    ),
    "cohere": Convention(
        "cohere", "CohereTokenizerFast",
        ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>",
         "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>", front=("<BOS_TOKEN>",), start=("<BOS_TOKEN>",),
        normalizer=normalizers.NFC(),
        splitter=split.Sequence([
            split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False),
        ]),
        settings=(("add_bos_token", True), ("add_eos_token", False)),
    ),
    "deepseek": Convention(
        "deepseek_v3", "LlamaTokenizerFast",
        ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
        "<\uff5cend▁of▁sentence\uff5c>",
        front=("<\uff5cbegin▁of▁sentence\uff5c>",),
        start=("<\uff5cbegin▁of▁sentence\uff5c>",),
        splitter=split.Sequence([
            DIGITS_OF_DEEPSEEK, split.Split(Regex("[一-龥]+"), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]),
        settings=(("add_bos_token", True), ("add_eos_token", False), ("legacy", True)),
    ),
    "llama 2": Convention(
        "llama", "LlamaTokenizer", ("<unk>", "<s>", "</s>"), "</s>", front=("<s>",),
        start=("<s>",), normalizer=PREPENDED, is_sentencepiece=True,
        settings=(("add_bos_token", True), ("add_eos_token", False), ("legacy", False)),
    ),
    "mistral": Convention(
        "mistral", "LlamaTokenizer", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>",
        front=("<s>",), start=("<s>",), splitter=metaspace("first"), is_sentencepiece=True,
        settings=(("add_bos_token", True), ("add_prefix_space", True)),
    ),
    "llama 3": Convention(
        "llama", "PreTrainedTokenizerFast",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "<|eot_id|>", front=("<|begin_of_text|>",), start=("<|begin_of_text|>",),
        stops=("<|end_of_text|>", "<|eom_id|>"),
        splitter=split.Sequence([WORDS_OF_QWEN, split.ByteLevel(False, use_regex=False)]),
    ),
    "opt": Convention(
        "opt", "GPT2Tokenizer", ("<s>", "<pad>", "</s>", "<unk>"), "</s>", front=("</s>",),
        splitter=split.ByteLevel(add_prefix_space=False),
        settings=(("add_bos_token", True), ("add_prefix_space", False), ("bos_token", "</s>")),
    ),
    "phi-3": Convention(
        "phi3", "LlamaTokenizer", ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>",
        "<|system|>", "<|end|>"), "<|endoftext|>", front=("<s>",), start=("<s>",),
        stops=("<|assistant|>", "<|end|>"), normalizer=PREPENDED, is_sentencepiece=True,
        settings=(("add_bos_token", False), ("add_eos_token", False), ("legacy", False)),
    ),
    "glm-4": Convention(
        "glm4", "PreTrainedTokenizerFast",
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|observation|>"), "<|endoftext|>",
        front=("[gMASK]", "<sop>"), start=("[gMASK]", "<sop>"),
        stops=("<|user|>", "<|observation|>"),
        splitter=split.Sequence([WORDS_OF_QWEN, split.ByteLevel(False, use_regex=False)]),
    ),
    "qwen": Convention(
        "qwen2", "Qwen2Tokenizer", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
        stops=("<|endoftext|>",), normalizer=normalizers.NFC(),
        splitter=split.Sequence([WORDS_OF_QWEN, split.ByteLevel(False, use_regex=False)]),
        settings=(("add_bos_token", False), ("add_prefix_space", False), ("bos_token", None)),
    ),
}  # fmt: skip


def sentencepiece(specials: tuple[str, ...]) -> Tokenizer:
    """A tokenizer as converted from SentencePiece, with bytes for unknown characters."""
    tokens = [*specials[:3], *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted(set("".join(TEXTS)) - set("🙂漢字 \n\t\r"))
    merges = [("▁", letter) for letter in "mal"] + [("▁m", "o"), ("▁mo", "d")]
    words = ["".join(pair) for pair in merges]
    vocabulary = {token: at for at, token in enumerate([*tokens, *letters, *words])}
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def written(folder: Path, family: Convention) -> Path:
    """Write the files that a repository of the family has on the hub."""
    if family.is_sentencepiece:
        tokenizer = sentencepiece(family.specials)
    else:
        tokenizer = train_tokenizer([Document("d", " ".join(TEXTS) * 2)], vocab_size=300)
    if family.splitter is not None:
        tokenizer.pre_tokenizer = family.splitter
    if family.normalizer is not None:
        tokenizer.normalizer = family.normalizer
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in family.specials])
    ids = [(name, tokenizer.token_to_id(name)) for name in family.front]
    if ids:
        tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*family.front, "$A"]), special_tokens=ids
        )
    elif not family.is_sentencepiece:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    start = {"bos_token": family.front[0]} if family.front else {}
    numbers = [tokenizer.token_to_id(name) for name in (family.end, *family.stops)]
    files = {
        "tokenizer_config": {
            "tokenizer_class": family.tokenizer_class, "eos_token": family.end,
            "model_max_length": 2048, **start, **dict(family.settings),
        },
        "config": {"model_type": family.model_type},
        "generation_config": {"eos_token_id": numbers[0] if len(numbers) == 1 else numbers},
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_family_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    family = CONVENTIONS[name]
    folder = written(tmp_path / "model", family)
    known = PretrainedTokenizer.read(folder, vocab_size=1000)
    stock = AutoTokenizer.from_pretrained(folder)
    number = known.tokenizer.token_to_id
    assert known.bounds.end == number(family.end)
    assert known.bounds.start == tuple(map(number, family.start))
    assert known.bounds.stops == tuple(map(number, family.stops))
    assert stock.eos_token_id == known.bounds.end
    documents = TokenisedDocuments.of_texts(TEXTS, known.tokenizer)
    config = GenerationConfig.from_pretrained(folder)
    assert PretrainedTokenizer.of(stock, ends=ends_of(config)).bounds == known.bounds
    for at, text in enumerate(TEXTS):
        ids = ids_of(documents.document(at)).tolist()
        front = known.bounds.start or tuple(map(number, family.front))
        assert [*front, *ids] == stock(text).input_ids
        assert ids == stock(text, add_special_tokens=False).input_ids
        assert int(documents.num_bytes[at]) == len(text.encode())
        assert known.tokenizer.decode(ids) == text
    long = [Document("d", TEXTS[1])]
    for limit in range(4, len(documents.document(1))):  # cut between characters
        cut = TokenisedDocuments.of(long, known.tokenizer, max_tokens_per_document=limit)
        assert limit - 4 < cut.num_tokens <= limit
        text = known.tokenizer.decode(ids_of(cut.tokens).tolist())
        assert TEXTS[1].startswith(text) and int(cut.num_bytes[0]) == len(text.encode())


@pytest.mark.parametrize("is_added", [True, False])
@pytest.mark.parametrize("has_start", [True, False])
def test_a_start_that_only_the_settings_name_is_noted(
    tmp_path: Path, is_added: bool, has_start: bool
) -> None:
    """As DeepSeek-V3: add_bos_token, and a tokenizer.json without a start."""
    family = CONVENTIONS["deepseek"]
    name = family.front[0]
    settings = (("add_bos_token", is_added), ("bos_token", name))
    front = family.front if has_start else ()
    folder = written(tmp_path / "model", replace(family, front=front, settings=settings))
    known = PretrainedTokenizer.read(folder, vocab_size=1000)
    number = known.tokenizer.token_to_id(name)
    assert known.bounds.start == ((number,) if has_start else ())
    assert (number in AutoTokenizer.from_pretrained(folder)("one").input_ids) is has_start
    assert (name in known.note) is (is_added and not has_start)


def test_each_leading_space_is_a_token_as_tokenizer_json_says(tmp_path: Path) -> None:
    """SentencePiece has one more in front of " a"; transformers 5, which rebuilds it, has not."""
    known = PretrainedTokenizer.read(
        written(tmp_path / "model", CONVENTIONS["llama 2"]), vocab_size=1000
    )
    space = known.tokenizer.token_to_id("▁")
    documents = TokenisedDocuments.of_texts(["  one", "  "], known.tokenizer)
    assert ids_of(documents.document(0)).tolist()[:3] == [space] * 3
    assert ids_of(documents.document(1)).tolist() == [space] * 3
    assert documents.num_bytes.tolist() == [5, 2]


LETTERS = {letter: at for at, letter in enumerate("abc")}
KNOWN = {
    "word pieces": WordPiece({**LETTERS, "[UNK]": 3}, unk_token="[UNK]"),
    "words": WordLevel({**LETTERS, "[UNK]": 3}, unk_token="[UNK]"),
    "letters": BPE({**LETTERS, "[UNK]": 3}, [], unk_token="[UNK]"),
    "unigrams": Unigram([("a", 0.0), ("b", 0.0), ("c", 0.0), ("[UNK]", 0.0)], unk_id=3),
}
UNKNOWN = {
    "word pieces": WordPiece(LETTERS, unk_token="[UNK]"),
    "words": WordLevel(LETTERS, unk_token="[UNK]"),
    "unigrams": Unigram([("a", 0.0), ("b", 0.0)]),
}


def by_spaces(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("name", KNOWN)
def test_the_share_of_unknown_tokens_is_noted(name: str) -> None:
    tokenizer, texts = by_spaces(KNOWN[name]), ["a b c a b", "a 漢 b", "c 🙂"]
    sides = [
        TokenisedDocuments.of_texts(texts[:2], tokenizer),
        TokenisedDocuments.of_texts(texts[2:], tokenizer),
    ]
    note = unencoded_note("old", sides, texts, tokenizer)
    assert note.startswith("old: 2 of 10 tokens (20.00%)") and "[UNK]" in note
    assert unencoded_note("old", sides[:0], [], tokenizer) == ""
    known = [TokenisedDocuments.of_texts(texts[:1], tokenizer)]
    assert unencoded_note("old", known, texts[:1], tokenizer) == ""


def test_texts_that_lose_characters_are_counted() -> None:
    texts = ["a b c", "a 漢 b", "🙂漢 🙂", "\n"]
    spaces = by_spaces(BPE(LETTERS, []))
    prefixed = Tokenizer(BPE({**LETTERS, "▁": 3}, []))
    prefixed.pre_tokenizer = metaspace("always")
    for tokenizer in (spaces, prefixed):
        note = unencoded_note(
            "old", [TokenisedDocuments.of_texts(texts, tokenizer)], texts, tokenizer
        )
        assert note.startswith("old: 2 of 4 texts") and ("漢" in note or "🙂" in note)
    for lossless in (train_tokenizer([Document("d", "a b")], vocab_size=260), sentencepiece(())):
        sides = [TokenisedDocuments.of_texts(texts, lossless)]
        assert unencoded_note("old", sides, texts, lossless) == ""


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_text_that_cannot_be_encoded_is_refused_by_name(name: str) -> None:
    tokenizer = by_spaces(UNKNOWN[name])
    assert len(encoded_texts(["a b", "b"], tokenizer)) == 2
    with pytest.raises(RequestError, match="z"):
        encoded_texts(["a b", "a z"], tokenizer)
    tokenizer.post_processor = TemplateProcessing(single="b $A", special_tokens=[("b", 1)])
    other = Tokenizer.from_str(tokenizer.to_str().replace('"a"', '"ä"'))  # no token for "a"
    assert TextBounds.of(other, 0).start == (1,)
