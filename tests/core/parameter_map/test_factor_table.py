"""The table tensor kind × (weight factor, gradient factor), worked out by hand.

Every number below is typed, not computed from an axis map. Derivation, with d the old width of a
space, D the new one, k copies of each coordinate, p the scale of producers, s the share of
consumers, Σ p·s = 1 over the copies of a coordinate, c = √(k·d/D):

    a tensor that writes O and reads I     weight p_O·s_I          gradient s_O·p_I
    before a nonlinearity (gate, q, k)     weight 1·s_I            gradient (p·s)_O·p_I
    a norm's gain onto O                   weight p_O·c            gradient s_O/c

Copies (net2net), everything doubled: residual p = 1, s = 1/2, c = √(2d/2d) = 1; neurons and
heads p = 1, s = .9 for the first copy and .1 for the second. With a tied head the embedding
has two roles. As the embedding its rows write the residual (gradient 1/2). As the head, which
would read with 1/2, it stays unscaled: the final norm writes p = 1/2, the head reads s = 1, and its
gradient is p = 1/2 too. Both roles agree.

A block is (rows that are first copies, rows that are second copies) × (columns, the same).
"""

import re
from collections.abc import Iterator
from itertools import product
from math import sqrt

import pytest
import torch
from torch import Tensor

from tritter.core.expansions import Width, build_steps
from tritter.core.families import Config, Model
from tritter.core.parameter_map import ParameterMap, Quantity

Block = list[list[float]]

HALVES: Block = [[0.5, 0.5], [0.5, 0.5]]
SHARES_BY_ROW: Block = [[0.9, 0.9], [0.1, 0.1]]
SHARES_BY_COLUMN: Block = [[0.9, 0.1], [0.9, 0.1]]

# kind: (weight factors, gradient factors), rows × columns in halves; vocab is one block.
NET2NET_DOUBLED: dict[str, tuple[Block, Block]] = {
    "embed": ([[1.0, 1.0]], [[0.5, 0.5]]),
    "attention_norm": ([[1.0], [1.0]], [[0.5], [0.5]]),
    "attention.q": (HALVES, SHARES_BY_ROW),
    "attention.q_bias": ([[1.0], [1.0]], [[0.9], [0.1]]),
    "attention.k": (HALVES, SHARES_BY_ROW),
    "attention.k_bias": ([[1.0], [1.0]], [[0.9], [0.1]]),
    "attention.v": (HALVES, SHARES_BY_ROW),
    "attention.v_bias": ([[1.0], [1.0]], [[0.9], [0.1]]),
    "attention.o": (SHARES_BY_COLUMN, HALVES),
    "attention.o_bias": ([[1.0], [1.0]], [[0.5], [0.5]]),
    "ffn_norm": ([[1.0], [1.0]], [[0.5], [0.5]]),
    "ffn.gate": (HALVES, SHARES_BY_ROW),
    "ffn.gate_bias": ([[1.0], [1.0]], [[0.9], [0.1]]),
    "ffn.up": (HALVES, SHARES_BY_ROW),
    "ffn.up_bias": ([[1.0], [1.0]], [[0.9], [0.1]]),
    "ffn.down": (SHARES_BY_COLUMN, HALVES),
    "ffn.down_bias": ([[1.0], [1.0]], [[0.5], [0.5]]),
}
UNTIED: dict[str, tuple[Block, Block]] = {
    "final_norm": ([[1.0], [1.0]], [[0.5], [0.5]]),
    "head": ([[0.5, 0.5]], [[1.0, 1.0]]),
}
TIED: dict[str, tuple[Block, Block]] = {"final_norm": ([[0.5], [0.5]], [[1.0], [1.0]])}

# fresh, everything doubled: the old block is unchanged (p = s = 1); then the new entries.
# Gains: c = √(1·24/48) = √½ and its inverse √2.
FRESH_NEW_ENTRIES = {
    "embed": "zero",  # writes the residual
    "attention_norm": "mean",
    "attention.q": "random",  # random producers, zero consumers
    "attention.q_bias": "zero",
    "attention.k": "random",
    "attention.k_bias": "zero",
    "attention.v": "random",
    "attention.v_bias": "zero",
    "attention.o": "zero",  # new rows write new directions, new columns read new heads
    "attention.o_bias": "zero",
    "ffn_norm": "mean",
    "ffn.gate": "random",
    "ffn.gate_bias": "zero",
    "ffn.up": "random",
    "ffn.up_bias": "zero",
    "ffn.down": "zero",
    "ffn.down_bias": "zero",
    "final_norm": "mean",
    "head": "random",  # reads new directions, which are always zero
}
GAINS = ("attention_norm", "ffn_norm", "final_norm")


