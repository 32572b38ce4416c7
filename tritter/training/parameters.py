"""The parameters of a live model: their layout and reshaping.

Separate parameters for appended experts are included in the layout of the model's family.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor

from tritter.core.families import (
    Adapters,
    Config,
    Flops,
    Model,
    StoredTensor,
    on_disk,
    training_flops,
)
from tritter.core.families.layout import Part
from tritter.core.models import (
    model_of,
    set_parameter,
    uninitialised_model,
    update_linear_sizes,
)
from tritter.errors import RequestError, TritterError
from tritter.transform import Change

BASE, NEW = "_base", "_new"  # suffixes of a parameter split into old and appended experts
WRAPPED = ".base_layer"  # PEFT's name of a linear layer with adapters
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of a sharded model (FSDP2)


def live_layout(model: nn.Module) -> tuple[StoredTensor, ...]:
    """Return the layout of a live model's parameters in forward order, without adapters."""
    parameters = dict(model.named_parameters())
    found: list[StoredTensor] = []
    for stored in model_of(model).layout("live"):
        owner, _, last = stored.name.rpartition(".")
        wrapped = f"{owner}{WRAPPED}.{last}"
        if stored.name in parameters:
            found.append(stored)
        elif wrapped in parameters:
            found.append(replace(stored, name=wrapped))
        elif stored.name + BASE in parameters:  # otherwise a buffer
            num_base = len(parameters[stored.name + BASE])
            found += [_part_of(stored, BASE, 0, num_base), _part_of(stored, NEW, num_base, None)]
    return tuple(found)


def disk_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, value) for values by parameter name of a live model."""
    shapes = {name: each.shape for name, each in model.named_parameters(remove_duplicate=False)}
    for name, value in values.items():
        if shapes.get(name) != value.shape:
            reason = "but the model has no parameter of this name and shape"
            raise TritterError(f"a method returned state {list(value.shape)} of {name}, {reason}.")
    for stored in live_layout(model):
        if stored.name in values:
            for tensor, value in stored.unpack(values[stored.name].detach().cpu()):
                yield tensor.disk_name, value


def _part_of(stored: StoredTensor, ending: str, first: int, end: int | None) -> StoredTensor:
    """Return the part of a parameter for the experts from `first` up to `end`."""
    parts = []
    for part in stored.parts:
        expert, rows = part.index
        assert isinstance(expert, int)
        if first <= expert and (end is None or expert < end):
            parts.append(Part(part.tensor, (expert - first, rows)))
    shape = ((end or stored.shape[0]) - first, *stored.shape[1:])
    return replace(stored, name=stored.name + ending, shape=shape, parts=tuple(parts))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a live model's state dict, with split experts joined."""
    state = model.state_dict()
    for name in [name.removesuffix(BASE) for name in state if name.endswith(BASE)]:
        state[name] = torch.cat([state.pop(name + BASE), state.pop(name + NEW)])
    return state


