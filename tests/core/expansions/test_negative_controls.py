"""Wrong maps must fail: otherwise a mistake in both code and tests would go unnoticed.

Each control corrupts a correct map in one entry and asserts that the oracle of
`test_families_exact.py` detects it: in the logits, or in the gradients if the function is still
preserved. The last part is a lower bound on the divergence of clones.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import RMS, generic, tiny
from tests.oracle.qwen3 import tiny_qwen3
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    Layers,
    LlamaPro,
    ResolvedExpansion,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import LogicalTensor, Model, Port
from tritter.core.parameter_map import AxisFactor, AxisMap, TensorMap

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": oracle.tiny_llama,
    "qwen3": tiny_qwen3,
}
SEEN, IDENTITY, GRADIENT = 1e-4, 1e-10, 1e-9


def _step(model: PreTrainedModel, spec: ExpansionSpec) -> ResolvedExpansion:
    return build_steps(Model(oracle_growth.config_of(model)), [spec], seed=0)[0]


def _with_maps(step: ResolvedExpansion, changed: Mapping[str, TensorMap]) -> ResolvedExpansion:
    tensors = {**step.parameter_map.tensors, **changed}
    assert tensors.keys() == step.parameter_map.tensors.keys()
    return replace(step, parameter_map=replace(step.parameter_map, tensors=tensors))


def _with_axis(tensor_map: TensorMap, position: int, factor: AxisFactor) -> TensorMap:
    axes = list(tensor_map.axes)
    axes[position] = factor
    return replace(tensor_map, axes=tuple(axes))


def _permuted(step: ResolvedExpansion, name: str, position: int) -> ResolvedExpansion:
    """Make one axis of one tensor copy its neighbours' sources."""
    tensor_map = step.parameter_map.tensors[name]
    axis = tensor_map.axes[position]
    assert axis is not None
    moved = replace(axis, index=axis.index.roll(1))
    return _with_maps(step, {name: _with_axis(tensor_map, position, moved)})


# A wrong index map

TENSOR_AXES = [
    ("embed", 1),
    ("layers.0.attention_norm", 0),
    ("layers.0.attention.q", 0),
    ("layers.0.attention.q", 1),
    ("layers.0.attention.k", 0),
    ("layers.1.attention.k", 1),
    ("layers.0.attention.v", 0),
    ("layers.1.attention.v", 1),
    ("layers.0.attention.o", 0),
    ("layers.0.attention.o", 1),
    ("layers.2.ffn_norm", 0),
    ("layers.0.ffn.gate", 0),
    ("layers.0.ffn.gate", 1),
    ("layers.1.ffn.up", 0),
    ("layers.1.ffn.up", 1),
    ("layers.2.ffn.down", 0),
    ("layers.2.ffn.down", 1),
    ("final_norm", 0),
    ("head", 1),
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "position"), TENSOR_AXES)
def test_one_permuted_index_is_seen(family: str, name: str, position: int) -> None:
    model = FAMILIES[family]().double()
    for init in ("fresh", "net2net", "zero_pad"):
        step = _step(model, Width(init=init))
        assert oracle_growth.errors(model, [step]).logits < IDENTITY
        assert oracle_growth.errors(model, [_permuted(step, name, position)]).logits > SEEN


