"""Launchers: environment of their processes, accepted settings, and failures."""

import contextvars
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins import basic_launcher
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from tests import compositions
from tests.config.conftest import FakeOutcome, FakePipeline
from tests.config.test_entry import Run
from tritter.config.launch import jobs
from tritter.config.launch.jobs import LaunchSettings
from tritter.config.schema import RunConfig
from tritter.planning import run_memory as memory
from tritter.storage.lock import FolderLock


@pytest.mark.full
def test_a_job_in_another_process_records_where_its_options_came_from(
    run: Run, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_job = basic_launcher.run_job

    def elsewhere(*arguments: object, **options: object) -> object:
        return contextvars.Context().run(run_job, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(basic_launcher, "run_job", elsewhere)
    (tmp_path / "conf").mkdir()
    assert run("-m", "seed=0,3", "--config-dir=conf", "hydra.sweep.dir=sweep").code == 0
    for job in ("0", "1"):
        recorded = json.loads((tmp_path / "sweep" / job / "run.json").read_text())
        assert recorded["config_folders"] == [str(tmp_path / "conf")]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("group", "option", "extra"),
    [("launcher", "joblib", "sweeps"), ("launcher", "ray", "ray"), ("sweeper", "optuna", "sweeps")],
)
def test_a_plugin_that_is_missing_is_named_with_its_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, group: str, option: str, extra: str
) -> None:
    monkeypatch.setattr(compositions, "_lists", {})  # earlier tests composed the same words
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group], f"{option}.yaml", False)
    result = run("-m", f"hydra/{group}={option}", "seed=0,3")
    assert (result.code, result.written) == (2, [])
    assert f"hydra/{group} = {option}: " in result.err
    assert f"pip install 'tritter[{extra}]'" in result.err and len(result.err.splitlines()) == 2


def test_processes_do_not_meet_on_the_same_devices(run: Run) -> None:
    result = run("-m", "seed=0,3", "hydra/launcher=joblib", "trainer=ddp")
    assert (result.code, result.written) == (2, [])
    assert "a launcher may run the jobs of a sweep in parallel" in result.err


def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def how(class_name: str, num_jobs: int, **settings: object) -> tuple[int, int | None]:
        hydra = OmegaConf.create({"launcher": {"_target_": f"a.b.{class_name}", **settings}})
        found = LaunchSettings.of(hydra, num_jobs=num_jobs)
        return found.num_parallel, found.threads

    monkeypatch.setattr(jobs, "_num_cores", lambda: 8)
    assert how("JoblibLauncher", 24, n_jobs=-1) == (8, 1)
    assert how("JoblibLauncher", 24, n_jobs=-3) == (6, 1)
    assert how("JoblibLauncher", 24, n_jobs=3) == (3, 2)
    assert how("JoblibLauncher", 2, n_jobs=3) == (2, 4)
    assert how("LocalLauncher", 24) == (24, 1)
    assert how("RayLauncher", 24, ray={"init": {"num_cpus": 4}, "remote": {"num_cpus": 2}}) == (
        2,
        4,
    )
    assert how("BasicLauncher", 24) == (1, None)


@pytest.mark.full
def test_jobs_side_by_side_have_to_fit_together(
    run: Run, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-m", "model=tritter_125m", "seed=0,3")
    monkeypatch.setattr(memory, "machine_memory", lambda: 9 * 10**9)  # for one, and a half
    refused = run(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=3")
    assert (refused.code, refused.written) == (2, [])
    assert "hydra/launcher = joblib: 2 parallel jobs require" in refused.err
    assert "1 in parallel fit" in refused.err
    assert run(*words).code == 0 and len(pipeline.configs) == 2


class _Killed(BaseException):
    pass


@pytest.mark.full
def test_the_same_sweep_goes_on_after_a_job_killed_its_process(
    run: Run, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like joblib: if the process of one job dies, the launcher fails."""
    run_job, call = basic_launcher.run_job, FakePipeline.__call__

    def die(self: FakePipeline, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        outcome = call(self, config, run_folder=run_folder)
        if config.seed == 9 and pipeline.configs.count(config) == 1:
            raise _Killed
        return outcome

    def launched(*arguments: Any, **options: Any) -> Any:
        try:
            return run_job(*arguments, **options)
        except _Killed as error:
            raise RuntimeError("a worker was killed") from error

    monkeypatch.setattr(FakePipeline, "__call__", die)
    monkeypatch.setattr(basic_launcher, "run_job", launched)
    words = ("-m", "seed=0,1,9,3", "hydra.sweep.dir=here")
    result = run(*words)
    assert result.code == 1 and "Traceback" not in result.err
    assert [config.seed for config in pipeline.configs] == [0, 1, 9]
    shown = [read_row(line) for line in result.out.splitlines() if "seed=" in line and "│" in line]
    assert [row[2] for row in shown] == ["kept", "failed", "killed", "not run"]
    assert "a worker was killed" in result.err and "job 1: the loss was not finite" in result.out
    assert run(*words).code == 1  # the failed one, which fails again
    assert [config.seed for config in pipeline.configs] == [0, 1, 9, 1, 9, 3]


def read_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.full
def test_a_launcher_that_can_not_start_at_all_is_told_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*arguments: Any, **options: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(basic_launcher, "run_job", launched)
    result = run("-m", "seed=0,3", "hydra.sweep.dir=here")
    assert result.code == 1
    assert "error: the sweep failed: OSError: no more processes" in result.err
    assert "Resume the sweep with:\n" in result.err and "hydra.sweep.dir=" in result.err


@pytest.mark.full
def test_one_process_runs_a_sweep(run: Run, tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from tritter.storage.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])).held(key='dir'):\n"
        "    print(1, flush=True); sys.stdin.read()"
    )
    for place in ("here", "here/a/0"):  # the sweep itself, or a job that runs on alone
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-c", hold, str(tmp_path / place)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdout.readline()
            assert FolderLock(tmp_path / place).process == holder.pid
            refused = run("-m", "seed=0,3", "hydra.sweep.dir=here")
            assert refused.code == 2 and f"process {holder.pid} on" in refused.err
            assert holder.stdin is not None
            holder.stdin.close()
    assert FolderLock(tmp_path / "here").process is None
    assert run("-m", "seed=0,3", "hydra.sweep.dir=here").code == 0


def test_a_sweep_does_not_lie_in_a_run(run: Run) -> None:
    assert run("hydra.run.dir=here").code == 0
    result = run("-m", "seed=0,3", "hydra.sweep.dir=here")
    assert result.code == 2 and not any("multirun" in path for path in result.written)
    assert "hydra.sweep.dir = " in result.err and "it is the folder of a run" in result.err


@pytest.mark.full
def test_wandb_groups_by_the_sweep_or_the_experiment(run: Run, pipeline: FakePipeline) -> None:
    own = "hydra.sweep.subdir=a/b${hydra.job.num}"
    assert run("-m", "seed=0,3", own, "hydra.sweep.dir=here").code == 0
    assert run("-m", "seed=0,3", "logger.wandb.group=mine").code == 0
    assert run("hydra.run.dir=alone").code == 0
    assert run("hydra.run.dir=named", "experiment=small_deep_wide").code == 0
    groups = [one.wandb.group for one in pipeline.configs if one.wandb is not None]
    assert groups == ["here", "here", "mine", "mine", None, "small_deep_wide"]
