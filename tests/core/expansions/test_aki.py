"""AKI (bert2BERT): further copies take their weights from the layer above, their readers do not.

Every number is compared with stock tensors by plain indexing, without our maps.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import generic, tiny
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import Width, build_steps
from tritter.core.expansions.width import _tensors_above
from tritter.core.families import Model
from tritter.core.parameter_map.carry import STATE_KINDS
from tritter.storage.tensors import TensorHeader
from tritter.storage.writer import TensorStream
from tritter.transform import expand

EQUAL = Width(init="aki", shares="equal")


def _grown(family: str = "llama") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's tensors before and after doubling all sizes with equal shares."""
    model = tiny(family)
    steps = build_steps(Model(oracle_growth.config_of(model)), [EQUAL], seed=0)
    return oracle_growth.logical_state(model), oracle_growth.logical_state(
        oracle_growth.grown(model, steps)
    )


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("attention.q", 24), ("attention.k", 12), ("attention.v", 12)],
)
def test_new_heads_are_those_of_the_layer_above(kind: str, rows: int) -> None:
    before, after = _grown()
    for layer, above in ((0, 1), (1, 2), (2, 2)):  # the last layer copies itself
        own, other = before[f"layers.{layer}.{kind}"], before[f"layers.{above}.{kind}"]
        grown = after[f"layers.{layer}.{kind}"]
        # Consumers of the doubled residual stream are halved, regardless of the layer of their rows
        torch.testing.assert_close(grown[:rows], torch.cat([own, own], dim=1) / 2)
        torch.testing.assert_close(grown[rows:], torch.cat([other, other], dim=1) / 2)


def test_new_neurons_and_directions_are_those_of_the_layer_above() -> None:
    before, after = _grown()
    down, above = before["layers.0.ffn.down"], before["layers.1.ffn.down"]
    gate = before["layers.1.ffn.gate"]
    new_gate, new_down = after["layers.0.ffn.gate"][40:], after["layers.0.ffn.down"]
    copied = torch.cdist(2 * new_gate[:, :24], gate).argmin(dim=1)  # the source neuron of each
    assert sorted(copied.tolist()) == list(range(40))
    torch.testing.assert_close(new_gate[:, :24] * 2, gate[copied])
    # Columns come from the same layer: each copied neuron is read like its source
    torch.testing.assert_close(new_down[:24, :40] * 2, down)
    torch.testing.assert_close(new_down[:24, 40:] * 2, down[:, copied])
    torch.testing.assert_close(new_down[24:, :40] * 2, above)


def test_what_has_no_layer_above_grows_as_under_net2net() -> None:
    model = tiny("llama")
    config = oracle_growth.config_of(model)
    (aki,) = build_steps(Model(config), [EQUAL], seed=0)
    (plain,) = build_steps(Model(config), [Width(init="net2net", shares="equal")], seed=0)
    after = {}
    for step in (aki, plain):
        after[step] = oracle_growth.logical_state(oracle_growth.grown(model, [step]))
    own = [name for name in after[plain] if torch.equal(after[plain][name], after[aki][name])]
    norms = {f"layers.{layer}.{kind}_norm" for layer in (0, 1) for kind in ("attention", "ffn")}
    of_last = {name for name in after[plain] if name.startswith("layers.2.")}
    assert set(own) == {"embed", "final_norm", "head", *norms, *of_last}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic())
def test_it_changes_the_function_and_says_so(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    assert not EQUAL.is_exact
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [EQUAL])
    assert not result.lineage.expansion_history[-1].claims_exact
    after = oracle.stock(result.folder)
    assert oracle.relative_difference(model, after, oracle.tokens()) > 1e-2
    (one,) = build_steps(
        Model(oracle_growth.config_of(tiny(family, num_hidden_layers=1))), [EQUAL], seed=0
    )
    assert oracle_growth.errors(tiny(family, num_hidden_layers=1).double(), [one]).logits < 1e-10


def test_layers_of_the_same_kind_give_to_each_other() -> None:
    """Qwen2-MoE with a dense layer 1: layer 0 copies experts of layer 2; the FFN has no donor."""
    model = tiny("qwen2_moe")
    config = oracle_growth.config_of(model)
    above = _tensors_above(Model(config).tensors)
    assert above["layers.0.experts.3.gate"] == "layers.2.experts.3.gate"
    assert above["layers.0.attention.q"] == "layers.1.attention.q"
    assert "layers.1.ffn.gate" not in above
    assert "layers.2.experts.3.gate" not in above
    assert "embed" not in above


def test_state_of_what_came_from_above_starts_anew() -> None:
    model = tiny("llama")
    (step,) = build_steps(Model(oracle_growth.config_of(model)), [EQUAL], seed=0)
    tensor_map = step.parameter_map.tensors["layers.0.attention.q"]
    moment = torch.rand(24, 24) + 1
    first, second = (
        STATE_KINDS[kind].mapped(tensor_map, lambda _: moment) for kind in ("exp_avg", "exp_avg_sq")
    )
    assert not first[24:].any()
    torch.testing.assert_close(first[:24], torch.cat([moment, moment], dim=1) / 2)
    torch.testing.assert_close(second[24:], second[:24].mean().expand(24, 48))
    mask = tensor_map.carried_mask(lambda _: torch.ones(24, 24, dtype=torch.bool))
    assert bool(mask[:24].all()) and not bool(mask[24:].any())


def test_anchors_follow_the_weights_from_above(tmp_path: Path) -> None:
    """State of kind `as_weights` is mapped like weights, donors included."""
    model = tiny("llama")
    source = oracle.saved(model, tmp_path / "source")
    state = {name: p.detach() for name, p in model.named_parameters()}

    def stream() -> TensorStream:
        entries = tuple(TensorHeader.of(n, p.dtype, tuple(p.shape)) for n, p in state.items())
        return TensorStream(entries, iter(state.items()))

    write_state(source, {"anchor": stream()}, step=3, max_shard_bytes=10**9)
    result = expand(source, tmp_path / "result", [EQUAL])
    stored_state = State.read(result.folder)
    assert stored_state is not None
    weights = oracle.stock(result.folder).state_dict()
    for name in state:
        assert torch.equal(stored_state.kinds["anchor"].get(name), weights[name]), name
