"""An expansion is checked by default, and what breaks its promise is told with the place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.oracle import saved, stock
from tests.oracle.families import tiny
from tritter.checkpoints import Lineage
from tritter.core.families import Model
from tritter.evaluation import measure
from tritter.evaluation.jump import Jump


@pytest.fixture
def rounded(place: Path) -> Path:
    """The current folder, its `base` in bfloat16."""
    saved(stock(place / "base").bfloat16(), place / "base")
    return place


_between = Jump.of_folders


def _damaged(source: Path, result: Path, *arguments: Any, **keywords: Any) -> Any:
    """Measure, after one entry of the new layer behind the second one was moved."""
    tensors = load_file(result / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][5, 7] += 0.5
    save_file(tensors, result / "model.safetensors", metadata={"format": "pt"})
    return _between(source, result, *arguments, **keywords)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_promise_exits_3(
    run: Run, rounded: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """One entry is enough, in any type: what is only copied is not rounded."""
    monkeypatch.setattr(Jump, "of_folders", _damaged)
    result = run(f"expand --checkpoint base --method llama-pro --dtype {dtype} --output deep")
    assert result.code == 3
    assert "the method is function-preserving, but" in result.err
    assert "differs from the source at layer 2" in " ".join(result.err.split())
    record = Lineage.read(rounded / "deep").expansion_history[-1]  # type: ignore[union-attr]
    assert record.step0_error is not None and record.step0_error > 1e-3


def test_a_source_with_constant_logits_is_expanded(run: Run, place: Path) -> None:
    """Its logits differ by rounding only, and a standard deviation of 0 would forbid that."""
    model = stock(place / "base")
    with torch.no_grad():
        for each in (model.get_input_embeddings(), model.get_output_embeddings()):
            each.weight.copy_(each.weight[:1].expand_as(each.weight))
    saved(model, place / "constant")
    result = run("expand --checkpoint constant --method width --hidden-size 36 --output wide")
    assert result.code == 0 and "nan" not in result.out and "inf" not in result.out


@pytest.mark.full
def test_copies_before_a_norm_of_zeros_are_held_to_their_claim_too(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their noise, which nothing reads, is no rounding that would excuse a damage."""
    saved(tiny("olmo2").bfloat16(), place / "normed")
    whole = run("expand --checkpoint normed --method llama-pro --target-layers 4 --output whole")
    assert whole.code == 0 and "rounding" not in whole.out
    monkeypatch.setattr(Jump, "of_folders", _damaged)
    result = run("expand --checkpoint normed --method llama-pro --target-layers 4 --output deep")
    assert result.code == 3 and "the method is function-preserving, but" in result.err


def _ruined(source: Path, result: Path, *arguments: Any, **keywords: Any) -> Any:
    """Measure, after the last norm was turned round."""
    tensors = load_file(result / "model.safetensors")
    tensors["model.norm.weight"] *= -1
    save_file(tensors, result / "model.safetensors", metadata={"format": "pt"})
    return _between(source, result, *arguments, **keywords)


def test_what_no_rounding_does_is_broken_in_16_bits_too(
    run: Run, rounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Jump, "of_folders", _ruined)
    result = run("expand --checkpoint base --method width --output wide")
    assert result.code == 3 and "the method is function-preserving, but" in result.err


def test_rounding_is_said_where_there_is_any(run: Run, rounded: Path) -> None:
    copied = run("expand --checkpoint base --method llama-pro")
    assert copied.code == 0 and "rounding" not in copied.out
    computed = run("expand --checkpoint base --method width")
    said = " ".join(computed.out.split())
    assert computed.code == 0 and "rounding to bfloat16" in said
    assert "root mean square" in said and "the source in bfloat16" in said


def test_nothing_is_measured_only_where_that_is_asked(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Jump, "of_folders", _damaged)
        result = run("expand --checkpoint base --method llama-pro --no-measure --output raw")
    assert result.code == 0 and "not measured" in result.out
    for words in ("", "--measure"):
        plain = run(f"expand --checkpoint base --method llama-pro --json --overwrite {words}").json
        assert plain["step0_error"] < 1e-4


def test_tokens_are_the_same_every_time_and_more_for_experts() -> None:
    dense = {"model_type": "llama", "vocab_size": 300, "hidden_size": 8, "num_attention_heads": 2}
    dense |= {"intermediate_size": 8, "num_hidden_layers": 1}
    model = Model(dense)
    tokens = measure.random_tokens(model)
    assert torch.equal(tokens, measure.random_tokens(model)) and int(tokens.max()) < 300
    more = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    sparse = model.changed({**dense, **more})
    assert measure.random_tokens(sparse).numel() > tokens.numel()
