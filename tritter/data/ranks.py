"""Which of several training processes this is."""

from dataclasses import dataclass

from torch import distributed


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `count` processes that train together; without others, 0 of 1."""

    index: int
    count: int


def this_rank() -> Rank:
    """Return the place of this process, as torch.distributed knows it."""
    if distributed.is_available() and distributed.is_initialized():
        return Rank(distributed.get_rank(), distributed.get_world_size())
    return Rank(0, 1)
