"""`tritter expand --method moe`: options reach the experts, and refusals speak of options."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.cli.conftest import VOCABULARY, Run
from tests.oracle import relative_difference, saved, stock, tokens
from tests.oracle.families import tiny
from tritter.core.models import load_model


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        "--method moe --noise 0",
        "--method moe --num-experts 4 --experts-per-token 1 --noise 0",
        "--method moe --granularity 2 --num-experts 8 --noise 0",
        "--method width,moe --hidden-size 32 --intermediate-size 48 --num-experts 4",
    ],
)
def test_a_dense_model_becomes_a_sparse_one(
    run: Run, sources: Path, tmp_path: Path, words: str
) -> None:
    result = run(f"expand --checkpoint {sources / 'llama'} --output {tmp_path / 'grown'} {words}")
    assert result.code == 0, result.err
    before, after = stock(sources / "llama"), stock(tmp_path / "grown")
    assert after.config.model_type == "mixtral"
    is_exact = "--noise 0" in words
    difference = relative_difference(before, after, tokens(VOCABULARY))
    assert difference < (1e-4 if is_exact else 0.5)
    text = " ".join(result.out.split())
    assert f"exact {'yes' if is_exact else 'no'}" in text
    assert f"experts a layer - {after.config.num_local_experts}" in text
    assert "llama → mixtral" in text and "parameters are active per token" in text
    assert AutoTokenizer.from_pretrained(tmp_path / "grown")("the")["input_ids"]


@pytest.mark.full
def test_some_layers_and_every_option(run: Run, sources: Path, tmp_path: Path) -> None:
    words = (
        "--num-experts 6 --experts-per-token 4 --noise 0.02 --reinit-fraction 0.5 --granularity 2 "
        "--sparse-layers 0,2"
    )
    line = f"expand --checkpoint {sources / 'qwen3'} --method moe {words} --json"
    refused = run(f"{line} --dry-run")
    assert refused.code == 2
    assert "--granularity = 2: it does not divide the FFN's 37 neurons; nearest: 1" in refused.err
    line = line.replace("--granularity 2 ", "")
    content = run(f"{line} --output {tmp_path / 'grown'}").json
    (step,) = content["steps"]
    typed = {"num_experts": 6, "experts_per_token": 4, "noise": 0.02, "reinit_fraction": 0.5}
    typed |= {"granularity": 1, "layers": [0, 2]}
    assert step["options"] == {
        **typed,
        **dict.fromkeys(("attention_from", "expert_hashes", "experts_from", "router", "target")),
        "norm_topk_prob": True,
    }
    assert not step["is_exact"]
    model = load_model(tmp_path / "grown")
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [True, False, True]
    shown = run(f"inspect {tmp_path / 'grown'}")
    assert shown.code == 0
    text = " ".join(shown.out.split())
    assert "experts" in text and "router" in text
    assert run(f"history {tmp_path / 'grown'} --verify").code == 0


def test_target_params_chooses_the_experts(run: Run, place: Path) -> None:
    line = "expand --checkpoint base --method moe --noise 0 --dry-run --json"
    count = run(f"{line} --num-experts 5").json["parameters"]["after"]
    content = run(f"{line} --target-params {count + 50}").json
    assert content["steps"][0]["options"]["num_experts"] == 5


@pytest.mark.full
def test_the_experts_of_a_result_go_on(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method moe --num-experts 4 --noise 0").code == 0
    assert run("expand --checkpoint base-moe --method llama-pro").code == 0
    before, after = stock(place / "base"), stock(place / "base-moe-llama-pro")
    assert relative_difference(before, after, tokens(VOCABULARY)) < 1e-4
    generated = run("generate --checkpoint base-moe-llama-pro --prompt the --max-new-tokens 3")
    assert generated.code == 0
    assert torch.equal(
        stock(place / "base-moe").model.layers[0].mlp.gate.weight,
        after.model.layers[0].mlp.gate.weight,
    )


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method moe --num-experts 2 --experts-per-token 3", "--experts-per-token = 3: a layer"),
        ("--method moe --num-experts 1", "--num-experts = 1"),
        ("--method moe --reinit-fraction 1", "--reinit-fraction = 1:"),
        ("--method moe --sparse-layers 1", "--sparse-layers: it leaves layers 0, 2 dense"),
        ("--method width --num-experts 4", "--method width does not have this option; moe"),
        ("--method width,moe --noise 0.1", "--noise = 0.1: width and moe both have this option"),
        ("--method moe,moe", "mixtral has experts already"),
    ],
)
def test_refusals_speak_of_options(run: Run, place: Path, words: str, said: str) -> None:
    result = run(f"expand --checkpoint base {words}")
    assert result.code == 2
    assert said in " ".join(result.err.split())
    assert [path.name for path in place.iterdir()] == ["base"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_a_shared_expert_by_option(run: Run, sources: Path, tmp_path: Path, target: str) -> None:
    words = f"--method moe --moe-target {target} --num-experts 4"
    result = run(f"expand --checkpoint {sources / 'llama'} --output {tmp_path / 'grown'} {words}")
    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    assert "exact yes" in text and f"llama → {target}: 4 experts per layer" in text
    before, after = stock(sources / "llama"), stock(tmp_path / "grown")
    assert relative_difference(before, after, tokens(VOCABULARY)) == 0


def test_the_default_target_of_qwen2_has_a_shared_expert(run: Run, tmp_path: Path) -> None:
    source = saved(tiny("qwen2"), tmp_path / "qwen2")
    result = run(f"expand --checkpoint {source} --method moe --dry-run")
    text = " ".join(result.out.split())
    assert "exact yes" in text and "preserved at step 0, with any noise" in text


def test_what_a_target_cannot_be_names_options(run: Run, sources: Path) -> None:
    source = f"expand --checkpoint {sources / 'llama'} --method moe"
    refused = run(f"{source} --moe-target qwen3_moe")
    assert refused.code == 2
    assert "--moe-target = qwen3_moe: llama can become mixtral, qwen2_moe, glm4_moe" in refused.err
    refused = run(f"{source} --no-norm-topk-prob")
    assert refused.code == 2
    text = " ".join(refused.err.split())
    assert "--norm-topk-prob = false: mixtral always renormalises" in text
    assert "--moe-target=qwen2_moe" in text
    near = run(f"{source} --moe-target qwen_moe")
    assert "must be one of mixtral, qwen2_moe, qwen3_moe, glm4_moe" in near.err
    scaled = run(f"{source} --moe-target qwen2_moe --no-norm-topk-prob --dry-run")
    assert "exact yes" in " ".join(scaled.out.split())
