"""Change a live training: the one place that does.

Parameters are replaced in their slots of the optimizer, moments and all other state follow the
map, the model is wrapped for DDP again, and whoever keeps something about parameters is told. The
journal that the module keeps in its checkpoints lets a resumed training make the shapes again.
"""

from collections.abc import Collection, Mapping
from math import prod

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from tritter.core.families import StoredTensor, count_parameters, layout
from tritter.core.parameter_map.carry import Policy
from tritter.errors import RequestError, TritterError
from tritter.storage.tensors import is_finite
from tritter.training.eight_bit import State
from tritter.training.module import BaseModule
from tritter.training.moments import Moments, carried_moments, put_moments
from tritter.training.parameters import entry_of, reshape
from tritter.transform import Change


def apply(
    trainer: Trainer,
    module: BaseModule,
    change: Change,
    *,
    reason: str,
    policy: Policy = "carry",
) -> None:
    """Change the model of a live training, between two optimizer steps.

    Meant for a callback's `on_train_batch_end`; of several processes all call it at the same step
    with the same change. Afterwards it holds that the optimizer has what is trained and nothing
    else, that ties are tied, that nothing changed is not finite, and that the number of parameters
    is the one that the shapes say.

    Args:
        reason: what the journal says why.
        policy: of Adam's moments, as in `tritter.core.parameter_map.carry`.

    Raises:
        RequestError: not between two optimizer steps, a strategy that can't bear it, or a change
            that is not about this model.
        TritterError: the optimizer does not hold Adam's moments, processes disagree, or what
            holds afterwards does not.
    """
    model = module.model
    _check_moment(trainer, module)
    _check_shapes(model, change)
    digest, strategy = change.digest(), trainer.strategy
    if not strategy.reduce_boolean_decision(strategy.broadcast(digest) == digest):
        raise TritterError("the processes of the training disagree on how the model is to change.")
    (optimizer,) = trainer.optimizers
    ties, others = _ties(model), _count_others(model, change)
    moments = carried_moments(optimizer, model, change, places=change.altered, policy=policy)
    entry = entry_of(change, step=trainer.global_step, reason=reason)
    old = dict(model.named_parameters())
    before = {new: optimizer.state.get(old[stem]) for new, stem in change.stems.items()}
    _take_on(model, change)
    module.journal.append(entry)
    _follow_groups(optimizer, module, old, moments, before)
    _wrap(trainer, module)
    for method in module.methods:
        method.parameters_changed(change)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
            assert isinstance(average, BaseModule)
            _take_on(average.model, change)
            average.journal.append(entry)
        elif hasattr(callback, "parameters_changed"):
            callback.parameters_changed(change)
    slots = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(slots) != sorted(id(p) for p in module.parameters() if p.requires_grad):
        raise TritterError(
            "the model was not changed as it should be: the optimizer does not hold what is "
            "trained."
        )
    _check_model(optimizer, model, change, ties=ties, num_others=others)


def apply_plain(
    model: nn.Module,
    change: Change,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    policy: Policy = "carry",
) -> None:
    """Change a model that is trained in a plain loop, between a step and the next forward pass.

    Groups keep their order: each new parameter stands in the slot of the old one.

    Args:
        optimizer: what trains the model; its moments follow. None: it is not known, and is to be
            made anew of `model.parameters()`.

    Raises:
        RequestError: the change is not about this model, or adds parameters of other names.
        TritterError: the optimizer does not hold Adam's moments, or what holds afterwards
            does not.
    """
    _check_shapes(model, change)
    ties, others = _ties(model), _count_others(model, change)
    old = dict(model.named_parameters())
    if change.removed or any(stored.name not in old for stored in change.after):
        raise RequestError("a plain loop's optimizer has slots for parameters of the same names.")
    moments = {}
    if optimizer is not None:
        moments = carried_moments(optimizer, model, change, places=change.altered, policy=policy)
    _take_on(model, change)
    new = dict(model.named_parameters())
    if optimizer is not None:  # each new parameter, with its state, where the old one stood
        follows = {id(old[name]): new[name] for name in old if new[name] is not old[name]}
        for group in optimizer.param_groups:
            group["params"] = [follows.get(id(each), each) for each in group["params"]]
        for name in old:
            if new[name] is not old[name]:
                optimizer.state.pop(old[name], None)
        for name, state in moments.items():
            optimizer.state[new[name]] = state
    for name in new:
        new[name].grad = None  # those of old shapes are of no use to the new ones
    _check_model(optimizer, model, change, ties=ties, num_others=others)


def thaw(trainer: Trainer, module: BaseModule, names: Collection[str]) -> None:
    """Let frozen parameters of a live training be trained from its next step on.

    They enter the optimizer where a new one would hold them, and begin without moments.

    Raises:
        RequestError: not between two optimizer steps, or a strategy that can't bear it.
    """
    _check_moment(trainer, module)
    (optimizer,), held = trainer.optimizers, dict(module.model.named_parameters())
    for name in names:
        held[name].requires_grad_(True)
    _follow_groups(optimizer, module, held, {}, {})
    _wrap(trainer, module)


