"""The main job with experts in place of FFNs: logit shift, methods, outputs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import oracle
from tests.pipeline.tiny import FIXTURES
from tritter.checkpoints import Lineage
from tritter.pipeline import Outcome

Run = Callable[..., Outcome]


def moved(folder: Path, part: str) -> float:
    """Return the distance that training moved some tensors, relative to their norm."""
    before = load_file(folder / "attempt_1/expanded/model.safetensors")
    after = load_file(folder / "attempt_1/trained/model.safetensors")
    names = [name for name in before if part in name]
    assert names
    distance = sum(float((after[name] - before[name]).square().sum()) for name in names)
    return (distance / sum(float(before[name].square().sum()) for name in names)) ** 0.5


@pytest.fixture(scope="module")
def plain(run_job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    words = ("expansion=moe", "forgetting=none", "pipeline.keep_stages=true")
    run_job(folder, *words, "expansion.moe.num_experts=4")
    return folder


@pytest.mark.full
def test_a_sparse_model_comes_out_and_its_jump_is_reported(run_tiny: Run, tmp_path: Path) -> None:
    words = ("expansion=moe", "expansion.moe.num_experts=4", "training.max_steps=20")
    run_tiny(tmp_path, *words, "gate=default", "pipeline.keep_stages=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameters"]["final"] > 1.5 * summary["parameters"]["baseline"]
    (check,) = [check for check in summary["gate"] if check["check"] == "preservation"]
    assert check["verdict"] == "reported"
    assert 0 < check["value"] < 0.1
    loss, after = (summary[stage]["new"]["loss"] for stage in ("baseline", "final"))
    assert after < loss
    model = oracle.stock(tmp_path / "attempt_1/trained")
    assert model.config.model_type == "mixtral"
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]["final"]


@pytest.mark.slow
def test_ewc_holds_the_copies_as_it_held_the_ffn(run_job: Run, plain: Path, tmp_path: Path) -> None:
    """The Fisher of the base model is mapped to the experts; the router is unconstrained."""
    options = ("expansion=moe", "expansion.moe.num_experts=4", "forgetting=ewc")
    run_job(tmp_path, *options, "forgetting.ewc.ewc_lambda=1e9", "pipeline.keep_stages=true")
    for part in ("experts.0.w1", "experts.3.w2", "self_attn.v_proj"):
        assert moved(tmp_path, part) < 0.5 * moved(plain, part)
    assert moved(tmp_path, "block_sparse_moe.gate") > 0.5 * moved(plain, "block_sparse_moe.gate")


@pytest.mark.full
def test_without_noise_it_is_held_to_exactness(run_job: Run, tmp_path: Path) -> None:
    options = ("expansion=[llama_pro,moe]", "expansion.moe.noise=0", "forgetting=[l2sp,replay]")
    run_job(tmp_path, *options, "expansion.moe.experts_per_token=1")
    summary = json.loads((tmp_path / "summary.json").read_text())
    (check,) = [check for check in summary["gate"] if check["check"] == "preservation"]
    assert check["verdict"] == "passed"
    assert check["bound"] is not None and check["value"] < check["bound"]


def test_the_tokens_of_a_base_are_read_from_its_record() -> None:
    lineage = Lineage.of(FIXTURES / "finished/baseline")
    made_from = lineage.training_config["made_from"]
    base, data = made_from["pretraining"], made_from["data"]
    steps = base["max_steps"] * data["batch_size"] * data["sequence_length"]
    assert lineage.pretraining_tokens == steps

    def tokens(**changes: object) -> float | None:
        config = {"made_from": {**made_from, **changes}}
        return replace(lineage, training_config=config).pretraining_tokens

    trainer = {**made_from["trainer"], "accumulate_grad_batches": 3}
    assert tokens(trainer=trainer) == 3 * steps
    without = {key: value for key, value in base.items() if key != "max_steps"}
    assert tokens(pretraining=without) is None
    assert tokens(pretraining=None) is None
