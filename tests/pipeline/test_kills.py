"""SIGKILL at ledger events and at random: the same command ends with the same files.

Fifty kills over what a run can be doing: pretraining, a Fisher, an expansion, training with each
kind of state, neurons that grow, experts that are spawned task after task, rounds, the gate and
what follows a rollback. `tests/test_kill_safety.py` kills `expand` at every call to the disk.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.conftest import SMALL
from tests.pipeline.test_experts_job import DYLORA, PLAIN
from tests.pipeline.test_growth_job import OFTEN
from tests.pipeline.tiny import TINY
from tritter.pipeline import Outcome
from tritter.storage.hashing import file_digest

ROOT = Path(__file__).parents[2]
TRAINED = ("training.max_steps=40", "trainer.save_every_n_steps=5")
JOB = (*SMALL, *TRAINED, "forgetting=[ewc,replay]", "pretraining.max_steps=40")
JOBS = {
    "wider": JOB,
    "neurons": (*TINY, *OFTEN, "training.max_steps=120", "growth.max_growth_per_step=1"),
    "experts": (
        *(*(word for word in PLAIN if not word.startswith("data")), *DYLORA, *TRAINED),
        *("data=skills", "data.old={prose: stdlib:prose}", "data.sequence_length=32"),
        *("data.tasks=[[sorting],[json_format],[sorting]]", "data.vocab_size=280"),
    ),
    "rounds": (*TINY, *TRAINED, "pipeline.target_params=40k"),
    "rolled back": (
        *(*SMALL, *TRAINED, "expansion=moe", "expansion.moe.num_experts=2", "control=true"),
        *("forgetting=none", "training.learning_rate=0.3", "gate.ladder=gentler"),
    ),
}
KILLS = {"wider": 14, "neurons": 12, "experts": 12, "rounds": 6, "rolled back": 6}


@dataclass(frozen=True, slots=True)
class Job:
    """A command with its own run folder and cache."""

    words: tuple[str, ...]
    folder: Path

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the job in a separate process."""
        own = [f"cache_dir={self.folder}-cache", f"hydra.run.dir={self.folder}"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *self.words, *own],
            cwd=self.folder.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self) -> dict[str, str]:
        """Run the job to its end and return the checksums of all its files."""
        process = self.start()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        return kept(self.folder)

    @property
    def state(self) -> tuple[tuple[str, int], ...]:
        """Files that mark the end of a stage or a saved training state."""
        marks = [self.folder / "ledger.json", *self.folder.glob("**/saved/*")]
        return tuple((str(p), p.stat().st_mtime_ns) for p in sorted(marks) if p.exists())

    def killed(self, wait: random.Random, *, at_once: bool) -> bool:
        """Kill the job at its next mark or within two seconds; return True if it was running."""
        before, process, since = self.state, self.start(), time.monotonic()
        while process.poll() is None and time.monotonic() - since < 120:
            try:
                if self.state != before:
                    break
            except FileNotFoundError:
                break  # it is being replaced: as good a moment as any
            time.sleep(0.002)
        if not at_once:
            time.sleep(wait.uniform(0.0, 2.0))
        ran = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        return ran


def kept(folder: Path) -> dict[str, str]:
    """Return the checksum of the checkpoint, without lineage and card, which contain times."""
    place = folder / "checkpoint"
    paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
    reported = ("tritter.json", "README.md")
    return {
        path.relative_to(place).as_posix(): file_digest(path)
        for path in paths
        if path.name not in reported
    }


def killed_often(job: Job, *, kills: int, seed: int) -> int:
    """Kill the job at marks and at random times until it ends; return the number of kills."""
    wait, hits = random.Random(seed), 0
    for number in range(kills):
        hits += job.killed(wait, at_once=bool(number % 2))
        if (job.folder / "summary.json").exists():
            break
    return hits


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    run_job: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The uninterrupted run used this process, the killed one other processes."""
    run_job(tmp_path / "whole", *JOB)
    job = Job(JOB, tmp_path / "parts")
    assert killed_often(job, kills=3, seed=0) >= 2
    assert job.finish() == kept(tmp_path / "whole")


def test_the_kills_are_at_least_fifty() -> None:
    assert sum(KILLS[name] for name in JOBS) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_however_often_it_is_killed_it_ends_with_the_same_files(name: str, tmp_path: Path) -> None:
    """Several runs, each killed until it ends, up to the required number of kills."""
    whole = Job(JOBS[name], tmp_path / "whole").finish()
    assert "model.safetensors" in whole
    hits = 0
    for seed in range(3 * KILLS[name]):
        job = Job(JOBS[name], tmp_path / f"run{seed}")
        hits += killed_often(job, kills=5, seed=seed)
        assert job.finish() == whole, f"run {seed}"
        leftovers = [path for path in job.folder.rglob(".*") if path.name != ".hydra"]
        assert leftovers == []
        if hits >= KILLS[name]:
            return
    raise AssertionError(f"{name} was hit {hits} times")
