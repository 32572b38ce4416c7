"""Runs and sweeps from the command line to the exit code, with a recording stub pipeline."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.conftest import FakeOutcome, FakePipeline, Result
from tritter.checkpoints.record import LedgerRecord
from tritter.config.launch.sweep import _changes, _ends_of, _experts, _print_sweep
from tritter.config.run_folder import RunRecord, RunStatus
from tritter.config.schema import RunConfig
from tritter.errors import TritterError
from tritter.options import leaves

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]


def test_a_run(run: Run, pipeline: FakePipeline, tmp_path: Path) -> None:
    result = run("training.max_steps=7", "gate=strict")
    assert result.code == 0
    assert pipeline.configs[0].training.max_steps == 7
    (folder,) = pipeline.folders
    assert result.out.startswith(f"run        {folder}\n")  # before its imports
    assert folder.parent == tmp_path / "outputs/runs"
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    status = RunStatus.read(folder)
    assert (status.status, status.metric, status.exit_code) == ("kept", 0.25, 0)
    assert status.overrides == ["training.max_steps=7", "gate=strict"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["expansion=llama-pro"], ["expansion=llama_pro"]),
        (["expansion=[llama-pro,width]"], ["expansion=[llama_pro,width]"]),
        (["training.max-steps=5"], ["training.max_steps=5"]),
        (
            ["forgetting=l2sp", "forgetting.l2sp.l2sp-lambda=3"],
            ["forgetting=l2sp", "forgetting.l2sp.l2sp_lambda=3"],
        ),
        (["trainer.precision=bf16_mixed"], ["trainer.precision=bf16-mixed"]),
        (["experiment=small-deep-wide"], ["experiment=small_deep_wide"]),
        (["+seed=4"], ["seed=4"]),
        (["+experiment=small_deep_wide"], ["experiment=small_deep_wide"]),
        (["experiment=null"], []),
        (["~experiment"], []),
        (["logger=null"], ["logger=csv"]),
        (["~logger"], ["logger=csv"]),
        (["logger=off"], ["logger=csv"]),
        (["~forgetting"], ["forgetting=none"]),
        (["forgetting=null"], ["forgetting=none"]),
        (["expansion=null"], ["expansion=none"]),
        (["~gate"], ["gate=off"]),
        (["gate=none"], ["gate=off"]),
        (["training.max_steps=5.0"], ["training.max_steps=5"]),
    ],
)
def test_both_spellings_are_the_same(
    run: Run, pipeline: FakePipeline, words: list[str], same: list[str]
) -> None:
    assert run(*words).code == run(*same).code == 0
    assert pipeline.configs[0] == pipeline.configs[1]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "word",
    [
        "hydra.output_subdir=.hydra",
        "hydra/launcher=basic",
        "hydra.verbose=[tritter]",
        "hydra.job_logging.root.level=DEBUG",
        "hydra.job.config.override_dirname.kv_sep=-",
    ],
)
def test_settings_of_hydra_that_leave_a_run_whole(run: Run, word: str) -> None:
    result = run(word)
    assert result.code == 0
    assert all(path.startswith("outputs") for path in result.written)


def test_exit_codes(run: Run) -> None:
    assert run("seed=3").code == 0
    assert run("seed=3", "gate=strict").code == 3
    failed = run("seed=1")
    assert failed.code == 1
    assert "error: the loss was not finite" in failed.err
    assert "Traceback" not in failed.err
    assert "resume=" in failed.err
    bug = run("seed=2")
    assert bug.code == 1
    assert "KeyError" in bug.err


@pytest.mark.parametrize("words", [(), ("-m",)], ids=["run", "sweep"])
@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "failed"])
def test_a_full_disk_is_told_without_a_traceback(
    run: Run,
    pipeline: FakePipeline,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    is_kept: bool,
) -> None:
    """The status has no room either."""
    called = FakePipeline.__call__

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(self: FakePipeline, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        monkeypatch.setattr(os, "fsync", full)
        return called(self, config, run_folder=run_folder)

    monkeypatch.setattr(FakePipeline, "__call__", fill)
    result = run(*words, "seed=3" if is_kept else "seed=1")
    said = result.out + result.err
    assert result.code == 1 and "Traceback" not in said
    assert f"{pipeline.folders[0]}/status.json could not be written: No space left" in said
    assert is_kept or "the loss was not finite" in said
    assert words or f"resume={pipeline.folders[0]}" in result.err
    assert RunStatus.read(pipeline.folders[0]).status == "running"  # as after a kill


def test_a_panic_is_one_error_of_a_failed_run(run: Run, pipeline: FakePipeline) -> None:
    panicked = run("seed=7")
    assert panicked.code == 1 and "of a library in Rust" in panicked.err
    assert "Traceback" not in panicked.err
    assert RunStatus.read(pipeline.folders[0]).status == "failed"


def test_the_same_command_goes_on(run: Run, pipeline: FakePipeline) -> None:
    assert run("seed=1", "hydra.run.dir=here").code == 1
    assert run("seed=1", "hydra.run.dir=here", "logger=csv", "trainer.progress=off").code == 1
    assert len(pipeline.folders) == 2
    assert pipeline.folders[0] == pipeline.folders[1]


def test_a_finished_run_is_not_run_again(run: Run, pipeline: FakePipeline) -> None:
    before = run("hydra.run.dir=here").written
    result = run("hydra.run.dir=here")
    assert (result.code, len(pipeline.configs)) == (0, 1)
    assert "nothing to do" in result.out
    assert "summary.json" in result.out
    assert result.written == before


@pytest.mark.full
def test_a_folder_in_which_a_process_runs_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "resume=here"]
    begun = FakePipeline.__call__
    second: list[subprocess.CompletedProcess[str]] = []

    def start_another(self: FakePipeline, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        second.append(subprocess.run(words, capture_output=True, text=True, timeout=120))
        return begun(self, config, run_folder=run_folder)

    monkeypatch.setattr(FakePipeline, "__call__", start_another)
    assert run("hydra.run.dir=here").code == 0
    assert second[0].returncode == 2
    assert f"hydra.run.dir = {tmp_path}/here: process {os.getpid()} on " in second[0].stderr
    assert second[0].stderr.endswith("Nothing was written.\n")
    assert run("resume=here").code == 0


def test_another_configuration_is_refused(run: Run, tmp_path: Path) -> None:
    run("hydra.run.dir=here")
    before = (tmp_path / "here/.hydra/config.yaml").read_bytes()
    result = run("hydra.run.dir=here", "training.max_steps=7", "expansion=dus")
    assert result.code == 2
    assert "training.max_steps: 250 → 7" in result.err
    assert "expansion.methods: [width] → [dus]" in result.err
    assert (tmp_path / "here/.hydra/config.yaml").read_bytes() == before


def test_output_that_exists_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("thesis", "file", "file/below"):
        result = run(f"hydra.run.dir={name}")
        assert result.code == 2
        assert "hydra.run.dir = " in result.err
        assert result.written == ["file", "thesis", "thesis/chapter.txt"]


def test_an_unreadable_run_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for text in ("", "[]", '{"format_version": 99, "fingerprint": {}}'):
        (tmp_path / "here/run.json").write_text(text)
        result = run("hydra.run.dir=here")
        assert result.code == 2
        assert "run.json" in result.err


def test_resume_finds_the_last_run(run: Run, pipeline: FakePipeline) -> None:
    run("seed=0")
    run("seed=1")
    assert run("seed=1", "resume=latest").code == 1
    assert pipeline.folders[2] == pipeline.folders[1] != pipeline.folders[0]
    assert run(f"resume={pipeline.folders[0]}").code == 0
    assert len(pipeline.folders) == 3
    (pipeline.folders[1] / "ledger.json").touch()
    refused = run("seed=5", "resume=latest")
    assert refused.code == 2
    assert "seed: 1 → 5" in refused.err


def test_a_sweep(run: Run, pipeline: FakePipeline, tmp_path: Path) -> None:
    result = run("-m", "forgetting=replay,[l2sp,replay]", "seed=0,1,2,3", "training=quick")
    assert result.code == 1
    assert len(pipeline.configs) == 8
    assert [len(config.forgetting) for config in pipeline.configs] == [1] * 4 + [2] * 4
    assert [folder.name for folder in pipeline.folders] == [str(n) for n in range(8)]
    sweep = pipeline.folders[0].parent
    assert sweep.parent == tmp_path / "outputs/sweeps"
    assert {folder.parent for folder in pipeline.folders} == {sweep}
    statuses = [RunStatus.read(sweep / str(number)).status for number in range(4)]
    assert statuses == ["kept", "failed", "failed", "rolled_back"]
    assert "KeyError" in RunStatus.read(sweep / "2").error
    for word in ("rolled_back", "failed", "training=quick", "seed=3"):
        assert word in result.out


def test_a_sweep_prints_a_line_per_job_and_keeps_the_output_in_its_log(
    run: Run, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called = FakePipeline.__call__

    def print_and_run(self: FakePipeline, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        print(f"a line of seed {config.seed}")
        if config.seed == 4:
            raise TritterError("the data has 2 problems:\n  data.old: gone\n  data.new: gone")
        return called(self, config, run_folder=run_folder)

    monkeypatch.setattr(FakePipeline, "__call__", print_and_run)
    result = run("-m", "seed=0,1,2,4", "training=quick", "hydra.sweep.dir=here")
    logs = [tmp_path / "here" / str(number) / "output.txt" for number in range(3)]
    started, *lines = result.out.splitlines()
    assert started.endswith(
        f"4 jobs, one at a time; output of each: {tmp_path}/here/JOB/output.txt"
    )
    assert lines[:3] == [
        "[1/4] job 0 (seed=0): kept; metric 0.2500",
        f"[2/4] job 1 (seed=1): failed: the loss was not finite 10 times in a row; log: {logs[1]}",
        f"[3/4] job 2 (seed=2): failed: KeyError: 'a bug'; log: {logs[2]}",
    ]
    assert "job 3 (seed=4): failed: the data has 2 problems: data.old: gone; log" in lines[3]
    assert lines[4].startswith("training=quick") or "━" in lines[5]  # the table
    assert "a line of" not in result.out and "Traceback" not in result.out + result.err
    for number, log in enumerate(logs):
        assert f"a line of seed {number}" in log.read_text()
    assert "Traceback" in logs[2].read_text()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_prints_its_table(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    called = FakePipeline.__call__

    def stop_second(self: FakePipeline, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        if config.seed == 3:
            os.kill(os.getpid(), number)
        return called(self, config, run_folder=run_folder)

    monkeypatch.setattr(FakePipeline, "__call__", stop_second)
    result = run("-m", "seed=0,3,4", "hydra.sweep.dir=here")
    assert result.code == 128 + number
    rows = [line.split("│")[1:4] for line in result.out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "seed=0", "kept"],
        ["1", "seed=3", "interrupted"],
        ["2", "seed=4", "not run"],
    ]
    assert "Resume the sweep with" in result.err and not Path("here/2").exists()


def test_the_table_of_a_sweep_has_experts_where_some_job_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held: dict[str, Any] = {"number": 3, "parameters": {"share": 0.0312}}
    damaged = ({}, {"experts": {"number": "3", "parameters": {"share": 1}}}, {"experts": [held]})
    for number, summary in enumerate(({"experts": held}, *damaged)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(summary))
        (tmp_path / str(number) / "status.json").write_text("{}")
    ends = _ends_of((), tmp_path)
    assert [*map(_experts, ends)] == [("3", "3.12%"), None, None, None]
    _print_sweep(ends, tmp_path)
    message = capsys.readouterr().out
    assert "experts" in message and "3.12%" in message
    del ends[tmp_path / "0"]
    _print_sweep(ends, tmp_path)
    assert "experts" not in capsys.readouterr().out


def test_the_table_of_a_sweep_compares_the_base_with_the_last_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all rounds; a gate counts from its own round, and drops of an accuracy."""
    old, base = {"loss_per_byte": 2.0}, {"loss_per_byte": None, "accuracy": 0.25}
    check = {"check": "retention", "subject": "old", "value": -0.1}
    last = {"final": {"old": {"loss_per_byte": 1.5}, "arc": {"accuracy": 0.75}}, "gate": [check]}
    summary = {"baseline": {"old": old, "arc": base}, "attempts": [last], "rounds": [{}, last]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "status.json").write_text("{}")
    assert _changes(tmp_path) == {"old": "-25.0%", "arc/accuracy": "+50.0 points"}
    _print_sweep(_ends_of((), tmp_path), tmp_path)
    assert "+50.0" in capsys.readouterr().out


