"""The parameters of a live model: what each holds, in parts on processes, in other shapes.

Experts that stand apart are included, as the model's family knows them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tritter.core.families import (
    NO_ADAPTERS,
    Adapters,
    Config,
    Flops,
    StoredTensor,
    layout,
    on_disk,
    training_flops,
)
from tritter.core.families.layout import Part
from tritter.core.models import (
    backbone_of,
    config_of,
    set_parameter,
    update_linear_sizes,
    weightless_model,
)
from tritter.errors import RequestError, TritterError
from tritter.transform import Change

BASE, NEW = "_base", "_new"  # what the two parts of a parameter end in whose experts stand apart
WRAPPED = ".base_layer"  # what PEFT calls a linear layer that it put adapters on


def live_layout(model: nn.Module) -> tuple[StoredTensor, ...]:
    """Return what each parameter of a live model but adapters' holds, in forward order."""
    config, parameters = config_of(model), dict(model.named_parameters())
    places: list[StoredTensor] = []
    for stored in layout(config, "live"):
        owner, _, last = stored.name.rpartition(".")
        wrapped = f"{owner}{WRAPPED}.{last}"
        if stored.name in parameters:
            places.append(stored)
        elif wrapped in parameters:
            places.append(replace(stored, name=wrapped))
        else:
            num_base = len(parameters[stored.name + BASE])
            places += [_part_of(stored, BASE, 0, num_base), _part_of(stored, NEW, num_base, None)]
    return tuple(places)


def disk_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, value) for values by name of a live model's parameters."""
    for stored in live_layout(model):
        if stored.name in values:
            for tensor, value in stored.unpack(values[stored.name].detach().cpu()):
                yield tensor.disk_name, value


def _part_of(stored: StoredTensor, ending: str, first: int, end: int | None) -> StoredTensor:
    """Return the parameter that holds the experts from `first` on, up to `end`."""
    parts = []
    for part in stored.parts:
        expert, rows = part.index
        assert isinstance(expert, int)
        if first <= expert and (end is None or expert < end):
            parts.append(Part(part.tensor, (expert - first, rows)))
    num_experts = (end or stored.shape[0]) - first
    shape = (num_experts, *stored.shape[1:])
    return replace(stored, name=stored.name + ending, shape=shape, parts=tuple(parts))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a live model's state dict, in which no experts stand apart."""
    state = model.state_dict()
    for name in [name.removesuffix(BASE) for name in state if name.endswith(BASE)]:
        state[name] = torch.cat([state.pop(name + BASE), state.pop(name + NEW)])
    return state


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of a step, whatever it reads.

    Args:
        sequence: of each sequence, or document where models read these apart.
        besides: of the step, of all processes together.
    """

    sequence: Flops
    besides: float = 0.0

    def of(self, lengths: Mapping[int, int]) -> float:
        """Return the FLOPs of a step on sequences, by length how many of all processes."""
        return self.sequence.of_all(lengths) + self.besides


def flops_of_sequence(
    model: nn.Module,
    *,
    routed_to: Collection[int] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:
    """Return the FLOPs of a step on one sequence, with what needs a gradient now.

    Args:
        routed_to: the experts that share the tokens evenly. Default: all.
        adapters: what stands beside the model's own tensors.
    """
    config, trained = config_of(model), trained_tensors(model)
    return training_flops(
        config,
        is_trained=lambda tensor: tensor.name in trained,
        routed_to=routed_to,
        adapters=adapters,
    )


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the logical names of what needs a gradient in a live model."""
    return frozenset(
        part.tensor.name
        for stored in live_layout(model)
        if model.get_parameter(stored.name).requires_grad
        for part in stored.parts
    )


# A model of which each of several processes holds a part (FSDP2).
#
# Each decoder layer is gathered before it computes and let go behind it, so that a process holds
# its part of all layers and the whole of one.

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Put a part of every parameter on each process of a mesh, decoder layer by decoder layer.

    What stands in no layer, embeddings that may be tied among it, is gathered together.
    """
    lists = (each for each in backbone_of(model).children() if isinstance(each, nn.ModuleList))
    for layer in next(lists):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Say whether parts of a model lie on other processes."""
    return isinstance(model, FSDPModule)


