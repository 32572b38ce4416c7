"""Ctrl-C and SIGTERM raise one exception in a block, and handlers are restored."""

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import Run, place, run, snapshot, sources
from tritter.stopping import Stopped, stopping

__all__ = ["place", "run", "sources"]
BOTH = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)


@BOTH
def test_a_signal_raises_once_and_the_handlers_go(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cleared = []
    with pytest.raises(Stopped) as stopped, stopping():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second signal during the cleanup
            os.kill(os.getpid(), signal.SIGINT)
            cleared.append(True)
    assert stopped.value.exit_code == code
    assert cleared == [True]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_has_no_handlers_and_no_harm() -> None:
    ends = []

    def work() -> None:
        with stopping():
            ends.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ends == [True]


@pytest.mark.quick_cases(2)
@BOTH
@pytest.mark.parametrize("at", [0, 9])
@pytest.mark.parametrize(
    "words",
    [
        "expand --checkpoint base --method width --output new",
        "expand --checkpoint base --method width --output old --overwrite",
        "export --checkpoint base --output deep/new",
        "export --checkpoint base --output old --overwrite",
    ],
)
def test_a_command_that_is_stopped_says_so_and_leaves_no_trace(
    run: Run,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    at: int,
    words: str,
) -> None:
    assert run("expand --checkpoint base --method width --output old --no-measure").code == 0
    before, paths = snapshot(place), sorted(place.rglob("*"))
    _signal_at_tensor(monkeypatch, at, number)
    result = run(words)
    assert (result.code, result.out, result.err) == (code, "", "\nStopped. Nothing was written.\n")
    assert snapshot(place) == before
    assert sorted(place.rglob("*")) == paths


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        "expand --checkpoint base --method width --output new",
        "export --checkpoint base --output new",
    ],
)
def test_a_command_that_is_stopped_too_late_says_what_stands(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """The signal arrives while the summary is printed."""

    def stop(*words: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tritter.cli.expand._print_shapes", stop)
    monkeypatch.setattr("tritter.cli.export._print", stop)
    result = run(words)
    assert result.code == 143
    assert result.err == "\nStopped. new was written and is complete.\n"
    assert run("inspect new").code == 0


def _signal_at_tensor(monkeypatch: pytest.MonkeyPatch, at: int, number: signal.Signals) -> None:
    """Make the process signal itself after checking the `at`-th tensor."""
    from tritter.checkpoints import export
    from tritter.transform import folder

    seen = 0
    is_finite = folder.is_finite

    def signalling(tensor: object) -> bool:
        nonlocal seen
        if seen == at:
            os.kill(os.getpid(), number)
        seen += 1
        return is_finite(tensor)

    monkeypatch.setattr(folder, "is_finite", signalling)
    monkeypatch.setattr(export, "is_finite", signalling)