def test_equal_jobs_run_each_in_its_folder(run: Run, pipeline: FakePipeline) -> None:
    assert run("-m", "seed=4,4").code == 0
    assert len({*pipeline.folders}) == len(pipeline.configs) == 2


@pytest.mark.full
def test_a_sweep_over_keys_of_swept_methods(run: Run, pipeline: FakePipeline) -> None:
    words = ("forgetting=l2sp,[replay,l2sp]", "forgetting.l2sp.l2sp-lambda=1,3")
    assert run("-m", *words).code == 0
    lambdas = [config.forgetting[-1].options.l2sp_lambda for config in pipeline.configs]
    assert lambdas == [1.0, 3.0, 1.0, 3.0]


@pytest.mark.full
def test_a_mode_makes_a_sweep(run: Run, pipeline: FakePipeline, tmp_path: Path) -> None:
    file = tmp_path / "conf/experiment/two.yaml"
    file.parent.mkdir(parents=True)
    two = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,3'}}}"
    file.write_text(f"# @package _global_\n# Two runs\n{two}\n")
    assert run("--config-dir=conf", "experiment=two").code == 0
    assert [config.seed for config in pipeline.configs] == [0, 3]
    assert {folder.parent.parent.name for folder in pipeline.folders} == {"sweeps"}


