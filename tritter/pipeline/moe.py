"""MoE experts in a run: router losses, opening of new experts, and expert usage."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tritter.core.expansions import MoeAdd, target_model
from tritter.core.families import SIGMOID_ROUTERS
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.data.tokens import concatenate
from tritter.methods.moe_routing.objective import OldRouting, RoutingObjective
from tritter.methods.moe_routing.opening import ExpertOpening, Unfreezing
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.training import Trainee

_HOLD_OLD_SEQUENCES = 256  # old sequences whose routing is preserved


def with_choice(branch: Branch, clone_from: Sequence[int]) -> Branch:
    """Return a branch with the selected experts to clone."""
    chosen = tuple(clone_from)
    specs = tuple(
        replace(spec, clone_from=chosen)
        if isinstance(spec, MoeAdd) and spec.is_chosen_by_data
        else spec
        for spec in branch.specs
    )
    return replace(branch, specs=specs)


def spaced_sequences(run: Run, domains: Sequence[str], count: int) -> Tensor:
    """Return up to `count` training sequences [N, T], evenly spaced over some domains."""
    sequences = concatenate(list(run.data.training_sequences(domains).values()))
    chosen = min(count, len(sequences))
    return sequences[torch.arange(chosen) * len(sequences) // max(1, chosen)]


def pending_experts(run: Run, branch: Branch) -> AddedExperts | None:
    """Return the appended experts that a branch still has to open; None if there are none."""
    added = run.source(branch.expanded).added
    return None if added is None or added.is_settled else added


def router_steps(run: Run, branch: Branch) -> int:
    """Return the number of steps of the router stage; 0 without one."""
    added, options = pending_experts(run, branch), run.config.adaptation
    if added is None or added.step:
        return 0
    sequences = sum(map(run.data.num_sequences, run.data.new_domains_of(branch)))
    of_step = run.data.batch_size * run.config.trainer.accumulate_grad_batches
    return options.router_steps(sequences, of_step)


@contextmanager
def router_trainee(run: Run, branch: Branch, model: nn.Module) -> Iterator[Trainee]:
    """Prepare a model for the router stage: train only routers, and encourage new experts."""
    added = pending_experts(run, branch)
    assert added is not None
    routing = _objective(
        run,
        branch,
        model,
        encouragement=run.config.adaptation.encouragement,
        new_experts=added.experts,
    )
    opening = ExpertOpening(added, anneal_steps=anneal_steps(run, branch, added))
    with only_trainable(model, lambda tensor: tensor.kind == "router"):
        yield Trainee(model, side_losses=(routing,), controls=(opening,))


@contextmanager
def training_of_routers(run: Run, branch: Branch, trainee: Trainee) -> Iterator[None]:
    """Train the routers of a model and open new experts, with a frozen base if requested."""
    model = trainee.model
    if RouterControl.of(model) is None:
        yield
        return
    trainee.side_losses, options = (_objective(run, branch, model),), run.config.adaptation
    added, steps = pending_experts(run, branch), router_steps(run, branch)
    if added is None:
        yield
        return
    opened_in = anneal_steps(run, branch, added)
    now = added.at(added.step + steps, anneal_steps=opened_in)
    trainee.controls = (ExpertOpening(now, anneal_steps=opened_in),)
    if not options.freeze_base:
        yield
        return
    with (
        SeparateExperts(model, added.experts[0]) as parts,
        only_trainable(model, lambda tensor: tensor.expert in added.experts),
    ):
        trainee.follow = parts.follow
        if options.unfreeze_after is not None:
            base = [p for p in model.parameters() if not p.requires_grad]
            trainee.controls += (Unfreezing(base, after_steps=options.unfreeze_after),)
        yield


def has_unsaved_bias(run: Run) -> bool:
    """Return True if training moves a selection bias that checkpoints lack."""
    config = run.config
    if not config.moe_routing.bias_update_rate:
        return False
    return target_model(run.data.model, config.expansion).model_type not in SIGMOID_ROUTERS


def anneal_steps(run: Run, branch: Branch, added: AddedExperts) -> int:
    """Return the number of steps until the router offset of appended experts reaches 0."""
    saved, configured = added.anneal_steps, run.config.adaptation.anneal_steps
    steps = router_steps(run, branch) or max(1, run.config.training.max_steps // 2)
    return configured or saved or steps


def _objective(
    run: Run,
    branch: Branch,
    model: nn.Module,
    *,
    encouragement: float = 0.0,
    new_experts: Sequence[int] = (),
) -> RoutingObjective:
    options, old = run.config.moe_routing, None
    if options.hold_old:  # routing of old data before any training of the branch
        sequences = run.data.sample_equally(
            run.data.old_domains_of(branch), _HOLD_OLD_SEQUENCES, "hold_old", *branch.purpose
        )
        batch_size = max(1, run.data.batch_size // 4)
        with run.waiting("routing of old data"):
            before = run.load(branch.expanded)
            old = OldRouting.of(before.to(run.device), sequences, batch_size=batch_size)
    return RoutingObjective(
        model, options, encouragement=encouragement, new_experts=new_experts, old=old
    )
