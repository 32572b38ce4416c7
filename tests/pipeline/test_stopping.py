"""Ctrl-C and SIGTERM in a run: exit code, message, resume command, and the same weights."""

import contextlib
import csv
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lightning import Callback

from tests.pipeline.plug import WORK
from tests.pipeline.test_trust import Ended, result
from tests.pipeline.tiny import TINY
from tritter.config.launch.entry import main
from tritter.pipeline import Outcome, run_pipeline
from tritter.training import fitting
from tritter.training.fitting import start_method

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
DDP = ("trainer=ddp", "trainer.precision=32-true")
Run = Callable[..., Ended]
During = Callable[[Callback], contextlib.AbstractContextManager[None]]


class SignalAt(Callback):
    """Send this process signals just before an optimizer step."""

    def __init__(self, step: int, *numbers: int, rank: int | None = None) -> None:
        self.step, self.numbers, self.rank = step, numbers, rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        is_requested = trainer.global_step == self.step and trainer.max_steps == 8
        if is_requested and self.rank in (None, trainer.global_rank):
            target = os.getppid() if self.rank is not None else os.getpid()
            for number in self.numbers:
                os.kill(target, number)
                if self.rank is not None:
                    time.sleep(0.5)  # so that it is passed on within this step


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], cache: Path) -> Run:
    """Run the tiny job, or only the given arguments, through the program."""

    def run_words(*words: str, is_alone: bool = False) -> Ended:
        job = [*TINY, f"cache_dir={cache}", "training.max_steps=8"]
        code = main(run_pipeline, arguments=list(words) if is_alone else [*job, *words])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run_words


@pytest.fixture(scope="module")
def whole(run_tiny: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_tiny(folder, "training.max_steps=8")
    return folder


@pytest.fixture(scope="module")
def whole_by_two(run_tiny: Callable[..., Outcome], whole: Path) -> Path:
    """The same on two processes."""
    run_tiny(whole.with_name("by_two"), "training.max_steps=8", *DDP)
    return whole.with_name("by_two")


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> During:
    """Put a callback first in every training run inside this context."""
    whole = fitting._build_trainer

    @contextlib.contextmanager
    def put(callback: Callback) -> Iterator[None]:
        def trainer(settings, callbacks, max_steps, *, loggers):  # type: ignore[no-untyped-def]
            return whole(settings, [callback, *callbacks], max_steps, loggers=loggers)

        with monkeypatch.context() as patch:
            patch.setattr(fitting, "_build_trainer", trainer)
            yield

    return put


def printed_words(ended: Ended) -> list[str]:
    """Return the arguments of the printed resume command, without the program."""
    program, _, *words = shlex.split(ended.err.strip().splitlines()[-1])
    assert program.rpartition("/")[2].startswith("python")
    return words


def logged(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without times and memory."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("performance/")} for row in rows]


def test_metrics_are_sorted_by_finished_steps(whole: Path) -> None:
    rows = logged(whole)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps) and next(iter(rows[0])) == "step"
    assert list(rows[0])[1:] == sorted(list(rows[0])[1:]) and "epoch" not in rows[0]
    last = [row for row in rows if row["step"] == "8"]  # of training.max_steps
    assert [{name.split("/")[0] for name, value in row.items() if value} for row in last] == [
        {"step", "eval"}, {"step", "train", "forgetting"}, {"step", "score"},
    ]  # fmt: skip


def status_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.quick_cases(1)
@BOTH
@pytest.mark.parametrize(
    "step", [5, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 7))], ids=str
)
def test_a_training_stops_at_its_step_and_goes_on_to_the_same_weights(
    run: Run, whole: Path, tmp_path: Path, signal_at: During, number: int, code: int, step: int
) -> None:
    folder = tmp_path / "it's a run"
    with signal_at(SignalAt(step, number)):
        ended = run(f"""hydra.run.dir="{folder}" """.strip())
    assert ended.code == code
    where = f"at step {step + 1} of 8 of the training, which can be resumed"
    assert f"\nStopped {where}.\nResume with:\n  " in ended.err and "Traceback" not in ended.err
    status = status_of(folder)
    assert (status["status"], status["exit_code"]) == ("interrupted", code)
    assert status["error"] == f"stopped {where}"
    again = run(*printed_words(ended), is_alone=True)
    assert again.code == 0, again.err
    assert result(folder) == result(whole)
    assert logged(folder) == logged(whole)
    assert not [path for path in folder.rglob(".*") if path.name != ".hydra"]