OWN_TENSOR_AXES = [
    ("gemma3_text", "embed", 1),
    ("gemma3_text", "layers.0.attention.q", 0),
    ("gemma3_text", "layers.0.attention.o", 0),
    ("gemma3_text", "layers.1.attention_output_norm", 0),
    ("gemma3_text", "layers.1.ffn.down", 0),
    ("gemma3_text", "layers.2.ffn_output_norm", 0),
    ("gemma3_text", "final_norm", 0),
    ("qwen2", "layers.0.attention.q_bias", 0),
    ("qwen2", "layers.0.attention.v_bias", 0),
    ("mixtral", "layers.0.router", 1),
    ("mixtral", "layers.0.experts.1.gate", 0),
    ("mixtral", "layers.0.experts.1.gate", 1),
    ("mixtral", "layers.1.experts.3.up", 0),
    ("mixtral", "layers.1.experts.0.down", 0),
    ("mixtral", "layers.2.experts.2.down", 1),
    ("qwen2_moe", "layers.1.ffn.down", 1),
    ("qwen2_moe", "layers.0.shared_expert.gate", 0),
    ("qwen2_moe", "layers.0.shared_expert.down", 1),
    ("qwen2_moe", "layers.2.shared_expert_gate", 1),
    ("qwen3_moe", "layers.1.router", 1),
    ("qwen3_moe", "layers.1.experts.2.down", 1),
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("family", "name", "position"), OWN_TENSOR_AXES)
def test_one_permuted_index_of_what_only_this_family_has_is_seen(
    family: str, name: str, position: int
) -> None:
    model = tiny(family).double()
    for init in ("fresh", "net2net"):
        step = _step(model, Width(init=init))
        assert oracle_growth.errors(model, [_permuted(step, name, position)]).logits > SEEN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_source_layer_is_seen(family: str) -> None:
    model = FAMILIES[family]().double()
    step = _step(model, LlamaPro(positions=(1,)))
    maps = step.parameter_map.tensors
    wrong = {
        name: replace(maps[name], source=maps[name].source.replace("layers.1", "layers.2"))
        for name in maps
        if name.startswith("layers.1.")
    }
    found = oracle_growth.errors(model, [_with_maps(step, wrong)])
    assert found.logits > SEEN
    assert found.worst_gradient > SEEN


# A copy that is not an identity, or replaces its original

IDENTITIES: list[ExpansionSpec] = [
    Dus(target_layers=4, identity_init=True),
    Stack(identity_init=True),
    Stack(target_layers=5, partial=True, identity_init=True),
    Interpolate(target_layers=4, identity_init=True),
    LlamaPro(positions=(1,)),
    Layers(sources=(0, 2, 1, 2), identity=(1,)),
]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["attention.o", "ffn.down", "attention.o_bias"])
@pytest.mark.parametrize("spec", IDENTITIES, ids=str)
def test_one_output_that_is_not_zeroed_is_seen(family: str, spec: ExpansionSpec, kind: str) -> None:
    model = FAMILIES[family](attention_bias=True).double()
    step = _step(model, spec)
    maps = step.parameter_map.tensors
    (name, *_) = [name for name in maps if name.endswith(kind) and maps[name].is_zeroed]
    forgotten = {name: replace(maps[name], is_zeroed=False)}
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    assert oracle_growth.errors(model, [_with_maps(step, forgotten)]).logits > SEEN


@pytest.mark.parametrize("family", FAMILIES)
def test_original_and_copy_in_each_others_place_are_seen_by_their_gradients(family: str) -> None:
    """The function is the same whichever of two adjacent layers is zero; the state is not."""
    model = FAMILIES[family]().double()
    step = _step(model, Interpolate(target_layers=6, identity_init=True))
    maps = step.parameter_map.tensors
    swapped = {
        name: replace(tensor_map, is_zeroed=not tensor_map.is_zeroed)
        for name, tensor_map in maps.items()
        if name.endswith(("attention.o", "ffn.down"))
    }
    found = oracle_growth.errors(model, [_with_maps(step, swapped)])
    assert found.logits < IDENTITY
    assert found.worst_gradient > SEEN


# A forgotten eps


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic(RMS))
@pytest.mark.parametrize("init", ["fresh", "net2net", "zero_pad"])
def test_an_eps_that_stays_is_seen(family: str, init: str) -> None:
    model = tiny(family, rms_norm_eps=1e-3).double()
    step = _step(model, Width(hidden_size=60, init=init))
    stays = replace(step, target=step.target.changed({**step.target.config, "rms_norm_eps": 1e-3}))
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    assert oracle_growth.errors(model, [stays]).logits > SEEN


