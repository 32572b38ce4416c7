"""Adapters merged into one: compared with the SVD of the full sum, and its error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritter.methods.experts.adapters import Factors


def adapters(*ranks: int, rows: int, columns: int, seed: int = 0) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factors(drawn(r, columns), drawn(rows, r), 0.5 + r) for r in ranks]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rank=st.integers(1, 12),
)
def test_the_nearest_of_its_rank(rows: int, columns: int, ranks: list[int], rank: int) -> None:
    parts = adapters(*ranks, rows=rows, columns=columns)
    weights = [0.2 + number for number in range(len(parts))]
    whole = sum(w * p.scaling * p.up @ p.down for p, w in zip(parts, weights, strict=True))
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    nearest = left[:, :rank] * values[:rank] @ right[:rank]
    one = Factors.merged(parts, weights, rank=rank, alpha=2.0 * rank)
    assert one.down.shape == (rank, columns) and one.up.shape == (rows, rank)
    assert one.scaling == 2
    assert torch.allclose(one.scaling * one.up @ one.down, nearest, atol=1e-9)
    lost = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
    assert one.lost_share(parts, weights) == pytest.approx(lost, abs=1e-7)


def test_one_adapter_with_room_is_itself() -> None:
    (own,) = adapters(3, rows=7, columns=5)
    result = Factors.merged([own], [1.0], rank=3, alpha=6.0)
    assert torch.allclose(result.delta(), own.delta(), atol=1e-12)
    zeros = Factors(own.down, torch.zeros_like(own.up), 1.0)
    result = Factors.merged([zeros], [1.0], rank=2, alpha=4.0)
    assert result.lost_share([zeros], [1.0]) == 0
