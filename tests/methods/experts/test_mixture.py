"""A mixture on stock models: matches PEFT, per token and causal, chosen experts only."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.experts.mixtures import TARGETS, mixture_of
from tests.oracle import tiny_llama, tokens
from tests.oracle.families import tiny
from tritter.checkpoints.expert_files import AdapterShape
from tritter.errors import RequestError
from tritter.methods.experts.adapters import Factors
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import ExpertMixture, mixture_on

MODES = [Routing(), Routing(top_k=2), Routing(top_k=1), Routing(top_k=2, temperature=0.5)]


@torch.no_grad()
def logits(mixture: ExpertMixture, ids: torch.Tensor) -> torch.Tensor:
    return mixture.model(input_ids=ids, use_cache=False).logits


def with_deltas(layer: LoraLayer, x: torch.Tensor, gates: torch.Tensor, names: list[str]):
    """Add up the experts one by one."""
    out = layer.get_base_layer()(x)
    for number, name in enumerate(names):
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            out = out + gates[..., number : number + 1] * layer.scaling[name] * (x @ a.T @ b.T)
    return out


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("is_shared", [False, True])
def test_every_layer_adds_the_experts_by_their_gates(routing: Routing, is_shared: bool) -> None:
    mixture = mixture_of(is_shared=is_shared)
    mixture.routing = routing
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = dict(mixture.lora)
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    logits(mixture, tokens())
    assert len(seen) == 9 and len(mixture.gates()) == 3
    assert len(list(mixture.routers())) == (1 if is_shared else 3)
    for name, (x, out) in seen.items():
        gates = mixture.gates()[int(name.split(".")[2])].weights
        expected = with_deltas(layers[name], x, gates, mixture.names)
        assert (out - expected).abs().max() < 1e-5 * out.abs().max()


def test_a_new_expert_changes_nothing_and_alone_it_is_pefts() -> None:
    plain = tiny_llama()
    base = copy.deepcopy(plain)
    mixture = ExpertMixture(plain)
    mixture.add("first", AdapterShape(4, 8.0, TARGETS), seed=0)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(logits(mixture, ids), base(input_ids=ids).logits)
    mixture = mixture_of()
    logits(mixture, ids)
    assert len(mixture.gates()) == 3
    with mixture.only("e1"):
        own = logits(mixture, ids)
    assert all(bool((gates.weights[..., 1] == 1).all()) for gates in mixture.gates())
    stock = copy.deepcopy(mixture.model)
    for module in stock.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, LoraLayer):
            module.set_adapter(["e1"])
    with torch.no_grad():
        assert (stock(input_ids=ids).logits - own).abs().max() < 1e-5 * own.abs().max()
        assert (own - base(input_ids=ids).logits).abs().max() > 0.1
    with mixture.off(), torch.no_grad():
        assert torch.equal(logits(mixture, ids), base(input_ids=ids).logits)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("is_training", [False, True])
def test_a_later_token_changes_no_earlier_logit(routing: Routing, is_training: bool) -> None:
    mixture = mixture_of()
    mixture.routing = Routing(
        top_k=routing.top_k, temperature=routing.temperature, capacity_factor=0.5
    )
    mixture.model.double().train(is_training)
    ids = tokens(length=12)
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 97
    change = (logits(mixture, ids) - logits(mixture, other)).abs()
    assert change[:, :7].max() < 1e-12  # products of other sizes have other rounding errors
    assert change[:, 7:].max() > 0.1


def test_only_the_chosen_compute() -> None:
    """The FLOPs of the experts are those of the choices, counted by torch."""
    ids = tokens(batch=2, length=16)

    def flops(routing: Routing) -> int:
        mixture = mixture_of(ranks=(4, 4, 4, 4), targets=[TARGETS] * 4)
        mixture.routing = routing
        with FlopCounterMode(display=False) as counter:
            logits(mixture, ids)
        with mixture.off(), FlopCounterMode(display=False) as base:
            logits(mixture, ids)
        routers = 3 * 2 * ids.numel() * 24 * 4
        return counter.get_total_flops() - base.get_total_flops() - routers

    dense, two, one = (flops(Routing(top_k=k)) for k in (None, 2, 1))
    assert dense == 4 * one and two == 2 * one and one > 0


def test_choices_are_each_computed_once() -> None:
    mixture = mixture_of()
    mixture.routing = Routing(top_k=2)
    logits(mixture, tokens())
    for gates in mixture.gates():
        assert gates._tokens is not None and gates.chosen is not None
        chosen = gates.chosen.flatten(0, -2)
        assert len(gates._tokens) == chosen.shape[1]
        for number, own in enumerate(gates._tokens):
            assert own.tolist() == chosen[:, number].nonzero()[:, 0].tolist()


class LargestOutput(TorchDispatchMode):
    """Records the largest number of rows of a tensor with `width` columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.width,):
            self.rows = max(self.rows, result.numel() // self.width)
        return result


def test_chosen_experts_never_have_a_row_of_the_output_for_each_choice() -> None:
    """Two of three experts per token: a head of 1,000 tokens would have 2 · 40 rows."""
    parts = {n: Factors(torch.randn(2, 6), torch.randn(1000, 2), 1.0) for n in range(3)}
    inputs = torch.randn(1, 40, 6)
    gates = Routing(top_k=2).gates(torch.randn(1, 40, 3))
    with LargestOutput(1000) as largest:
        found = gates.output(inputs, parts)
    assert largest.rows == 40
    expected = sum(gates.weights[..., [n]] * (inputs @ parts[n].delta().T) for n in parts)
    torch.testing.assert_close(found, expected)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_families_train_experts_and_routers_alone(family: str, checkpointing: bool) -> None:
    mixture = mixture_of(tiny(family), targets=[("q_proj", "v_proj")] * 3)
    if checkpointing:
        mixture.model.gradient_checkpointing_enable()
    mixture.routing = Routing(top_k=2)
    ids = tokens(vocab_size=64)
    gradients = []
    for _ in range(2):
        mixture.model.train().zero_grad()
        mixture.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in mixture.model.named_parameters()})
    trained = {name for name, gradient in gradients[0].items() if gradient is not None}
    assert all("lora_" in name or "expert_router" in name for name in trained)
    assert any("expert_router" in n for n in trained) and any("lora_A" in n for n in trained)
    for name in trained:
        assert torch.equal(gradients[0][name], gradients[1][name])


