"""Numbers of a summary.json that came from anywhere: what drawing and adding them can bear."""

from typing import Annotated

from pydantic import Field

LARGEST = 1e30  # sums and squares of such numbers, and axes over them, are finite
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
