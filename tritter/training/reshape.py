"""The shapes of a live model: changed once, written down, and made again where weights come back.

A journal says what a model became, in plain data. Weights of a changed model return to one that
is not changed when a training is resumed, and when worker processes hand them over: the shapes are
made again from the journal before anything is loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritter.errors import RequestError, TritterError
from tritter.expand import Change
from tritter.families import Config, layout, on_disk
from tritter.models import config_of, set_parameter, state_sizes, weightless_model

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
        state_sizes(module)


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
            _adopt_sizes(held[name], known[name], stock)
    changed = {key: value for key, value in on_disk(config).items() if own.get(key) != value}
    for stated in {id(c): c for m in held.values() if (c := getattr(m, "config", None))}.values():
        for key, value in changed.items():
            setattr(stated, key, value)


def _adopt_sizes(module: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Set on a module what stands otherwise in two stock modules, plain values and buffers."""
    for key, value in vars(after).items():
        if isinstance(value, bool | int | float | str | tuple) and vars(before).get(key) != value:
            setattr(module, key, value)
    for key, buffer in after.named_buffers(recurse=False):
        old = getattr(before, key)
        if old.shape != buffer.shape or not torch.equal(old, buffer):
            setattr(module, key, buffer.to(getattr(module, key).device))
