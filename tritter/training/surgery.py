"""Change a model during training. All such changes go through this module.

Parameters are replaced in the optimizer's groups, and moments and other state are mapped. The model
is wrapped for DDP again, and callbacks and methods with parameter state are notified. Checkpoints
contain a journal of the changes, which a resumed run replays.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.functional import pad

from tritter.core.families import StoredTensor
from tritter.core.parameter_map.carry import MOMENTS, STATE_KINDS, Policy
from tritter.errors import RequestError, TritterError
from tritter.storage.tensors import is_finite
from tritter.training.module import BaseModule
from tritter.training.parameters import reshape
from tritter.transform import Change

_BLOCK = 256  # values per scale, in all blockwise optimizers of bitsandbytes
_SUFFIXES = dict(zip(MOMENTS, "12", strict=True))  # of state, absmax (scales), qmap (code → value)

_Moments = dict[str, Tensor]  # of one parameter, by kind, and its step count
_State = Mapping[str, Any]  # of one parameter, in an optimizer


def apply(
    trainer: Trainer, module: BaseModule, change: Change, *, reason: str, policy: Policy = "carry"
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
    old = dict(model.named_parameters())
    before = {new: optimizer.state.get(old[stem]) for new, stem in change.stems.items()}
    _change_parameters(model, change)
    module.journal.record(change, step=trainer.global_step, reason=reason)
    _follow_groups(optimizer, module, old, moments, before)
    _wrap(trainer, module)
    for method in module.methods:
        method.parameters_changed(change)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
            assert isinstance(average, BaseModule)
            _change_parameters(average.model, change)
            average.journal.append(module.journal[-1])
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
    model: nn.Module, change: Change, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Change a model in a plain training loop, between a step and the next forward pass.

    Each new parameter replaces the old one at its position in the optimizer's groups.

    Args:
        model: Model to change.
        change: Change of the model.
        optimizer: Optimizer of the model, whose moments are mapped. If None, the caller must
            create a new optimizer from `model.parameters()`.
    """
    _check_shapes(model, change)
    ties, others = _ties(model), _count_others(model, change)
    old = dict(model.named_parameters())
    assert not change.removed and all(stored.name in old for stored in change.after)
    moments, before = {}, {}
    if optimizer is not None:
        moments = carried_moments(optimizer, model, change, stored_tensors=change.altered)
        before = {name: optimizer.state.get(old[stem]) for name, stem in change.stems.items()}
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
            put_moments(optimizer, new[name], state, before=before.get(name))
    for name in new:
        new[name].grad = None  # old gradients have the old shapes
    _check_model(optimizer, model, change, ties=ties, num_others=others)


def set_trained(
    trainer: Trainer, module: BaseModule, names: Collection[str], *, is_trained: bool
) -> None:
    """Unfreeze or freeze parameters of a running training from its next step.

    Unfrozen parameters take the positions that they would have in a new optimizer, without moments.
    Frozen ones are removed from the optimizer with their moments, so neither weight decay nor
    momentum changes them.

    Raises:
        RequestError: The call is not between two optimizer steps, or the strategy is not
            supported.
    """
    _check_moment(trainer, module)
    (optimizer,), parameters = trainer.optimizers, dict(module.model.named_parameters())
    for parameter in map(parameters.__getitem__, names):
        parameter.requires_grad_(is_trained)
        if not is_trained:
            parameter.grad = None
            optimizer.state.pop(parameter, None)
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
    reshape(model, change.model.config if change.model else {}, weights, removed=change.removed)


def _follow_groups(
    optimizer: torch.optim.Optimizer,
    module: BaseModule,
    old: Mapping[str, nn.Parameter],
    moments: Mapping[str, _Moments],
    before: Mapping[str, _State | None],
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


# Moments of Adam. Only these functions distinguish the optimizers of torch and bitsandbytes;
# elsewhere moments are tensors with the shape of the parameter.


def put_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    moments: _Moments,
    *,
    before: _State | None = None,
) -> None:
    """Set an Adam's moments of a parameter in its groups.

    Args:
        optimizer: An Adam of torch or bitsandbytes.
        parameter: Parameter in one of its groups.
        moments: Moments and step count.
        before: Optimizer state of the parameter that this one replaces, if known. An 8-bit
            optimizer uses it to keep the exact codes of unchanged blocks.
    """
    if _is_of_bitsandbytes(optimizer):
        _write_eight_bit(optimizer, parameter, moments, before=before)
        return
    # A copy: the optimizer changes it in place
    optimizer.state[parameter] = {
        **{kind: moments[kind].to(parameter, copy=True) for kind in MOMENTS},
        "step": moments["step"].to(torch.float32, copy=True),
    }


