"""The default learning rate, and the warning for a large checkpoint with a high learning rate."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.tiny import FIXTURES
from tritter.conf_folder import config_folder
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import fingerprint
from tritter.config.schema import CheckpointModelConfig
from tritter.core.families import Model
from tritter.core.families.presets import PRESETS
from tritter.errors import RequestError
from tritter.training.options import rate_notes

GIVEN = CheckpointModelConfig(model_type="hf", path="base")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("preset", "words", "start"),
    [
        ("tritter_125m", [], "1e-4"),
        ("tritter_7b", [], "2e-5"),
        ("tritter_7b", ["training.learning_rate=1e-4"], None),
        ("tritter_7b", ["optimizer=sgd"], None),
        ("tritter_7b", ["experts=dylora"], None),
        (None, [], None),
    ],
)
def test_the_default_rate_on_a_large_checkpoint(
    preset: str | None, words: list[str], start: str | None
) -> None:
    config = load_config(words)
    source = config.base_model() if preset is None else Model(PRESETS[preset].config())
    notes = rate_notes(replace(config, model=GIVEN), source)
    assert rate_notes(config, source) == ()  # what is pretrained here has the rate of its own
    if start is None:
        assert notes == ()
    else:
        (note,) = notes
        assert note.startswith("training.learning_rate = 0.003 is a learning rate for small bases")
        assert f"Start with training.learning_rate={start}" in note


MODELS = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))
DATA = ("model=hf", "data=text", f"data.old={FIXTURES}/text/old", f"data.new={FIXTURES}/text/old")


def checkpoint(place: Path, record: dict[str, Any] | None) -> Path:
    """Copy a checkpoint with or without a training run in its lineage."""
    shutil.copytree(FIXTURES / "finished/checkpoint", place)
    path = place / "tritter.json"
    if record is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"training_config": record}))
    return place


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("model", [name for name in MODELS if name != "hf"])
@pytest.mark.parametrize("training", ["default", "quick"])
def test_a_preset_keeps_its_rate(model: str, training: str) -> None:
    words = [f"model={model}", f"training={training}", "trainer.check_memory=false"]
    config = load_config(words)
    assert config.training.learning_rate == config.pretraining.learning_rate == 3e-3
    assert "0.003" in config.rate_note and "from scratch" in config.rate_note
    typed = load_config([*words, "training.learning_rate=3e-3"])
    assert typed.rate_note == "" and fingerprint(typed) == fingerprint(config)
    assert load_config([*words, "experts=dylora", "forgetting=none"]).rate_note == ""


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("record", "rate"),
    [
        (None, 1e-5),
        ({}, 1e-5),
        ({"stage": "given", "path": "x"}, 1e-5),
        ({"training": {"learning_rate": 7e-4}, "last_rate": 1e-6}, 7e-4),
        ({"made_from": {"pretraining": {"learning_rate": 2e-3}}}, 2e-3),
        (
            {
                "training": {"learning_rate": 7e-4},
                "made_from": {"pretraining": {"learning_rate": 2e-3}},
            },
            7e-4,
        ),
        *(
            ({"training": {"learning_rate": damaged}}, 1e-5)
            for damaged in (0.0, -1.0, float("nan"), float("inf"), "1e-3", True, None, [1e-3])
        ),
        ({"training": 3, "made_from": []}, 1e-5),
    ],
)
def test_a_checkpoint_is_trained_at_the_rate_that_it_records(
    tmp_path: Path, record: dict[str, Any] | None, rate: float
) -> None:
    place = checkpoint(tmp_path / "base", record)
    for name in ("default", "quick"):
        words = [*DATA, f"model.path={place}", f"training={name}", "data.new={x: stdlib:code}"]
        config = load_config(words)
        assert config.training.learning_rate == rate
        assert f"training.learning_rate = {rate:g}: " in config.rate_note
        assert ("newest training run" in config.rate_note) is (rate != 1e-5)
        assert fingerprint(load_config(words)) == fingerprint(config)
    typed = load_config([*words, "training.learning_rate=0.5"])
    assert (typed.training.learning_rate, typed.rate_note) == (0.5, "")


def test_a_damaged_lineage_is_one_problem_of_the_key_that_named_it(tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "base", None)
    (place / "tritter.json").write_text('{"format": "lineage", "format_version": 99}')
    with pytest.raises(RequestError) as caught:
        load_config([*DATA, f"model.path={place}", "data.new={x: stdlib:code}"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("model.path", place)
    assert "format_version 99" in problem.reason


def test_the_record_of_a_hub_id_is_not_read() -> None:
    config = load_config([*DATA, "model.path=owner/name", "forgetting=none"])
    assert config.training.learning_rate == 1e-5 and "from the hub" in config.rate_note


def test_a_base_needs_a_rate_of_its_own() -> None:
    with pytest.raises(RequestError, match=r"pretraining\.learning_rate"):
        load_config(["pretraining.learning_rate=null"])
    config = load_config(["training.learning_rate=null", "gate.ladder=gentler"])
    assert [each.training.learning_rate for each in config.attempts] == [3e-3, 3e-3, 1e-3]


def test_what_a_schedule_does_not_read_is_reported() -> None:
    config = load_config(["training.decay_ratio=0.3", "pretraining.minimum_ratio=0.1"])
    (note,) = rate_notes(config, config.base_model())
    assert note == "training.decay_ratio = 0.3: schedule cosine ignores it."
    config = load_config(["training.schedule=wsd", "training.decay_ratio=0.3"])
    assert not rate_notes(config, config.base_model())


def test_a_ladder_that_raises_the_rate_is_reported() -> None:
    config = load_config(["training.learning_rate=1e-5", "gate.ladder=gentler"])
    (note,) = rate_notes(config, config.base_model())
    assert "fallback 2 raises training.learning_rate from 1e-05 to 0.001" in note
    assert "gate.max_attempts=2" in note
    assert not rate_notes(replace(config, fallbacks=config.fallbacks[:1]), config.base_model())
