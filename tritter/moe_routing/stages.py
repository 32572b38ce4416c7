"""The two trainings that make appended experts useful, on live models and loaders of one's own.

First the routers alone learn to send the new domain's tokens to the new experts, then the new
experts learn the domain while the base stays as it is. The main job does the same with its own
batches, methods against forgetting and saved state.
"""

from collections.abc import Iterable, Sequence, Sized
from contextlib import nullcontext
from dataclasses import replace

import torch
from lightning import Callback
from torch import nn

from tritter.errors import RequestError
from tritter.families import LogicalTensor
from tritter.moe_routing.live import Batch, LoaderBatches, fit_live
from tritter.moe_routing.objective import RoutingObjective, RoutingSettings
from tritter.moe_routing.opening import ExpertOpening, Unfreezing
from tritter.moe_routing.separate import separate_experts
from tritter.moe_routing.trainable import is_router, only_trainable
from tritter.seeds import derived_seed
from tritter.stock_routers import AddedExperts, Routing
from tritter.training import BaseModule, OptimizerSettings, Schedule

ROUTER_UPDATES = ("fine_tune", "retrain", "frozen")


def adapt_router(
    model: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[Batch],
    epochs: int = 3,
    *,
    encouragement: float = 0.1,
    auxiliary_loss: float = 0.01,
    z_loss: float = 1e-3,
    replay: Iterable[Batch] | None = None,
    router_update: str = "fine_tune",
    learning_rate: float = 3e-3,
    anneal_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train the routers of a model, and nothing else, to send a domain to its new experts.

    The loss is that of the task, minus `encouragement` times the probability of the new experts
    (a mean between 0 and 1, so that it can't be had without limit), plus balance. A router offset
    that keeps the new experts back is raised to 0 meanwhile. Afterwards parameters need gradients
    as they did before, also when an error came up.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last ones of each layer.
        domain_dataloader: `{"input_ids": integers [B, T]}`; iterated once for each epoch.
        auxiliary_loss: weight of the load balancing loss.
        z_loss: weight of the router z-loss.
        replay: batches of old text; one is trained on beside each of the domain.
        router_update: `fine_tune` from the rows as they are, `retrain` with new rows drawn anew,
            or `frozen`: the routers stay, and only an offset is raised.
        anneal_steps: after which the offset is 0. Default: all steps, for which the loader needs
            a length.
        seed: of rows drawn anew, and of what layers draw in training, as for dropout.

    Raises:
        RequestError: no experts, no such experts, an unknown `router_update`, or a loader without
            the length that is needed.
    """
    check_router_update(router_update)
    experts = checked_experts(model, new_expert_indices)
    added = AddedExperts.of(model)
    controls: list[Callback] = []
    if added is not None:
        steps = anneal_steps or _known_steps(domain_dataloader, epochs)
        controls = [ExpertOpening(added, anneal_steps=steps)]
    if router_update == "retrain":
        redraw_rows(model, experts, seed=seed)
    if router_update != "frozen":
        balance = RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=z_loss)
        settings = replace(balance, encouragement=encouragement, new_experts=experts)
        batches = LoaderBatches(domain_dataloader, epochs, replay=replay)
        own = derived_seed(seed, "routers")
        with only_trainable(model, is_router):
            _train(
                model, batches, settings, learning_rate=learning_rate, controls=controls, seed=own
            )
    if added is not None:
        added.at(steps, anneal_steps=steps).apply(model)


def train_new_experts(
    model: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[Batch],
    epochs: int = 1,
    *,
    freeze_base: bool = True,
    train_routers: bool = False,
    unfreeze_after: int | None = None,
    auxiliary_loss: float = 0.01,
    z_loss: float = 1e-3,
    replay: Iterable[Batch] | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> None:
    """Train new experts on a domain, while the base stays as it is, bit for bit.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last ones of each layer.
        domain_dataloader: as for `adapt_router`.
        freeze_base: False trains all parameters.
        train_routers: let the routers go on learning.
        unfreeze_after: steps after which the base is trained too. Default: never.
        seed: of what layers draw in training, as for dropout.

    Raises:
        RequestError: no experts, no such experts, or `unfreeze_after` without a frozen base.
    """
    experts = checked_experts(model, new_expert_indices)
    if unfreeze_after is not None and not freeze_base:
        raise RequestError("unfreeze_after: with freeze_base=False nothing is frozen.")
    batches = LoaderBatches(domain_dataloader, epochs, replay=replay)

    def is_trained(tensor: LogicalTensor) -> bool:
        is_new = tensor.expert in experts
        return not freeze_base or is_new or (train_routers and is_router(tensor))

    separated = separate_experts(model, experts[0]) if freeze_base else nullcontext()
    with separated, only_trainable(model, is_trained):
        controls: list[Callback] = []
        if unfreeze_after is not None:
            held = [p for p in model.parameters() if not p.requires_grad]
            controls.append(Unfreezing(held, after_steps=unfreeze_after))
        _train(
            model,
            batches,
            RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=z_loss),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            controls=controls,
            seed=derived_seed(seed, "experts"),
        )


def check_router_update(word: str) -> None:
    """Refuse a word that says nothing about routers.

    Raises:
        RequestError: names those that do.
    """
    if word not in ROUTER_UPDATES:
        raise RequestError(
            f"router_update = {word!r}: allowed is one of {', '.join(ROUTER_UPDATES)}."
        )


def checked_experts(model: nn.Module, indices: Sequence[int]) -> tuple[int, ...]:
    """Return indices of new experts in their order.

    Raises:
        RequestError: the model has no experts, or these are not its last ones.
    """
    routing = Routing.of(model)
    if routing is None:
        raise RequestError("adaptation: the model has no experts; expand it with moe first.")
    experts = tuple(sorted(set(indices)))
    last = tuple(range(routing.num_experts - len(experts), routing.num_experts))
    if not experts or experts != last or not last[0] > 0:
        raise RequestError(
            f"new_expert_indices = {list(indices)}: new experts are the last of the "
            f"{routing.num_experts} of a layer, and at least one stands before them."
        )
    return experts


def redraw_rows(model: nn.Module, experts: Sequence[int], *, seed: int) -> None:
    """Draw the router rows of new experts anew, with the deviation of each router's other rows."""
    routing = Routing.of(model)
    assert routing is not None
    for layer in routing.layers:
        generator = torch.Generator().manual_seed(derived_seed(seed, "router", layer))
        weight = routing.router(layer).weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            drawn = torch.randn(len(experts), weight.shape[1], generator=generator)
            weight[list(experts)] = (drawn * weight[: experts[0]].std().cpu()).to(weight)


def _train(
    model: nn.Module,
    batches: LoaderBatches,
    settings: RoutingSettings,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    controls: Sequence[Callback],
    seed: int,
) -> None:
    """Train what needs a gradient at one rate, the terms of the routers in the loss."""
    module = BaseModule(
        model,
        schedule=Schedule.constant(learning_rate, max_steps=len(batches)),
        optimizer=OptimizerSettings(weight_decay=weight_decay),
        side_losses=[RoutingObjective(model, settings), *batches.side_losses],
    )
    fit_live(module, batches, seed=seed, controls=controls)


def _known_steps(loader: Iterable[Batch], epochs: int) -> int:
    """Return the steps of some epochs.

    Raises:
        RequestError: the loader does not say.
    """
    if not isinstance(loader, Sized):
        raise RequestError(
            "anneal_steps: the loader has no length; say after how many steps the router "
            "offset is to be 0."
        )
    return epochs * len(loader)
