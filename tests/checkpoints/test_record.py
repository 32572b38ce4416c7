"""tritter.json as data: round trip, versions, and what is not a lineage."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tritter.checkpoints import ExpansionRecord, Lineage
from tritter.checkpoints.record import layers_text
from tritter.errors import TritterError
from tritter.storage.records import FORMAT_VERSION, plain_record

RECORD = ExpansionRecord(
    timestamp="2026-01-02T03:04:05+00:00",
    expansion_type="depth",
    method="dus",
    options={"target_layers": 6, "drop_layers": None, "identity_init": False},
    seed=7,
    source_config={"num_hidden_layers": 4},
    target_config={"num_hidden_layers": 6},
    layer_sources=(0, 1, 2, 1, 2, 3),
    map_digest="d" * 64,
    claims_exact=False,
    step0_error=0.125,
    continued_training_steps=250,
    performance_delta={"prose": 0.01, "code": -0.25},
)
LINEAGE = Lineage(
    model_hash="a" * 64,
    base_model_hash="b" * 64,
    tensor_digests={"lm_head.weight": "c" * 64},
    file_digests={"config.json": "e" * 64},
    parent_hash="f" * 64,
    parent_path="../base",
    expansion_history=(RECORD, replace(RECORD, seed=8)),
    step=250,
    epoch=1,
    best_loss=3.5,
    benchmark_scores={"code": 3.5},
    training_config={"learning_rate": 1e-3, "data": {"prose": "hash"}},
)


def _write(folder: Path, plain: object) -> Path:
    (folder / "tritter.json").write_text(json.dumps(plain))
    return folder


def test_round_trip_through_json(tmp_path: Path) -> None:
    assert Lineage.read(_write(tmp_path, plain_record(LINEAGE))) == LINEAGE


def test_the_record_has_the_fields_that_the_format_promises() -> None:
    promised = {"format_version", "model_hash", "parent_hash", "base_model_hash", "step", "epoch"}
    promised |= {"tensor_digests", "file_digests", "expansion_history", "best_loss"}
    promised |= {"benchmark_scores", "training_config"}
    plain = plain_record(LINEAGE)
    assert promised <= set(plain)
    promised = {"timestamp", "expansion_type", "source_config", "target_config", "method"}
    promised |= {"continued_training_steps", "performance_delta", "map_digest", "layer_sources"}
    assert promised <= set(plain["expansion_history"][0])


def test_a_plain_folder_has_no_lineage(tmp_path: Path) -> None:
    assert Lineage.read(tmp_path) is None


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    newer = {**plain_record(LINEAGE), "format_version": FORMAT_VERSION + 1, "new_field": 1}
    with pytest.raises(TritterError) as error:
        Lineage.read(_write(tmp_path, newer))
    assert f"format_version {FORMAT_VERSION + 1}" in str(error.value)
    assert f"reads {FORMAT_VERSION}" in str(error.value)
    assert "tritter.json" in str(error.value)


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda plain: {name: value for name, value in plain.items() if name != key}


def _with(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda plain: {**plain, **changes}


def _in_history(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Change the newest record of the history."""

    def change(plain: dict[str, Any]) -> object:
        *older, newest = plain["expansion_history"]
        return {**plain, "expansion_history": [*older, {**newest, **changes}]}

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("format_version"), "format_version None"),
        (_without("format"), "development version"),
        (_with(format="ledger"), "not a lineage: format = 'ledger'"),
        (_with(format_version="1"), "format_version '1'"),
        (_without("model_hash"), "model_hash"),
        (_with(favourite_colour="red"), "favourite_colour"),
        (_with(model_hash="a" * 63), "model_hash"),
        (_with(model_hash=3), "model_hash"),
        (_with(model_hash="A" * 10**6), "model_hash"),
        (_with(tensor_digests={"w": 7}), "tensor_digests"),
        (_with(tensor_digests=["w"]), "tensor_digests"),
        (_with(file_digests={"../../secret": "a" * 64}), "file_digests"),
        (_with(file_digests={"/etc/passwd": "a" * 64}), "file_digests"),
        (_with(parent_path="x" * 10_000), "parent_path"),
        (_with(parent_path="a\0b"), "parent_path"),
        (_with(parent_path=["a"]), "parent_path"),
        (_with(parent_file_digests={"a": None}), "parent_file_digests"),
        (_with(step=-1), "step"),
        (_with(step=True), "step"),
        (_with(epoch=1.5), "epoch"),
        (_with(step=10**30), "step"),
        (_with(best_loss=float("nan")), "best_loss"),
        (_with(best_loss=10**120), "cannot be read"),
        (_with(benchmark_scores={"code": "good"}), "benchmark_scores"),
        (_with(benchmark_scores={"code": float("inf")}), "benchmark_scores"),
        (_with(training_config=[]), "training_config"),
        (_with(stock_loadable="perhaps"), "stock_loadable"),
        (_in_history(seed="a"), "expansion_history.1.seed"),
        (_in_history(seed=None), "expansion_history.1.seed"),
        (_in_history(timestamp=5), "expansion_history.1.timestamp"),
        (_in_history(method=["dus"]), "expansion_history.1.method"),
        (_in_history(options="all"), "expansion_history.1.options"),
        (_in_history(source_config=None), "expansion_history.1.source_config"),
        (_in_history(layer_sources=[0, -1]), "expansion_history.1.layer_sources"),
        (_in_history(layer_sources=[[0]]), "expansion_history.1.layer_sources"),
        (_in_history(layer_sources="0"), "expansion_history.1.layer_sources"),
        (_in_history(map_digest="d"), "expansion_history.1.map_digest"),
        (_in_history(claims_exact=1), "expansion_history.1.claims_exact"),
        (_in_history(step0_error="small"), "expansion_history.1.step0_error"),
        (_in_history(continued_training_steps=-5), "continued_training_steps"),
        (_in_history(performance_delta={"code": None}), "performance_delta"),
        (_in_history(performance_delta=None), "performance_delta"),
        (_in_history(mood="good"), "expansion_history.1.mood"),
        (_with(expansion_history=None), "not a lineage"),
        (_with(expansion_history=[{"method": "dus"}]), "timestamp is missing"),
        (_with(expansion_history=["dus"]), "not a lineage"),
        (lambda plain: [plain], "not a JSON object"),
        (lambda plain: "lineage", "not a JSON object"),
    ],
)
def test_what_is_no_lineage_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    with pytest.raises(TritterError) as error:
        Lineage.read(_write(tmp_path, change(plain_record(LINEAGE))))
    assert re.search(said, str(error.value))
    assert "tritter.json" in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 200_000])
def test_unreadable_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tritter.json").write_bytes(content)
    with pytest.raises(TritterError, match=r"tritter\.json cannot be read"):
        Lineage.read(tmp_path)


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ((0, 1, 1, 2), "0 1 1 2"),
        ((*range(24), *range(8, 32)), "0-23 8-31"),
        ((0, *range(5), 7), "0 0-4 7"),
        ((), ""),
    ],
)
def test_layers_in_order_are_a_range(sources: tuple[int, ...], text: str) -> None:
    assert layers_text(sources) == text


def test_many_layers_are_cut_in_the_middle() -> None:
    text = layers_text(sorted([*range(100), *range(100)]))
    assert text.startswith("0 0 1 1") and text.endswith("99 99 (200 layers)") and len(text) < 120
