"""EWC's Fisher computed at the grown model, and refreshed during training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.training.test_fit import SETTINGS, batches, module_of, run, task
from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Width
from tritter.core.families import training_flops
from tritter.core.models import model_of
from tritter.methods.forgetting import EWC
from tritter.methods.forgetting.ewc import EWCOptions, _has_nonzero_new_entries
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.terminal import Console
from tritter.training import ForgettingMethod, Task, fit
from tritter.transform.live import ModelExpander


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def given(model: nn.Module, fisher: dict[str, Tensor], **further: object) -> Task:
    state = {"fisher": fisher}
    return replace(task(model), state=state, state_before=state, **further)  # type: ignore[arg-type]


class Watched(EWC):
    """Records step, FLOPs and importances of every refresh."""

    def __init__(self, **options: object) -> None:
        super().__init__(ewc_lambda=10.0, num_sequences=6, **options)  # type: ignore[arg-type]
        self.seen: list[tuple[int, float, dict[str, Tensor]]] = []

    def observe_step(self, model: nn.Module, step: int) -> float:
        flops = super().observe_step(model, step)
        held = {name: value.clone() for name, value in self.importance.items()}
        self.seen.append((step, flops, held))
        return flops


def test_it_is_taken_after_ten_steps_and_twice_as_many_and_so_on() -> None:
    model = oracle.tiny_llama()
    for first, expected in ((10, [10, 20, 40, 80, 160]), (7, [7, 14, 28, 56, 112]), (None, [])):
        method = EWC(ewc_lambda=1.0, num_sequences=2, refresh_steps=first, at="carried")
        method.begin_task(model, given(model, zeros(model)))
        taken = [step for step in range(200) if method.observe_step(model, step)]
        assert taken == expected


def test_the_larger_of_the_two_stands_and_the_anchor_stays() -> None:
    model = oracle.tiny_llama()
    first = {n: torch.rand_like(p) * 1e-3 for n, p in model.named_parameters()}
    method = EWC(ewc_lambda=1.0, num_sequences=64, refresh_steps=1)
    told = given(model, first)
    method.begin_task(model, told)
    anchor = {name: value.clone() for name, value in method.anchor.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flops = method.observe_step(model, 1)
    sequences = told.old_sequences["old"]  # fewer than requested, so all of them
    now = diagonal_fisher(model, sequences)
    larger = 0
    for name, held in method.importance.items():
        torch.testing.assert_close(held, torch.maximum(first[name], now[name]), rtol=1e-3, atol=0)
        larger += int((now[name] > first[name]).sum())
        assert torch.equal(method.anchor[name], anchor[name])
    assert larger > 100
    per_sequence = training_flops(model_of(model)).of(sequences.shape[1])
    assert flops == len(sequences) * per_sequence


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Width(), True),
        (Width(intermediate_size=60), True),
        (Width(init="net2net"), False),
        (Dus(), False),
        (LlamaPro(), True),
        (Moe(), True),
    ],
    ids=repr,
)
def test_new_entries_that_are_not_zero_are_seen(spec: ExpansionSpec, expected: bool) -> None:
    model = oracle.tiny_llama(num_hidden_layers=4)
    expander = ModelExpander([spec])
    masks = expander.change(model).masks()
    assert _has_nonzero_new_entries(expander.expand(model), masks) is expected


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("at", ["auto", "expanded", "carried"])
def test_at_the_grown_model_new_columns_that_write_are_held(at: str) -> None:
    model = oracle.tiny_llama()
    expander = ModelExpander([Width()])
    change, grown = expander.change(model), expander.expand(model)
    masks = change.masks()
    fisher = diagonal_fisher(model, oracle.tokens(batch=6))
    carried = {n: v.float() for n, v in change.state("fisher", fisher).items()}
    method = Watched(at=at, refresh_steps=None)
    method.begin_task(grown, given(grown, carried, carried=masks))
    flops = method.observe_step(grown, 0)
    new = sum(int((v != 0)[~masks[n]].sum()) for n, v in method.importance.items())
    assert (flops > 0) is (new > 1000) is (at != "carried")
    old = sum(int((v != 0)[masks[n]].sum()) for n, v in method.importance.items())
    assert old > 1000


def test_nothing_is_prepared_that_is_not_used() -> None:
    def needs(**options: object) -> tuple[tuple[str, ...], bool]:
        needed = EWC.needs(EWCOptions(**options))  # type: ignore[arg-type]
        return needed.prepares, needed.carried

    assert needs() == (("fisher",), True)
    assert needs(at="expanded") == ((), False)
    assert needs(at="expanded", normalise="mean") == (("fisher",), False)
    assert needs(at="carried") == (("fisher",), False)


@pytest.mark.full
def test_looks_come_between_steps_and_cost_what_they_cost(tmp_path: Path) -> None:
    method = Watched(at="expanded", refresh_steps=2)
    module = module_of(method)
    result = run(module, tmp_path / "watched")
    assert [step for step, _, _ in method.seen] == list(range(9))
    taken = [step for step, flops, _ in method.seen if flops]
    assert taken == [0, 2, 4, 8]
    plain = module_of(EWC(ewc_lambda=0.0, at="carried", refresh_steps=None))
    without = fit(
        plain,
        batches(),
        settings=SETTINGS,
        folder=tmp_path / "plain",
        label="test",
        console=Console(quiet=True),
        task=given(plain.model, zeros(plain.model)),
    ).flops
    looking = sum(flops for _, flops, _ in method.seen)
    assert result.flops == pytest.approx(without + looking)


class Killed(Exception):
    pass


class Kills(ForgettingMethod):
    name = "kills"

    def __init__(self, step: int) -> None:
        self.step = step

    def observe_step(self, model: nn.Module, step: int) -> float:
        if step == self.step:
            raise Killed
        return 0.0


@pytest.mark.full
@pytest.mark.parametrize("killed_at", [3, 5, 7])
def test_killed_between_looks_it_ends_with_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    settings = replace(SETTINGS, save_every_n_steps=2)
    whole = module_of(EWC(ewc_lambda=10.0, at="expanded", refresh_steps=2, num_sequences=6))
    run(whole, tmp_path / "whole", settings=settings)
    method = EWC(ewc_lambda=10.0, at="expanded", refresh_steps=2, num_sequences=6)
    with pytest.raises(Killed):
        run(module_of(method, Kills(killed_at)), tmp_path / "killed", settings=settings)
    again = Watched(at="expanded", refresh_steps=2)
    module = module_of(again, Kills(-1))
    run(module, tmp_path / "killed", settings=settings)
    assert again.seen[0][0] == killed_at  # refreshes before the checkpoint are kept
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, module.model.get_parameter(name)), name