def _config(*, is_tied: bool) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": is_tied,
    }


def _map(spec: Width, *, is_tied: bool) -> ParameterMap:
    return build_steps(Model(_config(is_tied=is_tied)), [spec], seed=0)[0].parameter_map


def _kind(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _ones(is_tied: bool) -> Iterator[tuple[str, Tensor]]:
    config = _config(is_tied=is_tied)
    for name, shape in Model(config).shapes.items():
        yield name, torch.ones(shape, dtype=torch.float64)


def _spread(block: Block, shape: tuple[int, ...]) -> Tensor:
    """Expand the numbers of blocks to a tensor of the expanded shape."""
    rows = torch.tensor(block, dtype=torch.float64)
    rows = rows.repeat_interleave(shape[0] // rows.shape[0], dim=0)
    columns = shape[1] if len(shape) == 2 else 1
    return rows.repeat_interleave(columns // rows.shape[1], dim=1).view(shape)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_net2net_doubled_has_the_factors_of_the_table(is_tied: bool) -> None:
    table = NET2NET_DOUBLED | (TIED if is_tied else UNTIED)
    parameter_map = _map(Width(init="net2net"), is_tied=is_tied)
    seen = set()
    for name, ones in _ones(is_tied):
        weight, gradient = table[_kind(name)]
        seen.add(_kind(name))
        tensor_map = parameter_map.tensors[name]
        mapped = {quantity: tensor_map.apply(ones, quantity=quantity) for quantity in Quantity}
        expected_weight = _spread(weight, tuple(mapped[Quantity.WEIGHT].shape))
        expected_gradient = _spread(gradient, tuple(expected_weight.shape))
        for quantity, expected in (
            (Quantity.WEIGHT, expected_weight),
            (Quantity.GRADIENT, expected_gradient),
            (Quantity.SQUARED_GRADIENT, expected_gradient**2),
            (Quantity.PATH_INTEGRAL, expected_weight * expected_gradient),
        ):
            torch.testing.assert_close(
                mapped[quantity], expected, rtol=1e-12, atol=0, msg=f"{name}, {quantity}"
            )
    assert seen == set(table)
    assert set(parameter_map.tensors) == {name for name, _ in _ones(is_tied)}


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_fresh_doubled_keeps_the_old_block_and_scales_gains(is_tied: bool) -> None:
    parameter_map = _map(Width(), is_tied=is_tied)
    for name, ones in _ones(is_tied):
        tensor_map, is_gain = parameter_map.tensors[name], _kind(name) in GAINS
        weight, gradient = (sqrt(0.5), sqrt(2.0)) if is_gain else (1.0, 1.0)
        old = _old_entries(ones)
        for quantity, factor in (
            (Quantity.WEIGHT, weight),
            (Quantity.GRADIENT, gradient),
            (Quantity.SQUARED_GRADIENT, gradient**2),
            (Quantity.PATH_INTEGRAL, 1.0),
        ):
            mapped = tensor_map.apply(ones, quantity=quantity)
            torch.testing.assert_close(
                mapped[old], torch.full_like(mapped[old], factor), msg=f"{name}, {quantity}"
            )
            if quantity is not Quantity.WEIGHT:
                assert not mapped[~old].any(), name


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_fresh_doubled_fills_new_entries_as_the_table_says(is_tied: bool) -> None:
    """One side of every new direction is zero (exact), the other is not (it can learn)."""
    parameter_map, seen = _map(Width(), is_tied=is_tied), set()
    for name, ones in _ones(is_tied):
        kind = _kind(name)
        seen.add(kind)
        new = parameter_map.tensors[name].apply(ones)[~_old_entries(ones)]
        match FRESH_NEW_ENTRIES[kind]:
            case "zero":
                assert not new.any(), name
            case "mean":
                torch.testing.assert_close(new, torch.full_like(new, sqrt(0.5)), msg=name)
            case "random":
                fan_in = 48  # every reader of the grown residual stream; scale 1/√fan_in
                assert bool((new != 0).all()), name
                assert abs(float(new.std()) * sqrt(fan_in) - 1) < 0.1, name
                assert abs(float(new.mean())) * sqrt(fan_in) < 0.1, name
    assert seen == set(FRESH_NEW_ENTRIES) - ({"head"} if is_tied else set())


def _old_entries(ones: Tensor) -> Tensor:
    """Return the mask of the old block, the first entries along every axis.

    4 heads in 2 groups become 8 in 4: each old group keeps its 2, new groups come last.
    """
    grown = [length if length == 97 else 2 * length for length in ones.shape]
    old = torch.zeros(grown, dtype=torch.bool)
    old[tuple(slice(0, length) for length in ones.shape)] = True
    return old


def test_random_fills_differ_from_tensor_to_tensor_and_follow_the_seed() -> None:
    first, again = _map(Width(), is_tied=False), _map(Width(), is_tied=False)
    other = build_steps(Model(_config(is_tied=False)), [Width()], seed=1)[0].parameter_map
    fills = {
        name: first.tensors[name].apply(ones)
        for name, ones in _ones(is_tied=False)
        if first.tensors[name].fill.std > 0
    }
    assert len(fills) == 2 * 5 + 1
    assert len({first.tensors[name].fill.seed for name in fills}) == len(fills)
    gates = fills["layers.0.ffn.gate"], fills["layers.1.ffn.gate"], fills["layers.0.ffn.up"]
    assert not any(torch.equal(a, b) for a, b in product(gates, gates) if a is not b)
    for name, ones in _ones(is_tied=False):
        assert torch.equal(first.tensors[name].apply(ones), again.tensors[name].apply(ones))
        if name in fills:
            assert not torch.equal(fills[name], other.tensors[name].apply(ones))


def test_net2net_to_two_and_a_half_times_pads_the_remainder() -> None:
    """d = 24, D = 60, k = 2: c = √(48/60) = √.8; tied, the final norm has c/2 and gradient 1/c."""
    tensors = _map(Width(init="net2net", hidden_size=60), is_tied=True).tensors
    gain, tied = tensors["layers.0.ffn_norm"].axes[0], tensors["final_norm"].axes[0]
    read, write = tensors["layers.0.ffn.gate"].axes[1], tensors["layers.0.ffn.down"].axes[0]
    assert gain and tied and read and write
    for axis, weight, gradient in (
        (gain, sqrt(0.8), 0.5 / sqrt(0.8)),
        (tied, sqrt(0.8) / 2, 1 / sqrt(0.8)),
        (read, 0.5, 1.0),
        (write, 1.0, 0.5),
    ):
        assert axis.index.tolist() == [*range(24), *range(24), *[-1] * 12]
        torch.testing.assert_close(axis.weight[:48], torch.full((48,), weight).double())
        torch.testing.assert_close(axis.gradient[:48], torch.full((48,), gradient).double())
        assert not axis.gradient[48:].any()


@pytest.mark.parametrize(
    ("spec", "eps"),
    [
        (Width(), 0.5e-3),  # k·d/D = 24/48
        (Width(hidden_size=36), 2e-3 / 3),  # 24/36
        (Width(init="net2net"), 1e-3),  # 2·24/48
        (Width(init="net2net", hidden_size=60), 0.8e-3),  # 2·24/60
        (Width(intermediate_size=80), 1e-3),
    ],
)
def test_eps_follows_the_mean_square(spec: Width, eps: float) -> None:
    target = spec.target_config(Model(_config(is_tied=False)))
    assert target["rms_norm_eps"] == pytest.approx(eps, rel=1e-12)


def test_one_index_map_for_gate_up_and_down_and_for_every_reader_of_the_residual() -> None:
    tensors = _map(Width(init="net2net"), is_tied=False).tensors
    ffn = {"ffn.gate": 0, "ffn.up": 0, "ffn.gate_bias": 0, "ffn.up_bias": 0, "ffn.down": 1}
    for layer in (0, 1):
        sources = [_index(tensors, f"layers.{layer}.{kind}", axis) for kind, axis in ffn.items()]
        assert all(source == sources[0] for source in sources)
        assert sources[0][:40] == list(range(40))
        assert sorted(sources[0][40:]) == list(range(40))
    assert _index(tensors, "layers.0.ffn.up", 0) != _index(tensors, "layers.1.ffn.up", 0)
    residual = [*range(24), *range(24)]
    for tensor in Model(_config(is_tied=False)).tensors:
        for position, axis in enumerate(tensor.axes):
            if axis.space.size == "hidden_size":
                assert _index(tensors, tensor.name, position) == residual, tensor.name


def test_copied_heads_meet_copies_of_their_key_value_head() -> None:
    """4 query heads in 2 groups, head_dim 6, become 8 in 4: heads 0–3, then 0–3 once more."""
    tensors = _map(Width(init="net2net"), is_tied=False).tensors
    assert _index(tensors, "layers.0.attention.q", 0) == [*range(24), *range(24)]
    assert _index(tensors, "layers.0.attention.o", 1) == [*range(24), *range(24)]
    assert _index(tensors, "layers.0.attention.k", 0) == [*range(12), *range(12)]
    assert _index(tensors, "layers.0.attention.v", 0) == [*range(12), *range(12)]


def _index(tensors: object, name: str, axis: int) -> list[int]:
    factor = tensors[name].axes[axis]  # type: ignore[index]
    return factor.index.tolist()


# Features of other families: same numbers, derived as above.
#
# Gemma: norms have the gain 1 + w, on which their factors act; the embedding is multiplied with
# √(hidden size) by the model, so it writes with σ = √(d/D) = √½ and its gradient takes 1/σ; with
# a tied head, which reads the embedding with that σ, the final norm writes p = 1/(k·σ) = √½ in
# place of ½. Copies of everything doubled: σ·p = √½ and s/σ = ½·√2 = √½.
# q and k write into a norm that shares eps: weight c, gradient p·s/c, and c = 1 for whole copies.
ROOT = sqrt(0.5)
ONCE: Block = [[1.0]]
GEMMA_DOUBLED: dict[str, tuple[Block, Block]] = {
    **{kind: NET2NET_DOUBLED[kind] for kind in NET2NET_DOUBLED if not kind.endswith("bias")},
    "embed": ([[ROOT, ROOT]], [[ROOT, ROOT]]),
    "attention.q_norm": (ONCE, ONCE),
    "attention.k_norm": (ONCE, ONCE),
    "attention_output_norm": ([[1.0], [1.0]], [[0.5], [0.5]]),
    "ffn_output_norm": ([[1.0], [1.0]], [[0.5], [0.5]]),
}
GEMMA_TIED: dict[str, tuple[Block, Block]] = {"final_norm": ([[ROOT], [ROOT]], [[ROOT], [ROOT]])}

# Experts: router and shared gate read the stream and write before a nonlinearity; each expert is
# an FFN with neurons of its own.
EXPERTS_DOUBLED: dict[str, tuple[Block, Block]] = {
    "router": ([[0.5, 0.5]], [[1.0, 1.0]]),
    "shared_expert_gate": ([[0.5, 0.5]], [[1.0, 1.0]]),
    **{f"experts.{kind}": NET2NET_DOUBLED[f"ffn.{kind}"] for kind in ("gate", "up", "down")},
    **{f"shared_expert.{kind}": NET2NET_DOUBLED[f"ffn.{kind}"] for kind in ("gate", "up", "down")},
}

# fresh, everything doubled, old block: k = 1, c = √½, σ = √½; (weight, gradient). With a tied
# head the final norm makes up for the √½ that the head's columns lost: √½·√2 = 1.
GEMMA_FRESH: dict[str, tuple[float, float]] = {
    "embed": (ROOT, 1 / ROOT),
    "attention.q": (ROOT, 1 / ROOT),
    "attention.k": (ROOT, 1 / ROOT),
    "attention_norm": (ROOT, 1 / ROOT),
    "attention_output_norm": (ROOT, 1 / ROOT),
    "ffn_norm": (ROOT, 1 / ROOT),
    "ffn_output_norm": (ROOT, 1 / ROOT),
    "final_norm": (ROOT, 1 / ROOT),
}


def _of_family(model_type: str, *, is_tied: bool) -> Config:
    sizes = {"num_experts": 3, "moe_intermediate_size": 10, "shared_expert_intermediate_size": 14}
    config = {**_config(is_tied=is_tied), "model_type": model_type, "attention_bias": False}
    return {**config, **sizes, "num_experts_per_tok": 2, "head_dim": 6}


def _factors(spec: Width, config: Config) -> Iterator[tuple[str, Tensor, dict[Quantity, Tensor]]]:
    """Yield kind, a tensor of ones and its mapped values without offsets."""
    maps = build_steps(Model(config), [spec], seed=0)[0].parameter_map.tensors
    shapes = Model(config).shapes
    for tensor in Model(config).tensors:
        tensor_map = maps[tensor.name]
        ones = torch.ones(shapes[tensor.name], dtype=torch.float64)
        weight = tensor_map.apply(ones - tensor_map.offset) + tensor_map.offset
        rest = {
            quantity: tensor_map.apply(ones, quantity=quantity)
            for quantity in Quantity
            if quantity is not Quantity.WEIGHT
        }
        kind = re.sub(r"experts\.\d+\.", "experts.", _kind(tensor.name))
        yield kind, ones, {Quantity.WEIGHT: weight, **rest}


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen2_moe"])
def test_other_families_doubled_have_the_factors_of_the_table(
    model_type: str, is_tied: bool
) -> None:
    own = GEMMA_DOUBLED if model_type == "gemma3_text" else NET2NET_DOUBLED | EXPERTS_DOUBLED
    tied = GEMMA_TIED if model_type == "gemma3_text" else TIED
    table, seen = own | (tied if is_tied else UNTIED), set()
    for kind, _, found in _factors(Width(init="net2net"), _of_family(model_type, is_tied=is_tied)):
        seen.add(kind)
        weight, gradient = table[kind]
        expected_weight = _spread(weight, tuple(found[Quantity.WEIGHT].shape))
        expected_gradient = _spread(gradient, tuple(expected_weight.shape))
        for quantity, expected in (
            (Quantity.WEIGHT, expected_weight),
            (Quantity.GRADIENT, expected_gradient),
            (Quantity.SQUARED_GRADIENT, expected_gradient**2),
            (Quantity.PATH_INTEGRAL, expected_weight * expected_gradient),
        ):
            torch.testing.assert_close(
                found[quantity], expected, rtol=1e-12, atol=1e-15, msg=f"{kind}, {quantity}"
            )
    if model_type == "gemma3_text":
        assert seen == set(table)
    else:
        assert set(EXPERTS_DOUBLED) <= seen


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_gemma_fresh_scales_embedding_queries_keys_and_gains(is_tied: bool) -> None:
    for kind, ones, found in _factors(Width(), _of_family("gemma3_text", is_tied=is_tied)):
        weight, gradient = GEMMA_FRESH.get(kind, (1.0, 1.0))
        if kind == "final_norm" and is_tied:
            weight, gradient = 1.0, 1.0
        old = tuple(slice(0, length) for length in ones.shape)
        for quantity, factor in (
            (Quantity.WEIGHT, weight),
            (Quantity.GRADIENT, gradient),
            (Quantity.SQUARED_GRADIENT, gradient**2),
            (Quantity.PATH_INTEGRAL, 1.0),
        ):
            block = found[quantity][old]
            torch.testing.assert_close(block, torch.full_like(block, factor), msg=kind)
        if kind.endswith("norm") and kind not in ("attention.q_norm", "attention.k_norm"):
            filled = found[Quantity.WEIGHT][24:]  # the mean of the old effective gains
            torch.testing.assert_close(filled, torch.full_like(filled, weight), msg=kind)


def test_each_expert_has_neurons_of_its_own() -> None:
    config = _of_family("qwen2_moe", is_tied=False)
    tensors = build_steps(Model(config), [Width(init="net2net")], seed=0)[0].parameter_map.tensors
    for expert in range(3):
        stem = f"layers.0.experts.{expert}."
        gate, up, down = (
            _index(tensors, stem + kind, axis)
            for kind, axis in (("gate", 0), ("up", 0), ("down", 1))
        )
        assert gate == up == down
    copied = [_index(tensors, f"layers.0.experts.{e}.gate", 0)[10:] for e in range(3)]
    assert len({tuple(indices) for indices in copied}) == 3
    assert tensors["layers.0.router"].axes[0] is None
