"""The tokenizer of a checkpoint is read without its truncation and padding settings."""

import json

import pytest
from tokenizers import Regex, pre_tokenizers

from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, PretrainedTokenizer, TokenisedDocuments
from tritter.errors import RequestError, TritterError


@pytest.fixture
def folder(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    state(tmp_path, "tokenizer_config.json", eos_token=END_OF_TEXT)
    return tmp_path


def state(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_it_is_read(folder, tokenizer):
    found = PretrainedTokenizer.read(folder, vocab_size=300)
    assert found.tokenizer.id_to_token(found.bounds.end) == END_OF_TEXT
    assert found.tokenizer.to_str() == tokenizer.to_str()


def test_a_panic_of_a_tokenizer_is_one_error_with_the_text(tokenizer):
    failing = type(tokenizer).from_str(tokenizer.to_str())
    pattern = Regex(r"^(([a-z])+.)+[A-Z]([a-z])+$")  # takes too long on some texts
    failing.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    documents = [Document("1", "ab"), Document("2", "x" * 60)]
    with pytest.raises(TritterError, match=r"on the text 'xxxx") as raised:
        TokenisedDocuments.of(documents, failing)
    assert "\n" not in str(raised.value)


def test_truncation_and_padding_are_left_out(folder, tokenizer):
    text = "the model grows " * 20
    whole = tokenizer.encode(text).ids
    limited = type(tokenizer).from_str(tokenizer.to_str())
    limited.enable_truncation(5)
    limited.enable_padding(length=400)
    limited.save(str(folder / "tokenizer.json"))
    assert PretrainedTokenizer.read(folder, vocab_size=300).tokenizer.encode(text).ids == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": END_OF_TEXT}}),
        ("special_tokens_map.json", {"eos_token": END_OF_TEXT}),
        ("generation_config.json", {"eos_token_id": [0, 5]}),
        ("config.json", {"eos_token_id": 0}),
    ],
)
def test_where_the_end_of_text_is_stated(folder, name, content):
    state(folder, "tokenizer_config.json")
    state(folder, name, **content)
    found = PretrainedTokenizer.read(folder, vocab_size=300)
    assert found.tokenizer.id_to_token(found.bounds.end) == END_OF_TEXT


@pytest.mark.parametrize(
    "content",
    [{}, {"eos_token": None}, {"eos_token": "<unknown>"}, {"eos_token_id": 0}],
)
def test_no_end_of_text_is_refused(folder, content):
    state(folder, "tokenizer_config.json", **content)
    with pytest.raises(RequestError, match="eos_token"):
        PretrainedTokenizer.read(folder, vocab_size=300)


def test_a_tokenizer_of_another_model_is_refused(folder, tokenizer):
    assert tokenizer.get_vocab_size() == 300
    PretrainedTokenizer.read(folder, vocab_size=320)  # padded embeddings are common
    with pytest.raises(RequestError, match=r"token ids up to 299, but .* 299 embeddings"):
        PretrainedTokenizer.read(folder, vocab_size=299)


def test_damaged_files_are_refused(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(RequestError, match=r"tokenizer_config.json cannot be read"):
        PretrainedTokenizer.read(folder, vocab_size=300)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match="not a usable tokenizer"):
        PretrainedTokenizer.read(folder, vocab_size=300)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"has no tokenizer.json"):
        PretrainedTokenizer.read(folder, vocab_size=300)
