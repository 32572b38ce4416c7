"""Lazy imports of large libraries, without garbage collection during the import."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports the module of a name on first access.

    Args:
        package: its dotted name.
        modules: name → module that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return get


@contextmanager
def loading(library: str) -> Iterator[None]:
    """Disable garbage collection while a block imports a library, and freeze its objects.

    Modules are never garbage, yet Python would scan them repeatedly and again at exit. That costs
    2 of 5 CPU seconds with transformers and 4 of 10 with the pipeline.
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
