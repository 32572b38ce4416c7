"""How large libraries are imported."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(library: str) -> Iterator[None]:
    """Look for no garbage while a block imports a library, nor ever in what stands then.

    Modules are none, and Python would look through all of them again and again, and once more when
    the process ends: with transformers that is 2 of 5 processor seconds, with the pipeline 4 of 10.
    """
    if library in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
