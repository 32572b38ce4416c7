"""Seeds for each purpose, so that no random draw depends on what else a run does."""

import hashlib


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Return the seed of one purpose (below 2⁵⁶): data order, replay, one tensor's fill.

    The same whatever the order of the calls, and on every machine.
    """
    digest = hashlib.sha256("\0".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:7], "big")
