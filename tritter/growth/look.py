"""What goes into an FFN and what gradient comes back out, of some tokens of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tritter.growth.places import FfnPlace

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

MAX_TOKENS = 1024  # of a step, of all processes


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Some tokens of a step, as one FFN saw them.

    Args:
        inputs: float32 [T, H], what the FFN reads.
        output_gradients: float32 [T, H], of the loss by what it writes.
        computed: float32 [T, F], what its neurons computed; None: it follows from the weights.
    """

    inputs: Tensor
    output_gradients: Tensor
    computed: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        return bool(self.output_gradients.isfinite().all() and self.inputs.isfinite().all())


@dataclass(slots=True)
class Looking:
    """Collects tokens of FFNs during the forward and backward passes of a step.

    Args:
        max_tokens: of each batch; spread over it.
    """

    max_tokens: int = MAX_TOKENS
    _inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    _gradients: dict[int, list[Tensor]] = field(default_factory=dict)

    def hook(self, layer: int) -> Callable[..., None]:
        """Return a forward hook of the FFN of a layer."""

        import torch

        def see(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if not (module.training and output.requires_grad):
                return
            read, index = arguments[0].detach(), len(self._inputs.setdefault(layer, []))
            self._inputs[layer].append(self._some(read))
            self._gradients.setdefault(layer, []).append(torch.empty(0))

            def keep(gradient: Tensor) -> None:
                self._gradients[layer][index] = self._some(gradient)

            output.register_hook(keep)

        return see

    def looks(self) -> dict[int, Look]:
        """Return layer → what was seen of it; a pass without a backward one counts for nothing."""
        import torch

        found = {}
        for layer, inputs in self._inputs.items():
            pairs = [
                (x, g) for x, g in zip(inputs, self._gradients[layer], strict=True) if g.numel()
            ]
            if pairs:
                found[layer] = Look(*(torch.cat(each).float() for each in zip(*pairs, strict=True)))
        return found

    def clear(self) -> None:
        """Forget what was seen."""
        self._inputs.clear()
        self._gradients.clear()

    def _some(self, values: Tensor) -> Tensor:
        return some_rows(values, self.max_tokens)


def some_rows(values: Tensor, count: int) -> Tensor:
    """Return at most so many tokens of values [..., H] as rows: always those of the same places.

    At random places of the batch: evenly spaced ones may all begin a sequence.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows[_places(len(rows), count).to(rows.device)]


@lru_cache(maxsize=16)
def _places(size: int, count: int) -> Tensor:
    import torch

    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return drawn[:count].sort().values


def attach(model: nn.Module, places: Iterable[FfnPlace], seen: Looking) -> list[RemovableHandle]:
    """Let `seen` collect until the handles that are returned are removed."""
    return [
        model.get_submodule(place.module).register_forward_hook(seen.hook(place.layer))
        for place in places
    ]
