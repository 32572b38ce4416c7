"""How old neurons are, and larger updates for the young ones.

The update is scaled, not the gradient: Adam does not see how large a gradient is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritter.growth.places import FfnPlace

OLD = -(2**31)  # when neurons were born that stood there before


class Maturity:
    """When each neuron was born.

    Args:
        age: steps after which a neuron is mature.
        factor: on the updates of young ones.
    """

    def __init__(self, *, age: int, factor: float) -> None:
        self._age = age
        self._factor = factor
        self._latest = OLD  # step of the last birth
        self._born: dict[int, Tensor] = {}  # layer → int64 [F], the steps taken then
        self._before: dict[tuple[str, int], Tensor] = {}
        self._young: dict[int, Tensor] = {}
        self._measured: tuple[FfnPlace, ...] = ()
        self._whole: dict[str, Tensor] = {}
        self.update_norms: dict[str, float] = {}  # of the last step that was measured
        self._sums: dict[str, list[float]] = {}  # of all of them: sum, number

    def begin(self, widths: Mapping[int, int]) -> None:
        """Take the neurons of a model that begins for mature."""
        self._born = {n: torch.full((w,), OLD, dtype=torch.int64) for n, w in widths.items()}

    def grow(self, layer: int, places: Tensor, width: int, *, step: int) -> None:
        """Let neurons be born."""
        old = self._born[layer]
        self._born[layer] = torch.cat([old, old.new_full((width - len(old),), step)])
        self._born[layer][places] = step
        self._latest = max(self._latest, step)

    def young(self, layer: int, step: int) -> Tensor:
        """Return which neurons of a layer are not mature after so many steps, int64 [k]."""
        return (step - self._born[layer] < self._age).nonzero().squeeze(1)

    def ages(self, step: int) -> list[int]:
        """Return the ages of all young neurons, in steps."""
        born = (self._born[layer][self.young(layer, step)] for layer in self._born)
        return [step - each for layer in born for each in layer.tolist()]

    @torch.no_grad()
    def before_update(
        self, model: nn.Module, places: Sequence[FfnPlace], step: int, *, is_measured: bool = False
    ) -> None:
        """Keep what young neurons are, right before the optimizer's step.

        Args:
            step: steps taken.
            is_measured: find `update_norms`, of the layers that have young neurons.
        """
        self._before, self._young, self._measured = {}, {}, ()
        if step - self._latest >= self._age:
            return
        for place in places:
            if len(young := self.young(place.layer, step)):
                self._young[place.layer] = young
                for name, dim in place.parts:
                    parameter = model.get_parameter(name)
                    index = young.to(parameter.device)
                    self._before[name, dim] = parameter.detach().index_select(dim, index)
        self._measured = tuple(p for p in places if is_measured and p.layer in self._young)
        self._whole = {
            name: model.get_parameter(name).detach().clone()
            for place in self._measured
            for name in place.rows
        }

    @torch.no_grad()
    def after_update(self, model: nn.Module, places: Sequence[FfnPlace]) -> None:
        """Let young neurons go further the way that the optimizer took them."""
        by_name = {name: p.layer for p in places for name, _ in p.parts}
        for (name, dim), before in self._before.items():
            parameter = model.get_parameter(name)
            index = self._young[by_name[name]].to(parameter.device)
            moved = parameter.detach().index_select(dim, index)
            scaled = torch.lerp(before.float(), moved.float(), self._factor).to(parameter.dtype)
            parameter.detach().index_copy_(dim, index, scaled)
        self._before = {}
        if self._measured:
            self.update_norms = self._norms(model)
            for name, norm in self.update_norms.items():
                total, number = self._sums.get(name, [0.0, 0.0])
                self._sums[name] = [total + norm, number + 1]

    def mean_update_norm(self, name: str) -> float | None:
        """Return the mean of `update_norms` over a training; None where nothing was measured."""
        total, number = self._sums.get(name, [0.0, 0.0])
        return total / number if number else None

    def state_dict(self) -> dict[str, Any]:
        sums = {name: list(each) for name, each in self._sums.items()}
        return {"born": dict(self._born), "update_norms": dict(self.update_norms), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._born = {int(layer): value for layer, value in state["born"].items()}
        self._latest = max(int(born.max()) for born in self._born.values())
        self.update_norms = dict(state["update_norms"])
        self._sums = {name: list(each) for name, each in state["sums"].items()}

    def _norms(self, model: nn.Module) -> dict[str, float]:
        """Return the mean norm of a neuron's update, of young and of mature ones."""
        sums = {"young": [0.0, 0], "old": [0.0, 0]}
        for place in self._measured:
            moves = [
                torch.linalg.vector_norm(
                    place.turned(model.get_parameter(name).detach() - self._whole[name]), dim=1
                )
                for name in place.rows
            ]
            norms = torch.stack(moves).square().sum(dim=0).sqrt()
            is_young = torch.zeros_like(norms, dtype=torch.bool)
            is_young[self._young[place.layer].to(norms.device)] = True
            for name, chosen in (("young", norms[is_young]), ("old", norms[~is_young])):
                sums[name][0] += float(chosen.sum())
                sums[name][1] += len(chosen)
        self._whole = {}
        return {name: total / count for name, (total, count) in sums.items() if count}