def test_checkpointing_gives_the_gradients_of_none() -> None:
    ids, found = tokens(), []
    for is_on in (False, True):
        mixture = mixture_of()
        if is_on:
            mixture.model.gradient_checkpointing_enable()
        mixture.routing = Routing(top_k=2)
        mixture.model.train()
        mixture.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in mixture.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_generating_with_a_cache_is_reading_again() -> None:
    mixture = mixture_of()
    mixture.routing = Routing(top_k=2)
    ids = tokens(batch=2, length=5)
    cached, plain = (
        mixture.model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=is_on)
        for is_on in (True, False)
    )
    assert torch.equal(cached, plain)


def test_an_expert_goes_with_its_rows() -> None:
    mixture = mixture_of()
    routers = [router.weight.detach().clone() for router in mixture.routers()]
    kept = {n: p.detach().clone() for n, p in mixture.lora.parameters("e2").items()}
    mixture.remove("e1")
    assert mixture.names == ["e0", "e2"]
    for before, router in zip(routers, mixture.routers(), strict=True):
        assert torch.equal(router.weight, before[[0, 2]])
    assert all(torch.equal(p, kept[n]) for n, p in mixture.lora.parameters("e2").items())
    assert mixture.lora.parameters("e1") == {}
    assert logits(mixture, tokens()).isfinite().all()
    mixture.remove("e0")
    with pytest.raises(RequestError, match="the only expert"):
        mixture.remove("e2")


def test_the_base_keeps_its_names_and_weights() -> None:
    expected = {name: value.clone() for name, value in tiny_llama().state_dict().items()}
    mixture = mixture_of()
    own = mixture.base_state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())


def test_frozen_routers_stay_frozen() -> None:
    mixture = mixture_of()
    for router in mixture.routers():
        router.requires_grad_(False)
    mixture.add("e3", AdapterShape(2, 4.0, TARGETS), seed=0)
    mixture.remove("e0")
    assert not any(p.requires_grad for router in mixture.routers() for p in router.parameters())
    assert not any(row[-1].any() for router in mixture.routers() for row in router.parameters())


@pytest.mark.parametrize("router", ["learned", "evidence", "both"])
def test_a_checkpointed_pass_keeps_its_gates_while_others_follow(router: Any) -> None:
    """Two losses of one step, and a pass between a loss and its gradient."""
    found = []
    for is_on in (False, True):
        mixture = mixture_of(router=router)
        model: Any = mixture.model.train()
        if is_on:
            model.gradient_checkpointing_enable()
        losses = [
            model(input_ids=ids, labels=ids, use_cache=False).loss
            for ids in (tokens(), tokens().flip(1), tokens()[:1, :5])
        ]
        with torch.no_grad():
            model(input_ids=tokens()[:, :3], use_cache=False)
        sum(losses).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        copy.deepcopy(model)
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_model_with_several_stacks_of_layers_is_refused() -> None:
    model = tiny_llama()
    model.add_module("vision", torch.nn.Module())
    model.get_submodule("vision").layers = torch.nn.ModuleList(
        [torch.nn.Sequential(torch.nn.Linear(2, 2))]
    )
    with pytest.raises(RequestError, match=r"the model has 2: model\.layers, vision\.layers"):
        ExpertMixture(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert mixture_on(model) is None


def test_refusals() -> None:
    mixture = mixture_of()
    with pytest.raises(RequestError, match="already has an adapter e0"):
        mixture.add("e0", AdapterShape(2, 4.0, TARGETS), seed=0)
    with pytest.raises(
        RequestError, match=r"no linear layer or vocabulary with this name.*Did you mean 'q_proj'"
    ):
        mixture.add("other", AdapterShape(2, 4.0, ("q_prj",)), seed=0)
    assert mixture.names == ["e0", "e1", "e2"]
    with pytest.raises(RequestError, match="no expert e9"), mixture.only("e9"):
        pass
    with pytest.raises(RequestError, match="already has adapters"):
        ExpertMixture(mixture.model)
    with pytest.raises(RequestError, match="no decoder layers"):
        ExpertMixture(torch.nn.Linear(2, 2))
