"""A bigram model whose losses can be computed by hand, and documents to score."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tritter.data.tokens import TokenisedDocuments
from tritter.evaluation.statistics import PairedScores


class Bigram(nn.Module):
    """Predicts the next token only from the current one; `table` contains logits [V, V]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.5)
        self.batch_shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        self.batch_shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


class Summing(nn.Module):
    """Predicts from the mean of all tokens so far: a causal model that uses every earlier token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        positions = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        return SimpleNamespace(logits=self.table[input_ids].cumsum(dim=1) / positions)


def _documents(*documents: list[int], names: tuple[str, ...] | None = None) -> TokenisedDocuments:
    lengths = torch.tensor([len(document) for document in documents])
    return TokenisedDocuments(
        tokens=torch.tensor([token for document in documents for token in document]).int(),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        num_bytes=2 * lengths,
        identifiers=names or tuple(f"d{index}" for index in range(len(documents))),
    )


def _losses(nats: Tensor, *, num_bytes: Tensor | None = None) -> PairedScores:
    num_bytes = torch.full((len(nats),), 100) if num_bytes is None else num_bytes
    return PairedScores(
        tuple(f"d{index}" for index in range(len(nats))),
        nats.double(),
        {"tokens": num_bytes // 2, "bytes": num_bytes},
        unit="nats",
    )


def _answers(right: Tensor, *, chance: float = 0.25) -> PairedScores:
    """Scores of answers, with one question per item by default."""
    ones = torch.ones(len(right), dtype=torch.int64)
    names = tuple(f"q{index}" for index in range(len(right)))
    return PairedScores(names, right.double(), {"answers": ones}, unit="accuracy", chance=chance)


@pytest.fixture
def make_documents() -> Callable[..., TokenisedDocuments]:
    return _documents


@pytest.fixture
def make_losses() -> Callable[..., PairedScores]:
    return _losses


@pytest.fixture
def make_answers() -> Callable[..., PairedScores]:
    return _answers


@pytest.fixture
def bigram() -> type[Bigram]:
    return Bigram


@pytest.fixture
def summing() -> type[Summing]:
    return Summing


@pytest.fixture
def table() -> Tensor:
    return torch.randn(7, 7, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def documents() -> TokenisedDocuments:
    generator = torch.Generator().manual_seed(4)
    lengths = [1, 4, 5, 9, 23, 2, 8, 3]
    return _documents(*(torch.randint(1, 7, (n,), generator=generator).tolist() for n in lengths))
