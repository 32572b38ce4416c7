"""Every family computes the same function after growth, and its gradient is the mapped one.

Shapes, inits, shares, ties, biases and eps are drawn; the oracle is the stock class in float64
with its float32 casts lifted (< 1e-10), then the stock class in float32 from disk (< 1e-4 of the
logits' deviation).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import (
    EPS_AND_TIES,
    GEMMA,
    HEADS_DIVIDE_HIDDEN,
    LAYER_NORM,
    OWN,
    SPARSE,
    generic,
    marks_of,
    tiny,
)
from tests.oracle.qwen3 import tiny_qwen3
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    LlamaPro,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Model, family_of
from tritter.errors import RequestError
from tritter.transform import expand

INITS = ("fresh", "net2net", "zero_pad")
IDENTITY, STOCK, GRADIENT = 1e-10, 1e-4, 1e-9


@st.composite
def models(draw: st.DrawFn, family: str) -> PreTrainedModel:
    """A tiny stock model in float64, of any shape that the family accepts."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    hidden_size = draw(st.integers(5, 31))
    if family in HEADS_DIVIDE_HIDDEN:
        hidden_size = -(-hidden_size // heads) * heads
    options: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": draw(st.integers(3, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "rms_norm_eps": draw(st.sampled_from([1e-3, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
        "vocab_size": 31,
    }
    for key in FLAGS.get(family, ()):
        options[key] = draw(st.booleans())
    if family in SPARSE:
        options |= draw(experts(options["num_hidden_layers"]))
    if family in GEMMA:
        options["query_pre_attn_scalar"] = draw(st.integers(1, 20))
    return tiny(family, **options).double()


FLAGS = {
    "llama": ("attention_bias", "mlp_bias"),
    "qwen3": ("attention_bias",),
    "smollm3": ("attention_bias", "mlp_bias"),
    "granite": ("attention_bias", "mlp_bias"),
    "olmo2": ("attention_bias",),
    "glm4": ("attention_bias",),
    "gemma2": ("attention_bias",),
    "gemma3_text": ("attention_bias",),
    "gpt_neox": ("attention_bias", "use_parallel_residual"),
    "qwen2_moe": ("norm_topk_prob", "qkv_bias"),
    "qwen3_moe": ("norm_topk_prob", "attention_bias"),
}


