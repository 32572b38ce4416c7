"""Some experts of a layer on their own, so that the others can be frozen.

A stock model holds all experts of a layer in one parameter, which is trained whole or not at all:
with a gradient of zero its old part would still move under weight decay and old momentum. Here
the parameter is taken apart into that of the base's experts, which needs no gradient and so stays
out of the optimizer, and that of the new ones; each forward pass puts them together. Cost: a copy
of the experts' weights in every forward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritter.errors import RequestError
from tritter.families import layout
from tritter.models import config_of
from tritter.stock_routers import Routing
from tritter.training.parameters import BASE, NEW

_HANDLES = "separate_experts_handles"


class SeparateExperts:
    """The experts of a model, taken apart at one index.

    Args:
        model: a stock model with experts, which is changed.
        first_new: experts from this one on are new.

    Raises:
        RequestError: the model has no experts, or none on one of the sides.
    """

    def __init__(self, model: nn.Module, first_new: int) -> None:
        routing = Routing.of(model)
        if routing is None:
            raise RequestError("adaptation: the model has no experts.")
        if not 0 < first_new < routing.num_experts:
            raise RequestError(
                f"adaptation: new experts from {first_new} on; of {routing.num_experts} experts "
                f"allowed is 1 to {routing.num_experts - 1}."
            )
        self.first_new = first_new
        self.names = shared_names(model)
        self._attributes: dict[nn.Module, list[str]] = {}
        for name in self.names:
            module, _, attribute = name.rpartition(".")
            self._attributes.setdefault(model.get_submodule(module), []).append(attribute)

    def take_apart(self) -> None:
        """Replace each shared parameter by its two parts; the base's needs no gradient."""
        for module, attributes in self._attributes.items():
            for attribute in attributes:
                _split(module, attribute, self.first_new)
            _join_while_computing(module, attributes)

    def join(self) -> None:
        """Put the parts together again; the base's values are those from before, bit for bit."""
        for module, attributes in self._attributes.items():
            for handle in module.__dict__.pop(_HANDLES):
                handle.remove()
            for attribute in attributes:
                _unite(module, attribute)

    def follow(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values by parameter name for the parts in place of the whole."""
        followed = dict(values)
        for name in self.names:
            if name in followed:
                whole = followed.pop(name)
                followed[name + BASE] = whole[: self.first_new]
                followed[name + NEW] = whole[self.first_new :]
        return followed


@contextmanager
def separate_experts(model: nn.Module, first_new: int) -> Iterator[SeparateExperts]:
    """Take the experts of a model apart inside the block, and join them whatever happens.

    Raises:
        RequestError: the model has no experts, or none on one of the sides.
    """
    parts = SeparateExperts(model, first_new)
    parts.take_apart()
    try:
        yield parts
    finally:
        parts.join()


def shared_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that all experts of a layer share."""
    config = config_of(model)
    stored = layout(config, "live")
    return tuple(tensor.name for tensor in stored if tensor.is_of_experts)


def _split(module: nn.Module, attribute: str, first_new: int) -> None:
    whole = module.get_parameter(attribute)
    delattr(module, attribute)
    base = nn.Parameter(whole.detach()[:first_new].clone(), requires_grad=False)
    new = nn.Parameter(whole.detach()[first_new:].clone(), requires_grad=whole.requires_grad)
    module.register_parameter(attribute + BASE, base)
    module.register_parameter(attribute + NEW, new)


def _unite(module: nn.Module, attribute: str) -> None:
    parts = [module.get_parameter(attribute + ending) for ending in (BASE, NEW)]
    for ending in (BASE, NEW):
        delattr(module, attribute + ending)
    whole = torch.cat([part.detach() for part in parts])
    requires_grad = any(part.requires_grad for part in parts)
    module.register_parameter(attribute, nn.Parameter(whole, requires_grad=requires_grad))


def _join_while_computing(module: nn.Module, attributes: Sequence[str]) -> None:
    """Let a module find the whole under its old name during its forward pass."""
    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(partial(_put_together, tuple(attributes))),
        module.register_forward_hook(partial(_forget, tuple(attributes)), always_call=True),
    ]
    module.__dict__[_HANDLES] = handles


def _put_together(attributes: Sequence[str], module: nn.Module, arguments: Any) -> None:
    for attribute in attributes:
        # Tensors that are no parameters where gradients are taken of a functional call
        parts = (getattr(module, attribute + ending) for ending in (BASE, NEW))
        setattr(module, attribute, torch.cat(tuple(parts)))


def _forget(attributes: Sequence[str], module: nn.Module, arguments: Any, output: Any) -> None:
    for attribute in attributes:
        module.__dict__.pop(attribute, None)
