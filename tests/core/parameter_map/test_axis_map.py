"""C·E = I for every constructor of axis maps, and refusal of invalid maps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tritter.core.parameter_map import AxisMap

SIZES = st.integers(1, 12)


def _shares(source: list[int], old_size: int, raw: list[float]) -> Tensor:
    """Scale raw positive weights so that the copies of each coordinate add up to 1."""
    weight = torch.tensor(raw[: len(source)], dtype=torch.float64)
    index = torch.tensor(source)
    total = torch.zeros(old_size, dtype=torch.float64).index_add_(0, index, weight)
    return weight / total[index]


@st.composite
def axis_maps(draw: st.DrawFn) -> AxisMap:
    old_size, extra = draw(SIZES), draw(st.integers(0, 12))
    match draw(st.sampled_from(["padded", "tiled", "copied"])):
        case "padded":
            return AxisMap.padded(old_size, old_size + extra)
        case "tiled":
            return AxisMap.tiled(old_size, old_size + extra)
        case _:
            more = draw(st.lists(st.integers(0, old_size - 1), min_size=extra, max_size=extra))
            source = draw(st.permutations([*range(old_size), *more]))
            raw = draw(st.lists(st.floats(0.1, 9.0), min_size=len(source), max_size=len(source)))
            return AxisMap.copied(old_size, source, _shares(source, old_size, raw))


def _assert_exact(axis_map: AxisMap) -> None:
    producer, consumer = axis_map.producer_matrix(), axis_map.consumer_matrix()
    assert producer.shape == (axis_map.new_size, axis_map.old_size)
    assert consumer.shape == (axis_map.old_size, axis_map.new_size)
    identity = torch.eye(axis_map.old_size, dtype=torch.float64)
    torch.testing.assert_close(consumer @ producer, identity, rtol=0, atol=1e-12)


@given(axis_map=axis_maps(), width=st.integers(1, 4), scale=st.sampled_from([0.25, 0.5, 3.0]))
def test_consumers_undo_what_producers_write(axis_map: AxisMap, width: int, scale: float) -> None:
    _assert_exact(axis_map)
    _assert_exact(axis_map.repeated(width))
    _assert_exact(axis_map.rebalanced(scale=scale))
    _assert_exact(axis_map.repeated(width).rebalanced(scale=scale).repeated(2))


@given(axis_map=axis_maps(), width=st.integers(1, 4))
def test_repeated_is_the_kronecker_product_with_an_identity(axis_map: AxisMap, width: int) -> None:
    repeated, inner = axis_map.repeated(width), torch.eye(width, dtype=torch.float64)
    assert torch.equal(repeated.producer_matrix(), torch.kron(axis_map.producer_matrix(), inner))
    assert torch.equal(
        repeated.consumer_matrix(), torch.kron(axis_map.consumer_matrix().contiguous(), inner)
    )


def test_padded_by_hand() -> None:
    axis_map = AxisMap.padded(2, 3)
    assert axis_map.source.tolist() == [0, 1, -1]
    assert axis_map.producer_matrix().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert axis_map.consumer_matrix().tolist() == [[1, 0, 0], [0, 1, 0]]
    assert axis_map.num_copies == 1
    assert not axis_map.is_identity


def test_tiled_by_hand() -> None:
    axis_map = AxisMap.tiled(2, 5)
    assert axis_map.source.tolist() == [0, 1, 0, 1, -1]
    assert axis_map.scale.tolist() == [1, 1, 1, 1, 0]
    assert axis_map.share.tolist() == [0.5, 0.5, 0.5, 0.5, 0]
    assert axis_map.num_copies == 2


def test_rebalanced_by_hand() -> None:
    axis_map = AxisMap.tiled(1, 2).rebalanced(scale=0.5)
    assert axis_map.scale.tolist() == [0.5, 0.5]
    assert axis_map.share.tolist() == [1, 1]


def test_repeated_heads_by_hand() -> None:
    share = torch.tensor([0.9, 1.0, 0.0, 0.1], dtype=torch.float64)
    heads = AxisMap.copied(2, [1, 0, -1, 1], share)
    assert heads.repeated(2).source.tolist() == [2, 3, 0, 1, -1, -1, 2, 3]
    assert heads.repeated(2).share.tolist() == [0.9, 0.9, 1, 1, 0, 0, 0.1, 0.1]


@pytest.mark.parametrize("size", [1, 7])
def test_identity(size: int) -> None:
    identity = AxisMap.identity(size)
    assert identity.is_identity
    assert torch.equal(identity.producer_matrix(), torch.eye(size, dtype=torch.float64))
    assert identity.repeated(3).is_identity
    assert not identity.rebalanced(scale=2.0).is_identity
    assert not AxisMap.padded(size, size + 1).is_identity
    assert not AxisMap.copied(7, [1, 0, 2, 3, 4, 5, 6], torch.ones(7)).is_identity


@pytest.mark.parametrize(
    ("source", "share"),
    [
        ([0, 1, 0], [0.5, 1.0, 0.4]),  # the shares of 0 add up to 0.9
        ([0, 1, 0], [1.0, 1.0, 1.0]),  # the classic mistake: consumers of a copy are not split
        ([0, 0, 0], [0.5, 0.25, 0.25]),  # 1 has no copy
        ([0, 1, 0], [0.5, 1.0, 0.5 + 1e-9]),  # more than a rounding error
    ],
)
def test_shares_that_do_not_add_up_are_refused(source: list[int], share: list[float]) -> None:
    with pytest.raises(ValueError, match="not the identity"):
        AxisMap.copied(2, source, torch.tensor(share, dtype=torch.float64))


@pytest.mark.parametrize("outside", [2, -2, -100])
def test_a_source_outside_the_old_space_is_refused(outside: int) -> None:
    """A source of -2 would count as new here and as the last but one where it is an index."""
    with pytest.raises(ValueError, match=f"source {outside} is outside the old space of 2 "):
        AxisMap.copied(2, [0, 1, outside], torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("build", [AxisMap.padded, AxisMap.tiled])
def test_shrinking_is_refused(build: type[AxisMap]) -> None:
    with pytest.raises(ValueError, match="not the identity"):
        build(4, 3)  # type: ignore[call-arg,arg-type]


def test_coordinates_in_any_order_have_a_number_of_copies() -> None:
    assert AxisMap.copied(2, [0, 1, 1, 0], torch.full((4,), 0.5)).num_copies == 2
