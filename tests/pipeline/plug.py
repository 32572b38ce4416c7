"""A run that is killed at a stage, for tests that resume it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest

from tritter.pipeline.branch import Branch
from tritter.pipeline.stages import baseline
from tritter.pipeline.stages.appended import Adapt
from tritter.pipeline.stages.evaluate import Evaluate
from tritter.pipeline.stages.expand import Expand
from tritter.pipeline.stages.fit import Fit
from tritter.pipeline.verdict import Candidate

# Stage → where its work is, for `monkeypatch.setattr`
WORK: dict[str, tuple[Any, str]] = {
    "baseline": (baseline, "_baseline"),
    "expand": (Expand, "work"),
    "adapt": (Adapt, "work"),
    "fit": (Fit, "work"),
    "evaluate": (Evaluate, "work"),
    "gate": (Candidate, "checks"),
    "keep": (Candidate, "complete"),
    "publish": (Candidate, "publish"),
}


class _Pulled(Exception):
    pass


@contextmanager
def plug_pulled(stage: str, *, of: str) -> Iterator[None]:
    """Kill the run inside this context when it reaches a stage of a branch.

    Args:
        of: name of the branch.
    """
    owner, name = WORK[stage]
    original = getattr(owner, name)

    def pulled(*arguments: Any) -> Any:
        candidates = (each for each in arguments if isinstance(each, Candidate))
        branches = [*arguments, *chain.from_iterable(each.branches for each in candidates)]
        if any(isinstance(each, Branch) and each.name == of for each in branches):
            raise _Pulled
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Pulled):
        patch.setattr(owner, name, pulled)
        yield
