"""Function preservation against stock transformers, and the gradient identity in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.oracle.families import EPS_AND_TIES
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    Layers,
    LlamaPro,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.core.parameter_map import AxisMap, Quantity, TensorMap
from tritter.errors import RequestError
from tritter.transform import PlannedExpansion, expand

EXACT: dict[str, list[ExpansionSpec]] = {
    "fresh doubled": [Width()],
    "fresh 1.5x": [Width(hidden_size=36)],
    "net2net doubled": [Width(init="net2net")],
    "net2net doubled, equal shares": [Width(init="net2net", shares="equal")],
    "net2net 2.5x, remainder padded": [Width(init="net2net", hidden_size=60)],
    "hidden size alone": [
        Width(hidden_size=48, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    ],
    "fresh FFN": [Width(intermediate_size=57)],
    "net2net FFN 3.25x": [Width(intermediate_size=130, init="net2net")],
    "fresh query heads": [Width(num_attention_heads=6, num_key_value_heads=2)],
    "fresh key/value heads": [Width(num_attention_heads=6, num_key_value_heads=3)],
    "copied heads": [Width(num_attention_heads=6, num_key_value_heads=3, init="net2net")],
    "query heads copied in their groups": [Width(num_attention_heads=6, head_strategy="gqa")],
    "gqa, more groups as well": [
        Width(num_attention_heads=12, num_key_value_heads=4, head_strategy="gqa", init="net2net")
    ],
    "llama_pro": [LlamaPro()],
    "layers": [Layers(sources=(0, 2, 1, 2), identity=(1,))],
    "layers then width": [Layers(sources=(0, 2, 1, 2), identity=(1,)), Width()],
    "width then layers": [Width(), Layers(sources=(0, 0, 1, 2), identity=True)],
    "llama_pro at positions": [LlamaPro(positions=(0, 0, 2))],
    "dus, identity": [Dus(identity_init=True)],
    "stack, identity": [Stack(identity_init=True)],
    "partial stack, identity": [Stack(target_layers=7, partial=True, identity_init=True)],
    "interpolate, identity": [Interpolate(identity_init=True)],
    "interpolate to 7, identity": [Interpolate(target_layers=7, identity_init=True)],
    "width then depth": [Width(init="net2net"), LlamaPro()],
    "depth then width": [Dus(identity_init=True), Width(hidden_size=36)],
    "width then stack": [Width(), Stack(identity_init=True)],
    "interpolate then width": [Interpolate(identity_init=True), Width(init="net2net")],
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("eps", "tied"), EPS_AND_TIES)
@pytest.mark.parametrize("specs", EXACT.values(), ids=EXACT.keys())
def test_stock_model_computes_the_same(
    tmp_path: Path, specs: list[ExpansionSpec], eps: float, tied: bool
) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=tied, rms_norm_eps=eps, attention_bias=tied)
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", specs)
    after = oracle.stock(result.folder)
    assert oracle.relative_difference(model, after, oracle.tokens()) < 1e-4
    assert sum(p.numel() for p in after.parameters()) == result.parameters_after
    assert result.parameters_after > result.parameters_before


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("specs", EXACT.values(), ids=EXACT.keys())
def test_identity_in_float64(tmp_path: Path, specs: list[ExpansionSpec], tied: bool) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=tied, mlp_bias=tied).double()
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", specs)
    with oracle.float64_casts():
        before = oracle.logits(oracle.stock(source, torch.float64), oracle.tokens())
        after = oracle.logits(oracle.stock(result.folder, torch.float64), oracle.tokens())
    assert float((before - after).abs().max()) < 1e-10


def test_dus_changes_the_function_and_says_so(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [Dus()])
    assert not Dus().is_exact
    assert not result.lineage.expansion_history[-1].claims_exact
    jump = oracle.relative_difference(model, oracle.stock(result.folder), oracle.tokens())
    assert jump > 1e-2


def test_forgotten_eps_is_seen(tmp_path: Path) -> None:
    """Negative control: the oracle detects an unscaled eps of 1e-3."""
    model = oracle.tiny_llama(rms_norm_eps=1e-3, initializer_range=0.02)
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", [Width()])
    after = oracle.stock(result.folder)
    for module in after.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-3
    assert oracle.relative_difference(model, after, oracle.tokens()) > 1e-2


def test_noise_is_measured_as_a_jump(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    spec = Width(init="net2net", noise=0.01)
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [spec])
    assert not spec.is_exact
    jump = oracle.relative_difference(model, oracle.stock(result.folder), oracle.tokens())
    assert jump > 1e-3


@given(
    hidden_factor=st.integers(1, 3),
    hidden_extra=st.integers(0, 5),
    ffn=st.integers(40, 140),
    kv_heads=st.integers(2, 5),
    init=st.sampled_from(["fresh", "net2net"]),
    shares=st.sampled_from(["equal", "unequal"]),
    tied=st.booleans(),
)
def test_any_accepted_shape_is_exact(
    tmp_path_factory: pytest.TempPathFactory,
    hidden_factor: int,
    hidden_extra: int,
    ffn: int,
    kv_heads: int,
    init: str,
    shares: str,
    tied: bool,
) -> None:
    folder = tmp_path_factory.mktemp("shapes")
    heads = 2 * kv_heads
    hidden_size = -(-(24 * hidden_factor + hidden_extra) // heads) * heads
    spec = Width(
        hidden_size=hidden_size,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        init=init,
        shares=shares,
    )
    model = oracle.tiny_llama(tie_word_embeddings=tied)
    source = oracle.saved(model, folder / "source")
    try:
        result = expand(source, folder / "result", [spec], seed=ffn)
    except RequestError as error:
        assert "every target equals" in str(error)
        return
    after = oracle.stock(result.folder)
    assert oracle.relative_difference(model, after, oracle.tokens()) < 1e-4


def _mapped_gradients(
    folder: Path, specs: list[ExpansionSpec], gradient: dict[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return disk name → (mapped gradient, mask of entries that carry a history)."""
    config = read_model(folder).config
    names = {t.name: t.disk_name for t in Model(config).tensors}
    values = {name: gradient[disk_name] for name, disk_name in names.items()}
    masks = {name: torch.ones_like(value) for name, value in values.items()}
    for step in build_steps(Model(config), specs, seed=0):
        maps = step.parameter_map.tensors
        values = {
            name: tensor_map.apply(values[tensor_map.source], quantity=Quantity.GRADIENT)
            for name, tensor_map in maps.items()
        }
        masks = {
            name: replace(tensor_map, axes=_unit(tensor_map)).apply(
                masks[tensor_map.source],
                quantity=Quantity.GRADIENT,
            )
            for name, tensor_map in maps.items()
        }
        config = step.target.config
    disk = {t.name: t.disk_name for t in Model(config).tensors}
    return {disk[name]: (values[name], masks[name].bool()) for name in values}


