"""The run, its control and its pretraining are in one group, in W&B and other loggers."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning import Callback

from tests.oracle import saved, tiny_llama
from tests.pipeline.offline_wandb import OfflineRun, offline_runs
from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import fingerprint
from tritter.core.models import save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import TritterError
from tritter.pipeline import run_pipeline
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.metrics import wandb_logger
from tritter.pipeline.run import Run
from tritter.terminal import Console


class FailOnce(Callback):
    """Kill one training run, the first time."""

    def __init__(self, folder: str, marker: str) -> None:
        self.folder, self.marker = folder, Path(marker)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        is_meant = Path(trainer.loggers[0].log_dir).name == self.folder
        if is_meant and trainer.global_step == 4 and not self.marker.exists():
            self.marker.touch()
            raise KeyError("broken off")


class FakeRun:
    """Arguments of wandb.init, and the logged rows."""

    def __init__(self, **given: Any) -> None:
        self.given, self.rows, self.summary = given, list[dict[str, Any]](), dict[str, Any]()
        self.exit_codes = list[int]()

    def define_metric(self, name: str, **options: Any) -> None:
        """The offline file of a real run is read below."""

    def log(self, values: dict[str, Any]) -> None:
        assert not self.exit_codes
        self.rows.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    opened: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        opened.append(FakeRun(**given))
        return opened[-1]

    monkeypatch.setattr(wandb, "init", init)
    return opened


@pytest.mark.full
def test_one_process_leaves_one_folder_of_each_run_over_the_training_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed and resumed, read from W&B's offline files."""
    folder = tmp_path / "a run"
    folder.mkdir()
    failing = f"{{_target_: {__name__}.FailOnce, folder: attempt_1, marker: {tmp_path / 'failed'}}}"
    words = ("logger=wandb", "logger.wandb.tags=[mine]", "trainer.log_every_n_steps=1",
             "evaluation.every_n_steps=3", "control=true", f"callbacks.fail={failing}")  # fmt: skip
    config = load_config([*TINY, f"cache_dir={tmp_path / 'cache'}", *words])
    with pytest.raises(KeyError, match="broken off"):
        run_pipeline(config, run_folder=folder)
    run_pipeline(config, run_folder=folder)
    found = offline_runs(folder)
    assert [run.job_type for run in found] == ["pretraining", "run", "run", "control"]
    assert [run.exit_code for run in found] == [0, 1, 0, 0]
    _, first, second, control = found
    assert first.id == second.id and len({run.id for run in found}) == 3
    for run in found:
        assert run.axes == {"trainer/global_step": "", "*": "trainer/global_step"}
        assert all("trainer/global_step" in row for row in run.rows)
        assert {"mine", "seed:0", "expansion:width"} <= set(run.tags) and not run.group
    assert steps_of(first, "train/loss") == [1, 2, 3, 4]
    assert steps_of(second, "train/loss") == [5, 6]
    assert steps_of(first, "eval/old/loss") == [-1, 0, 3]
    assert steps_of(second, "eval/old/loss") == [6] == steps_of(second, "score/old/loss")
    assert steps_of(second, "plots/training.path") == [6] == steps_of(second, "samples.path")
    assert steps_of(control, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert (second.summary["status"], second.summary["new/verdict"]) == ("ungated", "reported")
    assert second.config["training"]["max_steps"] == 6
    (upload,) = [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]
    command = upload.partition("#")[0].replace("sync", "sync --dry-run")
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Would sync 4 run(s)" in shown.stdout + shown.stderr


def steps_of(run: OfflineRun, name: str) -> list[int]:
    return [row["trainer/global_step"] for row in run.rows if name in row]


def test_without_an_account_the_offline_mode_is_named_before_any_score(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def init(**given: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("tritter.pipeline.pipeline.run_baseline", pytest.fail)
    tokenizer = train_tokenizer([Document("d", "of a run " * 200)], vocab_size=280)
    base = saved(tiny_llama(vocab_size=280), tmp_path / "base")
    save_tokenizer(tokenizer, base, end_of_text=END_OF_TEXT)
    words = [word for word in TINY if not word.startswith(("model.", "pretraining."))]
    words += ["model=hf", f"model.path={base}", f"cache_dir={tmp_path / 'cache'}"]
    config = load_config([*words, "logger=wandb", "logger.wandb.mode=online"])
    with pytest.raises(TritterError, match=r"`wandb login` to log in; logger\.wandb\.mode=offline"):
        run_pipeline(config, run_folder=tmp_path / "run")


def test_what_a_killed_process_did_not_finish_is_cut_off(
    runs: list[FakeRun], tmp_path: Path
) -> None:
    """`wandb sync` 0.31 stops at a file without a record, and at a truncated record."""
    context = Run(
        config=load_config([*TINY, "logger=wandb"]),
        folder=tmp_path,
        console=Console(quiet=True),
        ledger=Ledger(tmp_path),
    )
    (tmp_path / "wandb_id").write_text("mine")
    whole = log_of([b"a" * 40_000, b"b" * 25_480, b"c" * 9])  # the third has no room in its block
    written = {
        "1-mine": whole, "2-mine": log_of([]), "3-mine": whole[:-1], "4-mine": whole[:32768],
        "5-other": whole[:-1], "6-mine": b"",
    }  # fmt: skip
    for name, data in written.items():
        path = tmp_path / f"wandb/offline-run-{name}/run-{name[2:]}.wandb"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    (tmp_path / "outside").write_bytes(whole[:-1])
    (tmp_path / "wandb/offline-run-7").mkdir()
    (tmp_path / "wandb/offline-run-7/run-mine.wandb").symlink_to(tmp_path / "outside")
    wandb_logger(context)
    left = {p.parent.name[12:]: p.read_bytes() for p in tmp_path.glob("wandb/*/run-*.wandb")}
    cut = log_of([b"a" * 40_000, b"b" * 25_480])
    assert left == {
        "1-mine": whole, "3-mine": cut, "5-other": whole[:-1], "6-mine": b"", "7": whole[:-1],
    }  # fmt: skip


def log_of(records: list[bytes]) -> bytes:
    """Write records in a LevelDB log, after W&B's header."""
    log = b":W&B\x00\x00\x00"
    for record in records:
        left, is_first = record, True
        while left or is_first:
            room = 2**15 - len(log) % 2**15
            if room < 7:
                log += bytes(room)
                continue
            part, left = left[: room - 7], left[room - 7 :]
            kind = (1 if is_first else 4) if not left else (2 if is_first else 3)
            log += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            is_first = False
    return log


@pytest.mark.full
def test_each_training_is_a_run_of_its_own_and_stays_it(
    runs: list[FakeRun], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep" / "0"
    folder.mkdir(parents=True)
    failing = f"{{_target_: {__name__}.FailOnce, folder: control, marker: {tmp_path / 'failed'}}}"
    words = (
        "logger=[csv,wandb]",
        "logger.rows={_target_: lightning.pytorch.loggers.CSVLogger, "
        "save_dir: rows, name: '', version: ''}",
        "callbacks=lr_monitor",
        f"callbacks.fail={failing}",
        f"cache_dir={tmp_path / 'cache'}",
        "expansion=llama_pro",
        "control=true",
        "trainer.log_every_n_steps=1",
    )
    config = load_config([*TINY, *words])
    with pytest.raises(KeyError, match="broken off"):
        run_pipeline(config, run_folder=folder)
    assert [run.given["job_type"] for run in runs] == ["pretraining", "run", "control"]
    assert [run.exit_codes for run in runs] == [[0], [1], [1]]
    run_pipeline(config, run_folder=folder)
    again = runs[3:]  # the control resumes, and the summary is logged to the run
    assert [run.given["job_type"] for run in again] == ["control", "run"]
    assert [run.given["id"] for run in again] == [runs[2].given["id"], runs[1].given["id"]]
    assert len({run.given["id"] for run in runs}) == 3
    assert {run.given["group"] for run in runs} == {None}
    assert [run.given["name"] for run in runs[:3]] == [
        "pretraining seed 0",
        "llama_pro ewc+replay seed 0",
        "control ewc+replay seed 0",
    ]
    for reported in (runs[0].rows, runs[1].rows, runs[2].rows + again[0].rows):
        steps = {row["trainer/global_step"] for row in reported if "train/loss" in row}
        assert len(steps) == 6
    assert any("score/new/loss" in row for row in again[0].rows)
    for part in ("", "pretraining", "control"):
        rows = (folder / "rows" / part / "metrics.csv").read_text().splitlines()
        assert "train/loss" in rows[0] and len(rows) > 1
        reported = yaml.safe_load((folder / "rows" / part / "hparams.yaml").read_text())
        assert reported == runs[0].given["config"] == fingerprint(config)
    opened = len(runs)
    (tmp_path / "other").mkdir()
    run_pipeline(load_config([*TINY, *words, "control=false"]), run_folder=tmp_path / "other")
    assert [run.given["job_type"] for run in runs[opened:]] == ["run"]  # a cached base
