"""Small handmade documents, and a tokenizer trained on them."""

import random

import pytest
from tokenizers import Tokenizer

from tritter.data.documents import Document
from tritter.data.tokens import train_tokenizer

SENTENCE = "the model grows a layer where data asks for one and keeps what it knew — déjà vu 猫"


def _make(count: int, *, prefix: str = "d") -> tuple[Document, ...]:
    source, words = random.Random(prefix), SENTENCE.split()
    return tuple(
        Document(f"{prefix}/{index}", " ".join(source.choices(words, k=40)) + "\n")
        for index in range(count)
    )


@pytest.fixture(scope="session")
def make_documents():
    """Return a factory of documents named `prefix/0`, `prefix/1`, …"""
    return _make


@pytest.fixture(scope="session")
def documents() -> tuple[Document, ...]:
    return _make(40)


@pytest.fixture(scope="session")
def tokenizer(documents: tuple[Document, ...]) -> Tokenizer:
    return train_tokenizer(documents, vocab_size=300)
