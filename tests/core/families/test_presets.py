"""Size presets: names match parameter counts, and option files match the presets."""

import math
from pathlib import Path

import pytest
import yaml

from tritter.conf_folder import config_folder
from tritter.config.launch.composition import load_config
from tritter.core.families import Model
from tritter.core.families.presets import (
    PRESETS,
    ModelConfig,
    _nominal_parameters,
    aspect_ratio_at,
)

ALL = list(PRESETS.values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_fits_its_count(name: str) -> None:
    unit = {"m": 1e6, "b": 1e9}[name[-1]]
    named = float(name.removeprefix("tritter_")[:-1]) * unit
    assert _nominal_parameters(name) == named
    assert Model(PRESETS[name].config()).num_parameters == pytest.approx(named, rel=0.1)


@pytest.mark.parametrize("preset", ALL, ids=list(PRESETS))
def test_a_count_is_that_of_the_shapes_by_hand(preset: ModelConfig) -> None:
    d, f, layers = preset.hidden_size, preset.intermediate_size, preset.num_hidden_layers
    kv = d // preset.num_attention_heads * preset.num_key_value_heads
    embeddings = 32_000 * d * (1 if preset.tie_word_embeddings else 2)
    by_hand = embeddings + d + layers * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d)
    assert Model(preset.config()).num_parameters == by_hand


def test_published_shapes_have_their_published_counts() -> None:
    """Mistral 7B and SOLAR 10.7B have this vocabulary size."""
    assert Model(PRESETS["tritter_7b"].config()).num_parameters == 7_241_732_096
    assert Model(PRESETS["tritter_10b"].config()).num_parameters == 10_731_524_096


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", PRESETS)
def test_an_option_file_composes_to_its_preset(name: str, tmp_path: Path) -> None:
    config = load_config([f"model={name}", f"cache_dir={tmp_path}"])
    assert config.base_model().config == PRESETS[name].config(vocab_size=config.data.vocab_size)


@pytest.mark.parametrize(("name", "preset"), PRESETS.items(), ids=list(PRESETS))
def test_an_option_file_states_its_count(name: str, preset: ModelConfig) -> None:
    path = config_folder() / "model" / f"{name}.yaml"
    count = Model(preset.config()).num_parameters
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
    assert f"({size} parameters" in path.read_text().splitlines()[0]
    assert yaml.safe_load(path.read_text())["num_hidden_layers"] == preset.num_hidden_layers


def test_aspect_ratios_pass_through_the_presets_and_lie_between_them() -> None:
    for name, preset in PRESETS.items():
        assert aspect_ratio_at(_nominal_parameters(name)) == pytest.approx(preset.aspect_ratio)
    small, large = PRESETS["tritter_350m"], PRESETS["tritter_1b"]
    between = aspect_ratio_at(math.sqrt(350e6 * 1e9))
    assert between == pytest.approx(math.sqrt(small.aspect_ratio * large.aspect_ratio))
    assert aspect_ratio_at(1) == ALL[0].aspect_ratio
    assert aspect_ratio_at(1e15) == ALL[-1].aspect_ratio
