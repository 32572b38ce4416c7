"""SIGKILL at ledger events and at random: the same command ends with the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import SMALL
from tritter.checkpoint import read_lineage
from tritter.pipeline import Outcome

ROOT = Path(__file__).parents[2]
JOB = (
    *SMALL,
    "forgetting=[ewc,replay]",
    "pretraining.max_steps=40",
    "training.max_steps=40",
    "trainer.save_every_n_steps=5",
)


def start(folder: Path, cache: Path) -> "subprocess.Popen[bytes]":
    """Start the job as a person would, with a cache of its own, in a process of its own."""
    words = [*JOB, f"cache_dir={cache}", f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finished(folder: Path, cache: Path) -> str:
    """Let the job run to its end and return the hash of what it kept."""
    process = start(folder, cache)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors.decode()
    return kept(folder)


def kept(folder: Path) -> str:
    lineage = read_lineage(folder / "checkpoint")
    assert lineage is not None
    return lineage.model_hash


def stages_done(folder: Path) -> int:
    path = folder / "ledger.json"
    return len(json.loads(path.read_text())["stages"]) if path.exists() else 0


def kill(process: "subprocess.Popen[bytes]") -> bool:
    """Kill the process; return whether it still ran."""
    ran = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    return ran


def kill_after_next_stage(folder: Path, cache: Path) -> bool:
    """Kill as soon as the ledger has one stage more."""
    before, process = stages_done(folder), start(folder, cache)
    while process.poll() is None and stages_done(folder) == before:
        time.sleep(0.005)
    return kill(process)


def kill_while_training(folder: Path, cache: Path, wait: random.Random) -> bool:
    """Kill at a random moment after the job began to change the folder."""
    process = start(folder, cache)
    process_started = time.monotonic()
    while process.poll() is None and time.monotonic() - process_started < 60:
        state = folder / "pretraining" / "saved", folder / "attempt_1" / "saved"
        if any(path.exists() for path in state) or stages_done(folder):
            break
        time.sleep(0.005)
    time.sleep(wait.uniform(0.0, 2.5))
    return kill(process)


def killed_often(folder: Path, cache: Path, *, kills: int, seed: int) -> int:
    """Kill the job in turn at a ledger event and at random; return how often it was hit."""
    wait, hits = random.Random(seed), 0
    for number in range(kills):
        if number % 2:
            hits += kill_after_next_stage(folder, cache)
        else:
            hits += kill_while_training(folder, cache, wait)
        if (folder / "summary.json").exists():
            break
    return hits


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    run_job: Callable[..., Outcome], tmp_path: Path
) -> None:
    run_job(tmp_path / "whole", *JOB)
    whole = kept(tmp_path / "whole")
    assert killed_often(tmp_path / "parts", tmp_path / "cache_parts", kills=3, seed=0) >= 2
    assert finished(tmp_path / "parts", tmp_path / "cache_parts") == whole
    leftovers = [path for path in (tmp_path / "parts").rglob(".*") if path.name != ".hydra"]
    assert leftovers == []


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """Several runs, each killed until it ends; writes a log that experiments quote."""
    whole = finished(tmp_path / "whole", tmp_path / "cache_whole")
    hits, log = 0, []
    for seed in range(12):
        folder, cache = tmp_path / f"run{seed}", tmp_path / f"cache{seed}"
        hit = killed_often(folder, cache, kills=5, seed=seed)
        hits += hit
        log.append({"seed": seed, "kills": hit, "same": finished(folder, cache) == whole})
        if hits >= 22:
            break
    (tmp_path / "kills.json").write_text(json.dumps(log))
    print(json.dumps(log))
    assert hits >= 20
    assert all(entry["same"] for entry in log)
