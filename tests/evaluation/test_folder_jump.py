"""The logit shift of folders equals that of loaded models, and a damaged module is named."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from tests import oracle
from tests.oracle.families import doubled, generic, tiny
from tritter.core import streamed
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    Layers,
    LlamaPro,
    Moe,
    Stack,
    Width,
)
from tritter.core.models import load_model
from tritter.errors import TritterError
from tritter.evaluation.jump import Jump, first_difference
from tritter.transform import Expanded, expand

TOKENS = oracle.tokens()
EXACT: dict[str, list[ExpansionSpec]] = {
    "llama_pro": [LlamaPro(positions=(0, 0, 2))],
    "layers": [Layers(sources=(2, 0, 1, 0, 2), identity=(0, 3))],
    "interpolate": [Interpolate(identity_init=True)],
    "width then depth": [Width(init="net2net"), Dus(identity_init=True)],
    "depth then width": [Stack(identity_init=True), Width(hidden_size=36)],
}


def made(place: Path, family: str, specs: Sequence[ExpansionSpec]) -> tuple[Path, Expanded]:
    source = oracle.saved(tiny(family), place / "source")
    return source, expand(source, place / "result", specs)


def damaged(folder: Path, name: str) -> None:
    """Change one entry of a tensor by its own magnitude."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "specs", [[Dus()], [Width(init="net2net", noise=0.02)]], ids=["dus", "width"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_figures_are_those_of_loaded_models(
    tmp_path: Path, family: str, specs: list[ExpansionSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, result = made(tmp_path, family, specs)
    expected = Jump.between(
        load_model(source), load_model(result.folder), TOKENS, has_yardstick=True
    )
    assert expected.relative_to_std > 1e-3
    for block_bytes in (2**20, 4 * 24 * 5):
        monkeypatch.setattr(streamed, "_BLOCK_BYTES", block_bytes)
        jump = Jump.of_folders(source, result.folder, TOKENS, has_yardstick=True)[0]
        for name in ("rms_to_std", "divergence", "bfloat16_rms_to_std", "bfloat16_divergence"):
            assert getattr(jump, name) == pytest.approx(getattr(expected, name), rel=1e-2), name
        assert jump.max_absolute == pytest.approx(expected.max_absolute, rel=1e-4)
        assert jump.relative_to_std == pytest.approx(expected.relative_to_std, rel=1e-4)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_the_yardstick_is_the_source_with_weights_and_activations_in_bfloat16(
    tmp_path: Path, family: str
) -> None:
    source = oracle.saved(tiny(family), tmp_path / "source")
    model, rounded = load_model(source), load_model(source, dtype=torch.bfloat16)
    expected = Jump.between(model, rounded, TOKENS).rms_to_std
    assert expected is not None and expected > 1e-3
    for jump in (
        Jump.between(model, model, TOKENS, has_yardstick=True),
        Jump.of_folders(source, source, TOKENS, has_yardstick=True)[0],
    ):
        assert jump.bfloat16_rms_to_std == pytest.approx(expected, rel=0.05)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert Jump.between(model, load_model(source), TOKENS).max_absolute == 0


def test_a_class_that_does_not_compute_in_bfloat16_has_no_yardstick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LlamaMLP.forward

    def forward(self: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return run(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    source = oracle.saved(tiny("llama"), tmp_path / "source")
    model = load_model(source)
    for jump in (
        Jump.between(model, model, TOKENS, has_yardstick=True),
        Jump.of_folders(source, source, TOKENS, has_yardstick=True)[0],
    ):
        assert (jump.rms_to_std, jump.bfloat16_rms_to_std) == (0, None)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic())
def test_exact_growth_of_every_family_parts_nowhere(tmp_path: Path, family: str) -> None:
    source, result = made(
        tmp_path, family, [doubled(family), LlamaPro(), Stack(identity_init=True)]
    )
    found, states = Jump.of_folders(source, result.folder, TOKENS)
    assert found.relative_to_std < 1e-4
    # All hidden states agree, so only the modules after them remain
    assert (
        first_difference(states, result.plan.parameter_map.layer_sources)
        == "the final norm or the head"
    )


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("specs", EXACT.values(), ids=EXACT)
def test_the_damaged_layer_is_named(tmp_path: Path, specs: list[ExpansionSpec]) -> None:
    source, result = made(tmp_path, "llama", specs)
    sources = result.plan.parameter_map.layer_sources
    sound, states = Jump.of_folders(source, result.folder, TOKENS)
    assert sound.relative_to_std < 1e-4
    assert first_difference(states, sources) == "the final norm or the head"
    for layer in (len(sources) - 1, len(sources) - 2):
        damaged(result.folder, f"model.layers.{layer}.self_attn.o_proj.weight")
        found, states = Jump.of_folders(source, result.folder, TOKENS)
        assert found.relative_to_std > 1e-3
        assert first_difference(states, sources) == f"layer {layer}"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.0.input_layernorm.weight", "layer 0"),
        ("model.norm.weight", "the final norm or the head"),
        ("lm_head.weight", "the final norm or the head"),
    ],
)
def test_what_is_no_layer_is_named(tmp_path: Path, name: str, place: str) -> None:
    source, result = made(tmp_path, "llama", [LlamaPro()])
    damaged(result.folder, name)
    tokens = torch.zeros_like(TOKENS)  # the damaged row of the embedding
    found, states = Jump.of_folders(source, result.folder, tokens)
    assert found.relative_to_std > 1e-3
    assert first_difference(states, result.plan.parameter_map.layer_sources) == place


def test_a_copy_that_does_not_do_its_work_is_named(tmp_path: Path) -> None:
    """The first of two copies may be an identity, the last one may not."""
    source, result = made(tmp_path, "llama", [LlamaPro(positions=(1,))])
    file = result.folder / "model.safetensors"
    tensors = load_file(file)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{part}.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    _, states = Jump.of_folders(source, result.folder, TOKENS)
    assert first_difference(states, result.plan.parameter_map.layer_sources) == "layer 2"


def test_experts_and_numbers_that_are_none(tmp_path: Path) -> None:
    source, result = made(tmp_path, "qwen3", [Moe(num_experts=4, noise=0.0)])
    sources = result.plan.parameter_map.layer_sources
    assert Jump.of_folders(source, result.folder, TOKENS)[0].relative_to_std < 1e-4
    file = result.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    found, states = Jump.of_folders(source, result.folder, TOKENS)
    assert math.isnan(found.relative_to_std) and found.to_dict()["max_absolute"] is None
    assert first_difference(states, sources) == "layer 2"


def test_progress_ends_where_it_said(tmp_path: Path) -> None:
    source, result = made(tmp_path, "qwen2_moe", [LlamaPro()])
    seen: list[tuple[int, int]] = []
    Jump.of_folders(source, result.folder, TOKENS, progress=lambda *figures: seen.append(figures))
    done = [each[0] for each in seen]
    assert done == sorted(done) and len(done) > 50
    assert len({each[1] for each in seen}) == 1 and seen[-1][0] == seen[-1][1]


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    one = oracle.saved(tiny("llama"), tmp_path / "one")
    other = oracle.saved(tiny("llama", vocab_size=96), tmp_path / "other")
    with pytest.raises(TritterError, match="old tokens are missing"):
        Jump.of_folders(one, other, TOKENS % 96)
