"""Adam moments across training runs: loaded at the start, saved at the end.

The `state/` of a checkpoint contains them by name on disk, with the step count of each parameter
for bias correction. A parameter without moments starts with zero moments and its own step count. A
frozen parameter has none. Only this module distinguishes the Adams of torch and bitsandbytes;
elsewhere moments are tensors with the shape of the parameter.
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
    """Return the saved moments of a model's trainable parameters.

    Returns:
        Parameter name → moments; parameters without saved moments are absent.

    Raises:
        TritterError: A moment does not have the shape of its parameter, or is not finite.
    """
    if not state.kinds.keys() >= set(MOMENTS):
        return {}
    first, second = (state.kinds[kind].files for kind in MOMENTS)
    both, found = first.keys() & second.keys(), {}
    for stored in live_layout(model):
        parameter = model.get_parameter(stored.name)
        if not parameter.requires_grad:
            continue
        saved = [part for part in stored.parts if part.tensor.disk_name in both]
        by_name = {
            part.tensor.name: {
                kind: _moment(state, kind, part.tensor.disk_name, part.of(parameter).shape)
                for kind in MOMENTS
            }
            | {"step": torch.tensor(float(state.step_of(part.tensor.disk_name)))}
            for part in saved
        }
        if by_name:
            found[stored.name] = packed_moments(stored, by_name)
    return found


def _moment(state: State, kind: str, name: str, shape: torch.Size) -> Tensor:
    tensors = state.kinds[kind]
    if tensors.shape(name) != tuple(shape):
        raise TritterError(
            f"{tensors.folder}: {name} has shape {list(tensors.shape(name))}; the model expects "
            f"{list(shape)}."
        )
    value = tensors.get(name)
    is_moment = value.is_floating_point() and is_finite(value)
    if not is_moment or (kind == MOMENTS[1] and bool((value < 0).any())):
        raise TritterError(f"{tensors.folder}: {name} is not a valid Adam moment.")
    return value


def start_from(
    optimizer: torch.optim.Optimizer, model: nn.Module, moments: Mapping[str, Moments]
) -> None:
    """Initialise an Adam with moments by parameter name; other parameters start without."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, values in moments.items():
        parameter = model.get_parameter(name)
        assert parameter in trained, f"{name} is frozen"
        put_moments(optimizer, parameter, values)


def put_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    moments: Moments,
    *,
    before: eight_bit.State | None = None,
) -> None:
    """Set an Adam's moments of a parameter in its groups.

    Args:
        optimizer: An Adam of torch or bitsandbytes.
        parameter: Parameter in one of its groups.
        moments: Moments and step count.
        before: Optimizer state of the parameter that this one replaces, if known. An 8-bit
            optimizer uses it to keep the exact codes of unchanged blocks.
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
    optimizer: torch.optim.Optimizer, model: nn.Module, stored_tensors: Iterable[StoredTensor]
) -> dict[str, Moments]:
    """Return an Adam's moments by logical name.

    Args:
        optimizer: An Adam of torch or bitsandbytes.
        model: Live model that it trains.
        stored_tensors: Parameters to read.

    Returns:
        Logical name → moments; tensors without moments are absent.

    Raises:
        TritterError: The optimizer state is not that of Adam.
    """
    found: dict[str, Moments] = {}
    for stored in stored_tensors:
        parameter = model.get_parameter(stored.name)
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if eight_bit.is_of_bitsandbytes(optimizer):
            state = eight_bit.read(state, parameter.device)
        missing = {*MOMENTS, "step"} - set(state)
        if missing:
            raise TritterError(
                f"{type(optimizer).__name__} has no {', '.join(sorted(missing))} for "
                f"{stored.name}. Tritter can carry the moments of Adam and AdamW, including their "
                "8-bit variants."
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
) -> dict[str, Moments]:
    """Return an Adam's moments after a change, by the names of the new parameters.

    A parameter whose state is reset has no moments: the optimizer creates them at its first step,
    with a new step count.

    Args:
        optimizer: Optimizer of `model`.
        model: Live model before the change.
        change: Change of the model.
        stored_tensors: Parameters after the change to return moments for.
        policy: Policy for the moments, as in `tritter.core.parameter_map.carry`.

    Raises:
        TritterError: The optimizer state is not that of Adam.
    """
    origins = {change.tensors[part.tensor.name].origin for s in stored_tensors for part in s.parts}
    # Only these: reading 8-bit moments needs eight bytes per parameter
    read = [s for s in change.before if any(part.tensor.name in origins for part in s.parts)]
    old = moments_by_name(optimizer, model, read)
    moved: dict[str, Moments] = {}

    def moved_kind(name: str, kind: str) -> Tensor:
        return mapped_state(
            change.tensors[name], STATE_KINDS[kind], lambda n: old[n][kind], policy=policy
        )

    found = {}
    for stored in stored_tensors:
        for name in (part.tensor.name for part in stored.parts):
            tensor_map = change.tensors[name]
            rule = STATE_KINDS[MOMENTS[0]]
            if has_state(tensor_map, rule, old.__contains__, policy=policy):
                step = old[tensor_map.origin or ""]["step"].clone()
                moved[name] = {kind: moved_kind(name, kind) for kind in MOMENTS} | {"step": step}
        if any(part.tensor.name in moved for part in stored.parts):
            found[stored.name] = packed_moments(stored, moved)
    return found


def packed_moments(stored: StoredTensor, state: Mapping[str, Moments]) -> Moments:
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


class MomentKeeper(Callback):
    """Save the final moments of a training run.

    Args:
        folder: Folder to replace; its `state/` contains the moments.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        model = pl_module.model
        assert isinstance(model, nn.Module)
        stored_tensors = live_layout(model)
        tensors = [part.tensor for stored in stored_tensors for part in stored.parts]
        by_name = moments_by_name(trainer.optimizers[0], model, stored_tensors)
        saved = {t.disk_name: by_name[t.name] for t in tensors if t.name in by_name}
        steps = {name: int(moments["step"]) for name, moments in saved.items()}
        # The step count of most parameters; others are listed by name
        step = Counter(steps.values()).most_common(1)[0][0] if steps else 0
        with atomic_folder(self._folder, overwrite=True) as temporary:
            write_state(
                temporary,
                {
                    kind: TensorStream.of((name, m[kind].cpu()) for name, m in saved.items())
                    for kind in MOMENTS
                },
                step=step,
                other_steps={name: own for name, own in steps.items() if own != step},
            )
