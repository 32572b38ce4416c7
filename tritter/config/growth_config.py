"""What grows in a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tritter.targets import TARGET, dotted, identity


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthConfig:
    """How neurons grow in a run.

    Args:
        kind: the class of the method; `options` what is asked of it.
        parts: key (`trigger`, `initialiser`) → a record that does its work.
    """

    kind: Any
    options: Any
    parts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its trigger and its initialiser, as reports name it."""
        parts = (self.plain()[key] for key in ("trigger", "initialiser"))
        return "+".join(p if isinstance(p, str) else p[TARGET].rpartition(".")[2] for p in parts)

    def made(self) -> Any:
        """Return the method."""
        return self.kind(self.options, **self.parts)

    def plain(self) -> dict[str, Any]:
        """Return what determines it, as plain values: of classes from outside their files, too."""
        values = {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.options).items()
        }
        for key, part in self.parts.items():
            outside = identity(type(part))
            if outside or not isinstance(values[key], str):
                values[key] = {TARGET: dotted(type(part)), **asdict(part), **outside}
        return values | identity(self.kind)
