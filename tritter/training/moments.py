"""Adam's moments from one training to the next: taken up where it starts, left where it ends.

They lie in the `state/` of a checkpoint by name on disk, each parameter with the number of steps
behind it, which corrects the bias of both moments. What has none begins anew, with a step count of
its own; what is frozen has none and leaves none. Adams of torch and of bitsandbytes are met here
alone; elsewhere moments are tensors of the parameter's shape.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.checkpoints.state import State, write_state
from tritter.core.families import StoredTensor
from tritter.core.parameter_map.carry import MOMENTS, STATE_KINDS, Policy, has_state, mapped_state
from tritter.errors import TritterError
from tritter.storage.atomic import atomic_folder
from tritter.storage.tensors import is_finite
from tritter.storage.writer import TensorStream
from tritter.training import eight_bit
from tritter.training.parameters import live_layout
from tritter.transform import Change

Moments = dict[str, Tensor]


def moments_of(state: State, model: nn.Module) -> dict[str, Moments]:
    """Return the moments of a model's trainable parameters, by parameter name; few may have some.

    Raises:
        TritterError: a moment has another shape than its parameter, or is not finite.
    """
    if not state.kinds.keys() >= set(MOMENTS):
        return {}
    first, second = (state.kinds[kind].files for kind in MOMENTS)
    both, found = first.keys() & second.keys(), {}
    for stored in live_layout(model):
        parameter = model.get_parameter(stored.name)
        if not parameter.requires_grad:
            continue
        held = [part for part in stored.parts if part.tensor.disk_name in both]
        by_name = {
            part.tensor.name: {
                kind: _moment(state, kind, part.tensor.disk_name, part.of(parameter).shape)
                for kind in MOMENTS
            }
            | {"step": torch.tensor(float(state.step_of(part.tensor.disk_name)))}
            for part in held
        }
        if by_name:
            found[stored.name] = packed_moments(stored, by_name)
    return found


def _moment(state: State, kind: str, name: str, shape: torch.Size) -> Tensor:
    tensors = state.kinds[kind]
    if tensors.shape(name) != tuple(shape):
        raise TritterError(
            f"{tensors.folder}: {name} has shape {list(tensors.shape(name))}; the model's is "
            f"{list(shape)}."
        )
    value = tensors.get(name)
    is_moment = value.is_floating_point() and is_finite(value)
    if not is_moment or (kind == MOMENTS[1] and bool((value < 0).any())):
        raise TritterError(f"{tensors.folder}: {name} is no moment of Adam's.")
    return value


def start_from(
    optimizer: torch.optim.Optimizer, model: nn.Module, moments: Mapping[str, Moments]
) -> None:
    """Let an Adam go on from moments, by parameter name; the others begin anew."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, values in moments.items():
        parameter = model.get_parameter(name)
        assert parameter in held, f"{name} is frozen"
        put_moments(optimizer, parameter, values)


def put_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    moments: Moments,
    *,
    before: eight_bit.State | None = None,
) -> None:
    """Let an Adam go on from moments of a parameter that is in its groups.

    Args:
        before: what it held of the parameter that this one stems from, if that is known; lets one
            of 8 bits keep the bits of what did not change.
    """
    if eight_bit.is_of_bitsandbytes(optimizer):
        eight_bit.write(optimizer, parameter, moments, before=before)
        return
    # A copy: the optimizer changes it in place
    optimizer.state[parameter] = {
        **{kind: moments[kind].to(parameter, copy=True) for kind in MOMENTS},
        "step": moments["step"].to(torch.float32, copy=True),
    }


