"""Size presets: shapes of Llama from 125 million to 14 billion parameters.

They are the options `conf/model/tritter_*.yaml`, whose first lines say what models they are like.
"""

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import yaml

from tritter.conf_folder import config_folder
from tritter.errors import RequestError, did_you_mean
from tritter.families.dimensions import Config
from tritter.families.tables import llama_config

_UNITS = {"m": 10**6, "b": 10**9}
VOCABULARY = 32_000  # what the parameter counts in the presets' names are for


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One size.

    Args:
        name: `tritter_` and the rounded count of parameters.
        nominal_parameters: the count that the name stands for, within 10 % of the true one.
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
    rms_norm_eps: float
    initializer_range: float

    @property
    def aspect_ratio(self) -> float:
        """Hidden size per layer."""
        return self.hidden_size / self.num_hidden_layers

    def config(self, *, vocab_size: int = VOCABULARY) -> Config:
        """Return the config.json of a model of this size."""
        sizes = asdict(self)
        del sizes["name"], sizes["nominal_parameters"]
        return llama_config(vocab_size=vocab_size, **sizes)


def _read_all() -> dict[str, Preset]:
    presets = []
    for path in (config_folder() / "model").glob("tritter_*.yaml"):
        size = path.stem.removeprefix("tritter_")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        wanted = [field.name for field in fields(Preset) if field.name in values]
        preset = Preset(
            name=path.stem,
            nominal_parameters=int(size[:-1]) * _UNITS[size[-1]],
            **{name: values[name] for name in wanted},
        )
        presets.append(preset)
    by_size = sorted(presets, key=lambda preset: preset.nominal_parameters)
    return {preset.name: preset for preset in by_size}


PRESETS = _read_all()


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


def aspect_ratio_at(parameters: float) -> float:
    """Return the presets' hidden size per layer at a size, interpolated in its logarithm.

    Below the smallest and above the largest preset it is theirs.
    """
    presets = list(PRESETS.values())
    position = math.log(max(parameters, 1))
    for left, right in pairwise(presets):
        start, end = math.log(left.nominal_parameters), math.log(right.nominal_parameters)
        if position <= end:
            share = min(max((position - start) / (end - start), 0.0), 1.0)
            return left.aspect_ratio ** (1 - share) * right.aspect_ratio**share
    return presets[-1].aspect_ratio
