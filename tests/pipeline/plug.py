"""A run whose plug is pulled at a stage, to be gone on with."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from tritter.pipeline.branch import Branch
from tritter.pipeline.context import RunContext


class _Pulled(Exception):
    pass


@contextmanager
def plug_pulled(module: ModuleType, stage: str, *, of: str) -> Iterator[None]:
    """Let the run inside end where a stage of an arm would begin, which it has to reach.

    Args:
        module: that holds the stage.
        of: name of the arm.
    """
    original = getattr(module, stage)

    def pulled(context: RunContext, branch: Branch, **options: Any) -> Any:
        if branch.name == of:
            raise _Pulled
        return original(context, branch, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Pulled):
        patch.setattr(module, stage, pulled)
        yield