def moments_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, places: Iterable[StoredTensor]
) -> dict[str, Moments]:
    """Return what an Adam holds of a live model, by logical name; the rest is absent.

    Args:
        places: the parameters that are asked about.

    Raises:
        TritterError: it holds something else than Adam's moments.
    """
    found: dict[str, Moments] = {}
    for stored in places:
        parameter = model.get_parameter(stored.name)
        held = optimizer.state.get(parameter)
        if not held:
            continue
        if eight_bit.is_of_bitsandbytes(optimizer):
            held = eight_bit.read(held, parameter.device)
        missing = {*MOMENTS, "step"} - set(held)
        if missing:
            raise TritterError(
                f"{type(optimizer).__name__} holds no {', '.join(sorted(missing))} for "
                f"{stored.name}; the moments of Adam and AdamW can be carried, those in 8 bits too."
            )
        for part in stored.parts:
            own = {kind: part.of(held[kind]) for kind in MOMENTS}
            found[part.tensor.name] = own | {"step": held["step"]}
    return found


def carried_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    change: Change,
    *,
    places: Sequence[StoredTensor],
    policy: Policy = "carry",
) -> dict[str, Moments]:
    """Return what becomes of an Adam's moments by a change, by the new parameters' names.

    A parameter whose state starts anew has none: the optimizer makes it at its first step, with a
    step count of its own.

    Args:
        optimizer: over `model`, which is as it was before the change.
        places: the parameters after the change that are asked about.

    Raises:
        TritterError: the optimizer does not hold Adam's moments.
    """
    origins = {change.tensors[part.tensor.name].origin for s in places for part in s.parts}
    # Of no others: in 8 bits, reading them takes eight bytes a parameter
    read = [s for s in change.before if any(part.tensor.name in origins for part in s.parts)]
    held = moments_by_name(optimizer, model, read)
    moved: dict[str, Moments] = {}

    def moved_kind(name: str, kind: str) -> Tensor:
        return mapped_state(
            change.tensors[name], STATE_KINDS[kind], lambda n: held[n][kind], policy=policy
        )

    found = {}
    for stored in places:
        for name in (part.tensor.name for part in stored.parts):
            tensor_map = change.tensors[name]
            rule = STATE_KINDS[MOMENTS[0]]
            if has_state(tensor_map, rule, held.__contains__, policy=policy):
                step = held[tensor_map.origin or ""]["step"].clone()
                moved[name] = {kind: moved_kind(name, kind) for kind in MOMENTS} | {"step": step}
        if any(part.tensor.name in moved for part in stored.parts):
            found[stored.name] = packed_moments(stored, moved)
    return found


def packed_moments(stored: StoredTensor, state: Mapping[str, Moments]) -> Moments:
    """Return the state of one parameter, of what it holds by logical name.

    Some of its parts may have none yet: zero and the mean of the others stand in. Where parts
    differ in their steps, the most that one has had counts.
    """
    first, second = MOMENTS
    held = [part.tensor.name for part in stored.parts if part.tensor.name in state]
    example = state[held[0]]
    mean = torch.stack([state[name][second].double().mean() for name in held]).mean()
    absent = {first: torch.zeros((), dtype=example[first].dtype), second: mean.to(example[second])}

    def moment(kind: str) -> Tensor:
        return stored.pack(lambda name: state[name][kind] if name in state else absent[kind])

    step = torch.stack([state[name]["step"] for name in held]).max()
    return {first: moment(first), second: moment(second), "step": step}


class MomentKeeper(Callback):
    """Leave the moments that a training ends with in a folder, as its `state/`.

    Args:
        folder: where `state/` is written; replaced whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        model = pl_module.model
        assert isinstance(model, nn.Module)
        places = live_layout(model)
        tensors = [part.tensor for stored in places for part in stored.parts]
        by_name = moments_by_name(trainer.optimizers[0], model, places)
        held = {t.disk_name: by_name[t.name] for t in tensors if t.name in by_name}
        steps = {name: int(moments["step"]) for name, moments in held.items()}
        # Of most parameters: what differs is told one by one
        step = Counter(steps.values()).most_common(1)[0][0] if steps else 0
        with atomic_folder(self._folder, overwrite=True) as temporary:
            write_state(
                temporary,
                {
                    kind: TensorStream.of((name, m[kind].cpu()) for name, m in held.items())
                    for kind in MOMENTS
                },
                step=step,
                other_steps={name: own for name, own in steps.items() if own != step},
            )
