"""Library calls on live models match a manual training loop, and change nothing else."""

import signal
from collections.abc import Callable, Iterator, Sequence
from math import nan

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.core.stock_routers.models import shared_names, tiny_moe
from tests.methods.moe_routing.test_stages import DOMAIN, OLD, Batch, grown, moved, values
from tritter.errors import TritterError
from tritter.evaluation.inference import preserve_modes
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.methods.moe_routing.distill import DistillationModule, only_new_experts
from tritter.methods.moe_routing.live import (
    _fit_live,
    _LoaderBatches,
    adapt_router,
    train_new_experts,
)
from tritter.methods.moe_routing.opening import _expert_utility
from tritter.training import OptimizerSettings, Schedule

RATE, DECAY, NEW = 1e-2, 0.3, 4  # experts from the fourth on are new


def task(model: nn.Module, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the next-token loss and the routers' logits, by transformers' own output."""
    out = model(input_ids=ids, output_router_logits=True)
    shifted = out.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(shifted, ids[:, 1:].flatten()), out.router_logits


def balance(layers: tuple[Tensor, ...]) -> Tensor:
    """Return the mean over layers of E · Σ f · P."""
    prices = []
    for logits in layers:
        chosen = logits.softmax(-1).topk(2, dim=-1).indices
        load = nn.functional.one_hot(chosen, logits.shape[-1]).float().sum(dim=1).mean(dim=0)
        prices.append(logits.shape[-1] * (load * logits.softmax(-1).mean(dim=0)).sum())
    return torch.stack(prices).mean()


def small(layers: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([logits.logsumexp(-1).square().mean() for logits in layers]).mean()


def offset(model: nn.Module, *, old: float, new: float) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.routing_offset[:NEW] = old
        layer.mlp.gate.routing_offset[NEW:] = new


def by_hand(
    model: nn.Module,
    names: list[str],
    loss_of: Callable[[int, Tensor], Tensor],
    *,
    decay: float,
    epochs: int,
    is_part: bool,
) -> None:
    """Take plain AdamW steps; in a part, old rows have no gradient and are restored."""
    trained = [model.get_parameter(name) for name in names]
    adamw = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    for step, batch in enumerate(DOMAIN * epochs):
        adamw.zero_grad()
        grads = torch.autograd.grad(loss_of(step, batch["input_ids"]), trained)
        before = [parameter.detach().clone() for parameter in trained]
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.grad = grad.clone()
            if is_part:
                parameter.grad[:NEW] = 0
        nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        if is_part:
            for parameter, old in zip(trained, before, strict=True):
                parameter.data[:NEW] = old[:NEW]
    adamw.zero_grad()


def alike(model: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("replay", [None, OLD], ids=["alone", "with old text"])
def test_routers_are_adapted_as_by_hand(replay: list[Batch] | None) -> None:
    model, other = grown(noise=0.5), grown(noise=0.5)
    routers = [name for name, _ in other.named_parameters() if name.endswith("mlp.gate.weight")]

    def loss_of(step: int, ids: Tensor) -> Tensor:
        offset(other, old=0.0, new=-20 * (1 - step / 12) if step else -torch.inf)
        loss, layers = task(other, ids)
        mass = torch.stack([lay.softmax(-1)[:, NEW:].sum(-1).mean() for lay in layers]).mean()
        loss = loss + 0.01 * balance(layers) + 1e-3 * small(layers) - 0.7 * mass
        return loss if replay is None else loss + task(other, replay[step % 6]["input_ids"])[0]

    by_hand(other, routers, loss_of, decay=0.0, epochs=2, is_part=False)
    offset(other, old=0.0, new=0.0)
    adapt_router(model, [4, 5], DOMAIN, 2, encouragement=0.7, replay=replay, learning_rate=RATE)
    alike(model, other)
    ids = OLD[0]["input_ids"]
    torch.testing.assert_close(oracle.logits(model, ids), oracle.logits(other, ids))


@pytest.mark.full
def test_new_experts_are_trained_as_by_hand() -> None:
    model, other = grown(noise=0.5), grown(noise=0.5)
    for each in (model, other):
        offset(each, old=0.0, new=0.0)

    def loss_of(step: int, ids: Tensor) -> Tensor:
        loss, layers = task(other, ids)
        return loss + 0.01 * balance(layers) + 1e-3 * small(layers)

    by_hand(other, list(shared_names(other)), loss_of, decay=DECAY, epochs=2, is_part=True)
    train_new_experts(model, [4, 5], DOMAIN, 2, learning_rate=RATE, weight_decay=DECAY)
    alike(model, other)


def teach(
    model: nn.Module,
    teacher: nn.Module,
    experts: Sequence[int],
    *,
    epochs: int = 1,
    auxiliary_loss: float = 0.01,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Distil a teacher into new experts, as the stage `distill` of a run."""
    batches = _LoaderBatches(DOMAIN, epochs)
    with only_new_experts(model, experts), preserve_modes(teacher):
        module = DistillationModule(
            model,
            teacher,
            new_experts=experts,
            temperature=2.0,
            auxiliary_loss=auxiliary_loss,
            schedule=Schedule.constant(learning_rate, max_steps=len(batches)),
            optimizer=OptimizerSettings(weight_decay=DECAY),
        )
        _fit_live(module, batches, seed=seed)


def test_new_experts_are_taught_as_by_hand() -> None:
    model, other, teacher = grown(noise=0.1), grown(noise=0.1), oracle.tiny_llama()

    def loss_of(step: int, ids: Tensor) -> Tensor:
        offset(other, old=-torch.inf, new=0.0)
        said = other(input_ids=ids, output_router_logits=True)
        wanted = (teacher(input_ids=ids).logits.detach() / 2).softmax(-1)
        ratio = wanted.log() - (said.logits / 2).log_softmax(-1)
        return 4 * (wanted * ratio).sum(-1).mean() + 0.5 * balance(said.router_logits)

    by_hand(other, list(shared_names(other)), loss_of, decay=DECAY, epochs=1, is_part=True)
    teach(model, teacher, [4, 5], auxiliary_loss=0.5, learning_rate=RATE)
    alike(model, other)


class Failing(list[Batch]):
    """Claims to have six batches, and fails at the third."""

    def __iter__(self) -> Iterator[Batch]:
        yield from self[:2]
        raise ZeroDivisionError


@pytest.mark.full
def test_an_error_amid_the_steps_leaves_the_model_as_it_stands() -> None:
    model = grown().eval()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for work in (adapt_router, train_new_experts):
        with pytest.raises(ZeroDivisionError):
            work(model, [4, 5], Failing(DOMAIN))  # type: ignore[operator]
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.full
def test_a_loader_without_a_length_is_read_once() -> None:
    model, other = grown(), grown()
    for each, loader in ((model, iter(DOMAIN)), (other, DOMAIN)):
        adapt_router(each, [4, 5], loader, 1)
        train_new_experts(each, [4, 5], (batch for batch in DOMAIN))
    alike(model, other)
    before = values(model)
    train_new_experts(model, [4, 5], [])
    assert not moved(model, before)
    unread = iter(DOMAIN)
    adapt_router(grown(), [4, 5], unread, router_update="frozen", anneal_steps=3)
    assert len(list(unread)) == len(DOMAIN)


def spoil(out: dict[str, Tensor]) -> None:
    out["loss"] = out["loss"] * nan


@pytest.mark.full
def test_a_step_that_is_not_finite_is_not_taken(capfd: pytest.CaptureFixture[str]) -> None:
    model = grown()
    bad = [*DOMAIN[:2], {"input_ids": DOMAIN[0]["input_ids"].clone()}]
    train_new_experts(model, [4, 5], bad[:2])
    before = values(model)
    hook = model.register_forward_hook(lambda module, arguments, out: spoil(out))
    with pytest.raises(TritterError, match=r"adaptation: .*not finite.*loss nan"):
        train_new_experts(model, [4, 5], bad)
    hook.remove()
    assert not moved(model, before)
    assert capfd.readouterr() == ("", "")  # no progress bar, table or library advice


@pytest.mark.full
def test_a_model_trains_in_its_own_dtype_and_keeps_its_mode() -> None:
    model = grown().to(torch.bfloat16).eval()
    adapt_router(model, [4, 5], DOMAIN)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training


def test_ctrl_c_is_that_of_any_other_call() -> None:
    def interrupt(module: nn.Module, arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    model = grown()
    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapt_router(model, [4, 5], DOMAIN)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.full
def test_each_module_gets_its_own_mode_back() -> None:
    model, teacher, sequences = grown(noise=0.5), oracle.tiny_llama(), DOMAIN[0]["input_ids"]
    model.train().model.layers[0].eval()
    teacher.train().model.layers[1].eval()
    modes = [module.training for each in (model, teacher) for module in each.modules()]
    calls: dict[str, Callable[[], object]] = {
        "adapt_router": lambda: adapt_router(model, range(NEW, 6), DOMAIN, epochs=1),
        "train_new_experts": lambda: train_new_experts(model, range(NEW, 6), DOMAIN),
        "distillation": lambda: teach(model, teacher, range(NEW, 6)),
        "expert_utility": lambda: _expert_utility(model, sequences),
        "diagonal_fisher": lambda: diagonal_fisher(model, sequences),
    }
    for name, call in calls.items():
        call()
        after = [module.training for each in (model, teacher) for module in each.modules()]
        assert after == modes, name


STAGES: dict[str, Callable[[nn.Module, nn.Module, int], None]] = {
    "routers": lambda model, _, seed: adapt_router(model, [3], DOMAIN, 1, seed=seed),
    "experts": lambda model, _, seed: train_new_experts(model, [3], DOMAIN, seed=seed),
    "distilled": lambda model, teacher, seed: teach(model, teacher, [2, 3], seed=seed),
}


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_what_layers_draw_follows_from_the_seed(stage: str) -> None:
    """Torch's generators are restored, regardless of earlier use."""
    found = []
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        model = tiny_moe("mixtral", attention_dropout=0.3, router_jitter_noise=0.3)
        teacher = tiny_moe("mixtral", initializer_range=0.1)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        STAGES[stage](model, teacher, seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(values(model))
    one, other, third = (torch.cat([v.flatten() for v in each.values()]) for each in found)
    assert torch.equal(one, other) and not torch.equal(one, third)
