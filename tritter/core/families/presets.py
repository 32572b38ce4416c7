"""Size presets: shapes of Llama from 125 million to 14 billion parameters.

The presets are the options `conf/model/tritter_*.yaml`, whose first lines name similar models.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from typing import Annotated, Literal

import yaml
from pydantic import Field

from tritter.conf_folder import config_folder
from tritter.core.families.dimensions import Config
from tritter.core.families.tables import llama_config
from tritter.errors import Problem
from tritter.limits import MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH
from tritter.options import RunRequest, nearest_multiples, options

_UNITS = {"m": 10**6, "b": 10**9}
_VOCABULARY = 32_000  # vocabulary size behind the parameter counts in the names of presets


@options
class ModelConfig:
    """The base model's architecture, in the names of Hugging Face configs."""

    model_type: Literal["llama"]
    hidden_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    intermediate_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    num_attention_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    tie_word_embeddings: bool
    rms_norm_eps: Annotated[float, Field(gt=0)]
    rope_theta: Annotated[float, Field(gt=0)]
    max_position_embeddings: Annotated[int, Field(ge=2, le=MAX_POSITIONS)]
    initializer_range: Annotated[float, Field(gt=0)]

    @property
    def aspect_ratio(self) -> float:
        """Hidden size per layer."""
        return self.hidden_size / self.num_hidden_layers

    def config(self, *, vocab_size: int = _VOCABULARY) -> Config:
        """Return the config.json of a model of this size."""
        sizes = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        del sizes["model_type"]
        return llama_config(vocab_size=vocab_size, **sizes)


def _nominal_parameters(name: str) -> int:
    """Return the parameter count in the name of a preset, within 10 % of the true one."""
    size = name.removeprefix("tritter_")
    return int(size[:-1]) * _UNITS[size[-1]]


def _read_all() -> dict[str, ModelConfig]:
    presets = {}
    for path in (config_folder() / "model").glob("tritter_*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        stated = {f.name: values[f.name] for f in fields(ModelConfig) if f.name in values}
        presets[path.stem] = ModelConfig(**stated)
    return {name: presets[name] for name in sorted(presets, key=_nominal_parameters)}


PRESETS = _read_all()  # by size


def aspect_ratio_at(parameters: float) -> float:
    """Return the hidden size per layer at a parameter count, log-interpolated between presets.

    Outside the range of the presets it is constant.
    """
    position = math.log(max(parameters, 1))
    for smaller, larger in pairwise(PRESETS):
        left, right = PRESETS[smaller], PRESETS[larger]
        start, end = (math.log(_nominal_parameters(name)) for name in (smaller, larger))
        if position <= end:
            share = min(max((position - start) / (end - start), 0.0), 1.0)
            return left.aspect_ratio ** (1 - share) * right.aspect_ratio**share
    return right.aspect_ratio


def model_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield the problems of a new base model whose sizes do not match each other."""
    model = config.model
    if not isinstance(model, ModelConfig):
        return
    hidden_size, heads = model.hidden_size, model.num_attention_heads
    kv_heads = model.num_key_value_heads
    for key, value, divisor_key, divisor in (
        ("hidden_size", hidden_size, "num_attention_heads", heads),
        ("num_attention_heads", heads, "num_key_value_heads", kv_heads),
    ):
        if value % divisor:
            reason = (
                f"it must be a multiple of model.{divisor_key} = {divisor}; nearest: "
                f"{nearest_multiples(value, divisor)}"
            )
            yield Problem(f"model.{key}", value, reason=reason)
    if hidden_size % heads == heads % kv_heads == 0 and hidden_size % (2 * heads):
        reason = (
            f"rotary embeddings pair coordinates, so each of the {heads} heads needs an even size; "
            f"nearest: {nearest_multiples(hidden_size, 2 * heads)}"
        )
        yield Problem("model.hidden_size", hidden_size, reason=reason)