def _moments_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, stored_tensors: Iterable[StoredTensor]
) -> dict[str, _Moments]:
    """Return an Adam's moments by logical name.

    Args:
        optimizer: An Adam of torch or bitsandbytes.
        model: Live model that it trains.
        stored_tensors: Parameters to read.

    Returns:
        Logical name → moments; tensors without moments are absent.
    """
    found: dict[str, _Moments] = {}
    for stored in stored_tensors:
        parameter = model.get_parameter(stored.name)
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if _is_of_bitsandbytes(optimizer):
            state = _read_eight_bit(state, parameter.device)
        known, has = {*MOMENTS, "step"}, set(state)
        if has != known:  # amsgrad and NAdam have more
            which = sorted(known - has or has - known)
            raise TritterError(
                f"{type(optimizer).__name__} has {'no' if known - has else 'also'} "
                f"{', '.join(which)} for {stored.name}. Tritter can carry the moments of Adam and "
                "AdamW, including their 8-bit variants."
            )
        for part in stored.parts:
            own = {kind: part.of(state[kind]) for kind in MOMENTS}
            found[part.tensor.name] = own | {"step": state["step"]}
    return found


def carried_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    change: Change,
    *,
    stored_tensors: Sequence[StoredTensor],
    policy: Policy = "carry",
) -> dict[str, _Moments]:
    """Return an Adam's moments after a change, by the names of the new parameters.

    A parameter whose state is reset has no moments: the optimizer creates them at its first step,
    with a new step count.

    Args:
        optimizer: Optimizer of `model`.
        model: Live model before the change.
        change: Change of the model.
        stored_tensors: Parameters after the change to return moments for.
        policy: Policy for the moments, as in `tritter.core.parameter_map.carry`.
    """
    origins = {change.tensors[part.tensor.name].origin for s in stored_tensors for part in s.parts}
    # Only these: reading 8-bit moments needs eight bytes per parameter
    read = [s for s in change.before if any(part.tensor.name in origins for part in s.parts)]
    old = _moments_by_name(optimizer, model, read)
    moved: dict[str, _Moments] = {}

    def moved_kind(name: str, kind: str) -> Tensor:
        return STATE_KINDS[kind].mapped(change.tensors[name], lambda n: old[n][kind], policy=policy)

    found = {}
    for stored in stored_tensors:
        for name in (part.tensor.name for part in stored.parts):
            tensor_map = change.tensors[name]
            rule = STATE_KINDS[MOMENTS[0]]
            if rule.has_state(tensor_map, old.__contains__, policy=policy):
                step = old[tensor_map.origin or ""]["step"].clone()
                moved[name] = {kind: moved_kind(name, kind) for kind in MOMENTS} | {"step": step}
        if any(part.tensor.name in moved for part in stored.parts):
            found[stored.name] = _packed_moments(stored, moved)
    return found


def _packed_moments(stored: StoredTensor, state: Mapping[str, _Moments]) -> _Moments:
    """Return the moments of one parameter from those of its parts by logical name.

    Parts without moments get a zero first moment and the mean second moment of the other parts.
    The step count is the maximum over the parts.
    """
    first, second = MOMENTS
    names = [part.tensor.name for part in stored.parts if part.tensor.name in state]
    example = state[names[0]]
    mean = torch.stack([state[name][second].double().mean() for name in names]).mean()
    absent = {first: torch.zeros((), dtype=example[first].dtype), second: mean.to(example[second])}

    def moment(kind: str) -> Tensor:
        return stored.pack(lambda name: state[name][kind] if name in state else absent[kind])

    step = torch.stack([state[name]["step"] for name in names]).max()
    return {first: moment(first), second: moment(second), "step": step}


# The moments of bitsandbytes' Adam: dequantise them, and quantise them again.
#
# bitsandbytes stores moments as 8-bit codes with one scale per block of the flattened tensor, which
# axis maps cannot transform. Small parameters have float32 moments. Only these functions know the
# internals of bitsandbytes.


