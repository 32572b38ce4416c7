"""A rate for small bases is told where a large checkpoint is to be trained at it."""

from dataclasses import replace

import pytest

from tritter.config.launch.composition import load_config
from tritter.config.rates import rate_notes
from tritter.config.schema import CheckpointModelConfig
from tritter.config.validation import source_config
from tritter.families.presets import PRESETS

GIVEN = CheckpointModelConfig(model_type="hf", path="base")


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
    source = source_config(config) if preset is None else PRESETS[preset].config()
    notes = rate_notes(replace(config, model=GIVEN), source)
    assert rate_notes(config, source) == ()  # what is pretrained here has the rate of its own
    if start is None:
        assert notes == ()
    else:
        (note,) = notes
        assert note.startswith("training.learning_rate = 0.003 is a rate for small bases")
        assert f"training.learning_rate={start} is a start" in note
