"""What a loop of one's own keeps of its last batch, so that neurons can grow at any moment."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tritter.growth.look import Look, some_rows
from tritter.growth.places import FfnPlace

MAX_TOKENS = 256  # of the last batch, of each layer


class LastTokens:
    """Tokens of the last batch that was trained on, as places of neurons saw them."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def see(
        self, layer: int, inputs: Tensor, output: Tensor, *, computed: Tensor | None = None
    ) -> None:
        """Keep some tokens, if a backward pass follows.

        Args:
            inputs: [..., H], what neurons read.
            output: [..., O], what they write in the end.
            computed: [..., F], of the neurons themselves.
        """
        if torch.is_grad_enabled() and output.requires_grad:
            own = None if computed is None else some_rows(computed, MAX_TOKENS)
            output.register_hook(partial(self._keep, layer, some_rows(inputs, MAX_TOKENS), own))

    def looks(self, model: nn.Module, places: Iterable[FfnPlace]) -> dict[int, Look]:
        """Return layer → what was seen of it, unless a neighbour has other sizes since."""
        found = {}
        for place in places:
            if place.layer not in self._last:
                continue
            inputs, computed, gradients = self._last[place.layer]
            width, size = place.turned(model.get_parameter(place.gate)).shape
            written = width
            if place.down is not None:
                written = len(place.turned(model.get_parameter(place.down)))
            if (inputs.shape[1], gradients.shape[1]) == (size, written):
                own = None if computed is None else computed.float()
                found[place.layer] = Look(inputs.float(), gradients.float(), own)
        return found

    def clear(self) -> None:
        """Forget what was seen."""
        self._last.clear()

    def _keep(self, layer: int, inputs: Tensor, computed: Tensor | None, gradient: Tensor) -> None:
        self._last[layer] = (inputs, computed, some_rows(gradient, MAX_TOKENS))