@pytest.mark.full
def test_a_sweep_with_a_strict_gate(run: Run) -> None:
    assert run("-m", "seed=0,3").code == 0
    assert run("-m", "seed=0,3", "gate=strict").code == 3
    assert run("-m", "seed=0,4", "gate=strict").code == 0


@pytest.mark.full
def test_a_sweep_goes_on_in_its_folder(run: Run, pipeline: FakePipeline) -> None:
    run("-m", "seed=0,1", "hydra.sweep.dir=here")
    result = run("-m", "seed=0,1", "hydra.sweep.dir=here")
    assert [config.seed for config in pipeline.configs] == [0, 1, 1]
    first, second = [line for line in result.out.splitlines() if line.startswith("[")]
    assert first == "[1/2] job 0 (seed=0): kept; metric 0.2500; finished earlier"
    assert second.startswith("[2/2] job 1 (seed=1): failed: ")
    assert result.code == 1
    Path("here/1", LedgerRecord.FILE_NAME).write_text("{}")  # a stage has finished
    refused = run("-m", "seed=0,2", "hydra.sweep.dir=here")
    assert refused.code == 2
    assert "job 1 (seed=2)" in refused.err
    assert "seed: 1 → 2" in refused.err


@pytest.mark.full
def test_an_ungated_job_is_finished(run: Run, pipeline: FakePipeline) -> None:
    words = ("-m", "seed=0,4", "gate=off", "hydra.sweep.dir=here")
    first = run(*words)
    assert first.code == 0 and "ungated" in first.out
    again = run(*words)
    assert again.code == 0 and "job 1 (seed=4): ungated; metric 0.2500; finished e" in again.out
    assert [config.seed for config in pipeline.configs] == [0, 4]
    assert RunStatus.read(Path("here/1")).status == "ungated"


