"""Experts that were appended to a model and are not open yet: `state/router.json`.

A router offset keeps them out at first and is raised to 0 while the model is trained. A stock
class knows no offset, so a folder with this file computes the right function in Tritter alone.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tritter.errors import RequestError, TritterError, brief
from tritter.stock_routers.control import Routing
from tritter.storage.reading import read_object

FORMAT_VERSION = 1
LOWEST_OFFSET = -20.0  # e⁻²⁰: the smallest weight from which an expert is raised
_PLACE = ("state", "router.json")
_CLOSED = "-inf"  # JSON has no number for it


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

    def at(self, step: int, *, anneal_steps: int) -> "AddedExperts":
        """Return what they are after so many steps."""
        offset = router_offset(step, anneal_steps=anneal_steps)
        return replace(self, offset=offset, step=step, anneal_steps=anneal_steps)

    @classmethod
    def of(cls, model: nn.Module) -> "AddedExperts | None":
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
        plain = {
            "format_version": FORMAT_VERSION,
            "new_experts": list(self.experts),
            "offset": _CLOSED if self.offset == -math.inf else self.offset,
            "anneal_steps": self.anneal_steps,
            "step": self.step,
        }
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "AddedExperts | None":
        """Return what a checkpoint folder says; None where no expert is being added.

        Raises:
            TritterError: the file is damaged, or of a newer format.
        """
        path = folder.joinpath(*_PLACE)
        if not path.exists():
            return None
        try:
            plain = read_object(path)
            version = plain["format_version"]
        except (TritterError, KeyError) as error:
            raise TritterError(f"{path} is damaged ({error}).") from error
        if version != FORMAT_VERSION:
            raise TritterError(
                f"{path}: format_version {brief(version)}; this Tritter reads {FORMAT_VERSION}."
            )
        try:
            return _from_plain(plain)
        except (KeyError, TypeError, ValueError) as error:
            raise TritterError(f"{path} is damaged ({error!r}).") from error


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


def _from_plain(plain: dict[str, object]) -> AddedExperts:
    experts, offset = plain["new_experts"], plain["offset"]
    step, anneal_steps = plain["step"], plain["anneal_steps"]
    if not isinstance(experts, list) or not all(_is_count(expert) for expert in experts):
        raise ValueError("new_experts is no list of indices")
    if not experts or experts != list(range(experts[0], experts[0] + len(experts))):
        raise ValueError("new_experts are not one behind the other")
    value = -math.inf if offset == _CLOSED else offset
    if not isinstance(value, int | float) or isinstance(value, bool) or not value <= 0:
        raise ValueError("offset is no number up to 0")
    if not _is_count(step) or not (anneal_steps is None or _is_count(anneal_steps)):
        raise ValueError("step or anneal_steps is no count")
    return AddedExperts(
        experts=tuple(experts),
        offset=float(value),
        step=step,  # type: ignore[arg-type]
        anneal_steps=anneal_steps,  # type: ignore[arg-type]
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
