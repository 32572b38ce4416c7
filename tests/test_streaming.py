"""Checkpoints are expanded tensor by tensor: shards of any size, constant memory."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import PreTrainedModel

from experiments.benchmarks.streaming import MEGABYTE, Row, benchmark, measure, write_source
from tests import oracle
from tests.oracle.families import SPARSE, tiny
from tests.oracle.qwen3 import tiny_qwen3
from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Width
from tritter.core.families import LayoutKind
from tritter.transform import expand

MODELS = {"llama": oracle.tiny_llama, "qwen3": tiny_qwen3}
LAYOUTS: tuple[LayoutKind, ...] = ("hub", "live")


# Shards


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sharded_in_sharded_out(tmp_path: Path, family: str, tied: bool) -> None:
    model = MODELS[family](tie_word_embeddings=tied)
    whole = oracle.saved(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    specs: list[ExpansionSpec] = [Width(), LlamaPro()]
    hashes, parents = set(), set()
    for source in (whole, tmp_path / "sharded"):
        for limit in (15_000, 100_000, 10**9):
            folder = tmp_path / f"{source.name}-{limit}"
            result = expand(source, folder, specs, max_shard_bytes=limit)
            hashes.add(result.lineage.model_hash)
            parents.add(result.lineage.parent_hash)
            _check_shards(folder, limit)
            assert oracle.relative_difference(model, oracle.stock(folder), oracle.tokens()) < 1e-4
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert (len(hashes), len(parents)) == (1, 1)


def _check_shards(folder: Path, limit: int) -> None:
    """Compare the index with the contents of the files, byte by byte."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            sizes = [tensor.nbytes for tensor in map(file.get_tensor, names)]
        assert sum(sizes) <= limit or len(sizes) == 1
        weight_map |= dict.fromkeys(names, path.name)
        total += sum(sizes)
    index = folder / "model.safetensors.index.json"
    if len(set(weight_map.values())) == 1:
        assert set(weight_map.values()) == {"model.safetensors"}
        assert not index.exists()
        return
    plain = json.loads(index.read_text(encoding="utf-8"))
    assert plain["weight_map"] == weight_map
    assert plain["metadata"]["total_size"] == total


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", MODELS)
def test_shards_of_a_sharded_result_go_in_again(tmp_path: Path, family: str) -> None:
    model: PreTrainedModel = MODELS[family]()
    source = oracle.saved(model, tmp_path / "source")
    first = expand(source, tmp_path / "first", [Width()], max_shard_bytes=20_000)
    again = expand(first.folder, tmp_path / "again", [Dus(identity_init=True)])
    at_once = expand(source, tmp_path / "at_once", [Width(), Dus(identity_init=True)])
    assert again.lineage.model_hash == at_once.lineage.model_hash
    assert again.lineage.parent_hash == first.lineage.model_hash
    assert again.lineage.base_model_hash == at_once.lineage.base_model_hash


# Experts


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_experts_in_shards_of_either_layout(tmp_path: Path, family: str) -> None:
    """Experts as separate tensors or stacked per layer: the values are equal."""
    model = tiny(family)
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [Moe(noise=0.0, num_experts=4), LlamaPro()]
    at_once = expand(source, tmp_path / "at_once", specs)
    for first in LAYOUTS:
        for limit in (15_000, 10**9):
            between = tmp_path / f"{first}{limit}"
            expand(source, between, specs[:1], expert_layout=first, max_shard_bytes=limit)
            _check_shards(between, limit)
            for second in LAYOUTS:
                folder = tmp_path / f"{between.name}-{second}"
                result = expand(between, folder, specs[1:], expert_layout=second)
                if second == "hub":
                    assert result.lineage.model_hash == at_once.lineage.model_hash
                error = oracle.relative_difference(model, oracle.stock(folder), oracle.tokens())
                assert error < 1e-4


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", SPARSE)
def test_sharded_experts_of_stock_transformers(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    whole = oracle.saved(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    specs: list[ExpansionSpec] = [LlamaPro(), Dus(identity_init=True)]
    hashes = {
        expand(source, tmp_path / f"{source.name}-out", specs).lineage.model_hash
        for source in (whole, tmp_path / "sharded")
    }
    assert len(hashes) == 1
    after = oracle.stock(tmp_path / "sharded-out")
    assert oracle.relative_difference(model, after, oracle.tokens()) < 1e-4


# Memory


def _assert_equal_peaks(rows: Sequence[Row]) -> None:
    """A larger source needs the same memory, within 15 %, and far less than its size."""
    small, large = rows
    assert large.method == small.method
    assert large.source_mb > 3 * small.source_mb
    # Not exactly equal: thousands of expert tensors need some bookkeeping
    assert large.peak_anonymous_mb < 1.25 * small.peak_anonymous_mb, rows
    assert large.growth_mb - small.growth_mb < 0.4 * (large.source_mb - small.source_mb), rows


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    rows = list(benchmark([20, 80], methods=["dus"], hidden_size=256, place=tmp_path))
    _assert_equal_peaks(rows)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["moe", "moe_fused"])
def test_memory_does_not_grow_with_the_layers_made_sparse(tmp_path: Path, method: str) -> None:
    rows = list(benchmark([20, 80], methods=[method], hidden_size=256, place=tmp_path))
    _assert_equal_peaks(rows)
    assert all(row.result_mb > 2 * row.source_mb for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["dus", "dus_fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_go_through_one_by_one(tmp_path: Path, layout: LayoutKind, method: str) -> None:
    """With stacked experts, at most one stacked tensor is in memory."""
    peaks = []
    for megabytes in (20, 80):
        place = tmp_path / str(megabytes)
        place.mkdir()
        write_source(place / "dense", megabytes=megabytes, hidden_size=256)
        expand(place / "dense", place / "sparse", [Moe(num_experts=4)], expert_layout=layout)
        peaks.append(measure(place / "sparse", place / "result", method))
    source_bytes = sum(path.stat().st_size for path in (tmp_path / "80" / "sparse").iterdir())
    small, large = (peak.peak_anonymous_mb for peak in peaks)
    assert large < 1.15 * small
    assert source_bytes > 150 * MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["dus", "width", "moe"])
def test_half_a_gigabyte_and_two_take_the_same_memory(tmp_path: Path, method: str) -> None:
    """Anonymous memory, sampled from outside; mapped pages of the source are not counted."""
    rows = list(benchmark([500, 2000], methods=[method], place=tmp_path))
    _assert_equal_peaks(rows)
    assert rows[1].growth_mb < 0.2 * rows[1].source_mb
    assert list(tmp_path.iterdir()) == []