def test_head_norms_that_forget_the_shared_eps_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3's q and k must be scaled with eps; at 1e-6 the float32 level would not see it.

    Measured max |Δ logits| / std in float32:

        activations   q, k         eps 1e-3   eps 1e-6
        natural       scaled         6e-6       4e-6
        natural       not scaled     4e-3       6e-6
        small         scaled         8e-7       1e-6
        small         not scaled     9e-2       1e-4
    """
    found = {}
    for scale in ("small", "natural"):
        for eps in (1e-3, 1e-6):
            size = 0.02 if scale == "small" else 0.3
            model = tiny_qwen3(rms_norm_eps=eps, initializer_range=size)
            for is_forgotten in (False, True):
                with monkeypatch.context() as patch:
                    if is_forgotten:
                        patch.setattr(AxisFactor, "writes_into_norm", _forgetful)
                    step = _step(model, Width(hidden_size=46))
                grown = oracle_growth.grown(model, [step])
                error = oracle.relative_difference(model, grown, oracle.tokens())
                found[scale, eps, is_forgotten] = error
    assert max(error for key, error in found.items() if not key[2]) < 1e-5
    assert found["natural", 1e-3, True] > 1e-4
    assert found["small", 1e-3, True] > 1e-2
    assert found["natural", 1e-6, True] < 1e-4


def _forgetful(axis_map: AxisMap, *, scale: float) -> AxisFactor:
    return AxisFactor.writes_nonlinear(axis_map)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_the_float64_level_sees_them_at_either_eps(
    monkeypatch: pytest.MonkeyPatch, eps: float
) -> None:
    model = tiny_qwen3(rms_norm_eps=eps).double()
    right = _step(model, Width(hidden_size=46))
    monkeypatch.setattr(AxisFactor, "writes_into_norm", _forgetful)
    wrong = _step(model, Width(hidden_size=46))
    assert oracle_growth.errors(model, [right]).logits < IDENTITY
    assert oracle_growth.errors(model, [wrong]).logits > 1e3 * IDENTITY


# Gemma's offset and embedding scale


@pytest.mark.full
@pytest.mark.parametrize("init", ["fresh", "net2net"])
def test_gains_that_forget_the_offset_are_seen(init: str) -> None:
    model = tiny("gemma3_text").double()
    step = _step(model, Width(init=init, hidden_size=60))
    maps = step.parameter_map.tensors
    gains = {name: replace(m, offset=0.0) for name, m in maps.items() if m.offset}
    assert len(gains) == 4 * 3 + 1
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    for name, changed in gains.items():
        spoiled = _with_maps(step, {name: changed})
        assert oracle_growth.errors(model, [spoiled]).logits > SEEN, name


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "position", "is_tied"),
    [("embed", 1, False), ("embed", 1, True), ("final_norm", 0, True)],
)
def test_an_embedding_scale_that_is_not_made_up_for_is_seen(
    name: str, position: int, is_tied: bool
) -> None:
    """Without √(d/D) on the embedding, or with a tied head √(D/d) on the last gain."""
    model = tiny("gemma3_text", tie_word_embeddings=is_tied).double()
    step = _step(model, Width(hidden_size=60))
    tensor_map = step.parameter_map.tensors[name]
    axis = tensor_map.axes[position]
    assert axis is not None
    factor = (60 / 24) ** (0.5 if name == "embed" else -0.5)
    forgetful = replace(axis, weight=axis.weight * factor)
    spoiled = _with_maps(step, {name: _with_axis(tensor_map, position, forgetful)})
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    assert oracle_growth.errors(model, [spoiled]).logits > 1e-2


# A scale in front of a nonlinearity


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_a_scaled_router_is_seen(family: str, scale: float) -> None:
    """Its rows are offsets in the log domain: the experts stay, their weights change."""
    model = tiny(family).double()
    step = _step(model, Width(init="net2net"))
    name = "layers.1.router" if family == "qwen3_moe" else "layers.0.router"
    tensor_map = step.parameter_map.tensors[name]
    axis = tensor_map.axes[1]
    assert axis is not None
    scaled = _with_axis(tensor_map, 1, replace(axis, weight=axis.weight * scale))
    assert oracle_growth.errors(model, [_with_maps(step, {name: scaled})]).logits > SEEN


def _scaled_neurons(
    step: ResolvedExpansion, *, gate: Callable[[AxisMap], AxisFactor]
) -> ResolvedExpansion:
    """Write the copied neurons of layer 0 with p = 1.5 and read them back, the gate unscaled."""
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64).repeat_interleave(40)
    neurons = AxisMap.copied(40, [*range(40), *range(40)], shares).rebalanced(scale=1.5)
    changed = {}
    for kind, position, factor in (
        ("gate", 0, gate(neurons)),
        ("up", 0, AxisFactor.writes(neurons)),
        ("down", 1, AxisFactor.reads(neurons)),
    ):
        name = f"layers.0.ffn.{kind}"
        changed[name] = _with_axis(step.parameter_map.tensors[name], position, factor)
    return _with_maps(step, changed)


def test_a_scale_on_up_alone_is_exact_and_the_gate_feels_it_in_its_gradient() -> None:
    """p = 1.5 on `up`: the gate stays unscaled, and its gradient factor is p·s, not s."""
    model = oracle.tiny_llama().double()
    step = _step(model, Width(intermediate_size=80, init="net2net"))
    right = _scaled_neurons(step, gate=AxisFactor.writes_nonlinear)
    found = oracle_growth.errors(model, [right])
    assert found.logits < IDENTITY
    assert found.worst_gradient < GRADIENT


def test_a_scale_on_the_gate_is_seen() -> None:
    model = oracle.tiny_llama().double()
    step = _step(model, Width(intermediate_size=80, init="net2net"))
    wrong = _scaled_neurons(step, gate=AxisFactor.writes)
    assert oracle_growth.errors(model, [wrong]).logits > 1e-2


def test_a_gate_gradient_without_the_scale_is_seen() -> None:
    def forgets_scale(axis_map: AxisMap) -> AxisFactor:
        kept = (axis_map.source >= 0).double()
        return AxisFactor(axis_map.source, kept, axis_map.share)

    model = oracle.tiny_llama().double()
    step = _step(model, Width(intermediate_size=80, init="net2net"))
    found = oracle_growth.errors(model, [_scaled_neurons(step, gate=forgets_scale)])
    assert found.logits < IDENTITY
    wrong = {name for name, error in found.gradients.items() if error > 1e-3}
    assert wrong == {"model.layers.0.mlp.gate_proj.weight"}


# Shares that preserve the function but not the moments


def _rewired(
    model: PreTrainedModel,
    step: ResolvedExpansion,
    maps: Callable[[LogicalTensor, int], AxisMap | None],
) -> ResolvedExpansion:
    """Rebuild the factors of every axis for which `maps` names another axis map."""
    config = step.source.config
    changed = {}
    for tensor in Model(config).tensors:
        tensor_map = step.parameter_map.tensors[tensor.name]
        for position, axis in enumerate(tensor.axes):
            axis_map = maps(tensor, position)
            if axis_map is None:
                continue
            match axis.port:
                case Port.WRITE | Port.WRITE_SCALED:
                    factor = AxisFactor.writes(axis_map)
                case Port.WRITE_NONLINEAR | Port.ABSORBED:
                    factor = AxisFactor.writes_nonlinear(axis_map)
                case Port.READ:
                    factor = AxisFactor.reads(axis_map)
                case Port.GAIN:
                    factor = AxisFactor.gain(axis_map, rms_ratio=1.0)
            tensor_map = _with_axis(tensor_map, position, factor)
        changed[tensor.name] = tensor_map
    return _with_maps(step, changed)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_residual_shares_keep_the_function_and_break_the_gradient(family: str) -> None:
    model = FAMILIES[family]().double()
    size = int(model.config.hidden_size)
    step = _step(model, Width(init="net2net"))

    def residual(first: float) -> Callable[[LogicalTensor, int], AxisMap | None]:
        shares = torch.tensor([first, 1 - first], dtype=torch.float64).repeat_interleave(size)
        stream = AxisMap.copied(size, [*range(size), *range(size)], shares)

        def choose(tensor: LogicalTensor, position: int) -> AxisMap | None:
            return stream if tensor.axes[position].space.size == "hidden_size" else None

        return choose

    equal = oracle_growth.errors(model, [_rewired(model, step, residual(0.5))])
    unequal = oracle_growth.errors(model, [_rewired(model, step, residual(0.9))])
    assert (equal.logits < IDENTITY, unequal.logits < IDENTITY) == (True, True)
    assert equal.worst_gradient < GRADIENT
    assert unequal.worst_gradient > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_that_differ_within_a_group_break_the_gradient_of_k_and_v(family: str) -> None:
    """4 query heads in 2 groups become 8 in 4; the two heads of a group get .9 and .6."""
    model = FAMILIES[family]().double()
    step = _step(model, Width(num_attention_heads=8, num_key_value_heads=4, init="net2net"))
    heads = torch.tensor([0.9, 0.6, 0.9, 0.6, 0.1, 0.4, 0.1, 0.4], dtype=torch.float64)
    queries = AxisMap.copied(4, [0, 1, 2, 3, 0, 1, 2, 3], heads).repeated(6)
    changed = {}
    for layer in range(3):
        name = f"layers.{layer}.attention.o"
        tensor_map = step.parameter_map.tensors[name]
        changed[name] = _with_axis(tensor_map, 1, AxisFactor.reads(queries))
    found = oracle_growth.errors(model, [_with_maps(step, changed)])
    assert found.logits < IDENTITY
    wrong = {name.split(".")[-2] for name, error in found.gradients.items() if error > 1e-2}
    assert {"k_proj", "v_proj"} <= wrong


# Clones

CLONES = {
    "ffn": ("layers.0.ffn.gate", 0),
    "heads": ("layers.0.attention.q", 0),
    "residual": ("embed", 1),
}


def _with_shares(step: ResolvedExpansion, first: float) -> ResolvedExpansion:
    """Give the copies of every neuron of layer 0 the shares `first` and 1 − `first`."""
    shares = torch.tensor([first, 1 - first], dtype=torch.float64).repeat_interleave(40)
    source = step.parameter_map.tensors["layers.0.ffn.gate"].axes[0]
    assert source is not None
    neurons = AxisMap.copied(40, source.index, shares)
    name = "layers.0.ffn.down"
    down = _with_axis(step.parameter_map.tensors[name], 1, AxisFactor.reads(neurons))
    return _with_maps(step, {name: down})


def _gaps(model: PreTrainedModel, step: ResolvedExpansion) -> dict[str, float]:
    """Return by space |second copy − first copy| / |first copy|."""
    state, found = oracle_growth.logical_state(model), {}
    for space, (name, dimension) in CLONES.items():
        axis = step.parameter_map.tensors[name].axes[dimension]
        assert axis is not None
        size = axis.index.numel() // 2
        first = state[name].index_select(dimension, axis.index[size:])
        second = state[name].narrow(dimension, size, size)
        found[space] = float((second - first).norm() / first.norm())
    return found


def _gaps_after_training(step: ResolvedExpansion, model: PreTrainedModel) -> dict[str, float]:
    grown = oracle_growth.grown(model, [step])
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    for number in range(300):
        oracle.gradients(grown, oracle.tokens(batch=4, seed=number % 20))
        optimizer.step()
    return _gaps(grown, step)


@pytest.mark.full
def test_clones_diverge_by_unequal_shares_or_noise_and_not_otherwise() -> None:
    """A doubled one-layer Llama after 300 steps of AdamW at 1e-3: gap between the copies.

        shares                              FFN    heads   residual
        .5/.5                               0      0       0
        .6/.4 in the FFN                    0.18   0       0
        .7/.3 in the FFN                    0.36   0       0
        .9/.1 in FFN and heads, default     0.72   0.85    0
        .5/.5 with 1 % noise                0.06   0.08    0.02
          (at step 0)                       0.025  0.025   0.010

    The shares of the residual stream are always equal (its moments could not follow otherwise),
    so without noise its copies never diverge; `fresh` and `zero_pad` make none.
    """
    model = oracle.tiny_llama(initializer_range=0.1, num_hidden_layers=1)
    equal = _step(model, Width(init="net2net", shares="equal"))
    noisy = _step(model, Width(init="net2net", shares="equal", noise=0.01))
    steps = {
        "equal": equal,
        ".6/.4": _with_shares(equal, 0.6),
        ".7/.3": _with_shares(equal, 0.7),
        ".9/.1": _step(model, Width(init="net2net")),
        "noise": noisy,
    }
    gaps = {name: _gaps_after_training(step, model) for name, step in steps.items()}
    start = _gaps(oracle_growth.grown(model, [noisy]), noisy)
    assert max(gaps["equal"].values()) < 1e-6
    assert 0.05 < gaps[".6/.4"]["ffn"] < gaps[".7/.3"]["ffn"] < gaps[".9/.1"]["ffn"]
    assert gaps[".9/.1"]["ffn"] > 0.3
    assert gaps[".9/.1"]["heads"] > 0.3
    assert gaps[".6/.4"]["heads"] < 1e-6
    assert all(gaps[name]["residual"] < 1e-6 for name in gaps if name != "noise")
    assert all(gaps["noise"][space] > 1.3 * start[space] for space in CLONES)
