"""Change a model during training. All such changes go through this module.

Parameters are replaced in the optimizer's groups, and moments and other state are mapped. The model
is wrapped for DDP again, and callbacks and methods with parameter state are notified. Checkpoints
contain a journal of the changes, which a resumed run replays.
"""

from collections.abc import Collection, Mapping
from math import prod

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from tritter.core.families import StoredTensor
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
    """Change the model of a running training, between two optimizer steps.

    Call it from a callback's `on_train_batch_end`. All processes must call it at the same step
    with the same change. It checks afterwards that

    - the optimizer holds exactly the trainable parameters;
    - tied parameters are still tied;
    - all changed values are finite;
    - the number of parameters matches the shapes.

    Args:
        trainer: Trainer of the run.
        module: Module with the model.
        change: Change of the model.
        reason: Reason for the journal.
        policy: Policy for Adam's moments, as in `tritter.core.parameter_map.carry`.

    Raises:
        RequestError: The call is not between two optimizer steps, the strategy is not supported,
            or the change does not match the model.
        TritterError: The optimizer state is not that of Adam, the processes disagree, or a check
            afterwards failed.
    """
    model = module.model
    _check_moment(trainer, module)
    _check_shapes(model, change)
    digest, strategy = change.digest(), trainer.strategy
    if not strategy.reduce_boolean_decision(strategy.broadcast(digest) == digest):
        raise TritterError("the processes of the training run requested different model changes.")
    (optimizer,) = trainer.optimizers
    ties, others = _ties(model), _count_others(model, change)
    moments = carried_moments(
        optimizer, model, change, stored_tensors=change.altered, policy=policy
    )
    entry = entry_of(change, step=trainer.global_step, reason=reason)
    old = dict(model.named_parameters())
    before = {new: optimizer.state.get(old[stem]) for new, stem in change.stems.items()}
    _change_parameters(model, change)
    module.journal.append(entry)
    _follow_groups(optimizer, module, old, moments, before)
    _wrap(trainer, module)
    for method in module.methods:
        method.parameters_changed(change)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
            assert isinstance(average, BaseModule)
            _change_parameters(average.model, change)
            average.journal.append(entry)
        elif hasattr(callback, "parameters_changed"):
            callback.parameters_changed(change)
    slots = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(slots) != sorted(id(p) for p in module.parameters() if p.requires_grad):
        raise TritterError(
            "the model change is inconsistent: the optimizer does not hold exactly the trainable "
            "parameters."
        )
    _check_model(optimizer, model, change, ties=ties, num_others=others)


def apply_plain(
    model: nn.Module,
    change: Change,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    policy: Policy = "carry",
) -> None:
    """Change a model in a plain training loop, between a step and the next forward pass.

    Each new parameter replaces the old one at its position in the optimizer's groups.

    Args:
        model: Model to change.
        change: Change of the model.
        optimizer: Optimizer of the model, whose moments are mapped. If None, the caller must
            create a new optimizer from `model.parameters()`.
        policy: Policy for Adam's moments, as in `tritter.core.parameter_map.carry`.

    Raises:
        RequestError: The change does not match the model, or adds or removes parameters.
        TritterError: The optimizer state is not that of Adam, or a check afterwards failed.
    """
    _check_shapes(model, change)
    ties, others = _ties(model), _count_others(model, change)
    old = dict(model.named_parameters())
    if change.removed or any(stored.name not in old for stored in change.after):
        raise RequestError("in a plain training loop, a change cannot add or remove parameters.")
    moments = {}
    if optimizer is not None:
        moments = carried_moments(
            optimizer, model, change, stored_tensors=change.altered, policy=policy
        )
    _change_parameters(model, change)
    new = dict(model.named_parameters())
    if optimizer is not None:  # each new parameter, with its state, replaces the old one
        follows = {id(old[name]): new[name] for name in old if new[name] is not old[name]}
        for group in optimizer.param_groups:
            group["params"] = [follows.get(id(each), each) for each in group["params"]]
        for name in old:
            if new[name] is not old[name]:
                optimizer.state.pop(old[name], None)
        for name, state in moments.items():
            optimizer.state[new[name]] = state
    for name in new:
        new[name].grad = None  # old gradients have the old shapes
    _check_model(optimizer, model, change, ties=ties, num_others=others)