@pytest.mark.full
def test_the_shipped_ablation(run: Run, pipeline: FakePipeline) -> None:
    assert run("-m", "experiment=ablation").code == 0
    pairs = {
        (tuple(m.name for m in c.expansion), tuple(m.name for m in c.forgetting))
        for c in pipeline.configs
    }
    assert len(pipeline.configs) == len(pairs) == 12


def test_cfg_shows_and_runs_nothing(run: Run, pipeline: FakePipeline) -> None:
    result = run("--cfg", "job", "-p", "training", "training=quick")
    assert (result.code, pipeline.configs, result.written) == (0, [], [])
    assert "max_steps: 40" in result.out


@pytest.mark.full
def test_cfg_lists_only_keys_that_the_run_reads(run: Run, tmp_path: Path) -> None:
    def listed(*overrides: str) -> set[str]:
        values = leaves(yaml.safe_load(run("--cfg", "job", *overrides).out), "")
        return {key for key, value in values.items() if value != {}}

    usual = listed()
    assert len(usual) <= 85  # what a newcomer has to read
    more = listed(
        *("evaluation.tasks=[piqa]", "gate.ladder=gentler", "training.schedule=wsd"),
        *("pretraining.schedule=wsd", "expansion.width.init=net2net"),
        *("evaluation.code_sandbox=external", "evaluation.code_sandbox_command=cat"),
    ) | listed("pipeline.target_params=300k")
    assert usual < more
    assert {key.rpartition(".")[2] for key in more - usual} == {
        *("tasks_path", "task_limit", "chat_template", "num_fewshot", "allow_code"),
        *("code_sandbox", "code_sandbox_command", "max_attempts", "max_rounds", "strategy"),
        *("decay_ratio", "shares", "noise"),
    }
    of_checkpoint = ("model=hf", "model.path=owner/name")
    assert not {key for key in listed(*of_checkpoint) if re.search("pretraining|vocab_size", key)}
    own = tmp_path / "own/training/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [default]\nmax_steps: ${pretraining.max_steps}\n")
    words = ("-cd", str(tmp_path / "own"), "training=mine", "--resolve", *of_checkpoint)
    for kind in ("job", "all"):  # hydra.overrides refers to the key too
        shown = run(*words, "seed=${pretraining.max_steps}", "--cfg", kind).out
        assert "max_steps: 600" in shown and "seed: 600" in shown


