"""The keys of `gate`: when a grown model is kept, and what is tried after it was not."""

from typing import Annotated

from pydantic import Field

from tritter.options import Count, Text, options


@options
class GateConfig:
    """When a grown model is kept, and what is tried after it was not.

    Args:
        ladder: by name; None: nothing is.
        max_attempts: the first counts; None: one, and one for each rung of the ladder.
    """

    enabled: bool
    strict: bool
    retention: Annotated[float, Field(ge=0)]
    confidence: Annotated[float, Field(gt=0.5, le=0.999)]
    ladder: Text | None = None
    max_attempts: Count | None = None
