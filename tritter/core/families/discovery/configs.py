"""Configs of types without a table: as cache keys, with limits, and of deeper models."""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from tritter.core.families.dimensions import FFN_SIZES, Config, plain_floats
from tritter.errors import RequestError, brief

_COUNTS = (
    *("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers"),
    "num_layers",
)
_MAX_LAYERS = 512
_LAYER_LIST = "layers_block_type"  # Nemotron-H has no number of layers
_DECODERS = (
    *("global_config", "text_config", "language_config", "llm_config", "decoder"),
    "decoder_config",
)
_MAX_SIZE = 2**31
_MAX_MODULES = 2**14
_MODULE_COUNTS = re.compile(
    r"(?i)(n|num)_?.*(layers?|experts?|blocks?|stages|heads|codebooks)|depth"
)
_NO_STRUCTURE = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    FFN_SIZES,
)
# Keys with the number of first layers of another kind
_FIRST_LAYERS = re.compile(r"first_k.*|num_dense_layers|.*layer_start_index|num_hash_layers")
_PATTERNS = re.compile(r".*(block_types?|layer_types?|_pattern)")
_LAYER_SETS = re.compile(r".*(layers|layer_idx|idxs|layer_ids)$")


class Key(tuple[tuple[str, str], ...]):
    """A config.json that can be a key of a cache."""

    __slots__ = ()

    @classmethod
    def of(cls, config: Config) -> "Key":
        """Return a config as a key, without what names code or describes no structure."""
        return cls(
            sorted(
                (name, json.dumps(value, sort_keys=True))
                for name, value in config.items()
                if name not in _NO_STRUCTURE and "implementation" not in name and name != "auto_map"
            )
        )

    @property
    def config(self) -> Config:
        """The config."""
        return {name: json.loads(value) for name, value in self}


class StockConfig:
    """The config.json of a model type without a table; it may contain the config of its decoder.

    Args:
        config: the whole config.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def kind(self) -> type[PreTrainedConfig]:
        """The config class of a causal language model in transformers."""
        model_type = str(self.config.get("model_type"))
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise RequestError(
                f"model_type '{model_type}' is not supported: the installed transformers has no "
                "causal language model of this type. Code that a checkpoint brings is never run."
            )
        _check_sizes(self.config)
        kind: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
        return kind

    @property
    def stock(self) -> PreTrainedConfig:
        """The config object of its class."""
        return self.kind.from_dict(plain_floats(self.config))

    @property
    def full(self) -> Config:
        """The config with the defaults of its class."""
        return dict(_complete(Key.of(self.config)))

    @property
    def part(self) -> str:
        """The key of the decoder's config in a multimodal config; empty if there is none."""
        config = self.config
        if any(isinstance(config.get(key), int) for key in _COUNTS) or _LAYER_LIST in config:
            return ""
        for part in _DECODERS:
            inner = config.get(part)
            if isinstance(inner, dict) and any(isinstance(inner.get(key), int) for key in _COUNTS):
                return part
        return ""

    @property
    def decoder(self) -> Config:
        """The decoder's config in a multimodal config, or else the config itself."""
        part = self.part
        return self.config[part] if part else self.config  # type: ignore[return-value]

    @property
    def full_decoder(self) -> Config:
        """The decoder's config with the defaults of its class."""
        return StockConfig(self.full).decoder

    @property
    def layer_key(self) -> str:
        """The decoder's key of the number of layers."""
        config = self.decoder
        for key in _COUNTS:
            value = config.get(key)
            if isinstance(value, int):
                if not 1 <= value <= _MAX_LAYERS:
                    raise RequestError(
                        f"config.json: {key} = {brief(value)}; must be from 1 to "
                        f"{_MAX_LAYERS} in a model type without a table."
                    )
                return key
        if isinstance(config.get(_LAYER_LIST), list):
            return _LAYER_LIST
        raise RequestError("config.json: no key has the number of layers.")

    @property
    def num_layers(self) -> int:
        """The number of layers of the decoder."""
        value: Any = self.decoder[self.layer_key]
        return len(value) if isinstance(value, list) else int(value)

    def with_decoder(self, changes: Config) -> Config:
        """Return the config with changes of the decoder's."""
        part = StockConfig(self.full).part
        if not part:
            return {**self.config, **changes}
        inner: Config = self.config.get(part) or {}  # type: ignore[assignment]
        return {**self.config, part: {**inner, **changes}}

    def structure(self, shrunk: Config) -> Key:
        """Return the structure from which a family is discovered, as a key without sizes and depth.

        Args:
            shrunk: the same config with the sizes of a twin.
        """
        full = {**shrunk, "layer_key": self.layer_key}  # classes accept several
        part = StockConfig(full).part
        if not part:
            return Key.of(_without_depth(full))
        return Key.of({**full, part: _without_depth(full[part])})  # type: ignore[arg-type]

    def deeper(self, sources: Sequence[int]) -> Iterator[Config]:
        """Yield configs of a model whose layer t may be a copy of layer `sources[t]`.

        Lists with an entry per layer follow. So do lists of layers, and numbers of first layers of
        another kind.
        """
        config = self.config
        if part := self.part:
            for inner in StockConfig(self.decoder).deeper(sources):
                yield {**config, part: inner}
            return
        count, layers = self.layer_key, self.num_layers
        deeper: Config = {**config, count: len(sources)}  # a list of layers follows below
        for name, value in config.items():
            if _is_set_of_layers(name, value, layers):
                chosen = set(value)  # type: ignore[call-overload]
                deeper[name] = [target for target, source in enumerate(sources) if source in chosen]
            elif isinstance(value, list) and len(value) == layers and name not in _NO_STRUCTURE:
                deeper[name] = [value[source] for source in sources]
            elif name.endswith("layer_end_index") and value == layers - 1:
                deeper[name] = len(sources) - 1
            elif name == "per_layer_config" and isinstance(value, dict):
                own = {int(layer): sizes for layer, sizes in value.items()}
                deeper[name] = {str(t): own[s] for t, s in enumerate(sources) if s in own}
            elif name == "num_kv_shared_layers" and isinstance(value, int):  # the last ones
                deeper[name] = sum(source >= layers - value for source in sources)
            elif name == "num_blocks" and value == layers:  # a second number of layers in xLSTM
                deeper[name] = len(sources)
            elif name == "scale_depth" and isinstance(value, int | float):  # MiniCPM: over √layers
                deeper[name] = value * (len(sources) / layers) ** 0.5
            elif name == "rescale_every" and isinstance(value, int):  # RWKV halves the stream
                deeper[name] = value * len(sources) // layers
        yield deeper
        moved = {
            name: sum(source < value for source in sources)
            for name, value in config.items()
            if _FIRST_LAYERS.fullmatch(name) and isinstance(value, int) and 0 < value < layers
        }
        if moved:
            yield {**deeper, **moved}
        periods = {
            name: [value[source % len(value)] for source in sources]
            for name, value in config.items()
            if isinstance(value, list) and 1 < len(value) < layers and _PATTERNS.fullmatch(name)
        }
        if periods:  # a list that is repeated along the layers
            yield {**deeper, **periods}


