"""The two trainings that make appended experts useful, on live models and loaders of one's own.

First the routers alone learn to send the new domain's tokens to the new experts, then the new
experts learn the domain while the base stays as it is. The main job does the same with its own
batches, methods against forgetting and saved state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor, nn

from tritter.adaptation.separate import is_router, separate_experts
from tritter.adaptation.trainable import only_trainable
from tritter.errors import RequestError, TritterError
from tritter.routing import AddedExperts, Routing
from tritter.seeds import derived_seed
from tritter.training import OptimiserSettings, RoutingObjective, RoutingSettings
from tritter.training.optimiser import build_optimiser
from tritter.training.parameters import NEW

Batch = Mapping[str, Tensor]
BatchLoss = Callable[[nn.Module, Tensor], Tensor]
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
        seed: of rows drawn anew.

    Raises:
        RequestError: no experts, no such experts, an unknown `router_update`, or a loader without
            the length that is needed.
    """
    check_router_update(router_update)
    experts = checked_experts(model, new_expert_indices)
    opening = _opening(model, anneal_steps, epochs, domain_dataloader)
    if router_update == "frozen":
        opening(None)
        return
    if router_update == "retrain":
        redraw_rows(model, experts, seed=seed)
    balance = RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=z_loss)
    settings = replace(balance, encouragement=encouragement, new_experts=experts)
    with only_trainable(model, is_router):
        descend(
            model,
            epochs_of(domain_dataloader, epochs),
            RoutingObjective(model, settings),
            replay=replay,
            optimiser=OptimiserSettings(weight_decay=0.0),
            learning_rate=learning_rate,
            before_step=opening,
        )
    opening(None)


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
) -> None:
    """Train new experts on a domain, while the base stays as it is, bit for bit.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last ones of each layer.
        domain_dataloader: as for `adapt_router`.
        freeze_base: False trains all parameters.
        train_routers: let the routers go on learning.
        unfreeze_after: steps after which the base is trained too. Default: never.

    Raises:
        RequestError: no experts, no such experts, or `unfreeze_after` without a frozen base.
    """
    experts = checked_experts(model, new_expert_indices)
    if unfreeze_after is not None and not freeze_base:
        raise RequestError("unfreeze_after: with freeze_base=False nothing is frozen.")
    settings = RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=z_loss)
    objective = RoutingObjective(model, settings)

    def is_trained(name: str) -> bool:
        return not freeze_base or name.endswith(NEW) or (train_routers and is_router(name))

    separated = separate_experts(model, experts[0]) if freeze_base else nullcontext()
    with separated, only_trainable(model, is_trained):
        held = [p for p in model.parameters() if not p.requires_grad]
        descend(
            model,
            epochs_of(domain_dataloader, epochs),
            objective,
            replay=replay,
            optimiser=OptimiserSettings(weight_decay=weight_decay),
            learning_rate=learning_rate,
            before_step=_unfreezing(held, unfreeze_after),
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


def descend(
    model: nn.Module,
    batches: Iterator[Batch],
    objective: RoutingObjective,
    *,
    replay: Iterable[Batch] | None,
    optimiser: OptimiserSettings,
    learning_rate: float,
    before_step: Callable[[int | None], None],
    batch_loss: BatchLoss | None = None,
) -> None:
    """Take an AdamW step on each batch.

    Args:
        before_step: told the number of each step.
        batch_loss: of a model on token ids [B, T]; by default the mean next-token loss.

    Raises:
        TritterError: a loss is not finite; the weights are those from before that step.
    """
    device = next(model.parameters()).device
    adamw = build_optimiser(model.named_parameters(), optimiser, learning_rate=learning_rate)
    old = None if replay is None else cycle(replay)
    batch_loss = batch_loss or _loss
    with _in_training(model), objective.routing.recording():
        for step, batch in enumerate(batches):
            before_step(step)
            loss = batch_loss(model, batch["input_ids"].to(device))
            loss = loss + objective.weighted(objective.terms(batch))
            if old is not None:
                loss = loss + _loss(model, next(old)["input_ids"].to(device))
            if not torch.isfinite(loss):
                raise TritterError(f"adaptation: the loss of step {step} is not finite.")
            adamw.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            adamw.step()
    adamw.zero_grad(set_to_none=True)


def _loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    # With router logits in its output a stock model adds a balance loss of its own
    loss = model(
        input_ids=input_ids, labels=input_ids, use_cache=False, output_router_logits=False
    ).loss
    assert isinstance(loss, Tensor)
    return loss


def epochs_of(loader: Iterable[Batch], epochs: int) -> Iterator[Batch]:
    for _ in range(epochs):
        yield from loader


def _opening(
    model: nn.Module, anneal_steps: int | None, epochs: int, loader: Iterable[Batch]
) -> Callable[[int | None], None]:
    """Return what raises the router offset before a step; None means the end.

    Raises:
        RequestError: the number of steps is not known.
    """
    added = AddedExperts.of(model)
    if added is None:
        return lambda step: None
    if anneal_steps is None:
        if not isinstance(loader, Sized):
            raise RequestError(
                "anneal_steps: the loader has no length; say after how many steps the router "
                "offset is to be 0."
            )
        anneal_steps = epochs * len(loader)
    held, total = added, anneal_steps

    def set_offset(step: int | None) -> None:
        held.at(total if step is None else step, anneal_steps=total).apply(model)

    return set_offset


def _unfreezing(
    parameters: Sequence[nn.Parameter], after_steps: int | None
) -> Callable[[int | None], None]:
    """Return what lets parameters be trained from a step on; for that they need gradients now.

    The optimiser holds them from the start, and passes over one that has no gradient.
    """
    if after_steps is None:
        return lambda step: None
    for parameter in parameters:
        parameter.requires_grad_(True)

    def set_needed(step: int | None) -> None:
        for parameter in parameters:
            parameter.requires_grad_(step is not None and step >= after_steps)

    return set_needed


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
