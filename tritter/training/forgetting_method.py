"""What a method against forgetting may do during a training, and when it is asked.

A Lightning callback alone can neither change a batch nor add a loss, so methods have a protocol
of their own: the LightningModule holds them as a list, and one callback drives them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tritter.data.batches import BatchStream
from tritter.parameter_map import ParameterMap


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a method is told when a training begins.

    Args:
        carried: parameter name → bool mask of the entries that hold old knowledge; everything
            else came with the expansion and is free.
        old_sequences: old domain → int [N, T], its packed training sequences.
        seed: of the method's own randomness.
        importance: kind (`fisher`) → parameter name → importance of each entry for the old
            domains, carried through the expansion; zero where an entry is new. A parameter that
            is absent has none. Holds what the methods of the run need.
        mean_importance: kind → its mean over the entries of the model before the expansion, which
            neither copies nor new entries move. Where it is not stated, the mean over the carried
            entries stands for it.
    """

    carried: Mapping[str, Tensor]
    old_sequences: Mapping[str, Tensor]
    seed: int
    importance: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    mean_importance: Mapping[str, float] = field(default_factory=dict)


class ForgettingMethod:
    """Base of all methods; each hook does nothing unless a method overrides it.

    Order within a step: `extra_loss` before the backward pass; then, on unclipped gradients of
    the task, `observe_gradients` of all methods, and only then `add_to_gradients` of all.
    """

    name = "method"

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Prepare for a training of `model`, whose weights are those after the expansion."""

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        """Return the batches to train on; what is new keeps its order."""
        return batches

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return a scalar to add to the loss of the task."""
        return None

    def observe_gradients(self, model: nn.Module) -> None:
        """Read the gradients of the task, before any method changes them."""

    def add_to_gradients(self, model: nn.Module) -> None:
        """Add the gradient of a penalty in place."""

    def logged_loss(self, model: nn.Module) -> float | None:
        """Return the penalty's present value, logged as `forgetting/<name>/loss`."""
        return None

    def parameters_changed(self, parameter_map: ParameterMap) -> None:
        """Follow an expansion of the live model."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in plain containers and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
