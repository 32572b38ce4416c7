"""From the methods that a config selects to methods."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

from tritter.training import ForgettingMethod, Needs


class Chosen(Protocol):
    """A method's class, and what is asked of it."""

    @property
    def kind(self) -> type[ForgettingMethod]:
        """The class, which takes its options by their names."""
        ...

    @property
    def options(self) -> Any:
        """A record of the class's `Options`."""
        ...


def build_methods(chosen: Sequence[Chosen]) -> tuple[ForgettingMethod, ...]:
    """Build the methods in the order asked for; fields of the options are their arguments."""
    return tuple(_built(one) for one in chosen)


def needs_of(chosen: Sequence[Chosen]) -> tuple[Needs, ...]:
    """Return what each method needs, in the order asked for."""
    return tuple(one.kind.needs(one.options) for one in chosen)


def _built(one: Chosen) -> ForgettingMethod:
    arguments = {f.name: getattr(one.options, f.name) for f in fields(one.options)}
    return one.kind(**arguments)
