"""What a GPU computes, against the same job on the CPU (make test-gpu).

Each body that needs no GPU also runs on the CPU in the full suite, so that it works before the
first machine with a GPU runs it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tritter
from tests import oracle
from tests.methods.growth.test_consumer_gpu import LIMIT, QWEN
from tests.pipeline.test_growth_job import OFTEN
from tests.pipeline.tiny import FIXTURES, TINY, is_within
from tests.training import test_sharded as sharded
from tests.training.test_ranks import run as run_program
from tests.training.test_ranks import stopped
from tritter.config.launch.composition import load_config
from tritter.core.families import Model
from tritter.core.models import new_model, save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.methods.growth.initialisers import orthogonalised
from tritter.pipeline import run_pipeline
from tritter.planning.run_memory import RunMemory
from tritter.training import read_metrics

NO_GPU = "torch finds no GPU on this machine; these checks need one"
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU))
ON_BOTH = pytest.mark.parametrize(
    "accelerator", [pytest.param("cpu", marks=pytest.mark.full), pytest.param("gpu", marks=GPU)]
)
ON_GPU = pytest.mark.parametrize("accelerator", [pytest.param("gpu", marks=GPU)])
EXPERTS = (
    *("expansion=none", "forgetting=none", "experts=dylora", "experts.rank=2"),
    *("experts.boundaries=told", "experts.max_experts=3"),
)
Summary = dict[str, Any]
RunTiny = Callable[..., Summary]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_tiny(cache: Path, tmp_path: Path) -> RunTiny:
    """Return a function that runs the smallest job on a device and returns its summary."""

    def run(accelerator: str, *words: str) -> Summary:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = load_config([*TINY, f"trainer={accelerator}", *words, f"cache_dir={cache}"])
        outcome = run_pipeline(config, run_folder=folder)
        summary: Summary = json.loads(outcome.summary_path.read_text())
        within = is_within(summary)
        assert all(within.get(name, True) for name in ("memory", "gradient_flow"))
        stock = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
        assert torch.isfinite(stock(oracle.tokens()).logits.float()).all()
        return summary

    return run


def losses(summary: Summary) -> list[float]:
    return [domain["loss"] for domain in summary["final"].values()]


@ON_BOTH
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(accelerator: str, precision: str, run_tiny: RunTiny) -> None:
    expected = losses(run_tiny("cpu", "trainer.precision=32-true"))
    found = losses(run_tiny(accelerator, f"trainer.precision={precision}"))
    assert found == pytest.approx(expected, rel=1e-4 if precision == "32-true" else 0.02)


@ON_GPU
def test_sixteen_bit_floats(accelerator: str, run_tiny: RunTiny) -> None:
    expected = losses(run_tiny("cpu", "trainer.precision=32-true"))
    found = losses(run_tiny(accelerator, "trainer.precision=16-mixed"))
    assert found == pytest.approx(expected, rel=0.02)


@ON_BOTH
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_optimizers(accelerator: str, optimizer: str, run_tiny: RunTiny) -> None:
    """Moments in 8 bits are mapped when neurons grow."""
    expected = losses(run_tiny("cpu", *OFTEN))
    found = losses(run_tiny(accelerator, f"optimizer={optimizer}", *OFTEN))
    assert found == pytest.approx(expected, rel=0.05)


@ON_GPU
def test_a_compiled_model(accelerator: str, run_tiny: RunTiny) -> None:
    found = losses(run_tiny(accelerator, "trainer.compile=true"))
    assert found == pytest.approx(losses(run_tiny(accelerator)), rel=1e-3)


@ON_BOTH
def test_recomputed_activations(accelerator: str, run_tiny: RunTiny) -> None:
    found = losses(run_tiny(accelerator, "trainer.activation_checkpointing=true"))
    assert found == pytest.approx(losses(run_tiny(accelerator)), rel=1e-5)


@ON_BOTH
@pytest.mark.parametrize("method", ["distill", "si", "l2sp", "online_ewc", "freeze"])
def test_forgetting_methods(accelerator: str, method: str, run_tiny: RunTiny) -> None:
    words = (f"forgetting=[{method}]",)
    found = losses(run_tiny(accelerator, *words))
    assert found == pytest.approx(losses(run_tiny("cpu", *words)), rel=1e-3)


@ON_BOTH
def test_neurons_grow(accelerator: str, run_tiny: RunTiny) -> None:
    found = run_tiny(accelerator, *OFTEN)
    assert found["growth"]["born"] == 12 and found["growth"]["function_change"] < 1e-4
    assert losses(found) == pytest.approx(losses(run_tiny("cpu", *OFTEN)), rel=1e-2)


@ON_GPU
@pytest.mark.parametrize("against", ["neighbours", "activations"])
def test_new_directions_are_those_of_the_cpu(accelerator: str, against: Any) -> None:
    """Solving for them is singular if rows repeat, which GPUs have no driver for."""
    rows, existing, inputs = (torch.randn(count, 12) for count in (4, 20, 30))
    expected = orthogonalised(rows, existing, against=against, inputs=inputs)
    on_gpu = [each.to("cuda") for each in (rows, existing, inputs)]
    found = orthogonalised(*on_gpu[:2], against=against, inputs=on_gpu[2])
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@ON_BOTH
def test_experts_are_added(accelerator: str, run_tiny: RunTiny) -> None:
    found = run_tiny(accelerator, *EXPERTS)
    assert found["experts"]["spawned"]
    assert losses(found) == pytest.approx(losses(run_tiny("cpu", *EXPERTS)), rel=1e-2)


@ON_BOTH
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_on_a_quantised_base(accelerator: str, bits: int, run_tiny: RunTiny) -> None:
    plain = losses(run_tiny("cpu", *EXPERTS))
    found = losses(run_tiny(accelerator, *EXPERTS, f"experts.base_bits={bits}"))
    assert found == pytest.approx(plain, rel=0.02)


@ON_BOTH
def test_a_mixture_of_experts(accelerator: str, run_tiny: RunTiny) -> None:
    words = ("expansion=moe", "expansion.moe.num_experts=4")
    found = losses(run_tiny(accelerator, *words))
    assert found == pytest.approx(losses(run_tiny("cpu", *words)), rel=1e-2)


@ON_BOTH
def test_sharded_weights_in_one_process(accelerator: str, tmp_path: Path) -> None:
    alone = replace(sharded.ONE, accelerator=accelerator)
    plain, _ = sharded.train(tmp_path / "plain", alone)
    shared, _ = sharded.train(tmp_path / "shared", replace(alone, strategy="fsdp"))
    sharded.assert_close(plain, shared)


@ON_BOTH
def test_a_run_that_is_stopped_resumes(accelerator: str, tmp_path: Path) -> None:
    words = (*TINY, f"trainer={accelerator}", "training.max_steps=200")
    place = tmp_path / "stopped"
    assert 0 < stopped(place, *words) < 200
    resumed, whole = (
        json.loads((run_program(each, *words) / "summary.json").read_text())
        for each in (place, tmp_path / "whole")
    )
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)


@ON_BOTH
@pytest.mark.parametrize("method", ["dus", "llama_pro", "width", "moe"])
def test_a_live_model_expands_on_its_device(accelerator: str, method: str) -> None:
    device = "cuda" if accelerator == "gpu" else "cpu"
    model = oracle.tiny_llama().to(device).eval()
    tokens = oracle.tokens().to(device)
    with torch.no_grad():
        before = model(tokens).logits
        larger = tritter.expand(model, method)
        after = larger.eval()(tokens).logits
    assert after.device.type == device
    if method in ("llama_pro", "width"):
        assert (after - before).abs().max() < 1e-4


@ON_GPU
def test_the_recipe_for_a_consumer_gpu_needs_the_memory_that_was_computed(
    accelerator: str, tmp_path: Path
) -> None:
    """With random weights of the shape of Qwen2.5-1.5B, and the recipe's precision and batch."""
    torch.cuda.reset_peak_memory_stats()
    base = new_model(Model(QWEN), seed=0).bfloat16()
    base.save_pretrained(tmp_path / "base")
    del base
    text = [Document("a", "a text")]
    save_tokenizer(
        train_tokenizer(text, vocab_size=280), tmp_path / "base", end_of_text=END_OF_TEXT
    )
    config = load_config(
        [
            "experiment=consumer_gpu",
            f"model.path={tmp_path / 'base'}",
            f"data.old={FIXTURES / 'text/old'}",
            f"data.new={FIXTURES / 'text/new.jsonl'}",
            *("training.max_steps=3", "growth.warmup_steps=0", "growth.check_every=1"),
            *("growth.growth_cooldown=1", "gate=off", "logger=csv", "trainer.progress=off"),
        ]
    )
    outcome = run_pipeline(config, run_folder=tmp_path)
    (needed,) = RunMemory(config, Model(QWEN)).needs()
    assert outcome.status == "ungated"
    logged = [row.get("performance/peak_memory_bytes") for row in read_metrics(tmp_path)]
    peak = max(float(value) for value in logged if value)
    print(f"computed {needed.device + needed.activations:,} bytes, measured {peak:,} bytes")
    assert peak < LIMIT
    assert peak == pytest.approx(needed.device + needed.activations, rel=0.25)
