"""A launcher's process has what the command was given, and nothing else of it."""

import contextvars
import json
from pathlib import Path

import pytest
from hydra._internal.core_plugins import basic_launcher

from tests.config.conftest import FakePipeline
from tests.config.test_entry import Run


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
