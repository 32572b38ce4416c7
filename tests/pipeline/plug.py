"""A run that is killed at a stage, for tests that resume it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run


class _Pulled(Exception):
    pass


@contextmanager
def plug_pulled(module: ModuleType, stage: str, *, of: str) -> Iterator[None]:
    """Kill the run inside this context when it reaches a stage of a branch.

    Args:
        module: that holds the stage.
        of: name of the branch.
    """
    original = getattr(module, stage)

    def pulled(context: Run, branch: Branch, **options: Any) -> Any:
        if branch.name == of:
            raise _Pulled
        return original(context, branch, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Pulled):
        patch.setattr(module, stage, pulled)
        yield
