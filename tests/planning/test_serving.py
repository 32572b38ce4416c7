"""What of a shape quantisers and engines do not take, next to bitsandbytes itself."""

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run, run
from tests.oracle import saved, tiny_llama
from tritter.core.expansions import Moe
from tritter.core.expansions.specification import target_model
from tritter.core.families import Config, Model, llama_config
from tritter.core.models import read_model
from tritter.planning.serving import serving_notes

__all__ = ["run"]
SIZES = {
    "vocab_size": 300, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64,
    "initializer_range": 0.02,
}  # fmt: skip


def config(**changes: object) -> Config:
    return llama_config(**{**SIZES, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "notes"),
    [
        ({}, {"intermediate_size": 1792, "hidden_size": 768}, []),
        ({}, {"intermediate_size": 1664}, ["FFN 1664: not a multiple of 256 (K-quants"]),
        (
            {},
            {"intermediate_size": 1700},
            ["FFN 1700: not a multiple of 32 (llama.cpp keeps it in 16 bits"],
        ),
        ({}, {"hidden_size": 544}, ["hidden size 544: not a multiple of 64 (bitsandbytes"]),
        # What the source has too is left out
        ({"intermediate_size": 1500}, {"intermediate_size": 1700}, []),
        (
            {},
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 768},
            ["12 attention heads, 3 key/value heads: no tensor parallelism over 2, 4, 8 GPUs"],
        ),
        ({}, {"num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 1024}, []),
    ],
)
def test_what_is_not_taken_any_more_is_noted(
    before: dict[str, object], after: dict[str, object], notes: list[str]
) -> None:
    found = serving_notes(Model(config(**after)), Model(config(**before)))
    assert len(found) == len(notes)
    assert all(note.startswith(text) for note, text in zip(found, notes, strict=True))


def test_experts_have_the_limits_of_the_ffn_that_they_copy() -> None:
    dense = Model(config(intermediate_size=192))
    assert serving_notes(target_model(dense, [Moe(num_experts=4)]), dense) == ()
    split = target_model(dense, [Moe(num_experts=8, granularity=2)])
    *_, note = serving_notes(split, dense)
    assert note.startswith("expert size 96: not a multiple of 64 (bitsandbytes")
    assert "256" not in note


def test_a_layer_pattern_that_llama_cpp_does_not_expect_is_noted() -> None:
    """llama.cpp takes every sixth layer of a Gemma 3 as global, whatever config.json says."""
    sizes = {**SIZES, "head_dim": 64, "model_type": "gemma3_text", "num_hidden_layers": 12}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    before = Model({**sizes, "layer_types": kinds * 2})
    whole = Model({**sizes, "num_hidden_layers": 18, "layer_types": kinds * 3})
    pairs = [kind for kind in kinds for _ in range(2)]  # each layer twice, as by llama-pro
    uneven = Model({**sizes, "num_hidden_layers": 24, "layer_types": pairs * 2})
    assert serving_notes(whole, before) == ()
    (note,) = serving_notes(uneven, before)
    assert note.startswith("layer_types of 24 layers: llama.cpp would compute another function")


@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 192])
def test_nf4_takes_exactly_multiples_of_64(size: int) -> None:
    """A library that takes more makes the note wrong."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(size, 64, bias=False, quant_type="nf4").eval().to("cpu")
    with torch.no_grad():
        try:
            layer(torch.randn(1, 4, size))
        except (RuntimeError, AssertionError):
            assert size % 64
        else:  # CPUs without these instructions use another kernel
            assert size % 64 == 0 or not bitsandbytes.functional.has_avx512bf16()


def test_expand_and_plan_print_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    saved(tiny_llama(**sizes, num_key_value_heads=2, head_dim=64), "base")
    words = "expand base --method width --intermediate-size 300"
    result = run(f"{words} --dry-run")
    assert "serving  FFN 300: not a multiple of 32 (llama.cpp keeps it" in result.out
    assert run(f"{words} --dry-run --json").json["serving_notes"]
    assert "serving  FFN 300" in run(words).out
    assert not run("expand base --method llama-pro --dry-run --json").json["serving_notes"]
    plan = run("plan --source base --target 700k --gpu-hours 1 --strategy width-first --json")
    assert plan.code == 0, plan.err
    assert any("Shape of the result: hidden size" in note for note in plan.json["notes"])


def test_split_heads_warn_of_kernels(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_llama(head_dim=64, hidden_size=64, num_attention_heads=4), "base")
    result = run("expand base --method width --head-strategy split --dry-run")
    assert "warning: head size 32, and some attention kernels" in " ".join(result.out.split())


def test_a_recipe_rounds_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_llama(hidden_size=64, intermediate_size=256, head_dim=64), "base")
    Path("grow.yaml").write_text("steps: [{width: {hidden_size: 96, multiple_of: 256}}]\n")
    result = run("expand base --recipe grow.yaml --output grown")
    assert result.code == 0, result.err
    assert read_model(tmp_path / "grown").config["intermediate_size"] == 512  # 384 by ratio
