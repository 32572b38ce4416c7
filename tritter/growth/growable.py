"""What growable modules have in common: the calls of a training loop."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tritter.errors import Problem, RequestError
from tritter.growth.grower import Growth
from tritter.growth.plain_loop import PlainLoop

Counts = dict[str, int]


class Growable:
    """A module that is asked to grow from a training loop.

    Between an optimizer's step and the next forward pass, before or after `zero_grad`; of an
    accumulation that is not finished the gradients would be lost.
    """

    _loop: PlainLoop

    def attach(self, optimizer: Optimizer | None) -> None:
        """Say which optimizer trains this: its moments follow every growth.

        One of torch's is found at its first step, without this. None: nothing holds the parameters
        beyond an event, and what does is made anew of `parameters()`.

        Raises:
            RequestError: it is no optimizer of what grows here.
        """
        self._loop.attach(optimizer)

    def update_loss(self, loss: float | Tensor) -> None:
        """Take the loss of a step: triggers that wait for a plateau need it."""
        self._loop.note_loss(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def check_and_grow(self, *, optimizer: Optimizer | None = None) -> Counts:
        """Look whether growth is called for, and let it happen.

        Args:
            optimizer: as for `attach`, where that was not called.

        Returns:
            `born`, `replaced` and `died`: neurons that were added, that took the place of dead
            ones, and dead ones that stay.

        Raises:
            RequestError: it would grow, and it is not known what trains it.
        """
        if optimizer is not None:
            self.attach(optimizer)
        decided = self._loop.decide()
        if not decided:
            return counted(None)
        self._check_growth_is_safe()
        return counted(self._loop.grow(decided))

    @property
    def growth_events(self) -> list[dict[str, Any]]:
        """What grew, event by event: step, layer, born, replaced, died, neurons, pressure."""
        return [dict(event) for event in self._loop.grower.events]

    def _check_growth_is_safe(self) -> None:
        """Raise where others rely on the shapes that there are."""


class GrowableLayer(Growable):
    """A growable module with one row of neurons."""

    def check_growth(self) -> tuple[bool, list[int]]:
        """Say whether growth is called for, and from which neurons new ones should stem."""
        decided = self._loop.decide()
        return (True, self._loop.sources(0, decided[0])) if decided else (False, [])

    def perform_growth(self, source_indices: Sequence[int]) -> dict[str, Any]:
        """Let as many neurons be born as indices are named.

        Args:
            source_indices: neurons that new ones stem from, where the initialiser copies; those
                that are dead and used again are passed over.

        Returns:
            As `check_and_grow`, and `indices`: where the new neurons stand.

        Raises:
            RequestError: there is no such neuron; it is frozen; nothing was seen of it; it is not
                known what trains it.
        """
        sources = [int(index) for index in source_indices]
        (place,), module = self._loop.grower.places, self._loop.module
        width = place.width(module)
        if not sources:
            return {**counted(None), "indices": []}
        if wrong := [index for index in sources if not 0 <= index < width]:
            reason = f"allowed are neurons from 0 to {width - 1}"
            raise RequestError(Problem("source_indices", wrong, reason=reason))
        if not place.is_trained(module):
            raise RequestError("growth: a weight that would grow is frozen; new neurons need all.")
        self._check_growth_is_safe()
        growth = None
        if self._loop.grower.pressure.neurons:
            growth = self._loop.grow({0: len(sources)}, sources={place.layer: sources})
        if growth is None:
            raise RequestError(
                "growth: nothing was seen of the neurons since they are as many as they are; take "
                "a step of training before."
            )
        places = growth.layers[place.layer].places(width)
        return {**counted(growth), "indices": places.tolist()}


def counted(growth: Growth | None) -> Counts:
    """Return how many neurons were born, replaced, and died."""
    layers = () if growth is None else growth.layers.values()
    return {
        "born": sum(each.born for each in layers),
        "replaced": sum(len(each.recycled) for each in layers),
        "died": 0 if growth is None else sum(growth.died.values()),
    }