def thaw(trainer: Trainer, module: BaseModule, names: Collection[str]) -> None:
    """Unfreeze parameters of a running training from its next step.

    They take the positions that they would have in a new optimizer, without moments.

    Raises:
        RequestError: The call is not between two optimizer steps, or the strategy is not
            supported.
    """
    _check_moment(trainer, module)
    (optimizer,), parameters = trainer.optimizers, dict(module.model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    _follow_groups(optimizer, module, parameters, {}, {})
    _wrap(trainer, module)


def freeze(trainer: Trainer, module: BaseModule, names: Collection[str]) -> None:
    """Freeze parameters of a running training from its next step.

    They are removed from the optimizer with their moments, so neither weight decay nor momentum
    changes them.

    Raises:
        RequestError: The call is not between two optimizer steps, or the strategy is not
            supported.
    """
    _check_moment(trainer, module)
    (optimizer,), parameters = trainer.optimizers, dict(module.model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None
        optimizer.state.pop(parameters[name], None)
    _follow_groups(optimizer, module, parameters, {}, {})
    _wrap(trainer, module)


def _wrap(trainer: Trainer, module: BaseModule) -> None:
    """Wrap the model for DDP again with the current trainable parameters, and recompile it."""
    if module.compiled is not None:
        module.compiled.forget()
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = module
        trainer.strategy.configure_ddp()


def _check_moment(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a call within an optimizer step, or with an unsupported strategy."""
    hook = module._current_fx_name  # tests check both private names with the pinned version
    if hook != "on_train_batch_end" or trainer.fit_loop._should_accumulate():
        where = "between two batches of one step" if hook == "on_train_batch_end" else f"in {hook}"
        raise RequestError(
            f"a model cannot change {where}; change it in on_train_batch_end, after the optimizer "
            "step."
        )
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        raise RequestError(
            f"trainer.strategy = {type(trainer.strategy).__name__}: a model can only change during "
            "training on one device or with ddp; otherwise expand between two training runs."
        )


def _check_shapes(model: nn.Module, change: Change) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for stored in change.before:
        if shapes.get(stored.name) != stored.shape:
            found = list(shapes[stored.name]) if stored.name in shapes else "none"
            raise RequestError(
                f"the change expects {stored.name} of shape {list(stored.shape)}; the model has "
                f"{found}."
            )


def _change_parameters(model: nn.Module, change: Change) -> None:
    """Apply a change to the parameters of a model."""
    weights = dict(change.weights({n: p.detach() for n, p in model.named_parameters()}))
    config = change.model.config if change.model else {}
    reshape(model, config, weights, removed=change.removed)


def _follow_groups(
    optimizer: torch.optim.Optimizer,
    module: BaseModule,
    old: Mapping[str, nn.Parameter],
    moments: Mapping[str, Moments],
    before: Mapping[str, State | None],
) -> None:
    """Update groups and state of the optimizer to those of a new one.

    The group dictionaries are kept, because schedulers and Lightning refer to them. A resumed run
    matches state by position, so the order must be that of a new optimizer.
    """
    optimizer.zero_grad(set_to_none=True)
    new_groups = module.new_optimizer().param_groups
    new = dict(module.model.named_parameters())
    for name, parameter in old.items():
        if new.get(name) is not parameter:
            optimizer.state.pop(parameter, None)
    for group, other in zip(optimizer.param_groups, new_groups, strict=True):
        group["params"] = list(other["params"])
    for name, values in moments.items():
        put_moments(optimizer, new[name], values, before=before.get(name))


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Return the sets of names of tied parameters."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(each) for each in names.values() if len(each) > 1}


def _count_others(model: nn.Module, change: Change) -> int:
    """Return the size of all parameters that belong to neither the family nor the change."""
    known = {s.name for s in (*change.before, *change.after, *_stock(change))}
    return sum(p.numel() for name, p in model.named_parameters() if name not in known)


def _stock(change: Change) -> tuple[StoredTensor, ...]:
    """Return the parameters of the family; none for a module without a config."""
    return change.model.layout("live") if change.model else ()


def _check_model(
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
    change: Change,
    *,
    ties: set[frozenset[str]],
    num_others: int,
) -> None:
    """Check the consistency of a model and its optimizer state after a change."""
    state = {} if optimizer is None else optimizer.state
    groups = [] if optimizer is None else optimizer.param_groups
    slots = {id(p) for group in groups for p in group["params"]}
    # Expected size: parameters of the family, of the change, and others
    stock = {s.name for s in _stock(change)}
    counted = num_others + sum(prod(s.shape) for s in change.after if s.name not in stock)
    counted += change.model.num_parameters if change.model else 0
    own = list(model.parameters())
    found = sum(p.numel() for p in own)
    altered = [model.get_parameter(stored.name) for stored in change.altered]
    states = (state.get(parameter, {}).values() for parameter in altered)
    values = [*altered, *(v for each in states for v in each if isinstance(v, torch.Tensor))]
    problems = {
        "the optimizer has state of removed parameters": not set(map(id, state)) <= slots,
        "tied parameters are no longer tied": not ties <= _ties(model),
        "parameters share memory": len({p.data_ptr() for p in own}) < len(own),
        f"it has {found} parameters instead of {counted}": found != counted,
        "it has values that are not finite": not all(is_finite(v.detach()) for v in values),
    }
    if any(problems.values()):
        reasons = "; ".join(reason for reason, is_so in problems.items() if is_so)
        raise TritterError(f"the model change is inconsistent: {reasons}.")
