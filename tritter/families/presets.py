"""Size presets: shapes of Llama from 125 million to 14 billion parameters.

All but the smallest two and the 10 B are the shapes of published models with this vocabulary in
place of their own; `conf/model/tritter_*.yaml` holds the same numbers, and a test compares them.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from tritter.errors import RequestError, did_you_mean
from tritter.families.dimensions import Config
from tritter.families.llama import llama_config

VOCABULARY = 32_000  # what the parameter counts in the presets' names are for


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One size.

    Args:
        name: `tritter_` and the rounded count of parameters.
        nominal_parameters: the count that the name stands for, within 10 % of the true one.
        like: the published model that has this shape, or nothing.
    """

    name: str
    nominal_parameters: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_theta: float
    like: str = ""

    @property
    def aspect_ratio(self) -> float:
        """Hidden size per layer."""
        return self.hidden_size / self.num_hidden_layers

    def config(self, *, vocab_size: int = VOCABULARY) -> Config:
        """Return the config.json of a model of this size."""
        return llama_config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            tie_word_embeddings=self.tie_word_embeddings,
            rms_norm_eps=1e-5,
            rope_theta=self.rope_theta,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=0.02,
        )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tritter_125m",
            nominal_parameters=125_000_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=14,
            num_attention_heads=12,
            num_key_value_heads=12,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            rope_theta=10_000.0,
        ),
        Preset(
            name="tritter_350m",
            nominal_parameters=350_000_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            rope_theta=10_000.0,
        ),
        Preset(
            name="tritter_1b",
            nominal_parameters=1_000_000_000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            rope_theta=500_000.0,
            like="Llama 3.2 1B",
        ),
        Preset(
            name="tritter_3b",
            nominal_parameters=3_000_000_000,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            rope_theta=500_000.0,
            like="Llama 3.2 3B",
        ),
        Preset(
            name="tritter_7b",
            nominal_parameters=7_000_000_000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            rope_theta=500_000.0,
            like="Mistral 7B",
        ),
        Preset(
            name="tritter_10b",
            nominal_parameters=10_000_000_000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            rope_theta=500_000.0,
            like="SOLAR 10.7B",
        ),
        Preset(
            name="tritter_14b",
            nominal_parameters=14_000_000_000,
            hidden_size=5120,
            intermediate_size=17408,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            rope_theta=500_000.0,
            like="Qwen3 14B",
        ),
    )
}


def find_preset(name: str) -> Preset:
    """Return a preset by its name, spelled with - or _.

    Raises:
        RequestError: there is none; names those there are and the nearest.
    """
    spelled = name.lower().replace("-", "_")
    if spelled in PRESETS:
        return PRESETS[spelled]
    raise RequestError(
        f"'{name}' is no preset; there are {', '.join(PRESETS)}.{did_you_mean(spelled, PRESETS)}"
    )


def nearest_preset(parameters: float) -> Preset:
    """Return the preset whose nominal size is nearest, by ratio."""
    return min(
        PRESETS.values(), key=lambda p: abs(math.log(p.nominal_parameters / max(parameters, 1)))
    )


def aspect_ratio_at(parameters: float) -> float:
    """Return the presets' hidden size per layer at a size, interpolated in its logarithm.

    Below the smallest and above the largest preset it is theirs.
    """
    presets = sorted(PRESETS.values(), key=lambda preset: preset.nominal_parameters)
    position = math.log(max(parameters, 1))
    for left, right in pairwise(presets):
        start, end = math.log(left.nominal_parameters), math.log(right.nominal_parameters)
        if position <= end:
            share = min(max((position - start) / (end - start), 0.0), 1.0)
            return left.aspect_ratio ** (1 - share) * right.aspect_ratio**share
    return presets[-1].aspect_ratio
