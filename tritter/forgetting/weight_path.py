"""The way that the weights of a training go, and how much of the fall of a loss each did.

ω = Σ −g·Δθ over the steps of a training (Zenke et al. 2017, arXiv 1703.04200, eq. 3), where g is
the gradient at the start of a step.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tritter.expand import Change

PATH_INTEGRAL, DISPLACEMENT = "path_integral", "displacement"
RECORDED = (PATH_INTEGRAL, DISPLACEMENT)  # kinds of state: ω, and Δ, how far each weight came


class WeightPath:
    """The way that the weights of one training go.

    Args:
        start: parameter name → weights that it began with; what is absent is taken from the model
            when it is first seen.
        path_integral: parameter name → ω so far.
    """

    def __init__(
        self, *, start: dict[str, Tensor], path_integral: Mapping[str, Tensor] | None = None
    ) -> None:
        self.start = start
        self.path_integral = dict(path_integral or {})
        self._before: dict[str, Tensor] = {}  # room for the weights before a step
        self._gradients: dict[str, Tensor] = {}  # room for those of a step
        self._pending: tuple[str, ...] = ()  # what has a gradient in the step that is taken

    @torch.no_grad()
    def before_step(self, model: nn.Module, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take the gradients of a step that is about to be taken.

        Args:
            gradients: by parameter name; None: those that the parameters hold.
        """
        self.take_up(model)
        if gradients is None:
            held = ((name, p.grad) for name, p in model.named_parameters())
            gradients = {name: gradient for name, gradient in held if gradient is not None}
        given = list(gradients.values())
        # A step that is not finite is refused, and moves nothing
        is_finite = bool(torch.isfinite(nn.utils.get_total_norm(given)))
        self._pending = tuple(gradients) if is_finite else ()
        for name in gradients.keys() - self._gradients.keys():
            self._gradients[name] = torch.empty_like(self._before[name])
        if self._pending:
            torch._foreach_copy_([self._gradients[name] for name in gradients], given)
            torch._foreach_copy_([self._before[name] for name in gradients], self._weights(model))

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Add the step's −g·Δθ; nothing where none was taken."""
        if self._pending:
            moved = [self._before[name] for name in self._pending]
            torch._foreach_sub_(moved, self._weights(model))  # −Δθ
            omega = [self.path_integral[name] for name in self._pending]
            torch._foreach_addcmul_(omega, [self._gradients[n] for n in self._pending], moved)
        self._pending = ()

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """Return the weights of what has a gradient in the step."""
        held: dict[str, Tensor] = dict(model.named_parameters())
        return [held[name] for name in self._pending]

    @torch.no_grad()
    def take_up(self, model: nn.Module) -> None:
        """Begin for what is trained and was not met before."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in self._before:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self._before[name] = torch.empty_like(parameter, dtype=wide)
                start = self.start.get(name)
                self.start[name] = parameter.clone() if start is None else start.to(parameter)
                omega = self.path_integral.get(name, torch.zeros_like(parameter))
                self.path_integral[name] = omega.to(self._before[name])

    def displacement(self, model: nn.Module) -> dict[str, Tensor]:
        """Return Δ by parameter name: how far each weight is from where it began."""
        return {
            name: p.detach().to(self.path_integral[name]) - self.start[name]
            for name, p in model.named_parameters()
            if name in self.path_integral
        }

    def parameters_changed(self, change: "Change", *, start: dict[str, Tensor]) -> None:
        """Follow a change of the live model; what is new has done nothing yet.

        Args:
            start: where the weights that are there then began.
        """
        self.start = start
        self.path_integral = change.state(PATH_INTEGRAL, self.path_integral)
        self._before, self._gradients, self._pending = {}, {}, ()
