"""Garbage collection resumes after an import and skips the imported objects."""

import gc
import subprocess
import sys

import pytest

from tritter.loading import loading


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record whether collection is enabled at each freeze; nothing is frozen here."""
    calls: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    return calls


def test_no_garbage_is_looked_for_meanwhile(frozen: list[bool]) -> None:
    with loading("a_library"):
        assert not gc.isenabled()
        with loading("another"):
            pass
        assert not gc.isenabled()
    assert gc.isenabled() and frozen == [False]


def test_an_import_that_fails_leaves_nothing_behind(frozen: list[bool]) -> None:
    with pytest.raises(ImportError), loading("a_library"):
        raise ImportError
    assert gc.isenabled() and frozen == [False]


def test_what_is_there_already_is_left_alone(frozen: list[bool]) -> None:
    with loading("torch"):
        assert gc.isenabled()
    assert frozen == []


@pytest.mark.full
def test_bitsandbytes_advises_nothing() -> None:
    program = "import tritter, bitsandbytes.backends.cpu.ops as ops; ops.logger.warning('advice')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