def test_typed_keys_that_the_run_does_not_read_are_named(run: Run) -> None:
    typed = ("pipeline.max_rounds=null", "training.max_steps=5", "evaluation.allow_code=[]")
    notes = [line for line in run(*typed).out.splitlines() if line.startswith("unread")]
    assert notes == [
        "unread     pipeline.max_rounds=null: it needs pipeline.target_params",
        "unread     evaluation.allow_code=[]: it needs evaluation.tasks",
    ]
    told = ("experts=dylora", "experts.boundaries=told", "experts.cooldown=3", "experts.z=0.1")
    notes = [line for line in run(*told, "hydra.run.dir=told").out.splitlines() if "unread" in line]
    assert notes == [
        "unread     experts.cooldown=3: it needs experts.boundaries=detected",
        "unread     experts.z=0.1: it needs experts.router=learned or both",
    ]
    rate = ("experts=single_lora", "training.learning_rate=1e-4")
    noted = (
        "unread     training.learning_rate=1e-4: it needs experts=none; set experts.learning_rate"
    )
    assert noted in run(*rate, "hydra.run.dir=rate").out
    assert noted not in run(*rate, "control=true", "hydra.run.dir=control").out
    both = ("experts.learning_rate=${training.learning_rate}", "hydra.run.dir=both")
    assert "unread" not in run(*rate, *both).out
    own = "{_target_:tritter.methods.growth.triggers.Percentile}"  # as a class from outside
    words = ("growth=foam", f"growth.trigger={own}", "growth.history_checks=3")
    assert "unread" not in run(*words, "hydra.run.dir=own").out
    grown = ("growth=foam", "growth.trigger=schedule", "growth.history_checks=3")
    found = run(*grown, "growth.dead_quantile=0.5", "hydra.run.dir=grown").out
    assert "unread     growth.history_checks=3: it needs growth.trigger=percentile" in found
    assert "unread     growth.dead_quantile=0.5: it needs growth.enable_replacement" in found
    assert "unread" not in run("training.decay_ratio=0.3", "hydra.run.dir=other").out  # has a note