@st.composite
def experts(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Numbers and sizes of experts, and dense layers (Mixtral has none)."""
    number = draw(st.integers(2, 4))
    return {
        "num_local_experts": number,
        "num_experts": number,
        "num_experts_per_tok": draw(st.integers(1, number)),
        "moe_intermediate_size": draw(st.integers(2, 15)),
        "shared_expert_intermediate_size": draw(st.integers(2, 15)),
        "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
        "decoder_sparse_step": draw(st.integers(1, 2)),
    }


@st.composite
def widths(draw: st.DrawFn, model: PreTrainedModel) -> Width:
    """Targets that the family accepts: hidden size, FFN and heads, each grown or not."""
    config = oracle_growth.config_of(model)
    old = Model(config).sizes
    init = draw(st.sampled_from(INITS))
    strategy = draw(st.sampled_from([None, "fresh", "copy", "gqa"]))
    is_copied = (strategy or ("fresh" if init == "fresh" else "copy")) == "copy"
    kv_heads = old.num_key_value_heads + draw(st.integers(0, 3))
    group = old.num_attention_heads // old.num_key_value_heads
    heads = kv_heads * (group if is_copied else group + draw(st.integers(0, 2)))
    if family_of(config).norms_all_heads:  # all heads are copied, or none
        kind = strategy or ("fresh" if init == "fresh" else "copy")
        times = 1 if kind == "fresh" else draw(st.integers(1, 3))
        heads = old.num_attention_heads * times
        kv_heads = old.num_key_value_heads * (times if kind == "copy" else 1)
    hidden_size = old.hidden_size + draw(st.integers(0, 2 * old.hidden_size + 3))
    if family_of(
        config
    ).subtracts_mean:  # whole copies of the stream, and heads of the same total width
        times = draw(st.integers(1, 3))
        init = "net2net" if times > 1 else init
        strategy = draw(st.sampled_from([None, "fresh", "copy"]))
        hidden_size = times * old.hidden_size
        heads = kv_heads = times * old.num_attention_heads
    elif family_of(config).heads_divide_hidden:
        hidden_size = -(-hidden_size // heads) * heads
    return Width(
        hidden_size=hidden_size,
        intermediate_size=old.ffn_size + draw(st.integers(0, 60)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_strategy=strategy,
        init=init,
        shares=draw(st.sampled_from(["equal", "unequal"])),
    )


def depths(layers: int) -> st.SearchStrategy[ExpansionSpec]:
    positions = st.lists(st.integers(0, layers - 1), min_size=1, max_size=3).map(tuple)
    return st.one_of(
        positions.map(lambda chosen: LlamaPro(positions=chosen)),
        st.integers(layers + 1, 2 * layers + 1).map(lambda count: LlamaPro(target_layers=count)),
        st.sampled_from(range(layers + 1 + (layers + 1) % 2, 2 * layers + 1, 2)).map(
            lambda count: Dus(target_layers=count, identity_init=True)
        ),
        st.integers(layers + 1, 3 * layers + 1).map(
            lambda count: Stack(target_layers=count, partial=True, identity_init=True)
        ),
        st.integers(layers + 1, 3 * layers + 1).map(
            lambda count: Interpolate(target_layers=count, identity_init=True)
        ),
    )


def _assert_kept(model: PreTrainedModel, specs: list[ExpansionSpec], *, seed: int) -> None:
    steps = build_steps(Model(oracle_growth.config_of(model)), specs, seed=seed)
    found = oracle_growth.errors(model, steps)
    assert found.logits < IDENTITY
    assert found.worst_gradient < GRADIENT, max(found.gradients, key=found.gradients.__getitem__)
    assert found.compared >= sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic())
@settings(max_examples=20)
@given(data=st.data())
def test_any_width_keeps_function_and_gradient(family: str, data: st.DataObject) -> None:
    model = data.draw(models(family))
    spec = data.draw(widths(model))
    try:
        _assert_kept(model, [spec], seed=data.draw(st.integers(0, 9)))
    except RequestError as error:
        assert "every target equals" in str(error)
        assume(False)


@pytest.mark.full
@pytest.mark.parametrize("family", generic())
@pytest.mark.parametrize("order", ["width first", "depth first"])
@settings(max_examples=8)
@given(data=st.data())
def test_any_width_and_depth_in_either_order(family: str, order: str, data: st.DataObject) -> None:
    model = data.draw(models(family))
    width: ExpansionSpec = data.draw(widths(model))
    depth = data.draw(depths(model.config.num_hidden_layers))
    specs = [width, depth] if order == "width first" else [depth, width]
    try:
        _assert_kept(model, specs, seed=3)
    except RequestError as error:
        assert "every target equals" in str(error)
        assume(False)


QWEN3_STOCK: dict[str, list[ExpansionSpec]] = {
    "fresh doubled": [Width()],
    "fresh to an odd size": [Width(hidden_size=37)],
    "fresh FFN": [Width(intermediate_size=58)],
    "fresh query heads": [Width(num_attention_heads=6, num_key_value_heads=2)],
    "net2net doubled": [Width(init="net2net")],
    "net2net doubled, equal shares": [Width(init="net2net", shares="equal")],
    "net2net to an odd size": [Width(init="net2net", hidden_size=57)],
    "zero_pad doubled": [Width(init="zero_pad")],
    "zero_pad to an odd size": [Width(init="zero_pad", hidden_size=29)],
    "zero_pad, equal shares": [Width(init="zero_pad", shares="equal")],
    "hidden size alone": [
        Width(hidden_size=45, intermediate_size=37, num_attention_heads=4, num_key_value_heads=2)
    ],
    "dus, identity": [Dus(identity_init=True)],
    "stack, identity": [Stack(identity_init=True)],
    "interpolate, identity": [Interpolate(identity_init=True)],
    "llama_pro": [LlamaPro()],
    "width then stack": [Width(init="net2net"), Stack(identity_init=True)],
    "interpolate then width": [Interpolate(identity_init=True), Width(hidden_size=29)],
    "width then depth": [Width(init="zero_pad", hidden_size=31), LlamaPro()],
    "depth then width": [Dus(identity_init=True), Width(init="net2net")],
    "three in a row": [Width(hidden_size=29), LlamaPro(), Width(init="net2net")],
}
LLAMA_STOCK: dict[str, list[ExpansionSpec]] = {
    "zero_pad doubled": [Width(init="zero_pad")],
    "zero_pad 1.5x": [Width(init="zero_pad", hidden_size=36)],
    "zero_pad, fresh heads": [Width(init="zero_pad", head_strategy="fresh")],
    "zero_pad, equal shares": [Width(init="zero_pad", shares="equal")],
    "zero_pad then depth": [Width(init="zero_pad"), LlamaPro()],
    "depth then zero_pad": [LlamaPro(), Width(init="zero_pad", hidden_size=32)],
}
# Sizes of experts stay multiples of 4: torch's grouped product needs rows of 16 bytes.
EACH_STOCK: dict[str, list[ExpansionSpec]] = {
    "fresh doubled": [Width()],
    "fresh 1.5x": [Width(hidden_size=36, intermediate_size=60)],
    "net2net doubled": [Width(init="net2net")],
    "net2net 2.5x": [Width(init="net2net", hidden_size=60, intermediate_size=100)],
    "zero_pad, gqa": [Width(init="zero_pad", num_attention_heads=8, head_strategy="gqa")],
    "more groups": [Width(num_key_value_heads=4, head_strategy="gqa")],
    "width then depth": [Width(hidden_size=32, intermediate_size=44), LlamaPro()],
    "depth then width": [Dus(identity_init=True), Width(init="net2net")],
}
LAYER_NORM_STOCK: dict[str, list[ExpansionSpec]] = {
    "doubled": [Width(init="net2net")],
    "three times, equal shares": [Width(init="net2net", hidden_size=72, shares="equal")],
    "doubled, fresh heads": [Width(init="net2net", head_strategy="fresh")],
    "fresh FFN": [Width(intermediate_size=57)],
    "width then depth": [Width(init="net2net", intermediate_size=44), LlamaPro()],
    "depth then width": [Dus(identity_init=True), Width(init="net2net")],
}
TABLES = {
    **dict.fromkeys(OWN, EACH_STOCK),
    **dict.fromkeys(LAYER_NORM, LAYER_NORM_STOCK),
    "llama": LLAMA_STOCK,
    "qwen3": QWEN3_STOCK,
}
CASES = [
    pytest.param(family, specs, id=f"{family}: {name}", marks=marks_of(family))
    for family, table in TABLES.items()
    for name, specs in table.items()
]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("eps", "tied"), EPS_AND_TIES)
@pytest.mark.parametrize(("family", "specs"), CASES)
def test_stock_model_from_disk_computes_the_same(
    tmp_path: Path, family: str, specs: list[ExpansionSpec], eps: float, tied: bool
) -> None:
    sizes = {"hidden_size": 23, "intermediate_size": 37} if family == "qwen3" else {}
    biases = {"attention_bias": tied} if "attention_bias" in FLAGS.get(family, ()) else {}
    model = tiny(family, tie_word_embeddings=tied, rms_norm_eps=eps, **sizes, **biases)
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", specs)
    after = oracle.stock(result.folder)
    assert after.config.model_type == family
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
    assert sum(p.numel() for p in after.parameters()) == result.parameters_after


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("init", INITS)
def test_head_gains_keep_value_and_gradient(init: str) -> None:
    """q and k have norms per head, so width leaves their gains unchanged: W' = W, G' = G."""
    model = tiny_qwen3(rms_norm_eps=1e-3).double()
    ids = oracle.tokens()
    steps = build_steps(Model(oracle_growth.config_of(model)), [Width(init=init)], seed=0)
    grown = oracle_growth.grown(model, steps)
    with oracle.float64_casts():
        before, after = oracle.gradients(model, ids), oracle.gradients(grown, ids)
    values, grown_values = model.state_dict(), grown.state_dict()
    names = [name for name in before if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(names) == 2 * 3
    for name in names:
        assert torch.equal(values[name], grown_values[name])
        torch.testing.assert_close(before[name], after[name], rtol=1e-9, atol=1e-12)
        assert float(before[name].abs().max()) > 1e-6


def test_odd_hidden_sizes_are_for_those_that_accept_them(tmp_path: Path) -> None:
    qwen3 = oracle.saved(tiny_qwen3(), tmp_path / "qwen3")
    grown = expand(qwen3, tmp_path / "grown", [Width(hidden_size=47)])
    assert oracle.stock(grown.folder).config.hidden_size == 47
    llama = oracle.saved(oracle.tiny_llama(), tmp_path / "llama")
    with pytest.raises(RequestError, match=r"hidden_size = 47.*nearest: 44 or 48"):
        expand(llama, tmp_path / "refused", [Width(hidden_size=47)])
    assert not (tmp_path / "refused").exists()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "spec",
    [
        LlamaPro(positions=(0, 2)),
        Dus(target_layers=4, identity_init=True),
        Stack(identity_init=True),
        Stack(target_layers=5, partial=True, identity_init=True),
        Interpolate(target_layers=7, identity_init=True),
        Width(),
    ],
    ids=str,
)
def test_sliding_windows_stay_with_their_layers(tmp_path: Path, spec: ExpansionSpec) -> None:
    """Qwen3 lists a kind of attention per layer; copies keep their source layer's kind."""
    model = tiny_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", [spec])
    after = oracle.stock(result.folder)
    kinds = ("full_attention", "sliding_attention", "sliding_attention")
    layers = result.steps[-1].parameter_map.layer_sources
    assert after.config.layer_types == [kinds[layer] for layer in layers]
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
