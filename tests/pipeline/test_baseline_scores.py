"""The base model is scored once per cache, and cached scores are verified by checksum."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import SMALL
from tritter.config.launch.composition import load_config
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run
from tritter.pipeline.stages.baseline import run_baseline
from tritter.terminal import Console


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names under which a model was scored."""
    names: list[str] = []
    score = Run.score

    def counted(self: Run, model: Any, name: str) -> Any:
        names.append(name)
        return score(self, model, name)

    monkeypatch.setattr(Run, "score", counted)
    return names


def begin(folder: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    """Run the baseline stage of a job and return its scores."""
    folder.mkdir(parents=True)
    texts = {name: folder.parent / f"{name}.jsonl" for name in ("old", "new")}
    for name, path in texts.items():
        words = [f"{name} {number} {number * number} and so on. " * 9 for number in range(60)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    places = [f"data.{name}={path}" for name, path in texts.items()]
    quick = ["data=text", *places, "data.vocab_size=300", "pretraining.max_steps=2"]
    config = load_config([*SMALL, *quick, f"cache_dir={cache}", *overrides])
    run_baseline(Run(config=config, folder=folder, console=Console(), ledger=Ledger(folder)))
    return dict(json.loads((folder / "scores" / "baseline.json").read_text(encoding="utf-8")))


@pytest.mark.full
def test_two_jobs_of_a_sweep_score_their_base_once(tmp_path: Path, scored: list[str]) -> None:
    first = begin(tmp_path / "0", tmp_path / "cache", "forgetting=none")
    second = begin(tmp_path / "1", tmp_path / "cache", "forgetting=l2sp", "expansion=dus")
    assert scored == ["baseline"]
    assert first == second
    (held,) = (tmp_path / "cache" / "scores").glob("*.json")

    # Another cut of the documents, or another base, is scored by itself
    begin(tmp_path / "2", tmp_path / "cache", "evaluation.batch_size=16")
    begin(tmp_path / "3", tmp_path / "cache", "seed=1")
    assert scored == ["baseline"] * 3

    # One digit changed: scored again, with the same result
    held.write_text(held.read_text().replace('"values": [', '"values": [1', 1))
    assert begin(tmp_path / "4", tmp_path / "cache") == first
    held.write_text("{")
    assert begin(tmp_path / "5", tmp_path / "cache") == first
    assert scored == ["baseline"] * 5
    assert begin(tmp_path / "6", tmp_path / "cache") == first
    assert scored == ["baseline"] * 5
