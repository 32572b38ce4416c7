"""Changes of a mixture's parameters when experts are added, widened, merged and removed.

Each is a change of parameters by name. Moments and all other state are mapped with them, and all
other parameters are unchanged, bit for bit.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from tritter.core.families import StoredTensor
from tritter.core.parameter_map import AxisFactor, Fill, TensorMap
from tritter.core.parameter_map.tensor_map import NO_SOURCE
from tritter.errors import RequestError
from tritter.methods.experts.mixture import ExpertMixture
from tritter.transform import Change
from tritter.transform.change import declared


def spawn_change(mixture: ExpertMixture, name: str) -> Change:
    """Return the change that adds an expert, whose adapter is already on the model.

    Its router rows are zero.

    Args:
        mixture: the mixture.
        name: the mixture's last expert.
    """
    parts = _Parts()
    for key, parameter in mixture.lora.parameters(name).items():
        values = parameter.detach().clone()
        parts.create(key, tuple(values.shape), Fill(kind="given", values=values))
    parts.follow_routers(mixture, [*range(len(mixture.names) - 1), NO_SOURCE])
    return parts.change()


def evict_change(mixture: ExpertMixture, name: str) -> Change:
    """Return the change that removes an expert's weights, with its router rows.

    Close its adapter afterwards.

    Raises:
        RequestError: there is no expert of this name, or no other one.
    """
    mixture.check_removable(name)
    parts = _Parts()
    for key, parameter in mixture.lora.parameters(name).items():
        parts.remove(key, tuple(parameter.shape))
    parts.follow_routers(mixture, [n for n, each in enumerate(mixture.names) if each != name])
    return parts.change()


def widen_change(mixture: ExpertMixture, name: str, rank: int, *, seed: int) -> Change:
    """Return the change that gives an expert a larger rank; the function is preserved.

    New rows of A are random and new columns of B are zero (reversed in an embedding), as PEFT
    initialises them. α / r is kept; call `mixture.lora.set_rank` afterwards.

    Raises:
        RequestError: the rank is not larger than the current one.
    """
    model, own = mixture.model, mixture.lora.shape(name).rank
    if rank <= own:
        raise RequestError(f"{name} already has rank {own}; the new rank {rank} must be larger.")
    source = torch.cat([torch.arange(own), torch.full((rank - own,), NO_SOURCE)])
    axis, parts = _plain_factor(source), _Parts()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in mixture.lora.parameters(name).items():
        if ".lora_A." in key:
            bound = sqrt(
                1 / parameter.shape[1]
            )  # Kaiming uniform initialisation with a = √5, as in PEFT
            drawn = torch.rand(rank - own, parameter.shape[1], generator=generator)
            fill = Fill(kind="given", values=(2 * drawn - 1) * bound)
            parts.follow(model, key, (axis, None), fill)
        elif ".lora_embedding_A." in key:
            parts.follow(model, key, (axis, None), Fill())
        elif ".lora_embedding_B." in key:
            drawn = torch.randn(parameter.shape[0], rank - own, generator=generator)
            parts.follow(model, key, (None, axis), Fill(kind="given", values=drawn))
        else:
            parts.follow(model, key, (None, axis), Fill())
    return parts.change()


class _Parts:
    """A change under construction."""

    def __init__(self) -> None:
        self._before: list[StoredTensor] = []
        self._after: list[StoredTensor] = []
        self._maps: dict[str, TensorMap] = {}

    def create(self, name: str, shape: tuple[int, ...], fill: Fill) -> None:
        self._after.append(declared(name, shape))
        self._maps[name] = TensorMap.created(shape, fill)

    def remove(self, name: str, shape: tuple[int, ...]) -> None:
        self._before.append(declared(name, shape))

    def follow(
        self, model: nn.Module, name: str, axes: tuple[AxisFactor | None, ...], fill: Fill
    ) -> None:
        before = tuple(model.get_parameter(name).shape)
        sizes = zip(before, axes, strict=True)
        after = tuple(n if axis is None else len(axis.index) for n, axis in sizes)
        self._before.append(declared(name, before))
        self._after.append(declared(name, after))
        self._maps[name] = TensorMap(source=name, axes=axes, fill=fill)

    def follow_routers(self, mixture: ExpertMixture, source: Sequence[int]) -> None:
        axis = _plain_factor(torch.tensor(source))
        for router in mixture.router_names():
            self.follow(mixture.model, f"{router}.weight", (axis, None), Fill())
            self.follow(mixture.model, f"{router}.bias", (axis,), Fill())

    def change(self) -> Change:
        return Change(
            model=None, before=tuple(self._before), after=tuple(self._after), tensors=self._maps
        )


def _plain_factor(source: Tensor) -> AxisFactor:
    """Return the factor of an axis whose coordinates are kept, dropped or new, without scaling."""
    kept = (source != NO_SOURCE).double()
    return AxisFactor(source, kept, kept)
