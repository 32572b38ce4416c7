"""Experts added, widened and removed during training: others keep weights and moments."""

from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor

from tests import oracle
from tests.methods.experts.mixtures import TARGETS, mixture_of
from tests.training.test_surgery import train
from tritter.checkpoints.expert_files import AdapterShape
from tritter.errors import RequestError
from tritter.methods.experts.mixture import ExpertMixture
from tritter.training import surgery

AT = 6


class Event(Callback):
    """Change a mixture after a step, and record the state before, after and at the end."""

    def __init__(self, mixture: ExpertMixture) -> None:
        self.mixture = mixture
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self.logits: list[Tensor] = []

    def change(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step != AT:
            return
        self.logits.append(oracle.logits(pl_module.model, oracle.tokens()))
        self.before = held(trainer, pl_module.model)
        self.change(trainer, pl_module)
        self.after = held(trainer, pl_module.model)
        self.logits.append(oracle.logits(pl_module.model, oracle.tokens()))
        pl_module.model.train()


class Spawn(Event):
    def change(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        self.mixture.open("new", AdapterShape(5, 10.0, TARGETS), seed=7)
        surgery.apply(trainer, module, self.mixture.spawn_change("new"), reason="spawn")


class Evict(Event):
    def change(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        surgery.apply(trainer, module, self.mixture.evict_change("e1"), reason="evict")
        self.mixture.close("e1")


class Widen(Event):
    def change(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        change = self.mixture.widen_change("e1", 8, seed=3)
        surgery.apply(trainer, module, change, reason="rank")
        self.mixture.lora.set_rank("e1", 8)


def held(trainer, model) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Weights and moments of trained parameters, by name."""
    (optimizer,) = trainer.optimizers
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {kind}"] = value.clone()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor], *parts: str) -> int:
    """Return the number of entries of these parts, which are all bit-identical."""
    names = [name for name in one if any(part in name for part in parts)]
    assert all(torch.equal(one[name], other[name]) for name in names)
    return len(names)


def trained(event: Event, tmp_path: Path) -> dict[str, Tensor]:
    train(tmp_path, event, model=event.mixture.model)
    return {n: p.detach() for n, p in event.mixture.model.named_parameters()}


def test_a_new_expert_is_trained_and_the_old_ones_go_on(tmp_path: Path) -> None:
    event = Spawn(mixture_of())
    end = trained(event, tmp_path)
    assert event.mixture.names == ["e0", "e1", "e2", "new"]
    assert same(event.before, event.after, ".e0.", ".e1.", ".e2.") == 4 * (6 + 6 + 2) * 3
    assert same(event.before, end, "base_layer", "embed_tokens", "norm") > 9
    own = event.mixture.lora.parameters("new")
    assert len(own) == 2 * 3 * 3
    for name in own:
        assert not torch.equal(event.after[name], end[name])
        assert f"{name} exp_avg" not in event.after
    for router in event.mixture.router_names():
        weight, bias = f"{router}.weight", f"{router}.bias"
        assert torch.equal(event.after[weight][:3], event.before[weight])
        assert not event.after[weight][3].any() and event.after[bias][3] == 0
        assert torch.equal(event.after[f"{weight} exp_avg"][:3], event.before[f"{weight} exp_avg"])
        second = event.after[f"{weight} exp_avg_sq"][3]
        assert torch.allclose(second, event.before[f"{weight} exp_avg_sq"].mean())
        assert not torch.equal(end[weight], event.after[weight])


@pytest.mark.full
def test_one_goes_and_its_state_with_it(tmp_path: Path) -> None:
    event = Evict(mixture_of())
    end = trained(event, tmp_path)
    assert event.mixture.names == ["e0", "e2"]
    assert not any(".e1." in name for name in end)
    assert same(event.after, event.before, ".e0.", ".e2.") == 4 * (6 + 2) * 3
    for router in event.mixture.router_names():
        for key in (f"{router}.weight", f"{router}.weight exp_avg", f"{router}.bias"):
            assert torch.equal(event.after[key], event.before[key][[0, 2]])
    with pytest.raises(RequestError, match=r"no expert e1; the experts are e0, e2"):
        event.mixture.evict_change("e1")


def test_a_doubled_rank_keeps_function_moments_and_scale(tmp_path: Path) -> None:
    event = Widen(mixture_of(oracle.tiny_llama().double()))
    before = event.mixture.lora.shape("e1")
    end = trained(event, tmp_path)
    assert (event.logits[0] - event.logits[1]).abs().max() < 1e-10
    assert same(event.before, event.after, ".e0.", ".e2.", "expert_router") > 0
    after = event.mixture.lora.shape("e1")
    assert (after.rank, after.scaling) == (8, before.scaling)
    for name, layer in event.mixture.lora:
        if "e1" not in layer.lora_A:
            continue
        assert layer.r["e1"] == 8 and layer.scaling["e1"] == before.scaling
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            key = f"{name}.{part}.e1.weight"
            grown, old = event.after[key], event.before[key]
            assert torch.equal(grown.narrow(dim, 0, 4), old)
            new = grown.narrow(dim, 4, 4)
            assert (new == 0).all() if part == "lora_B" else (new != 0).all()
            for kind in ("exp_avg", "exp_avg_sq"):
                moments = event.after[f"{key} {kind}"].narrow(dim, 0, 4)
                assert torch.equal(moments, event.before[f"{key} {kind}"])
            assert (end[key].narrow(dim, 4, 4) != new).any()
    with pytest.raises(RequestError, match="already has rank 8; the new rank 8 must be larger"):
        event.mixture.widen_change("e1", 8, seed=0)
