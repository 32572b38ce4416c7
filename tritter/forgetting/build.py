"""From validated options to methods."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Protocol

from tritter.forgetting.ewc import EWC
from tritter.forgetting.l2sp import L2SP
from tritter.forgetting.replay import Replay
from tritter.training import ForgettingMethod

METHODS: Mapping[str, Callable[..., ForgettingMethod]] = {
    method.name: method for method in (EWC, L2SP, Replay)
}


class NamedOptions(Protocol):
    """A dataclass of options whose `name` is the method's."""

    @property
    def name(self) -> str: ...


def build_methods(options: Sequence[NamedOptions]) -> tuple[ForgettingMethod, ...]:
    """Build the methods in the order asked for.

    Fields of the options are the method's arguments; what it does not take is meant for the
    stage that prepares what the method needs.
    """
    return tuple(_built(entry) for entry in options)


def _built(options: NamedOptions) -> ForgettingMethod:
    assert is_dataclass(options) and not isinstance(options, type)
    method = METHODS[options.name]
    taken = inspect.signature(method).parameters
    return method(**{key: value for key, value in asdict(options).items() if key in taken})
