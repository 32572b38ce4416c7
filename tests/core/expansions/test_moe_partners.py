"""Further model types with experts, and weights that are not renormalised."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import tiny
from tests.oracle.moe import by_logical_name, identity_error, steps_of, upcycled
from tritter.core.expansions import Moe, target_model
from tritter.core.families import Model
from tritter.core.stock_routers import RouterControl
from tritter.errors import RequestError
from tritter.methods.moe_routing.objective import RoutingObjective
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.transform import expand

TOKENS = oracle.tokens()
# Dense type, type with a shared expert, and options of the dense model
SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "qwen2_moe", {}),
    "mistral, window": ("mistral", "qwen2_moe", {"sliding_window": 4}),
    "mistral": ("mistral", "qwen2_moe", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", "qwen2_moe", {}),
    "llama, sigmoid": ("llama", "glm4_moe", {}),
    "mistral, sigmoid": ("mistral", "glm4_moe", {"sliding_window": None}),
    "qwen2, sigmoid": ("qwen2", "glm4_moe", {"use_sliding_window": False, "layer_types": None}),
    "qwen3, sigmoid": ("qwen3", "glm4_moe", {}),
}


def dense(source: str, options: dict[str, Any]) -> PreTrainedModel:
    return tiny(source, **options)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("source", "target", "options"), SHARED.values(), ids=SHARED.keys())
def test_silent_experts_beside_a_shared_one_are_exact(
    tmp_path: Path, source: str, target: str, options: dict[str, Any], tied: bool
) -> None:
    model = dense(source, {**options, "tie_word_embeddings": tied})
    for pieces in (1, 2):
        spec = Moe(target=target, noise=0.5, granularity=pieces)  # type: ignore[arg-type]
        assert identity_error(model.double(), upcycled(model.double(), [spec]), TOKENS) == 0
    folder = oracle.saved(model.float(), tmp_path / "source")
    result = expand(folder, tmp_path / "result", [spec])
    stock = oracle.stock(result.folder)
    assert stock.config.model_type == target
    assert result.lineage.expansion_history[-1].claims_exact
    assert oracle.relative_difference(oracle.stock(folder), stock, TOKENS) == 0
    expert = stock.model.layers[0].mlp.experts
    assert expert.down_proj.abs().max() == 0
    assert expert.gate_up_proj.abs().max() > 0


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_rotary_keys_of_earlier_releases_are_read(
    tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    folder = oracle.saved(dense("llama", {}), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"]
    config |= {"rope_theta": 321.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = expand(folder, tmp_path / "result", [Moe(noise=0)])
    stock = oracle.stock(result.folder)
    assert stock.config.rope_parameters["rope_theta"] == 321
    assert oracle.relative_difference(oracle.stock(folder), stock, TOKENS) < 1e-5


def test_the_loss_reaches_silent_experts_and_then_the_router() -> None:
    """Negative control of silence: after one step of `down`, the function changes."""
    for source, target, options in (SHARED["llama"], SHARED["llama, sigmoid"]):
        model = upcycled(dense(source, options), [Moe(target=target, noise=0.1)])  # type: ignore[arg-type]
        oracle.gradients(model, TOKENS)
        mlp = model.model.layers[0].mlp
        assert mlp.experts.down_proj.grad.abs().max() > 0
        assert mlp.gate.weight.grad.abs().max() == 0
        before = oracle.logits(model, TOKENS)
        with torch.no_grad():
            mlp.experts.down_proj -= mlp.experts.down_proj.grad
        assert (oracle.logits(model, TOKENS) - before).abs().max() > 1e-6
        oracle.gradients(model, TOKENS)
        assert mlp.gate.weight.grad.abs().max() > 0


def test_dense_layers_of_a_sigmoid_model_come_first() -> None:
    config = oracle_growth.config_of(tiny("llama"))
    spec = Moe(target="glm4_moe", layers=(1, 2))
    assert target_model(Model(config), [spec]).config["first_k_dense_replace"] == 1
    model = tiny("llama").double()
    assert identity_error(model, upcycled(model, [spec]), TOKENS) == 0
    with pytest.raises(RequestError, match="only the first can be"):
        target_model(Model(config), [Moe(target="glm4_moe", layers=(0, 1))])


@pytest.mark.parametrize(
    ("source", "options", "spec", "message"),
    [
        ("llama", {}, {"target": "qwen3_moe"}, "llama can become mixtral, qwen2_moe, glm4_moe"),
        ("llama", {"attention_bias": True}, {"target": "qwen2_moe"}, "has no bias there"),
        ("llama", {"mlp_bias": True}, {"target": "glm4_moe"}, "has no bias there"),
        ("mistral", {"sliding_window": 4}, {"target": "glm4_moe"}, "has no window"),
        ("llama", {}, {"norm_topk_prob": False}, "mixtral always renormalises"),
        ("llama", {}, {"norm_topk_prob": False}, "use true, or expansion.moe.target=qwen2_moe"),
        (
            "qwen3",
            {},
            {"norm_topk_prob": False, "target": "glm4_moe"},
            "Tritter does not support it for glm4_moe; use true, or expansion.moe.target=qwen3_moe",
        ),
    ],
)
def test_refusals(source: str, options: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    config = oracle_growth.config_of(tiny(source, **options))
    with pytest.raises(RequestError, match=message):
        target_model(Model(config), [Moe(**spec)])


def test_what_its_partner_refuses_is_told_of_the_result() -> None:
    config = {**oracle_growth.config_of(tiny("llama")), "num_hidden_layers": 513}
    with pytest.raises(RequestError, match=r"expansion.moe: of the result, num_hidden_layers"):
        target_model(Model(config), [Moe(target="glm4_moe")])


# Weights that are not renormalised


def evenly_routed(model: PreTrainedModel, noise: float = 0.0) -> PreTrainedModel:
    """Make the router rows (almost) zero, so that all experts have (almost) the same weight."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight *= noise
    return model


