"""A streamed model equals the loaded stock model, bit for bit."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.benchmarks import check
from tests import oracle
from tests.core.families.model_types import example
from tests.oracle.families import SPARSE, generic, tiny
from tests.oracle.sizes import SIZES, uneven, written
from tritter.core import streamed
from tritter.core.expansions import LlamaPro, Moe, MoeAdd
from tritter.core.families import LayoutKind
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import load_model
from tritter.core.streamed import _KEPT_POSITIONS, StreamedModel
from tritter.errors import TritterError
from tritter.transform import expand

VOCABULARY = 97
EVERYTHING = slice(0, VOCABULARY)
ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def whole(folder: Path) -> Any:
    """Return the outputs of the loaded model with experts that run one by one."""
    model: Any = load_model(folder)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    with torch.inference_mode():
        return model(input_ids=oracle.tokens(), use_cache=False, output_hidden_states=True)


def assert_the_same(folder: Path) -> StreamedModel:
    expected, model = whole(folder), StreamedModel(folder, oracle.tokens())
    assert torch.equal(model.logits(EVERYTHING), expected.logits)
    assert torch.equal(model.logits(slice(31, 64)), expected.logits[..., 31:64])
    # transformers returns the last state after the final norm
    for ours, theirs in zip(model.states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(ours, theirs[:, -_KEPT_POSITIONS:])
    return model


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic())
def test_every_family(tmp_path: Path, family: str) -> None:
    for tied in (False, True):
        model = tiny(family, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied), max_shard_size="20KB")
        assert_the_same(tmp_path / str(tied))


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name == "falcon_h1" else pytest.mark.full)
        for name in (
            *("falcon_h1", "zaya"),  # the parent fills the buffers of a layer; loading changes one
            "rwkv",  # changes its weights before it evaluates them
            *("llama4", "llama4_text"),  # their prefix is no attribute
            *("gemma4", "reformer"),  # read the weights of other modules
            *("camembert", "xlm-roberta"),  # the head has the first name of the tied tensor
            "openai-gpt",  # layers return lists
        )
    ],
)
def test_what_tables_lack(tmp_path: Path, model_type: str) -> None:
    few = {} if model_type == "gemma4" else {"num_hidden_layers": 4}
    few |= {"rescale_every": 2} if model_type == "rwkv" else {}
    folder = tmp_path / "base"
    Twin.of(example(model_type, **few)).model.float().save_pretrained(folder)
    config: Any = load_model(folder).config
    size = config.get_text_config(decoder=True).vocab_size
    model, expected = StreamedModel(folder, oracle.tokens()), whole(folder).logits
    # Not equal: on some CPUs, products of matrices round by the alignment of their memory
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    close(model.logits(slice(0, size)), expected)
    close(model.logits(slice(31, 64)), expected[..., 31:64])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["gemma3_text", "mixtral"])
def test_what_is_stored_in_bfloat16_is_computed_in_float32(tmp_path: Path, family: str) -> None:
    assert_the_same(oracle.saved(tiny(family).bfloat16(), tmp_path))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ROTARY)
def test_every_kind_of_rotary_embedding(tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROTARY[kind]}
    assert_the_same(oracle.saved(tiny("llama", rope_parameters=rope), tmp_path))


def test_a_padding_token_is_a_token(tmp_path: Path) -> None:
    assert_the_same(oracle.saved(tiny("llama", pad_token_id=VOCABULARY - 1), tmp_path))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("layout", ["hub", "live"])
def test_experts_as_the_hub_has_them_and_as_memory_has_them(
    tmp_path: Path, layout: LayoutKind
) -> None:
    source = oracle.saved(tiny("qwen3"), tmp_path / "source")
    expand(source, tmp_path / "sparse", [Moe(num_experts=4)], expert_layout=layout)
    assert_the_same(tmp_path / "sparse")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", SPARSE)
def test_appended_experts_are_held_back(tmp_path: Path, family: str) -> None:
    source = oracle.saved(tiny(family), tmp_path / "source")
    spec = MoeAdd(num_experts=2, addition="append", noise=0.5)
    expand(source, tmp_path / "grown", [spec])
    model = assert_the_same(tmp_path / "grown")
    (tmp_path / "grown" / "state" / "router.json").unlink()
    opened = StreamedModel(tmp_path / "grown", oracle.tokens())
    assert not torch.equal(opened.logits(EVERYTHING), model.logits(EVERYTHING))


def test_ffns_of_different_width(tmp_path: Path) -> None:
    folder = written(uneven("llama", SIZES), tmp_path / "uneven")
    model = StreamedModel(folder, oracle.tokens())
    torch.testing.assert_close(model.logits(EVERYTHING), whole(folder).logits)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["gemma3_text", "qwen2_moe"])
def test_large_matrices_are_multiplied_by_in_blocks(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = oracle.saved(tiny(family), tmp_path)
    monkeypatch.setattr(streamed, "_BLOCK_BYTES", 4 * 24 * 7)
    cut, sizes = streamed.blocks, set[int]()

    def watched(rows: slice, step: int) -> Iterator[slice]:
        for block in cut(rows, step):
            sizes.add(block.stop - block.start)
            yield block

    monkeypatch.setattr(streamed, "blocks", watched)
    model = StreamedModel(folder, oracle.tokens())
    torch.testing.assert_close(model.logits(EVERYTHING), whole(folder).logits)
    assert 7 in sizes and max(sizes) < 12


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_come_and_go(tmp_path: Path, family: str) -> None:
    """Reads are counted, and afterwards the model has no weights in memory."""
    folder, used = oracle.saved(tiny(family), tmp_path), 0

    def count(num_bytes: int) -> None:
        nonlocal used
        used += num_bytes

    model = StreamedModel(folder, oracle.tokens(), on_read=count)
    model.logits(EVERYTHING)
    assert used == model.num_bytes
    assert not model._loaded


def test_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    folder = oracle.saved(tiny("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TritterError, match=r"1 tensors are missing: model\.norm\.weight"):
        StreamedModel(folder, oracle.tokens())


def test_the_layers_run_once(tmp_path: Path) -> None:
    folder = oracle.saved(tiny("llama"), tmp_path / "source")
    expand(folder, tmp_path / "deep", [LlamaPro(target_layers=5)])
    model = StreamedModel(tmp_path / "deep", oracle.tokens())
    for start in range(0, VOCABULARY, 20):
        model.logits(slice(start, min(start + 20, VOCABULARY)))
    assert len(model.states) == 6


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Eight times the layers need the same memory, within a tenth of their float32 weights."""
    options: dict[str, Any] = {"place": tmp_path, "methods": ["dus"], "hidden_size": 256}
    small, large = (row for size in (20, 160) for row in check.benchmark(size, **options))
    stored_mb = [row.source_mb + row.result_mb for row in (small, large)]  # in bfloat16
    assert large.result_mb > 6 * small.result_mb
    assert large.own_mb - small.own_mb < 2 * (stored_mb[1] - stored_mb[0]) / 10, (small, large)
    assert large.own_mb < large.result_mb / 2


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_both_loaded_take_what_layers_do_not(tmp_path: Path) -> None:
    """Negative control of the measurement: loading both models needs their full size."""
    options: dict[str, Any] = {"methods": ["dus"], "contenders": check.CONTENDERS}
    streamed_row, loaded_row = check.benchmark(80, place=tmp_path, hidden_size=256, **options)
    assert loaded_row.own_mb > 2 * (loaded_row.source_mb + loaded_row.result_mb)
    assert streamed_row.own_mb < loaded_row.own_mb / 4
