"""Runs that end between two writes that belong together, and resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tritter.checkpoints import Lineage
from tritter.pipeline import Outcome
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.stages import baseline

Run = Callable[..., Outcome]


def end_at_record(monkeypatch: pytest.MonkeyPatch, stage: str, *, is_recorded: bool) -> None:
    """End the first run that records a stage, before or after it has."""
    record, ended = Ledger.record, list[str]()

    def record_or_end(self: Ledger, key: str, *args: Any, **kwargs: Any) -> None:
        ends = key == stage and not ended
        if is_recorded or not ends:
            record(self, key, *args, **kwargs)
        if ends:
            ended.append(key)
            raise KeyError("killed")

    monkeypatch.setattr(Ledger, "record", record_or_end)


@pytest.mark.full
def test_what_a_killed_writer_left_in_a_checkpoint_is_no_obstacle(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed while it wrote the scores into the card, on another machine."""
    end_at_record(monkeypatch, "attempt_1.expand", is_recorded=False)
    with pytest.raises(KeyError, match="killed"):
        run_tiny(tmp_path, "expansion=width")
    left = tmp_path / "attempt_1/expanded/.README.md.0123abcd-77.abcdefgh"
    left.write_text("half")
    run_tiny(tmp_path, "expansion=width")
    assert Lineage.read(tmp_path / "checkpoint") is not None and not left.exists()


@pytest.mark.full
def test_a_base_that_was_cached_and_not_logged_keeps_its_curve(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(path: Path, rows: object) -> None:
        raise KeyError("killed")

    words = ("expansion=none", "forgetting=none", "training.max_steps=2")
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(baseline, "write_rows", end)
        run_tiny(tmp_path / "run", *words, cache_dir=tmp_path / "cache")
    for name in ("run", "later"):
        run_tiny(tmp_path / name, *words, cache_dir=tmp_path / "cache")
        assert "train/loss" in (tmp_path / name / "metrics_pretraining.csv").read_text()
        assert not (tmp_path / name / "pretraining/saved").exists()


@pytest.mark.full
def test_scores_are_logged_although_the_run_ended_once_they_were_recorded(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_at_record(monkeypatch, "attempt_1.evaluate", is_recorded=True)
    rows = "{_target_: lightning.pytorch.loggers.CSVLogger, name: '', version: '', save_dir: "
    words = ("expansion=none", "forgetting=none", f"logger.rows={rows}{tmp_path / 'rows'}}}")
    with pytest.raises(KeyError, match="killed"):
        run_tiny(tmp_path / "run", *words)
    run_tiny(tmp_path / "run", *words)
    assert "score/new/loss" in (tmp_path / "rows/metrics.csv").read_text()
