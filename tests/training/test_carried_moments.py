"""Moments through an expansion: on a live optimizer, on files, and against a second training."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import oracle
from tests.oracle.families import tiny
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import Dus, ExpansionSpec, Layers, LlamaPro, Width
from tritter.core.parameter_map.carry import BUILT_IN_KINDS
from tritter.errors import TritterError
from tritter.storage.writer import TensorStream
from tritter.training.parameters import live_layout
from tritter.training.surgery import _moments_by_name, carried_moments, put_moments
from tritter.transform import expand, plan_expansion

SPECS: dict[str, list[ExpansionSpec]] = {
    "fresh": [Width()],
    "net2net": [Width(init="net2net")],
    "zero_pad": [Width(init="zero_pad", hidden_size=36)],
    "llama_pro": [LlamaPro()],
    "layers": [Layers(sources=(2, 0, 1, 2, 0), identity=(0, 4)), Width(init="net2net")],
    "both": [Dus(identity_init=True), Width(init="net2net")],
}


def with_moments(model: nn.Module, *, steps: int = 3) -> torch.optim.AdamW:
    """Return an optimizer that saw some batches and, at rate 0, moved nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    for step in range(steps):
        oracle.gradients(model, oracle.tokens(seed=step))
        optimizer.step()
    return optimizer


def transplanted(
    folder: Path,
    specs: list[ExpansionSpec],
    *,
    family: str = "llama",
    policy: str = "carry",
    tied: bool = False,
) -> tuple[nn.Module, torch.optim.AdamW]:
    """Return the expanded model and an optimizer that was given the old one's moments."""
    model = oracle.tiny_llama if family == "llama" else partial(tiny, family)
    source = oracle.saved(model(tie_word_embeddings=tied).double(), folder / "source")
    old = oracle.stock(source, torch.float64)
    optimizer = with_moments(old)
    plan = plan_expansion(source, specs)
    new = oracle.stock(expand(source, folder / "result", specs).folder, torch.float64)
    own = torch.optim.AdamW(new.parameters(), lr=0.0, betas=(0.9, 0.95))
    change = plan.change
    moments = carried_moments(optimizer, old, change, stored_tensors=change.after, policy=policy)  # type: ignore[arg-type]
    for name, values in moments.items():
        put_moments(own, new.get_parameter(name), values)
    return new, own


CASES = [("llama", name, is_tied) for name in SPECS for is_tied in (False, True)]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("family", "name", "tied"), [*CASES, ("phi3", "both", False), ("olmo2", "net2net", False)]
)
def test_carried_moments_are_those_the_expanded_model_would_have(
    tmp_path: Path, family: str, name: str, tied: bool
) -> None:
    """Both models see the same batches at rate 0; nothing of ours computes the second one."""
    with oracle.float64_casts():
        model, own = transplanted(tmp_path, SPECS[name], family=family, tied=tied)
        other = with_moments(model)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter not in own.state:
            continue
        carried, seen = own.state[parameter], other.state[parameter]
        assert int(carried["step"]) == 3
        # New entries: the first moment starts at zero and the second at the mean of the others
        is_old = carried["exp_avg"] != 0
        for kind in ("exp_avg", "exp_avg_sq"):
            scale = seen[kind].abs().max()
            assert float((carried[kind] - seen[kind])[is_old].abs().max() / scale) < 1e-9, name
        compared += int(is_old.sum())
    assert compared > 10_000


def test_policies(tmp_path: Path) -> None:
    specs = [Width(init="net2net", intermediate_size=80)]
    name = "model.layers.0.mlp.gate_proj.weight"
    states = {}
    for policy in ("carry", "reset_new", "zero"):
        model, own = transplanted(tmp_path / policy, specs, policy=policy)
        states[policy] = own.state.get(model.get_parameter(name))
    carried, reset = states["carry"], states["reset_new"]
    assert states["zero"] is None and carried is not None and reset is not None
    assert torch.equal(carried["exp_avg"][:40], reset["exp_avg"][:40])
    assert bool((carried["exp_avg"][40:] != 0).any()) and not bool(reset["exp_avg"][40:].any())
    mean = reset["exp_avg_sq"][:40].mean()
    torch.testing.assert_close(reset["exp_avg_sq"][40:], mean.expand(40, 24))


def test_moments_of_plain_layers_are_those_of_their_source(tmp_path: Path) -> None:
    """Layer 1 is dropped; layer 1 of the result is an identity."""
    table = Layers(sources=(2, 0, 0, 2), identity=(1,))
    model, own = transplanted(tmp_path, [table])
    source = oracle.stock(tmp_path / "source", torch.float64)
    old = with_moments(source)
    for name, parameter in model.named_parameters():
        if ".layers." not in name:
            continue
        layer = int(name.split(".")[2])
        origin = name.replace(f".{layer}.", f".{table.sources[layer]}.", 1)  # type: ignore[index]
        assert (parameter in own.state) == (layer != 1)
        for kind in ("exp_avg", "exp_avg_sq") if layer != 1 else ():
            expected = old.state[source.get_parameter(origin)][kind]
            assert torch.equal(own.state[parameter][kind], expected)


