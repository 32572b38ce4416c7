"""Which weights of a mixture of experts are trained; old and new experts as two parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from tritter.core.families import LogicalTensor
from tritter.core.models import model_of
from tritter.training.parameters import BASE, NEW, live_layout
from tritter.transform import declared

_HANDLES = "separate_experts_handles"


@contextmanager
def only_trainable(model: nn.Module, is_trained: Callable[[LogicalTensor], bool]) -> Iterator[None]:
    """Context manager in which only some tensors of a live model need gradients.

    Args:
        model: the model.
        is_trained: returns True for a trained tensor; a parameter that stores several needs a
            gradient only if all of them do.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = {stored.name: stored for stored in live_layout(model)}
    try:
        for name, parameter in model.named_parameters():
            stored = known.get(name) or declared(name, tuple(parameter.shape))
            parameter.requires_grad_(all(is_trained(part.tensor) for part in stored.parts))
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


# The experts of a layer split into two parameters, so that one part can be frozen.
#
# A stock model stores all experts of a layer in one parameter. Zeroing the gradient of its old part
# is not enough: weight decay and momentum would still move it. Here the parameter is split into
# that of the base's experts, which needs no gradient and is not in the optimizer, and that of the
# new ones; each forward pass concatenates them. Cost: a copy of the experts' weights per forward.


class SeparateExperts(AbstractContextManager["SeparateExperts"]):
    """Context manager that splits the experts of a model at one index, and joins them on exit.

    Args:
        model: a stock model with experts, which is changed.
        first_new: index of the first new expert.
    """

    def __init__(self, model: nn.Module, first_new: int) -> None:
        self.first_new = first_new
        # Of the parameters that all experts of a layer share
        self.names = tuple(p.name for p in model_of(model).layout("live") if p.is_of_experts)
        self._attributes: dict[nn.Module, list[str]] = {}
        for name in self.names:
            module, _, attribute = name.rpartition(".")
            self._attributes.setdefault(model.get_submodule(module), []).append(attribute)

    def __enter__(self) -> Self:
        """Split each shared parameter in two; the base's part needs no gradient."""
        for module, attributes in self._attributes.items():
            for attribute in attributes:
                whole = module.get_parameter(attribute)
                delattr(module, attribute)
                base, new = (part.clone() for part in whole.detach().tensor_split([self.first_new]))
                module.register_parameter(attribute + BASE, nn.Parameter(base, requires_grad=False))
                module.register_parameter(attribute + NEW, nn.Parameter(new, whole.requires_grad))
            # During the forward pass the module has the whole tensor under its old name
            before = partial(_concatenate_parts, tuple(attributes))
            after = partial(_drop_whole, tuple(attributes))
            module.__dict__[_HANDLES] = [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        """Concatenate the parts again; the base's values are unchanged, bit for bit."""
        for module, attributes in self._attributes.items():
            for handle in module.__dict__.pop(_HANDLES):
                handle.remove()
            for attribute in attributes:
                parts = [module.get_parameter(attribute + ending) for ending in (BASE, NEW)]
                for ending in (BASE, NEW):
                    delattr(module, attribute + ending)
                whole = torch.cat([part.detach() for part in parts])
                needs_grad = any(part.requires_grad for part in parts)
                module.register_parameter(attribute, nn.Parameter(whole, needs_grad))

    def follow(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values by parameter name, split like the parameters."""
        followed = dict(values)
        for name in self.names:
            if name in followed:
                whole = followed.pop(name)
                followed[name + BASE] = whole[: self.first_new]
                followed[name + NEW] = whole[self.first_new :]
        return followed


def _concatenate_parts(attributes: Sequence[str], module: nn.Module, arguments: Any) -> None:
    for attribute in attributes:
        # In a functional call these are tensors, not parameters
        parts = (getattr(module, attribute + ending) for ending in (BASE, NEW))
        setattr(module, attribute, torch.cat(tuple(parts)))


def _drop_whole(attributes: Sequence[str], module: nn.Module, arguments: Any, output: Any) -> None:
    for attribute in attributes:
        module.__dict__.pop(attribute, None)