@pytest.mark.parametrize("experts", [(8, 2), (3, 1), (2, 2), (6, 4)])
def test_an_even_router_gives_the_output_of_the_ffn(experts: tuple[int, int]) -> None:
    total, chosen = experts
    for pieces in (1, 2):
        spec = Moe(
            num_experts=total * pieces, experts_per_token=chosen * pieces, granularity=pieces,
            noise=0.0, norm_topk_prob=False,
        )  # fmt: skip
        model = tiny("qwen3").double()
        result = upcycled(model, [spec])
        assert result.config.norm_topk_prob is False
        assert not spec.is_exact
        if total > chosen:  # with a router that prefers experts, it is not exact
            assert identity_error(model, result, TOKENS) > 1e-3
        # Pieces of a copy are routed together by tiny rows; a zero router would mix them
        bound = 1e-10 if pieces == 1 else 1e-7
        even = evenly_routed(result, 0.0 if pieces == 1 else 1e-9)
        assert identity_error(model, even, TOKENS) < bound


def test_moments_follow_the_scale_of_the_output() -> None:
    """All experts selected: the map of gradients is exact where the weights are equal."""
    spec = Moe(num_experts=4, experts_per_token=4, noise=0.0, norm_topk_prob=False)
    model = tiny("qwen3").double()
    (step,) = steps_of(model, spec)
    result = evenly_routed(oracle_growth.grown(model, (step,)))
    with oracle.float64_casts():
        oracle.gradients(model, TOKENS)
        oracle.gradients(result, TOKENS)
    before, after = (
        by_logical_name(m, {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        for m in (model, result)
    )
    maps = step.parameter_map.tensors
    for part in ("gate", "up", "down"):
        name, dense_name = f"layers.1.experts.2.{part}", f"layers.1.ffn.{part}"
        (factor,) = [axis for axis in maps[name].axes if axis is not None]
        shape = (-1, 1) if part != "down" else (1, -1)
        expected = before[dense_name] * factor.gradient.view(shape)
        torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=1e-12)
        wrong = before[dense_name] / 4 * (1 if part == "down" else 2)
        assert not torch.allclose(after[name], wrong, rtol=1e-3) or spec.output_scale == 1


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_the_scale_of_moments(chosen: int) -> None:
    """Each of C copies gets 1/C of the gradient, divided by the scale of `down`."""
    spec = Moe(num_experts=8, experts_per_token=2 * chosen, granularity=2, norm_topk_prob=False)
    assert spec.output_scale == 2 * 8 / (2 * chosen)
    (step,) = steps_of(tiny("qwen3"), spec)
    down = step.parameter_map.tensors["layers.0.experts.3.down"].axes[1]
    assert down is not None
    assert set(down.weight.tolist()) == {spec.output_scale}
    assert down.gradient.tolist() == pytest.approx([1 / 4 / spec.output_scale] * len(down.gradient))
    assert down.squared is not None
    assert down.squared.tolist() == pytest.approx(
        [1 / 4 / chosen / spec.output_scale**2] * len(down.squared)
    )


# Sigmoid routers in training


def sigmoid_model() -> PreTrainedModel:
    model = upcycled(tiny("llama"), [Moe(target="glm4_moe", num_experts=4, noise=0.1)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            down = layer.mlp.experts.down_proj
            down.copy_(torch.randn(down.shape, generator=generator) * 0.1)
    return model


def test_control_of_sigmoid_routers_changes_nothing() -> None:
    model = sigmoid_model()
    before = oracle.logits(model, TOKENS)
    routing = RouterControl.of(model)
    assert routing is not None
    with routing.recording():
        assert torch.equal(oracle.logits(model, TOKENS), before)
        record = routing.recorded()[0]
    scores = record.own_logits.sigmoid()
    torch.testing.assert_close(record.probabilities, scores / scores.sum(-1, keepdim=True))
    assert torch.equal(record.selected.sort(-1).values, scores.topk(2).indices.sort(-1).values)
    with pytest.raises(RequestError, match="sigmoid routers have none"):
        routing.set_offset([0], -math.inf)
    routing.detach()
    assert torch.equal(oracle.logits(model, TOKENS), before)


def test_the_balance_loss_of_scores_by_hand() -> None:
    """E · Σ f·P with the scores divided by their sum."""
    model = sigmoid_model()
    objective = RoutingObjective(model, RoutingOptions(auxiliary_loss=1.0, z_loss=0.0))
    objective.routing.start_recording()
    model(input_ids=TOKENS, use_cache=False)
    loss = objective.terms({"input_ids": TOKENS})["auxiliary_loss"]
    expected = []
    for record in objective.routing.recorded():
        scores = record.own_logits.sigmoid()
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        load = torch.bincount(record.selected.flatten(), minlength=4) / len(record.selected)
        expected.append(4 * (load * shares).sum())
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0


def test_the_selection_bias_of_a_sigmoid_router_is_in_its_files(tmp_path: Path) -> None:
    model = sigmoid_model()
    routing = RouterControl.of(model)
    assert routing is not None
    bias = torch.tensor([0.0, 9.0, 0.0, 9.0])
    for layer in routing.layers:
        routing.set_selection_bias(layer, bias)
    expected = oracle.logits(model, TOKENS)
    with routing.recording():
        oracle.logits(model, TOKENS)
        assert set(routing.recorded()[0].selected.flatten().tolist()) == {1, 3}
    routing.detach()
    stock = oracle.stock(oracle.saved(model, tmp_path / "model"))
    assert torch.equal(stock.model.layers[0].mlp.gate.e_score_correction_bias, bias)
    assert torch.equal(oracle.logits(stock, TOKENS), expected)


# Any shape


@st.composite
def cases(draw: st.DrawFn) -> tuple[PreTrainedModel, Moe]:
    """A tiny dense model of any shape, and a type with a shared expert that it can become."""
    source = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    target = draw(st.sampled_from(["glm4_moe"] if source == "qwen3" else ["qwen2_moe", "glm4_moe"]))
    kv_heads, group, pieces = (draw(st.integers(1, most)) for most in (2, 3, 3))
    heads = kv_heads * group
    options: dict[str, Any] = {
        "hidden_size": heads * draw(st.integers(2, 6)),
        "intermediate_size": pieces * draw(st.integers(1, 15)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if target == "glm4_moe":
        options |= {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
    first = draw(st.integers(0, options["num_hidden_layers"] - 1))
    copies = draw(st.integers(2, 5))
    spec = Moe(
        target=target,
        num_experts=copies * pieces,
        experts_per_token=pieces * draw(st.integers(1, copies)),
        granularity=pieces,
        noise=0.3,
        reinit_fraction=draw(st.sampled_from([0.0, 0.5])),
        layers=tuple(range(first, options["num_hidden_layers"])),
    )
    return tiny(source, **options).double(), spec


@pytest.mark.full
@settings(max_examples=30, deadline=None)
@given(case=cases(), seed=st.integers(0, 5))
def test_any_shape_with_a_shared_expert(case: tuple[PreTrainedModel, Moe], seed: int) -> None:
    model, spec = case
    result = upcycled(model, [spec], seed=seed)
    assert identity_error(model, result, TOKENS) == 0
    config = oracle_growth.config_of(result)
    parameters = result.num_parameters()
    assert spec.target is not None
    if spec.target == "glm4_moe":  # its files have a bias for each expert
        sparse = len(spec.layers or ())
        parameters += sparse * spec.total_experts
    assert Model(config).num_parameters == parameters