def test_a_block_that_starts_anew_has_no_state(tmp_path: Path) -> None:
    model, own = transplanted(tmp_path, [LlamaPro()])
    held = {name.split(".")[2] for name, p in model.named_parameters() if p in own.state
            and "layers" in name}  # fmt: skip
    assert held == {"0", "1", "3"}  # layers from 0 1 1 2 2


def test_new_rows_do_not_leap(tmp_path: Path) -> None:
    """Ten steps at rate 1e-3: no entry may move much more than the rate times the steps."""
    model, own = transplanted(tmp_path, [Width(intermediate_size=80)])
    for group in own.param_groups:
        group["lr"], group["weight_decay"] = 1e-3, 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(10):
        oracle.gradients(model, oracle.tokens(seed=50 + step))
        own.step()
    for name, parameter in model.named_parameters():
        assert float((parameter - before[name]).detach().abs().max()) < 1.6e-2, name


def test_another_optimizer_is_refused() -> None:
    model = oracle.tiny_llama()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    oracle.gradients(model, oracle.tokens())
    sgd.step()
    with pytest.raises(TritterError, match="moments of Adam"):
        _moments_by_name(sgd, model, live_layout(model))


@pytest.mark.full
def test_state_on_files_follows_as_on_a_live_optimizer(tmp_path: Path) -> None:
    specs = [Width(init="net2net"), LlamaPro()]
    with oracle.float64_casts():
        model, own = transplanted(tmp_path, specs)
        old = oracle.stock(tmp_path / "source", torch.float64)
        optimizer = with_moments(old)
    weights = dict(old.named_parameters())
    kinds = {
        kind: TensorStream.of((n, optimizer.state[p][kind]) for n, p in weights.items())
        for kind in ("exp_avg", "exp_avg_sq")
    }
    squares = [(name, optimizer.state[p]["exp_avg_sq"]) for name, p in weights.items()]
    kinds["fisher"] = TensorStream.of(squares)
    for kind in ("online_fisher", "online_fisher_mean", "path_integral", "displacement"):
        kinds[kind] = TensorStream.of(squares)
    kinds["anchor"] = TensorStream.of((n, p.detach()) for n, p in weights.items())
    kinds["ema"] = kinds["anchor"]
    priced = {"fisher_penalty", "online_fisher_penalty", "online_fisher_penalty_mean"}
    assert set(kinds) == BUILT_IN_KINDS - priced - {"si_importance"}
    write_state(tmp_path / "source", kinds, step=3)
    result = expand(tmp_path / "source", tmp_path / "with_state", specs, max_shard_bytes=20_000)
    state = State.read(result.folder)
    assert state is not None and state.step == 3 and set(state.kinds) == set(kinds)
    held = {kind: dict(folder) for kind, folder in state.kinds.items()}
    for name, parameter in model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            if parameter in own.state:
                assert torch.equal(held[kind][name], own.state[parameter][kind]), (kind, name)
            else:
                assert name not in held[kind]
    grown = dict(oracle.stock(result.folder, torch.float64).named_parameters())
    for name, anchor in held["anchor"].items():
        torch.testing.assert_close(anchor, grown[name])
    for name, fisher in held["fisher"].items():
        new = held["exp_avg_sq"][name]
        is_carried = fisher != 0
        assert torch.equal(fisher[is_carried], new[is_carried])
    assert {"state/state.json", "state/anchor/model.safetensors.index.json"} <= set(
        result.lineage.file_digests
    )


def test_si_factor_is_gradient_factor_times_weight_factor(tmp_path: Path) -> None:
    """ω = gradient × step: for a copy of share .1 that is written in full, a tenth."""
    model = oracle.tiny_llama()
    source = oracle.saved(model, tmp_path / "source")
    ones = TensorStream.of((name, torch.ones_like(p)) for name, p in model.named_parameters())
    write_state(source, {"path_integral": ones}, step=1)
    spec = Width(init="net2net", intermediate_size=80)
    result = expand(source, tmp_path / "result", [spec])
    omega = load_file(result.folder / "state/path_integral/model.safetensors")
    gate = omega["model.layers.0.mlp.gate_proj.weight"]
    assert sorted({round(v, 6) for v in gate.unique().tolist()}) == [0.1, 0.9]
    assert float(gate.sum()) == pytest.approx(40 * 24, rel=1e-6)
    torch.testing.assert_close(omega["model.layers.0.mlp.down_proj.weight"][0], gate[:, 0])
