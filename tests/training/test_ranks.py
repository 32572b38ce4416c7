"""Runs whose processes torchrun or srun starts, against those that start their own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.pipeline.tiny import TINY
from tritter.errors import RequestError
from tritter.launched import Launch
from tritter.training.ranks import Ranks

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
SHARED = (*TINY, "trainer=fsdp", "forgetting=replay")


def environment(place: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITTER_CACHE": str(place / "cache"), **more}


def run(place: Path, *words: str, program: tuple[str, ...] = (sys.executable,)) -> Path:
    folder = place / "run"
    line = [*program, str(ROOT / "train.py"), *words, f"hydra.run.dir={folder}"]
    place.mkdir(exist_ok=True)
    subprocess.run(
        line, env=environment(place), cwd=place, check=True, capture_output=True, timeout=300
    )
    return folder


def model_hash(folder: Path) -> str:
    found: str = json.loads((folder / "summary.json").read_text())["lineage"]["model_hash"]
    return found


def torchrun(**changes: str) -> dict[str, str]:
    names = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    return {"TORCHELASTIC_RUN_ID": "none", **names, **changes}


def slurm(**changes: str) -> dict[str, str]:
    names = {"NODEID": "1", "LOCALID": "1", "STEP_NUM_TASKS": "4", "STEP_NUM_NODES": "2"}
    return {**{f"SLURM_{name}": value for name, value in names.items()}, **changes}


@pytest.mark.parametrize("environ, program", [(torchrun(), "torchrun"), (slurm(), "srun")])
def test_the_place_of_a_process_is_in_its_environment(
    environ: dict[str, str], program: str
) -> None:
    launch = Launch.of(environ)
    assert launch == Launch(program, rank=3, count=4, local_rank=1, local_count=2)  # type: ignore[arg-type]
    assert launch.num_nodes == 2


def test_one_process_needs_no_others() -> None:
    assert Launch.of({}) is None
    assert Launch.of(torchrun(WORLD_SIZE="1")) is None
    # In a batch script that srun has not started, and in a shell that it has
    assert Launch.of({name: value for name, value in slurm().items() if "STEP" not in name}) is None
    assert Launch.of(slurm(SLURM_JOB_NAME="bash")) is None
    assert Launch.of(slurm(SLURM_STEP_NUM_TASKS="1", SLURM_STEP_NUM_NODES="1")) is None


def test_machines_need_equal_numbers_of_processes() -> None:
    with pytest.raises(RequestError, match="5 processes on 2 machines"):
        Launch.of(slurm(SLURM_STEP_NUM_TASKS="5"))


def fails_in_one() -> None:
    """Raise an error in the second process only, while the first waits for it."""
    if distributed.get_rank():
        raise RuntimeError("only here")
    distributed.all_reduce(torch.ones(1))


if __name__ == "__main__":
    _launch = Launch.of()
    assert _launch is not None
    if _launch.rank:
        sys.exit(Ranks(_launch).serve())
    from tests.training.test_ranks import fails_in_one as _task  # the others import it by name

    with Ranks(_launch).lead():
        Ranks.call(Ranks.leading(), _task)  # type: ignore[arg-type]


@pytest.mark.full
def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    line = [*TORCHRUN, "-m", "tests.training.test_ranks"]
    ended = subprocess.run(
        line, env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and "RuntimeError: only here" in ended.stderr


@pytest.mark.full
@pytest.mark.parametrize("words", [(*TINY, "trainer=ddp"), SHARED], ids=["ddp", "fsdp"])
def test_torchrun_gives_the_same_bits(words: tuple[str, ...], tmp_path: Path) -> None:
    assert model_hash(run(tmp_path / "a", *words)) == model_hash(
        run(tmp_path / "b", *words, program=TORCHRUN)
    )


@pytest.mark.full
def test_srun_gives_the_same_bits(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = tmp_path / "srun"
    place.mkdir()
    line = [sys.executable, ROOT / "train.py", *SHARED, f"hydra.run.dir={place / 'run'}"]
    started = [
        subprocess.Popen(
            list(map(str, line)),
            env=environment(
                place,
                MASTER_PORT=port,
                SLURM_JOB_ID="123456",
                SLURM_JOB_NAME="tritter",
                SLURM_NTASKS="2",
                SLURM_NODEID="0",
                SLURM_LOCALID=rank,
                SLURM_PROCID=rank,
                SLURM_STEP_NODELIST="127.0.0.1",
                SLURM_STEP_NUM_NODES="1",
                SLURM_STEP_NUM_TASKS="2",
            ),
            cwd=place,
            stdout=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    assert model_hash(place / "run") == model_hash(run(tmp_path / "own", *SHARED))


def stopped(place: Path, *words: str, program: tuple[str, ...] = (sys.executable,)) -> int:
    """Start the run, send SIGTERM during its training, and return the step of the saved state."""
    place.mkdir()
    log, metrics = place / "log", place / "run/attempt_1/metrics.csv"
    line = [*program, str(ROOT / "train.py"), *words, f"hydra.run.dir={place / 'run'}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            line, env=environment(place), cwd=place, stdout=output, stderr=subprocess.STDOUT
        )
        until = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    found = re.search(r"Stopped at step (\d+) of \d+ of the training", log.read_text())
    assert found is not None, log.read_text()
    return int(found[1])


@pytest.mark.full
def test_a_signal_to_torchrun_saves_the_state_and_the_run_resumes(tmp_path: Path) -> None:
    words = (*SHARED, "training.max_steps=60", "trainer.save_every_n_steps=0")
    expected = model_hash(run(tmp_path / "whole", *words))
    place = tmp_path / "stopped"
    assert 0 < stopped(place, *words, program=TORCHRUN) < 60
    assert model_hash(run(place, *words, program=TORCHRUN)) == expected


@pytest.mark.full
def test_a_refusal_ends_all_processes(tmp_path: Path) -> None:
    line = [*TORCHRUN, str(ROOT / "train.py"), "trainer=ddp", "seeed=1"]
    ended = subprocess.run(
        line, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (
        ended.returncode == 1 and "seeed" in ended.stderr and "Nothing was written" in ended.stderr
    )
    assert not list(tmp_path.iterdir())
