"""What a decision on novelty may be asked to rest on."""

from typing import Annotated

from pydantic import Field

from tritter.options import Count, WholeNumber, options

Confidence = Annotated[float, Field(ge=0.5, lt=1)]


@options
class NoveltyOptions:
    """When a run of batches is called new, or known.

    Args:
        min_samples: that a decision rests on, at least.
        in_a_row: batches above the threshold, one after the other.
        confidence: of the bound that has to lie beyond the threshold, one-sided.
        cooldown: batches behind something new in which nothing else is called so.
        moving_average: share of its old value in the novelty that is compared; 0: none.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    in_a_row: Count = 2
    confidence: Confidence = 0.99
    cooldown: WholeNumber = 30
    moving_average: Annotated[float, Field(ge=0, lt=1)] = 0.0


@options
class BurstOptions:
    """When novel samples of mixed batches are handed over.

    Args:
        min_samples: alike ones, of a burst.
        window_samples: seen last, among which they are.
        usual_share: of samples of known skills that may look novel.
        confidence: with which their share is above that of the largest group of known samples.
        similarity: cosine of whitened features with the mean of those it joins, at least.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    window_samples: Count = 1024
    usual_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    confidence: Confidence = 0.99
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.3