def let_go(model: nn.Module) -> None:
    """Let a process hold its part alone after passes that no backward pass followed."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gather(model: nn.Module, *, is_kept: bool) -> None:
    """Let a model that is no longer trained hold whole weights, on the CPU; all processes ask.

    Args:
        is_kept: whether this process is one that wants them.
    """
    names = [name for name, _ in model.named_parameters()]
    whole: Mapping[str, Any] = get_model_state_dict(model, options=WHOLE)
    if not is_kept:
        return
    for name in names:
        set_parameter(model, name, whole[name])
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():  # `to` asks for the parts that were there
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.cpu())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose parts lie on several processes, all of which ask; others as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# The shapes of a live model: changed once, written down, and made again where weights come back.
#
# A journal says what a model became, in plain data. Weights of a changed model return to one that
# is not changed when a training is resumed, and when worker processes hand them over: the shapes
# are made again from the journal before anything is loaded.

Entry = dict[str, Any]


def reshape(
    model: nn.Module, config: Config, values: Mapping[str, Tensor], *, removed: Sequence[str] = ()
) -> None:
    """Give a live model other parameters, and let its modules follow a config; ties are kept.

    Args:
        config: empty: `model` is a module that no family knows, and has none.
        values: by parameter name, of those that are new or not what they were.
        removed: names of parameters that go.

    Raises:
        RequestError: the config needs modules of another class.
        TritterError: there is no module for a parameter to stand in.
    """
    like = next(model.parameters())
    if config:
        _adopt_config(model, config)
    for name in removed:
        owner, key = _place(model, name)
        if isinstance(owner, nn.ParameterDict):  # which keeps a list of its names besides
            del owner[key]
        else:
            delattr(owner, key)
    held = dict(model.named_parameters())
    for name, value in values.items():
        if name in held:
            set_parameter(model, name, value.to(held[name]))
        else:
            owner, key = _place(model, name)
            parameter = nn.Parameter(value.to(like))
            if isinstance(owner, nn.ParameterDict):
                owner[key] = parameter
            else:
                owner.register_parameter(key, parameter)
    if config:
        model.tie_weights()  # type: ignore[operator]
    for module in model.modules():  # which may be narrower than stock
        update_linear_sizes(module)


def entry_of(change: Change, *, step: int, reason: str) -> Entry:
    """Return what the journal says of a change, in plain data."""
    known = _stock_shapes(change.config)
    return {
        "step": step,
        "reason": reason,
        "config": dict(change.config),
        "map_digest": change.digest(),
        "others": {s.name: list(s.shape) for s in change.after if s.name not in known},
        "removed": list(change.removed),
    }


def replay(model: nn.Module, entries: Sequence[Entry]) -> None:
    """Give a model the shapes that journal entries say; what it holds there is arbitrary."""
    config: Config = entries[-1]["config"]
    shapes = _stock_shapes(config)
    removed: set[str] = set()
    for entry in entries:
        shapes |= {name: tuple(shape) for name, shape in entry["others"].items()}
        removed = (removed | set(entry["removed"])) - set(entry["others"])
    held = dict(model.named_parameters())
    values = {
        name: torch.zeros(shape)
        for name, shape in shapes.items()
        if name not in removed and (name not in held or tuple(held[name].shape) != tuple(shape))
    }
    reshape(model, config, values, removed=[name for name in removed if name in held])


def _stock_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a family states; none where a change is of parts that none knows."""
    return {stored.name: stored.shape for stored in layout(config, "live")} if config else {}


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that a parameter belongs to, and what it is called there."""
    owner, _, key = name.rpartition(".")
    try:
        return model.get_submodule(owner), key
    except AttributeError as error:
        raise TritterError(
            f"{name}: the model has no module {owner}; whoever adds parameters that the family "
            "does not know makes their modules before."
        ) from error


def _adopt_config(model: nn.Module, config: Config) -> None:
    """Let a live model's modules be those of another config; its parameters are the caller's.

    What a stock class would hold otherwise (`out_features`, buffers) is set, and modules that it
    would have besides are added. All else stays as it is: hooks, modes, what was put in between.

    Raises:
        RequestError: some module would be of another class.
    """
    own = on_disk(config_of(model))  # widths by layer are stated by the weights themselves
    before, after = weightless_model(own), weightless_model(config)
    held, known = dict(model.named_modules()), dict(before.named_modules())
    for name, stock in after.named_modules():
        if name in known and type(known[name]) is not type(stock):
            raise RequestError(
                f"{name or 'the model'} would be {type(stock).__name__} instead of "
                f"{type(known[name]).__name__}; that is for between two trainings."
            )
    for name, stock in after.named_modules():
        parent, _, last = name.rpartition(".")
        if name not in known and parent in known:
            like = next(model.parameters())
            held[parent].add_module(last, stock.to(like).train(model.training))
        elif name in known and name in held:
            module, old = held[name], known[name]
            for key, value in vars(stock).items():
                is_plain = isinstance(value, bool | int | float | str | tuple)
                if is_plain and vars(old).get(key) != value:
                    setattr(module, key, value)
            for key, buffer in stock.named_buffers(recurse=False):
                was = getattr(old, key)
                if was.shape != buffer.shape or not torch.equal(was, buffer):
                    setattr(module, key, buffer.to(getattr(module, key).device))
    changed = {key: value for key, value in on_disk(config).items() if own.get(key) != value}
    for stated in {id(c): c for m in held.values() if (c := getattr(m, "config", None))}.values():
        for key, value in changed.items():
            setattr(stated, key, value)
