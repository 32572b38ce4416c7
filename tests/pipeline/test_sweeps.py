"""Real parallel sweeps: one base model for all, and the results of sequential jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_trust import result
from tests.pipeline.tiny import TINY

ROOT = Path(__file__).parents[2]
JOBS = ("expansion=dus,llama_pro", "forgetting=none,replay", "training.max_steps=60")
LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local",),
}
_SECONDS = 1500  # on a machine that does much else


def begun(place: Path, *words: str) -> subprocess.Popen[str]:
    tiny = [word for word in TINY if not word.startswith(("forgetting", "training.max"))]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *tiny, *JOBS, *words]
    return subprocess.Popen(
        [*command, f"cache_dir={place / 'cache'}", f"hydra.sweep.dir={place / 'sweep'}"],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        start_new_session=True,
    )  # fmt: skip


def results(place: Path) -> list[Any]:
    return [result(place / "sweep" / str(number)) for number in range(4)]


def rows(message: str) -> list[str]:
    return [line for line in message.splitlines() if line.startswith("│")]


def compared(place: Path) -> Any:
    """The output of `tritter compare` for the sweep, without time and memory."""
    page = ["--output", str(place / "page.html"), "--overwrite"]
    own = ["compare", str(place / "sweep"), "--json", *page]
    command = [sys.executable, "-m", "tritter", *own]
    message = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    kept = ("name", "status", "seed", "training_flops", "training_tokens", "steps", "subjects")
    return [{key: run[key] for key in kept} for run in message["runs"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The sequential sweep, and its output."""
    place = tmp_path_factory.mktemp("alone")
    sweep = begun(place)
    message, _ = sweep.communicate(timeout=_SECONDS)
    assert sweep.returncode == 0, message
    return place, message


@pytest.mark.slow
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_killed_sweep_of_jobs_side_by_side_ends_as_one_by_one(
    alone: tuple[Path, str], tmp_path: Path, launcher: str
) -> None:
    sweep = begun(tmp_path, *LAUNCHERS[launcher])
    until = time.monotonic() + _SECONDS
    while not list(tmp_path.glob("sweep/*/attempt_1/saved")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    cut = [p for p in tmp_path.glob("sweep/*/status.json") if '"running"' in p.read_text()]
    assert cut, "it was killed too late"
    again = begun(tmp_path, *LAUNCHERS[launcher])
    message, _ = again.communicate(timeout=_SECONDS)
    assert again.returncode == 0, message
    assert results(tmp_path) == results(alone[0])
    assert rows(message) == rows(alone[1]) and len(rows(message)) == 4
    assert compared(tmp_path) == compared(alone[0])
    printed = [path.read_text() for path in tmp_path.glob("sweep/*/output.txt")]
    assert sum("training a base model with" in text for text in printed) == 1
    (base,) = (path for path in (tmp_path / "cache/bases").iterdir() if path.is_dir())
    (kept,) = (path for path in (alone[0] / "cache/bases").iterdir() if path.is_dir())
    hashes = [json.loads((p / "tritter.json").read_text())["model_hash"] for p in (base, kept)]
    assert hashes[0] == hashes[1]
