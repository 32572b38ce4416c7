"""Upcycling of folders and live models, with their optimizer state and importances."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle.families import tiny
from tests.oracle.moe import PARTNERS, by_logical_name
from tritter import ModelExpander
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import ExpansionSpec, LlamaPro, Moe, Width
from tritter.core.families import Model
from tritter.core.models import load_model, model_of, new_model
from tritter.core.parameter_map.carry import Policy
from tritter.storage.writer import TensorStream
from tritter.training.surgery import carried_moments, put_moments
from tritter.transform import expand, plan_expansion

FOUR = Moe(num_experts=4)  # of which a token takes 2
FAMILIES = list(PARTNERS)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_live_models_and_files_grow_alike(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [
        Width(hidden_size=48), Moe(num_experts=4, reinit_fraction=0.5), LlamaPro()
    ]  # fmt: skip
    on_files = load_model(expand(source, tmp_path / "result", specs, seed=3).folder, dtype=dtype)
    live = ModelExpander(specs, seed=3).expand(model)
    assert type(live) is type(on_files)
    expected = dict(model_of(on_files).disk_tensors(on_files.state_dict()))
    found = dict(model_of(live).disk_tensors(live.state_dict()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert oracle.relative_difference(on_files, live, oracle.tokens()) < 1e-6


def test_odd_sizes_run_where_the_default_kernel_refuses(tmp_path: Path) -> None:
    """Tritter runs experts one by one; stock transformers needs an option for it."""
    model = tiny("qwen3", hidden_size=23, intermediate_size=37)
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", [Moe(noise=0.0)])
    assert any("experts_implementation" in note for note in result.steps[0].notes)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        oracle.logits(oracle.stock(result.folder), oracle.tokens())
    ours = load_model(result.folder)
    assert oracle.relative_difference(model, ours, oracle.tokens()) < 1e-4
    assert "eager" not in str(model_of(ours).config)
    fresh = new_model(Model(result.plan.target.config), seed=0)
    assert oracle.logits(fresh, oracle.tokens()).isfinite().all()


def test_the_default_kernel_stays_where_it_can(tmp_path: Path) -> None:
    source = oracle.saved(tiny("qwen3"), tmp_path / "source")
    result = expand(source, tmp_path / "result", [Moe(noise=0.0)])
    assert not any("experts_implementation" in note for note in result.steps[0].notes)
    ours = {dtype: load_model(result.folder, dtype=dtype) for dtype in (torch.float32,
            torch.bfloat16, torch.float64)}  # fmt: skip
    kernels = [model.config._experts_implementation for model in ours.values()]
    assert kernels == ["grouped_mm", "grouped_mm", "eager"]
    assert all(oracle.logits(model, oracle.tokens()).isfinite().all() for model in ours.values())


@pytest.mark.full
def test_a_bf16_source_stays_bf16_and_as_near(tmp_path: Path) -> None:
    """Copies and halves are exact in bf16 as well: nothing is rounded."""
    for family in FAMILIES:
        model = tiny(family).to(torch.bfloat16)
        source = oracle.saved(model, tmp_path / family)
        for name, spec in (("whole", Moe(noise=0.0)), ("halves", Moe(noise=0.0, granularity=2))):
            result = expand(source, tmp_path / f"{family}-{name}", [spec])
            assert {v.dtype for v in load_file(result.folder / "model.safetensors").values()} == {
                torch.bfloat16
            }
            before, after = oracle.stock(source), oracle.stock(result.folder)
            assert oracle.relative_difference(before, after, oracle.tokens()) < 1e-4


# Optimizer state and importances


def with_moments(model: PreTrainedModel, *, steps: int = 3) -> torch.optim.AdamW:
    """Return an optimizer after some steps at learning rate 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    for step in range(steps):
        oracle.gradients(model, oracle.tokens(seed=step))
        optimizer.step()
    return optimizer


