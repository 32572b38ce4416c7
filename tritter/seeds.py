"""Derived seeds: each purpose has its own random stream, independent of the rest of the run."""

import hashlib


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Return the seed of one purpose (below 2⁵⁶): data order, replay, the fill of one tensor.

    It does not depend on the order of calls or on the machine.
    """
    digest = hashlib.sha256("\0".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:7], "big")
