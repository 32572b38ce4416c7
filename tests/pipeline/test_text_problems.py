"""Text that goes bad after it was looked at, or was too much for that, fails a run by a list."""

from pathlib import Path
from typing import Any

import pytest

from tritter.config.launch.entry import main
from tritter.config.launch.jobs import read_status
from tritter.data import contents
from tritter.pipeline import run_pipeline


def test_what_is_found_when_the_run_reads_it_is_listed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contents.check_contents, "__kwdefaults__", {"max_bytes": 0})
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
        (tmp_path / name / "b.jsonl").write_text('{"text": "a"}\n{"body": 1}\n3\n')
    run = tmp_path / "run"
    words = ["data=text", f"data.old={tmp_path}/old", f"data.new={tmp_path}/new", "model=tiny"]
    words += [f"hydra.run.dir={run}", f"cache_dir={tmp_path}/cache", "logger=csv"]
    assert main(run_pipeline, arguments=words) == 1
    errors = capsys.readouterr().err
    assert "4 things are wrong with the text:" in errors
    for name in ("old", "new"):
        assert f"data.{name}: {tmp_path}/{name}/b.jsonl, line 2 has no field text" in errors
        assert f"data.{name}: {tmp_path}/{name}/b.jsonl, line 3 is no JSON object" in errors
    assert f"The run so far: {run}" in errors
    status: dict[str, Any] = read_status(run)
    assert (status["status"], status["exit_code"]) == ("failed", 1)
