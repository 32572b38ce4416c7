"""Quadratic penalties mapped through a live change equal those created after it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.methods.forgetting.test_ewc import carried_fisher, task_with
from tritter.core.expansions import LlamaPro, Width
from tritter.core.families import Model
from tritter.methods.forgetting import EWC, L2SP, SI, OnlineEWC
from tritter.methods.forgetting.quadratic import QuadraticPenalty, diagonal_fisher
from tritter.transform import expand, plan_expansion

METHODS = {
    "ewc": lambda: EWC(ewc_lambda=3.0),
    "ewc penalty_preserving": lambda: EWC(ewc_lambda=3.0, carry="penalty_preserving"),
    "online_ewc": lambda: OnlineEWC(ewc_lambda=3.0, gamma=0.5),
    "si": lambda: SI(si_lambda=3.0),
    "l2sp": lambda: L2SP(l2sp_lambda=3.0),
}


def pulls(method: QuadraticPenalty, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that a method adds after all weights have moved by a tenth."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
            parameter.grad = torch.zeros_like(parameter)
    method.add_to_gradients(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_followed_pulls_as_one_begun_on_the_grown_model(
    tmp_path: Path, name: str
) -> None:
    model = oracle.tiny_llama()
    source = oracle.saved(model, tmp_path / "source")
    specs = [Width(init="net2net", intermediate_size=60), LlamaPro()]
    plan = plan_expansion(source, specs)
    fisher = diagonal_fisher(model, oracle.tokens(batch=4))
    method = METHODS[name]()
    told = task_with(model, fisher)
    kinds = ("fisher", "fisher_penalty", "online_fisher", "si_importance")
    state = dict.fromkeys(kinds, fisher)
    method.begin_task(model, replace(told, state=state))
    method.parameters_changed(plan.change)

    grown = oracle.stock(expand(source, tmp_path / "grown", specs).folder)
    begun = METHODS[name]()
    state = {
        kind: {
            t.disk_name: value
            for t in Model(plan.target.config).tensors
            if (value := carried_fisher(plan, fisher, kind).get(t.name)) is not None
        }
        for kind in state
    }
    masks = plan.change.masks()
    begun.begin_task(grown, replace(told, state=state, carried=masks))
    assert method.logged_loss(grown) == 0.0
    found, expected = pulls(method, grown), pulls(begun, oracle.stock(tmp_path / "grown"))
    assert found.keys() == expected.keys()
    for parameter, pull in found.items():
        torch.testing.assert_close(pull, expected[parameter], rtol=1e-6, atol=0)
        assert not bool(pull[~masks[parameter]].any()), parameter
    held = sum(int((pull != 0).sum()) for pull in found.values())
    assert held >= 0.9 * sum(int(mask.sum()) for mask in masks.values())
