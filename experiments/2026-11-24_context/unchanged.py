"""An expansion for comparison: more positions with unchanged rotary embeddings."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tritter.core.expansions import Context
from tritter.core.families import Config
from tritter.options import options


@options
class Unchanged(Context):
    """More positions for a model; its rotary embeddings extrapolate."""

    name: ClassVar[str] = "unchanged"

    def _scale(
        self, config: Config, parameters: Mapping[str, Any], old: int, new: int
    ) -> dict[str, Any]:
        return dict(parameters)
