"""From validated options to methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol

from tritter.forgetting.l2sp import L2SP
from tritter.forgetting.replay import Replay
from tritter.training import ForgettingMethod

METHODS: Mapping[str, Callable[..., ForgettingMethod]] = {
    method.name: method for method in (L2SP, Replay)
}


class NamedOptions(Protocol):
    """A dataclass of options whose `name` is the method's."""

    @property
    def name(self) -> str: ...


def build_methods(options: Sequence[NamedOptions]) -> tuple[ForgettingMethod, ...]:
    """Build the methods in the order asked for; fields of the options are their arguments."""
    return tuple(METHODS[entry.name](**_fields(entry)) for entry in options)


def _fields(options: NamedOptions) -> dict[str, Any]:
    assert is_dataclass(options) and not isinstance(options, type)
    return asdict(options)