def _unit(tensor_map: TensorMap) -> tuple[Any, ...]:
    return tuple(
        None if axis is None else replace(axis, gradient=(axis.index >= 0).double())
        for axis in tensor_map.axes
    )


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("specs", EXACT.values(), ids=EXACT.keys())
def test_gradient_of_the_expanded_model_is_the_mapped_gradient(
    tmp_path: Path, specs: list[ExpansionSpec], tied: bool
) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    source = oracle.saved(model.double(), tmp_path / "source")
    result = expand(source, tmp_path / "result", specs)
    with oracle.float64_casts():
        before = oracle.gradients(oracle.stock(source, torch.float64), oracle.tokens())
        after = oracle.gradients(oracle.stock(result.folder, torch.float64), oracle.tokens())
    compared = 0
    for name, (expected, mask) in _mapped_gradients(source, specs, before).items():
        difference = (after[name] - expected)[mask].abs()
        if difference.numel():
            scale = after[name].abs().max().clamp(min=1e-6)
            assert float(difference.max() / scale) < 1e-9, name
            compared += difference.numel()
    assert compared >= sum(value.numel() for value in before.values())


def test_copies_of_the_residual_stream_share_equally() -> None:
    """Unequal shares would break the gradient identity above; see AxisMap.tiled."""
    residual = AxisMap.tiled(24, 60)
    shares = residual.share[residual.source >= 0]
    assert float(shares.max() - shares.min()) == 0.0
    assert residual.num_copies == 2


@pytest.mark.full
def test_every_new_parameter_gets_a_gradient_within_two_steps(tmp_path: Path) -> None:
    model = oracle.tiny_llama(rms_norm_eps=1e-6)
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [
        Width(),
        Width(init="net2net"),
        LlamaPro(),
        Dus(identity_init=True),
        Stack(identity_init=True),
        Interpolate(target_layers=7, identity_init=True),
    ]
    for position, spec in enumerate(specs):
        result = expand(source, tmp_path / f"result{position}", [spec])
        grown = oracle.stock(result.folder)
        optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
        touched = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in grown.named_parameters()}
        for step in range(3):
            batch = oracle.tokens(batch=16, length=32, seed=step)
            batch[0, :] = torch.arange(32)
            batch[1, :] = torch.arange(32) + 32
            batch[2, :] = torch.arange(32) + 64
            for name, gradient in oracle.gradients(grown, batch).items():
                touched[name] |= gradient != 0
            optimizer.step()
        rows = touched.pop("model.embed_tokens.weight")
        assert bool(rows[:97].any(dim=1).all())
        for name, mask in touched.items():
            assert bool(mask.all()), f"{spec.name}: {name} has {int((~mask).sum())} dead entries"


@pytest.mark.full
def test_unequal_clones_diverge_and_equal_ones_do_not(tmp_path: Path) -> None:
    gaps = {}
    for shares in ("unequal", "equal"):
        model = oracle.tiny_llama(initializer_range=0.1)
        source = oracle.saved(model, tmp_path / f"source-{shares}")
        spec = Width(intermediate_size=80, init="net2net", shares=shares)
        result = expand(source, tmp_path / shares, [spec])
        index = build_steps(read_model(source), [spec], seed=0)[0].parameter_map
        copies = index.tensors["layers.0.ffn.gate"].axes[0]
        assert copies is not None
        grown = oracle.stock(result.folder)
        optimizer = torch.optim.AdamW(grown.parameters(), lr=3e-3)
        for step in range(60):
            oracle.gradients(grown, oracle.tokens(seed=step))
            optimizer.step()
        gate = grown.model.layers[0].mlp.gate_proj.weight.detach()
        first = gate[:40][copies.index[40:]]
        gaps[shares] = float((gate[40:] - first).norm() / first.norm())
    assert gaps["equal"] < 1e-5
    assert gaps["unequal"] > 0.02


def test_maps_in_a_row_need_no_model() -> None:
    config = LLAMA_CONFIG
    plan = PlannedExpansion.of(Model(config), [Width(), LlamaPro()], seed=0)
    shapes = Model(config).shapes
    maps, target = plan.parameter_map.tensors, plan.target.config
    for tensor in Model(target).tensors:
        value = maps[tensor.name].mapped(lambda name: torch.ones(shapes[name]))
        assert tuple(value.shape) == Model(target).shapes[tensor.name]


LLAMA_CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