def freeze(trainer: Trainer, module: BaseModule, names: Collection[str]) -> None:
    """Let parameters of a live training be trained no more from its next step on.

    They leave the optimizer, with their moments: neither weight decay nor momentum moves them.

    Raises:
        RequestError: not between two optimizer steps, or a strategy that can't bear it.
    """
    _check_moment(trainer, module)
    (optimizer,), held = trainer.optimizers, dict(module.model.named_parameters())
    for name in names:
        held[name].requires_grad_(False)
        held[name].grad = None
        optimizer.state.pop(held[name], None)
    _follow_groups(optimizer, module, held, {}, {})
    _wrap(trainer, module)


def _wrap(trainer: Trainer, module: BaseModule) -> None:
    """Let DDP wait for the gradients of what is trained now, and of nothing else; compile that."""
    if module.compiled is not None:
        module.compiled.forget()
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = module
        trainer.strategy.configure_ddp()


def _check_moment(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a moment at which gradients are on their way, or a model that is wrapped otherwise."""
    hook = module._current_fx_name  # tests hold both private names to the pinned version
    if hook != "on_train_batch_end" or trainer.fit_loop._should_accumulate():
        where = "between two batches of one step" if hook == "on_train_batch_end" else f"in {hook}"
        raise RequestError(
            f"a model can't change {where}: change it in on_train_batch_end, after the optimizer's "
            "step."
        )
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        raise RequestError(
            f"trainer.strategy = {type(trainer.strategy).__name__}: a model can change during a "
            "training on one device and under ddp; elsewhere expand between two trainings."
        )
    if len(trainer.optimizers) != 1:
        raise RequestError(f"{len(trainer.optimizers)} optimizers; a model changes under one.")


def _check_shapes(model: nn.Module, change: Change) -> None:
    held = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for stored in change.before:
        if held.get(stored.name) != stored.shape:
            has = list(held[stored.name]) if stored.name in held else "none"
            raise RequestError(
                f"the change is about {stored.name} of shape {list(stored.shape)}; the model has "
                f"{has}."
            )


def _take_on(model: nn.Module, change: Change) -> None:
    """Give a model the parameters that a change makes of its own."""
    weights = dict(change.weights({n: p.detach() for n, p in model.named_parameters()}))
    reshape(model, change.config, weights, removed=change.removed)


def _follow_groups(
    optimizer: torch.optim.Optimizer,
    module: BaseModule,
    old: Mapping[str, nn.Parameter],
    moments: Mapping[str, Moments],
    before: Mapping[str, State | None],
) -> None:
    """Let the groups hold what a new optimizer's would, and every parameter its own state.

    Groups stay the dictionaries they are, which schedulers and Lightning hold as well; a resumed
    training matches state by position, so that the order has to be that of a new optimizer.
    """
    optimizer.zero_grad(set_to_none=True)
    module.moments = {}  # what the training started from lies behind
    wanted = module.new_optimizer().param_groups
    if len(wanted) != len(optimizer.param_groups):
        raise TritterError(
            f"the optimizer has {len(optimizer.param_groups)} groups; a new one has {len(wanted)}."
        )
    new = dict(module.model.named_parameters())
    for name, parameter in old.items():
        if new.get(name) is not parameter:
            optimizer.state.pop(parameter, None)
    for group, other in zip(optimizer.param_groups, wanted, strict=True):
        group["params"] = list(other["params"])
    for name, values in moments.items():
        put_moments(optimizer, new[name], values, before=before.get(name))


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Return the names that one parameter goes by, where it has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(each) for each in names.values() if len(each) > 1}


def _count_others(model: nn.Module, change: Change) -> int:
    """Count the parameters that neither the family nor the change knows."""
    known = {s.name for s in (*change.before, *change.after, *_stock(change))}
    return sum(p.numel() for name, p in model.named_parameters() if name not in known)


def _stock(change: Change) -> tuple[StoredTensor, ...]:
    """Return the parameters that the family knows; none of a module that is no whole model."""
    return layout(change.config, "live") if change.config else ()


def _check_model(
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
    change: Change,
    *,
    ties: set[frozenset[str]],
    num_others: int,
) -> None:
    """Check what has to hold of a model, and of the state of its optimizer, after every change."""
    state = {} if optimizer is None else optimizer.state
    groups = [] if optimizer is None else optimizer.param_groups
    slots = {id(p) for group in groups for p in group["params"]}
    # From shapes: what the model then holds of its family's, of the change's own, and of others
    stock = {s.name for s in _stock(change)}
    counted = num_others + sum(prod(s.shape) for s in change.after if s.name not in stock)
    counted += count_parameters(change.config) if change.config else 0
    own = list(model.parameters())
    found = sum(p.numel() for p in own)
    altered = [model.get_parameter(stored.name) for stored in change.altered]
    states = (state.get(parameter, {}).values() for parameter in altered)
    values = [*altered, *(v for each in states for v in each if isinstance(v, torch.Tensor))]
    problems = {
        "state is left of parameters that are gone": not set(map(id, state)) <= slots,
        "ties are cut": not ties <= _ties(model),
        "parameters share their values": len({p.data_ptr() for p in own}) < len(own),
        f"it has {found} parameters instead of {counted}": found != counted,
        "it holds values that are not finite": not all(is_finite(v.detach()) for v in values),
    }
    if any(problems.values()):
        reasons = "; ".join(reason for reason, is_so in problems.items() if is_so)
        raise TritterError(f"the model was not changed as it should be: {reasons}.")