def transplanted(
    folder: Path, family: str, specs: list[ExpansionSpec], *, policy: Policy = "carry"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], PreTrainedModel]:
    """Return second moments by logical name before and after, and the new model."""
    model = tiny(family)
    source = oracle.saved(model, folder / "source")
    old = with_moments(model)
    plan = plan_expansion(source, specs)
    new = load_model(expand(source, folder / "result", specs).folder)
    own = torch.optim.AdamW(new.parameters(), lr=1e-3, betas=(0.9, 0.95))
    change = plan.change
    moments = carried_moments(old, model, change, stored_tensors=change.after, policy=policy)
    for name, values in moments.items():
        put_moments(own, new.get_parameter(name), values)
    oracle.gradients(new, oracle.tokens())
    seconds = []
    for found, optimizer in ((model, old), (new, own)):
        state = {n: p for n, p in found.named_parameters() if p in optimizer.state}
        kept = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in state.items()}
        seconds.append(by_logical_name(found, kept))
    own.step()
    assert all(p.isfinite().all() for p in new.parameters())
    return seconds[0], seconds[1], new


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_moments_go_to_all_copies_as_a_policy(tmp_path: Path, family: str) -> None:
    before, after, _ = transplanted(tmp_path, family, [FOUR])
    assert "layers.0.router" not in after
    for expert in range(4):
        for part in ("gate", "up", "down"):
            torch.testing.assert_close(
                after[f"layers.1.experts.{expert}.{part}"], before[f"layers.1.ffn.{part}"] / 8
            )
    torch.testing.assert_close(after["layers.0.attention.q"], before["layers.0.attention.q"])


def test_moments_follow_the_shared_expert_and_not_the_silent_ones(tmp_path: Path) -> None:
    before, after, _ = transplanted(tmp_path, "qwen2", [FOUR])
    torch.testing.assert_close(
        after["layers.0.shared_expert.down"], before["layers.0.ffn.down"] / 4
    )
    torch.testing.assert_close(after["layers.0.shared_expert.up"], before["layers.0.ffn.up"])
    assert not any(".experts." in name for name in after)


@pytest.mark.full
def test_other_policies(tmp_path: Path) -> None:
    before, after, _ = transplanted(tmp_path / "reset", "llama", [FOUR], policy="reset_new")
    gate = before["layers.2.ffn.gate"] / 8
    torch.testing.assert_close(after["layers.2.experts.0.gate"], gate)
    found = torch.stack([after[f"layers.2.experts.0.{part}"].mean() for part in ("gate", "up")])
    # Reset copies share the step count of the first one, and get the mean of its values
    for part in ("gate", "up"):
        copy = after[f"layers.2.experts.3.{part}"]
        torch.testing.assert_close(copy, found.mean().expand_as(copy))
    _, after, _ = transplanted(tmp_path / "zero", "llama", [FOUR], policy="zero")
    assert not after


@pytest.mark.full
def test_moments_go_on_through_a_second_expansion(tmp_path: Path) -> None:
    specs: list[ExpansionSpec] = [Width(init="net2net", intermediate_size=80), FOUR, LlamaPro()]
    before, after, _ = transplanted(tmp_path, "llama", specs)
    one = after["layers.0.experts.3.gate"].sqrt().sum()
    torch.testing.assert_close(one * 8**0.5, before["layers.0.ffn.gate"].sqrt().sum())


@pytest.mark.full
def test_importances_on_files_reach_the_experts(tmp_path: Path) -> None:
    model = tiny("llama")
    source = oracle.saved(model, tmp_path / "source")
    values = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    kinds = {
        kind: TensorStream.of(values.items())
        for kind in ("fisher", "fisher_penalty", "anchor", "exp_avg", "exp_avg_sq")
    }
    write_state(source, kinds, step=3)
    result = expand(source, tmp_path / "result", [FOUR])
    state = State.read(result.folder)
    assert state is not None
    found = {kind: dict(folder) for kind, folder in state.kinds.items()}
    stem = "model.layers.1.block_sparse_moe.experts.2"
    gate = values["model.layers.1.mlp.gate_proj.weight"]
    torch.testing.assert_close(found["fisher"][f"{stem}.w1.weight"], gate / 8)
    torch.testing.assert_close(found["fisher_penalty"][f"{stem}.w1.weight"], gate / 4)
    assert not any("gate.weight" in name for name in found["fisher"])
    live = Model(result.plan.target.config).live_tensors(found["fisher"])
    assert live["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 80, 24)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_carries_the_old_knowledge(tmp_path: Path, family: str) -> None:
    source = oracle.saved(tiny(family), tmp_path / "source")
    spec = Moe(num_experts=4, reinit_fraction=0.5)
    plan = plan_expansion(source, [spec])
    masks = plan.change.masks()
    new = new_model(plan.target, seed=0)
    assert masks.keys() == dict(new.named_parameters()).keys()
    assert not bool(masks["model.layers.0.mlp.gate.weight"].any())
    experts = masks["model.layers.0.mlp.experts.down_proj"].double().mean()
    assert float(experts) == (0 if family == "qwen2" else 0.5)
    if family == "qwen2":
        assert bool(masks["model.layers.0.mlp.shared_expert.down_proj.weight"].all())
