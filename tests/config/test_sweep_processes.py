"""Sweeps in separate processes: failures, kills, signals and threads, with stub runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.sweep_program import FAILS, IS_KILLED, WAITS

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "tests/config/sweep_program.py"), "-m"]
EACH = pytest.mark.parametrize(
    "launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)], ids=lambda it: it[0]
)
pytestmark = pytest.mark.slow
_SECONDS = 900  # on a machine that does much else


def started(place: Path, *words: str) -> subprocess.Popen[str]:
    """Start a sweep in its own session, like a terminal."""
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [*PROGRAM, *words, "hydra.sweep.dir=sweep"], cwd=place, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**own, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def begun(place: Path) -> list[list[str]]:
    """Job, seed, process, threads and process group of a started run."""
    file = place / "begun.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def statuses(place: Path) -> list[str]:
    jobs = sorted(p for p in (place / "sweep").iterdir() if p.name.isdigit())
    return [json.loads((job / "status.json").read_text())["status"] for job in jobs]


def wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        if is_so():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come about")


@EACH
def test_failed_and_killed_jobs_stand_in_the_table(tmp_path: Path, launcher: tuple[str]) -> None:
    words = (f"seed=0,{FAILS},{IS_KILLED},3", f"hydra/launcher={launcher[0]}", *launcher[1:])
    sweep = started(tmp_path, *words)
    out, errors = sweep.communicate(timeout=_SECONDS)
    assert sweep.returncode == 1, errors
    assert "killed" in out and "the sweep failed" in errors
    assert {line[4] for line in begun(tmp_path)} == {"sweep"}
    assert "a line of the run" in (tmp_path / "sweep/0/output.txt").read_text()
    assert "a line of the run" not in out
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert len(lines) == 3 and not any(f"seed={IS_KILLED}" in line for line in lines)
    assert any(f"(seed={FAILS}): failed: the loss was not finite" in line for line in lines)
    at_once = 2 if launcher[0] == "joblib" else 4
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    assert {line[3] for line in begun(tmp_path)} == {str(threads)}


@EACH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_signal_ends_all_jobs_in_order(
    tmp_path: Path, launcher: tuple[str], number: signal.Signals
) -> None:
    words = (f"seed={WAITS}", "data.batch_size=4,8", f"hydra/launcher={launcher[0]}", *launcher[1:])
    sweep = started(tmp_path, *words)
    wait_for(lambda: len(begun(tmp_path)) == 2)
    if number == signal.SIGINT:
        os.killpg(sweep.pid, number)  # a terminal sends it to all
    else:
        os.kill(sweep.pid, number)
    _, errors = sweep.communicate(timeout=_SECONDS)
    assert sweep.returncode == 128 + number, errors
    assert "Resume the sweep with:\n" in errors and "Traceback" not in errors
    assert statuses(tmp_path) == ["interrupted", "interrupted"]
    assert not (tmp_path / "sweep/.stopping").exists()
    (tmp_path / "go").touch()
    again = started(tmp_path, *words)
    assert again.communicate(timeout=_SECONDS) and again.returncode == 0
    assert statuses(tmp_path) == ["kept", "kept"]


def test_jobs_of_submitit_run_on_and_hold_their_folders(tmp_path: Path) -> None:
    words = (f"seed={WAITS}", "data.batch_size=4,8", "hydra/launcher=submitit_local")
    sweep = started(tmp_path, *words)
    wait_for(lambda: len(begun(tmp_path)) == 2)
    sweep.kill()
    sweep.wait()  # the jobs hold what it printed to
    refused = started(tmp_path, *words)
    _, errors = refused.communicate(timeout=_SECONDS)
    assert refused.returncode == 2 and "is using it" in errors
    (tmp_path / "go").touch()
    wait_for(lambda: statuses(tmp_path) == ["kept", "kept"])
    again = started(tmp_path, *words)
    assert again.communicate(timeout=_SECONDS) and again.returncode == 0
    assert len(begun(tmp_path)) == 2
