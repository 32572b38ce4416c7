"""Applying maps: a case by hand, matrix identities, fills, noise, masks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, Quantity, TensorMap

# Two neurons become three, neuron 1 twice with shares .9/.1; two inputs become four by tiling.
NEURONS = AxisMap.copied(2, [0, 1, 1], torch.tensor([1.0, 0.9, 0.1], dtype=torch.float64))
INPUTS = AxisMap.tiled(2, 4)
WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)

UP = TensorMap("up", (AxisFactor.writes(NEURONS), AxisFactor.reads(INPUTS)))
DOWN = TensorMap("down", (AxisFactor.writes(INPUTS), AxisFactor.reads(NEURONS)))


def _close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_two_by_two_by_hand() -> None:
    _close(
        UP.apply(WEIGHT),
        [[0.5, 1.0, 0.5, 1.0], [1.5, 2.0, 1.5, 2.0], [1.5, 2.0, 1.5, 2.0]],
    )
    _close(
        UP.apply(WEIGHT, quantity=Quantity.GRADIENT),
        [[1.0, 2.0, 1.0, 2.0], [2.7, 3.6, 2.7, 3.6], [0.3, 0.4, 0.3, 0.4]],
    )
    _close(
        UP.apply(WEIGHT, quantity=Quantity.SQUARED_GRADIENT),
        [[1.0, 2.0, 1.0, 2.0], [2.43, 3.24, 2.43, 3.24], [0.03, 0.04, 0.03, 0.04]],
    )
    _close(
        UP.apply(WEIGHT, quantity=Quantity.PATH_INTEGRAL),
        [[0.5, 1.0, 0.5, 1.0], [1.35, 1.8, 1.35, 1.8], [0.15, 0.2, 0.15, 0.2]],
    )
    _close(
        DOWN.apply(WEIGHT),
        [[1.0, 1.8, 0.2], [3.0, 3.6, 0.4], [1.0, 1.8, 0.2], [3.0, 3.6, 0.4]],
    )
    _close(
        DOWN.apply(WEIGHT, quantity=Quantity.GRADIENT),
        [[0.5, 1.0, 1.0], [1.5, 2.0, 2.0], [0.5, 1.0, 1.0], [1.5, 2.0, 2.0]],
    )


def test_agrees_with_the_dense_matrices() -> None:
    """W' = E_O·W·C_I and G' = C_Oᵀ·G·E_Iᵀ, computed by another path."""
    weight = torch.randn(2, 2, dtype=torch.float64)
    dense = NEURONS.producer_matrix() @ weight @ INPUTS.consumer_matrix()
    torch.testing.assert_close(UP.apply(weight), dense)
    dense = NEURONS.consumer_matrix().T @ weight @ INPUTS.producer_matrix().T
    torch.testing.assert_close(UP.apply(weight, quantity=Quantity.GRADIENT), dense)


def test_a_two_layer_network_is_kept_and_the_often_written_halving_is_not() -> None:
    """Negative control: halving the rows of the copied neuron changes the function."""
    up, down = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    nonlinear = TensorMap("up", (AxisFactor.writes_nonlinear(NEURONS), None))
    out = TensorMap("down", (None, AxisFactor.reads(NEURONS)))
    x = torch.randn(5, 2, dtype=torch.float64)
    before = torch.tanh(x @ up.T) @ down.T
    after = torch.tanh(x @ nonlinear.apply(up).T) @ out.apply(down).T
    torch.testing.assert_close(after, before)

    halves = torch.tensor([[1.0], [0.5], [0.5]], dtype=torch.float64)
    wrong = torch.tanh(x @ (up[[0, 1, 1]] * halves).T) @ down[:, [0, 1, 1]].T
    assert float((wrong - before).abs().max()) > 1e-2


def test_a_write_through_a_nonlinearity_is_unscaled_and_its_gradient_has_p_times_s() -> None:
    scaled = AxisFactor.writes_nonlinear(AxisMap.tiled(2, 4).rebalanced(scale=4.0))
    assert scaled.weight.tolist() == [1, 1, 1, 1]
    assert scaled.gradient.tolist() == [0.5, 0.5, 0.5, 0.5]


def test_a_gain_takes_the_ratio_and_its_gradient_the_inverse() -> None:
    gain = AxisFactor.gain(AxisMap.tiled(2, 4), rms_ratio=0.8)
    assert gain.weight.tolist() == [0.8] * 4
    assert gain.gradient.tolist() == [0.625] * 4


def test_a_map_without_axes_copies_and_does_not_alias() -> None:
    source = torch.randn(2, 3)
    result = TensorMap("x").apply(source)
    assert torch.equal(result, source)
    result.zero_()
    assert bool(source.any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert UP.apply(WEIGHT.to(dtype)).dtype == dtype
    filled = _padded(Fill("random", std=1.0, seed=1))
    assert filled.apply(WEIGHT.to(dtype)).dtype == dtype


def _padded(fill: Fill) -> TensorMap:
    return TensorMap("w", (AxisFactor.reads(AxisMap.padded(2, 4)), None), fill=fill)


def test_zero_and_mean_fill() -> None:
    assert _padded(Fill("zero")).apply(WEIGHT).tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    mean = _padded(Fill("mean")).apply(WEIGHT)
    assert mean.tolist() == [[1, 2], [3, 4], [2.5, 2.5], [2.5, 2.5]]


def test_random_fill_follows_its_seed_alone() -> None:
    source = torch.randn(2, 500)
    first = _padded(Fill("random", std=0.3, seed=7)).apply(source)
    torch.manual_seed(99)
    again = _padded(Fill("random", std=0.3, seed=7)).apply(source)
    other = _padded(Fill("random", std=0.3, seed=8)).apply(source)
    assert torch.equal(first, again)
    assert torch.equal(first[:2], source)
    assert not torch.equal(first[2:], other[2:])
    assert 0.27 < float(first[2:].std()) < 0.33


@pytest.mark.parametrize("quantity", [q for q in Quantity if q is not Quantity.WEIGHT])
def test_what_lives_on_weights_is_zero_in_new_coordinates(quantity: Quantity) -> None:
    mapped = _padded(Fill("random", std=1.0)).apply(WEIGHT, quantity=quantity)
    assert bool((mapped[2:] == 0).all())
    assert bool((mapped[:2] != 0).all())


def test_fresh_state_copies_weights_and_starts_moments_anew() -> None:
    fresh = replace(UP, state="fresh")
    assert torch.equal(fresh.apply(WEIGHT), UP.apply(WEIGHT))
    assert not fresh.apply(WEIGHT, quantity=Quantity.GRADIENT).any()


def test_zeroed_copies_have_the_shape_and_no_values() -> None:
    zeroed = replace(UP, is_zeroed=True).apply(WEIGHT)
    assert zeroed.shape == (3, 4)
    assert not zeroed.any()


def test_noise_falls_on_second_copies_alone() -> None:
    rows = TensorMap("up", (AxisFactor.writes(NEURONS), None), noise=0.01, noise_seed=3)
    difference = rows.apply(WEIGHT) - replace(rows, noise=0.0).apply(WEIGHT)
    assert bool((difference[:2] == 0).all())
    assert bool((difference[2] != 0).all())
    assert float(difference.abs().max()) < 0.1
    assert torch.equal(rows.apply(WEIGHT), rows.apply(WEIGHT))
    assert not torch.equal(rows.apply(WEIGHT), replace(rows, noise_seed=4).apply(WEIGHT))


def test_carried_marks_what_has_a_history() -> None:
    everything = torch.ones(2, 2, dtype=torch.bool)

    def marked(tensor_map: TensorMap) -> Tensor:
        return tensor_map.carried_mask(lambda _: everything)

    assert marked(UP).all()
    assert marked(_padded(Fill())).tolist() == [
        [True, True],
        [True, True],
        [False, False],
        [False, False],
    ]
    assert not marked(replace(UP, is_zeroed=True)).any()
    assert not marked(replace(UP, state="fresh")).any()
    assert marked(TensorMap("x")).all()


def test_carried_through_two_maps_in_a_row() -> None:
    """New rows of the first map are copied by the second: copies of the new stay new."""
    first = TensorMap("w", (AxisFactor.reads(AxisMap.padded(2, 3)), None))
    second = TensorMap(first, (AxisFactor.writes(AxisMap.tiled(3, 7)), None))
    mask = second.carried_mask(lambda _: torch.ones(2, 2, dtype=torch.bool))
    assert mask.all(dim=1).tolist() == [True, True, False, True, True, False, False]
    assert torch.equal(mask.all(dim=1), mask.any(dim=1))