@pytest.mark.full
def test_a_second_signal_ends_it_at_once(
    run: Run, whole: Path, tmp_path: Path, signal_at: During
) -> None:
    with signal_at(SignalAt(5, signal.SIGINT, signal.SIGINT)):
        ended = run(f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 130 and "resumes from its last saved state" in ended.err
    assert status_of(tmp_path / "run")["status"] == "interrupted"
    head = json.loads((tmp_path / "run/attempt_1/saved/checkpoint.json").read_text())
    steps = [value for key, value in head["content"]["pairs"] if key == "global_step"]
    assert steps == [4]  # the last it saved by itself
    assert run(*printed_words(ended), is_alone=True).code == 0
    assert result(tmp_path / "run") == result(whole)


@pytest.mark.full
@BOTH
@pytest.mark.parametrize("stage", ["baseline", "expand", "evaluate"])
def test_any_other_stage_says_that_it_starts_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, stage: str
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), number)

    key = stage if stage == "baseline" else f"attempt_1.{stage}"
    with monkeypatch.context() as patch:
        patch.setattr(*WORK[stage], stop)
        ended = run(f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == code and f"Stopped during {key}, which will restart." in ended.err
    assert run(*printed_words(ended), is_alone=True).code == 0
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.full
def test_a_sweep_ends_and_says_how_it_goes_on(run: Run, tmp_path: Path, signal_at: During) -> None:
    words = ("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    with signal_at(SignalAt(3, signal.SIGTERM)):
        ended = run(*words)
    assert ended.code == 143 and "Resume the sweep with:" in ended.err
    assert not (tmp_path / "sweep/1").exists()
    again = run(*printed_words(ended), is_alone=True)
    assert again.code == 0, again.err
    assert [status_of(tmp_path / f"sweep/{n}")["status"] for n in (0, 1)] == ["ungated"] * 2


@pytest.mark.full
@pytest.mark.skipif(start_method("cpu") != "fork", reason="spawning takes seconds")
@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=str)
def test_processes_stop_together_and_go_on(
    run: Run, whole_by_two: Path, tmp_path: Path, signal_at: During, numbers: tuple[int, ...]
) -> None:
    with signal_at(SignalAt(5, *numbers, rank=1)):  # to the one that started them, alone
        ended = run(f"hydra.run.dir={tmp_path / 'run'}", *DDP)
    assert ended.code == 128 + numbers[0], ended.err
    where = "at step 6 of 8" if len(numbers) == 1 else "during the training"
    assert f"Stopped {where}" in ended.err and "Traceback" not in ended.err
    assert multiprocessing.active_children() == []
    assert run(*printed_words(ended), is_alone=True).code == 0
    assert result(tmp_path / "run") == result(whole_by_two)


@pytest.mark.slow
@BOTH
def test_signals_from_outside_at_any_moment(
    run: Run, tmp_path: Path, cache: Path, number: int, code: int
) -> None:
    """The program in a separate process, stopped repeatedly until it ends."""
    long = ("training.max_steps=1500", "trainer.save_every_n_steps=200")
    assert run(f"hydra.run.dir={tmp_path / 'whole'}", *long).code == 0
    folder = tmp_path / "run"
    first = [*TINY, f"cache_dir={cache}", *long, f"hydra.run.dir={folder}"]
    command, codes = [sys.executable, str(ROOT / "train.py"), *first], []
    for wait in (0.0, 0.7, 1.9, 3.1, None):
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if wait is not None:
            begun = (folder / "status.json").stat().st_mtime_ns if codes else 0
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    if (folder / "status.json").stat().st_mtime_ns > begun:
                        break
                time.sleep(0.01)
            time.sleep(wait)
            process.send_signal(number)
        _, errors = process.communicate(timeout=180)
        codes.append(process.returncode)
        if process.returncode == 0:
            break
        assert process.returncode == code and "Resume with:\n" in errors, errors
        command = shlex.split(errors.strip().splitlines()[-1])
    assert codes[-1] == 0 and codes.count(code) >= 2
    assert result(folder) == result(tmp_path / "whole")