@lru_cache(maxsize=256)
def _complete(key: Key) -> Config:
    config = key.config
    kind = StockConfig(config).kind
    try:
        with quiet():
            full: Config = kind.from_dict(plain_floats(config)).to_dict()
    except Exception as error:  # a config class may raise anything
        name = config["model_type"]
        raise RequestError(
            f"config.json: transformers refuses this {name}: {reason_of(error)}."
        ) from error
    return {**full, "model_type": config["model_type"]}


def _without_depth(config: Config) -> Config:
    layers = StockConfig(config).num_layers
    structure: Config = {}
    for name, value in config.items():
        if name in (*_COUNTS, "num_blocks") or _is_set_of_layers(name, value, layers):
            continue
        if name == "per_layer_config" and isinstance(value, dict):
            value = sorted({json.dumps(each, sort_keys=True) for each in value.values()})
        if isinstance(value, list) and len(value) == layers:
            value = sorted({json.dumps(each) for each in value})
        elif _FIRST_LAYERS.fullmatch(name) and isinstance(value, int):
            value = value > 0
        structure[name] = value
    return structure


def _check_sizes(config: Config) -> None:
    """Refuse numbers with which a class would build for hours, at any depth of a config."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value)
        most = _MAX_MODULES if _MODULE_COUNTS.fullmatch(str(name)) else _MAX_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise RequestError(f"config.json: {name} = {brief(value)}; must be at most {most:,}.")


def _is_set_of_layers(name: str, value: object, layers: int) -> bool:
    return (
        _LAYER_SETS.fullmatch(name) is not None
        and isinstance(value, list)
        and all(isinstance(each, int) and 0 <= each < layers for each in value)
        and all(first < second for first, second in pairwise(value))
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and info messages of transformers."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def reason_of(error: Exception) -> str:
    """Return the message of a config or model class, which may be long, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
