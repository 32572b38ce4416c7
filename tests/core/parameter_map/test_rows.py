"""Weights computed in blocks of rows equal those of whole tensors, bit for bit."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, TensorMap, rows
from tritter.core.parameter_map.rows import WeightReader

ROWS, COLUMNS = 70, 34  # not multiples of the group size of torch's generator
TALL = AxisFactor.writes(AxisMap.tiled(ROWS, 105))
COPIED = torch.cat([torch.arange(ROWS), torch.arange(0, ROWS, 2)])
SHARES = torch.ones(105, dtype=torch.float64).index_put((COPIED,), torch.tensor(0.5).double())
WIDE = AxisFactor.reads(AxisMap.padded(COLUMNS, 51))
TWICE = AxisFactor.writes_nonlinear(AxisMap.tiled(COLUMNS, 75))
PICKED = AxisFactor(torch.tensor([3, -1, 3, 69, 0] * 9), *(torch.ones(45).double(),) * 2)
RANDOM = Fill("random", std=0.3, seed=5)
MATCHED = Fill("matched", seed=6, scale=1.5)
DONOR = TensorMap("b", (TALL, WIDE), RANDOM)
MAPS = {
    "kept": TensorMap("a"),
    "kept twice": TensorMap(TensorMap("a"), is_copy=True, state="fresh"),
    "silent": TensorMap("a", is_zeroed=True),
    "rows": TensorMap("a", (TALL, None)),
    "columns": TensorMap("a", (None, WIDE), RANDOM),
    "both": TensorMap("a", (TALL, WIDE), RANDOM),
    "repeated": TensorMap("a", (TALL, TWICE), MATCHED, noise=0.1, noise_seed=7),
    "picked": TensorMap("a", (PICKED, WIDE), MATCHED, noise=0.1, noise_seed=8),
    "a further copy": TensorMap("a", (None, None), noise=0.02, noise_seed=9, is_copy=True),
    "mean of rows": TensorMap("a", (PICKED, None), Fill("row_mean")),
    "from elsewhere": TensorMap("a", (TALL, WIDE), Fill("copy", donor=DONOR)),
    "mean": TensorMap("a", (TALL, WIDE), Fill("mean")),
    "offset": TensorMap("a", (TALL, WIDE), RANDOM, offset=1.0),
    "blend": TensorMap("a", blend=("b",)),
    "after": TensorMap(DONOR, (PICKED, None), MATCHED),
    "created": TensorMap.created((40, 30), replace(RANDOM, repeat=2)),
    "gain": TensorMap("c", (AxisFactor.writes(AxisMap.padded(40, 60)),), Fill("mean")),
    "narrow": TensorMap("d", (AxisFactor.writes(AxisMap.padded(50, 75)), None), RANDOM),
}


@pytest.fixture(autouse=True, params=[16, 2**17], ids=["small blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rows, "_BLOCK_ENTRIES", request.param)
    yield


def _tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (ROWS, COLUMNS), "b": (ROWS, COLUMNS), "c": (40,), "d": (50, 8)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (0.02 * tensor + 0.001).to(dtype) for name, tensor in drawn.items()}


@pytest.mark.quick_cases(36)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_make_the_whole(name: str, dtype: torch.dtype) -> None:
    tensors, tensor_map = _tensors(dtype), MAPS[name]
    before = {key: value.clone() for key, value in tensors.items()}
    for result in (dtype, torch.float16):
        whole = tensor_map.rounded_weight(tensors.__getitem__, result)
        pieces = list(WeightReader(tensors.__getitem__).blocks(tensor_map, result))
        assert all(piece.dtype == result for piece in pieces)
        assert torch.equal(torch.cat([p.reshape(-1) for p in pieces]), whole.reshape(-1))
    assert all(torch.equal(tensors[key], value) for key, value in before.items())


def test_large_tensors_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_ENTRIES", 16)
    tensors = _tensors(torch.bfloat16)
    reader = WeightReader(tensors.__getitem__)
    counts = {name: len(list(reader.blocks(MAPS[name], torch.bfloat16))) for name in MAPS}
    assert counts["kept"] == math.ceil(ROWS * COLUMNS / 16)
    assert counts["both"] == counts["repeated"] == 7
    assert counts["mean"] == 1


def test_another_seed_makes_another_tensor() -> None:
    """Otherwise equal bits would not test the draws."""
    tensors = _tensors(torch.float32)
    one, two = (
        torch.cat(list(WeightReader(tensors.__getitem__).blocks(made, torch.float32)))
        for made in (MAPS["both"], replace(MAPS["both"], fill=replace(RANDOM, seed=6)))
    )
    assert not torch.equal(one, two)