def test_arguments_of_the_process_are_restored(run: Run) -> None:
    before = list(sys.argv)
    run("seed=0")
    assert sys.argv == before


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_with_what_signal(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def stop(self: FakePipeline, config: object, *, run_folder: Path) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(FakePipeline, "__call__", stop)
    result = run("hydra.run.dir=here")
    assert result.code == code
    assert "Resume with:\n  " in result.err and f"train.py resume={tmp_path}/here\n" in result.err
    assert json.loads(Path("here/run.json").read_text())["status"] == "running"


def test_a_metric_that_is_not_finite_is_stored_as_null(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.config.conftest as conftest

    def outcome(self: FakePipeline, config: object, *, run_folder: Path) -> object:
        return conftest.FakeOutcome("undecided", math.nan, run_folder / "summary.json")

    monkeypatch.setattr(FakePipeline, "__call__", outcome)
    assert run("hydra.run.dir=here").code == 0
    assert RunStatus.read(Path("here")).metric is None


def test_run_file_is_written_whole(run: Run, pipeline: FakePipeline) -> None:
    run("hydra.run.dir=here")
    RunRecord.of(Path("here"), pipeline.configs[0], status="running").write(Path("here"))
    assert [p.name for p in Path("here").iterdir() if p.name.startswith(".run")] == []


@pytest.mark.parametrize("sign", ["\x1b", "\n", "\u202e", "\u2028"])
def test_what_no_record_holds_is_refused_before_anything_is_written(
    run: Run, pipeline: FakePipeline, tmp_path: Path, sign: str
) -> None:
    result = run("data=text", f"data.old='a{sign}b'", "data.new=x", "hydra.run.dir=here")
    assert result.code == 2 and not pipeline.configs and not (tmp_path / "here").exists()
    assert f"it contains the character {sign!a}" in result.err


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "words",
    ["seed=0,x", "seed=x,y", "training.max_stesp=1,2", "forgetting=replay,nope",
     "data=text data.new=missing.jsonl,gone.jsonl", "hydra.sweep.subdir=one seed=0,3"],
)  # fmt: skip
def test_a_refused_sweep_leaves_no_folder(
    run: Run, pipeline: FakePipeline, tmp_path: Path, words: str
) -> None:
    for folder in ("deep/er/here", "outputs/x"):
        result = run("-m", *words.split(), f"hydra.sweep.dir={folder}")
        assert result.code == 2 and not pipeline.configs, result.out
    assert not [*tmp_path.iterdir()]


def test_a_name_with_an_unbroken_space_is_recorded(
    run: Run, pipeline: FakePipeline, tmp_path: Path
) -> None:
    for name in ("old\u00a0text", "new"):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    words = ("data=text", "data.old='old\u00a0text'", "data.new=new", "hydra.run.dir=here")
    assert run("seed=1", *words).code == 1 and len(pipeline.configs) == 1
    assert run("resume=here").code == 1 and len(pipeline.configs) == 2


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: (place / ".hydra" / "hydra.yaml").mkdir(parents=True), "hydra.yaml is a f"),
        (lambda place: (place / ".hydra").write_text("x"), ".hydra is a file, but Hydra needs"),
        (lambda place: (place / "train.log").symlink_to("train.log"), "is a circular link"),
    ],
)
def test_what_hydra_would_fail_over_is_refused(
    run: Run, tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    (tmp_path / "here").mkdir()
    make(tmp_path / "here")
    result = run("hydra.run.dir=here")
    assert result.code == 2 and message in result.err