def _is_of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Return True for any Adam of bitsandbytes, also paged, but not for AdEMAMix or LAMB."""
    has_its_hooks = hasattr(optimizer, "init_state") and hasattr(optimizer, "update_step")
    return has_its_hooks and getattr(optimizer, "optimizer_name", None) == "adam"


def _read_eight_bit(state: _State, device: torch.device) -> dict[str, Tensor]:
    """Return the moments and the step count of one parameter in the format of torch's Adam.

    Args:
        state: Optimizer state of the parameter.
        device: Device of the parameter; paged state can be on another one.
    """
    moments = {kind: _eight_bit_values(state, suffix, device) for kind, suffix in _SUFFIXES.items()}
    return moments | {"step": torch.tensor(float(state["step"]))}


def _write_eight_bit(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    moments: Mapping[str, Tensor],
    *,
    before: _State | None = None,
) -> None:
    """Set the moments of a parameter in the optimizer's groups.

    The optimizer creates the state, so its own rule chooses between 8 bits and float32. It never
    frees GPU pages, including those of a replaced parameter.

    Args:
        optimizer: An Adam of bitsandbytes.
        parameter: Parameter in one of its groups.
        moments: Moments and step count in the format of torch's Adam.
        before: State of the parameter that this one replaces. Blocks with unchanged values keep
            their exact codes and scales. Quantising again would shrink the largest value of a
            block by 0.7 % if it is negative, because there is no code for −1.
    """
    from bitsandbytes.functional import quantize_blockwise

    (slot,) = (
        (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, candidate in enumerate(group["params"])
        if candidate is parameter
    )
    optimizer.state.pop(parameter, None)
    optimizer.init_state(slot[0], parameter, *slot[1:])  # type: ignore[attr-defined]
    state = optimizer.state[parameter]
    state["step"] = int(moments["step"])
    for kind, suffix in _SUFFIXES.items():
        values = moments[kind].to(parameter.device, torch.float32).contiguous()
        if not _is_coded(state, suffix):
            state[f"state{suffix}"].copy_(values)
            continue
        if not is_finite(values):  # there are no codes for inf and NaN
            raise TritterError(f"{kind} is not finite; 8-bit optimizers cannot store such values.")
        code = state[f"qmap{suffix}"]
        codes, rest = quantize_blockwise(values, code=code, blocksize=_BLOCK)
        # On the CPU, bitsandbytes quantises zero to the smallest positive number
        codes.masked_fill_(values == 0, int(code.abs().argmin()))
        scales = rest.absmax
        if before is not None and _is_coded(before, suffix):
            _keep_blocks(codes.view(-1), scales, values.view(-1), before, suffix)
        state[f"state{suffix}"].copy_(codes)
        state[f"absmax{suffix}"].copy_(scales)


def _is_coded(state: _State, suffix: str) -> bool:
    return state[f"state{suffix}"].dtype == torch.uint8


def _eight_bit_values(state: _State, suffix: str, device: torch.device) -> Tensor:
    """Return one moment in float32."""
    stored = state[f"state{suffix}"].to(device)
    if not _is_coded(state, suffix):
        return stored
    from bitsandbytes.functional import dequantize_blockwise

    scales, code = state[f"absmax{suffix}"], state[f"qmap{suffix}"]
    if scales.numel() != -(stored.numel() // -_BLOCK):
        raise TritterError(
            f"this version of bitsandbytes has {scales.numel()} scales for {stored.numel()} "
            f"values; Tritter supports blocks of {_BLOCK} values."
        )
    return dequantize_blockwise(
        stored, absmax=scales.to(device), code=code.to(device), blocksize=_BLOCK
    )


def _keep_blocks(
    codes: Tensor, scales: Tensor, values: Tensor, before: _State, suffix: str
) -> None:
    """Copy the old codes and scales of all blocks [256] with unchanged values.

    A last block that was partial and has grown counts as changed.
    """
    old_codes = before[f"state{suffix}"].to(codes.device).view(-1)
    old_values = _eight_bit_values(before, suffix, codes.device).view(-1)
    length = min(len(values), len(old_values))
    if len(values) != len(old_values):
        length -= length % _BLOCK
    is_same = values[:length] == old_values[:length]
    is_kept = pad(is_same, (0, -length % _BLOCK), value=True).view(-1, _BLOCK).all(dim=1)
    kept = is_kept.repeat_interleave(_BLOCK)[:length]
    codes[:length][kept] = old_codes[:length][kept]
    old_scales = before[f"absmax{suffix}"].to(scales.device)
    scales[: len(is_kept)][is_kept] = old_scales[: len(is_kept)][is_kept]
