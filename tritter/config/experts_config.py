"""The LoRA experts that a run is asked for."""

from dataclasses import dataclass, fields
from typing import Any

from tritter.targets import identity


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The LoRA experts of a run.

    Args:
        kind: the class of the method; `options` what is asked of it.
    """

    kind: Any
    options: Any

    @property
    def name(self) -> str:
        return str(self.kind.name)

    @property
    def is_dynamic(self) -> bool:
        return bool(self.kind.is_dynamic)

    def made(self) -> Any:
        """Return the method."""
        return self.kind(self.options)

    def plain(self) -> dict[str, Any]:
        """Return what determines it, as plain values."""
        values = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"name": self.name, **listed, **identity(self.kind)}