def flops_of_sequence(
    model: nn.Module, *, routed_to: Collection[int] | None = None, adapters: Adapters | None = None
) -> Flops:
    """Return the FLOPs of a step on one sequence with the current trainable parameters.

    Args:
        model: Live model.
        routed_to: Experts that share the tokens evenly. Default: all.
        adapters: Adapters of the model.
    """
    trained = trained_tensors(model)
    return training_flops(
        model_of(model),
        is_trained=lambda tensor: tensor.name in trained,
        routed_to=routed_to,
        adapters=adapters,
    )


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the logical names of the trainable tensors of a live model."""
    return frozenset(
        part.tensor.name
        for stored in live_layout(model)
        if model.get_parameter(stored.name).requires_grad
        for part in stored.parts
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a sharded one; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshape(
    model: nn.Module, config: Config, values: Mapping[str, Tensor], *, removed: Sequence[str] = ()
) -> None:
    """Replace parameters of a live model and update its modules to a config; ties are kept.

    Args:
        model: Live model.
        config: New config; empty for a module without a known family.
        values: Parameter name → value of new and changed parameters.
        removed: Names of parameters to remove.
    """
    like = next(model.parameters())
    if config:
        _adopt_config(model, config)
    for name in removed:
        owner, key = _parent_module(model, name)
        if isinstance(owner, nn.ParameterDict):  # it also keeps a list of its names
            del owner[key]
        else:
            delattr(owner, key)
    existing = dict(model.named_parameters())
    for name, value in values.items():
        if name in existing:
            set_parameter(model, name, value.to(existing[name]))
        else:
            owner, key = _parent_module(model, name)
            parameter = nn.Parameter(value.to(like))
            if isinstance(owner, nn.ParameterDict):
                owner[key] = parameter
            else:
                owner.register_parameter(key, parameter)
    if config:
        model.tie_weights()  # type: ignore[operator]
    for module in model.modules():  # they may be narrower than in the stock model
        update_linear_sizes(module)


class Journal(list[dict[str, Any]]):
    """Changes of a live model, an entry each, as plain data.

    Weights of a changed model are loaded into an unchanged one when a run is resumed and when
    worker processes return them. The journal is replayed first to restore the shapes.
    """

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> "Journal":
        """Return a copy of a journal, such as that of a saved state."""
        return cls(dict(entry) for entry in entries)

    def record(self, change: Change, *, step: int, reason: str) -> None:
        """Add the entry of a change."""
        config = change.model.config if change.model else {}
        known = {s.name for s in change.model.layout("live")} if change.model else ()
        entry = {
            "step": step,
            "reason": reason,
            "config": dict(config),
            "map_digest": change.digest(),
            "others": {s.name: list(s.shape) for s in change.after if s.name not in known},
            "removed": list(change.removed),
        }
        self.append(entry)

    def digest(self, reason: str) -> str:
        """Return the SHA-256 over the maps of all changes with a reason."""
        maps = (entry["map_digest"] for entry in self if entry["reason"] == reason)
        return sha256("".join(maps).encode()).hexdigest()

    def replay(self, model: nn.Module) -> None:
        """Give a model the parameter shapes after all entries, with arbitrary values."""
        config: Config = self[-1]["config"]
        layout = Model(config).layout("live") if config else ()
        shapes = {stored.name: stored.shape for stored in layout}
        removed: set[str] = set()
        for entry in self:
            shapes |= {name: tuple(shape) for name, shape in entry["others"].items()}
            removed = (removed | set(entry["removed"])) - set(entry["others"])
        old = dict(model.named_parameters())
        values = {
            name: torch.zeros(shape)
            for name, shape in shapes.items()
            if name not in removed and (name not in old or tuple(old[name].shape) != tuple(shape))
        }
        reshape(model, config, values, removed=[name for name in removed if name in old])


def _parent_module(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module of a parameter, and its name in that module."""
    owner, _, key = name.rpartition(".")
    try:
        return model.get_submodule(owner), key
    except AttributeError as error:
        raise TritterError(
            f"{name}: the model has no module {owner}. Add the modules of new parameters that the "
            "family does not have before the change."
        ) from error


def _adopt_config(model: nn.Module, config: Config) -> None:
    """Update the modules of a live model to another config; the caller replaces parameters.

    Changed attributes (`out_features`, buffers) are set and missing modules are added. Hooks,
    modes and wrapper modules are unchanged.
    """
    own = model_of(model).on_disk.config  # the weights define the widths of the layers
    before, after = uninitialised_model(own), uninitialised_model(config)
    live, known = dict(model.named_modules()), dict(before.named_modules())
    for name, stock in after.named_modules():
        if name in known and type(known[name]) is not type(stock):
            raise RequestError(
                f"{name or 'the model'} would be {type(stock).__name__} instead of "
                f"{type(known[name]).__name__}; expand between two training runs instead."
            )
    for name, stock in after.named_modules():
        parent, _, last = name.rpartition(".")
        if name not in known and parent in known:
            live[parent].add_module(last, stock.to(next(model.parameters())).train(model.training))
        elif name in known and name in live:
            module, old = live[name], known[name]
            for key, value in vars(stock).items():
                is_plain = isinstance(value, bool | int | float | str | tuple)
                if is_plain and vars(old).get(key) != value:
                    setattr(module, key, value)
            for key, buffer in stock.named_buffers(recurse=False):
                was = getattr(old, key)
                if was.shape != buffer.shape or not torch.equal(was, buffer):
                    setattr(module, key, buffer.to(getattr(module, key).device))
    changed = {key: value for key, value in on_disk(config).items() if own.get(key) != value}
    top: Any = model.config
    parts: dict[str, Any] = {  # of a multimodal model
        key: part for key in changed if hasattr(part := getattr(top, key, None), "to_diff_dict")
    }
    each: Any
    for each in {id(c): c for m in live.values() if (c := getattr(m, "config", None))}.values():
        if type(each) is type(top):
            each.update({key: value for key, value in changed.items() if key not in parts})
        for key, part in parts.items():
            if type(each) is type(part):
                each.update(changed[key])
