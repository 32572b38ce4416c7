"""How large libraries are imported: late, and without looking for garbage meanwhile."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports a name's module when it is first asked for.

    Args:
        package: its dotted name.
        modules: name → module that has it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return get


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
