"""Experts that were appended to a model and are not open yet: `state/router.json`.

A router offset keeps them out at first and is raised to 0 while the model is trained. A stock
class knows no offset, so a folder with this file computes the right function in Tritter alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from tritter.errors import RequestError, TritterError
from tritter.stock_routers.control import Routing
from tritter.storage.records import Finite, WholeNumber, read_record, record, record_text

if TYPE_CHECKING:
    from torch import nn

LOWEST_OFFSET = -20.0  # e⁻²⁰: the smallest weight from which an expert is raised
_PLACE = ("state", "router.json")
_CLOSED: Literal["-inf"] = "-inf"  # JSON has no number for it


@record
class _RouterHead:
    """What `router.json` says; see `AddedExperts`."""

    FORMAT: ClassVar[str] = "router state"

    new_experts: tuple[WholeNumber, ...]
    offset: Literal["-inf"] | Finite
    anneal_steps: WholeNumber | None
    step: WholeNumber

    def __post_init__(self) -> None:
        experts = self.new_experts
        if not experts or experts != tuple(range(experts[0], experts[0] + len(experts))):
            raise ValueError("new_experts; allowed are indices one after the other")
        if self.offset != _CLOSED and self.offset > 0:
            raise ValueError(f"offset = {self.offset}; allowed is a number up to 0")


def router_offset(step: int, *, anneal_steps: int) -> float:
    """Return the offset of new experts after so many steps: −∞, then from −20 in a line to 0.

    Args:
        step: optimizer steps since they were appended.
        anneal_steps: after so many the offset is 0.
    """
    if step <= 0:
        return -math.inf
    return LOWEST_OFFSET * max(0.0, 1 - step / anneal_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedExperts:
    """Appended experts, in every layer that has experts, and how far they are open.

    Args:
        experts: their indices, one behind the other; all others come before.
        offset: what the router adds to their logits; −∞ closes them, 0 opens them wholly.
        step: optimizer steps since they were appended.
        anneal_steps: after how many the offset is 0; None while that is not decided.
    """

    experts: tuple[int, ...]
    offset: float = -math.inf
    step: int = 0
    anneal_steps: int | None = None

    @property
    def is_settled(self) -> bool:
        """True when a stock class computes the same."""
        return self.offset == 0

    @property
    def num_settled_experts(self) -> int:
        """How many experts a layer has without the appended ones."""
        return self.experts[0]

    def at(self, step: int, *, anneal_steps: int) -> AddedExperts:
        """Return what they are after so many steps."""
        offset = router_offset(step, anneal_steps=anneal_steps)
        return replace(self, offset=offset, step=step, anneal_steps=anneal_steps)

    @classmethod
    def of(cls, model: nn.Module) -> AddedExperts | None:
        """Return what a live model's offsets say; None where no expert is held back."""
        routing = Routing.attached(model)
        if routing is None:
            return None
        offsets = routing.offset(routing.layers[0]).tolist()
        held_back = tuple(expert for expert, offset in enumerate(offsets) if offset != 0)
        return cls(experts=held_back, offset=offsets[held_back[0]]) if held_back else None

    def apply(self, model: nn.Module) -> Routing:
        """Set the offset in a live model.

        Raises:
            TritterError: the model has no such experts.
        """
        routing = Routing.of(model)
        if routing is None:
            raise TritterError(f"{'/'.join(_PLACE)} speaks of experts, and the model has none.")
        try:
            routing.set_offset(self.experts, self.offset)
        except RequestError as error:
            raise TritterError(f"{'/'.join(_PLACE)} does not fit the model: {error}") from error
        return routing

    def write(self, folder: Path) -> None:
        """Write `state/router.json`; meant for a checkpoint folder that is still being made."""
        path = folder.joinpath(*_PLACE)
        path.parent.mkdir(exist_ok=True)
        head = _RouterHead(
            new_experts=self.experts,
            offset=_CLOSED if self.offset == -math.inf else self.offset,
            anneal_steps=self.anneal_steps,
            step=self.step,
        )
        path.write_text(record_text(head), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> AddedExperts | None:
        """Return what a checkpoint folder says; None where no expert is being added.

        Raises:
            TritterError: the file is damaged, or of another format.
        """
        path = folder.joinpath(*_PLACE)
        if not path.exists():
            return None
        head = read_record(path, _RouterHead)
        return cls(
            experts=head.new_experts,
            offset=-math.inf if head.offset == _CLOSED else float(head.offset),
            step=head.step,
            anneal_steps=head.anneal_steps,
        )


def stock_obstacle(folder: Path) -> str | None:
    """Return why stock classes compute something else than the model; None where they do not.

    Raises:
        TritterError: the folder's state is damaged, or of a newer format.
    """
    added = AddedExperts.read(folder)
    if added is None or added.is_settled:
        return None
    first, last = added.experts[0], added.experts[-1]
    named = f"expert {first} was" if first == last else f"experts {first} to {last} were"
    return (
        f"{named} appended and the router offset that keeps them back is {added.offset:g}, not 0 "
        "yet; stock classes know no such offset"
    )
