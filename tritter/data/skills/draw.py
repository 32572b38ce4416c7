"""Draws that are the same on every machine and in every version of Python."""

import random
from collections.abc import Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


class Draw:
    """Draws that follow from words alone.

    `random.random` of a seed is what Python promises to keep; the rest is made of it here.
    """

    def __init__(self, *words: object) -> None:
        self._random = random.Random("/".join(map(str, words))).random

    def below(self, count: int) -> int:
        """Return a whole number from 0 to count − 1."""
        return int(self._random() * count)

    def between(self, least: int, most: int) -> int:
        """Return a whole number from `least` to `most`, both included."""
        return least + self.below(most - least + 1)

    def one(self, items: Sequence[_Item]) -> _Item:
        """Return one of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """Return different ones of the items, in any order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]
