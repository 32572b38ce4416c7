"""Read a folder's config.json as JSON and check it against the family table.

Missing keys that a table reads get the default of the transformers class. transformers builds
everything that a config requests: a name for each of a billion labels, an entry for each of a
million layers. So it only receives configs that were checked here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritter.core.families.dimensions import Config, require_size
from tritter.core.families.family import Family
from tritter.core.families.model import Model
from tritter.core.families.tables import family_of
from tritter.errors import RequestError, TritterError, brief
from tritter.limits import MAX_LABELS, MAX_LAYERS, MAX_POSITIONS
from tritter.storage.reading import check_links, read_object
from tritter.storage.tensors import SINGLE_NAME

_MAX_REASON_CHARACTERS = 300
# Keys that name code: a class in the model folder, a kernel from the hub.
_NAMING_CODE = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
_QWEN: Config = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_PATTERN: Config = {"decoder_sparse_step": 1, "mlp_only_layers": None}
_DEFAULTS: Mapping[str, Config] = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "smollm3": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "granite": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "olmo2": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "phi3": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None},
    "glm4": {
        "rms_norm_eps": 1.5625e-7,
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
    },
    "gemma2": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gpt_neox": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    "gpt2": {"tie_word_embeddings": True, "n_inner": None, "n_positions": 1024},
    "mixtral": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 8},
    "qwen2_moe": {**_QWEN, **_PATTERN, "num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": {**_QWEN, **_PATTERN, "num_key_value_heads": 4},
}
# Family → whether a layer has sliding-window attention, for configs without `layer_types`
_IS_WINDOWED: Mapping[str, Callable[[Any, int], bool]] = {
    "qwen2": lambda c, layer: c["sliding_window"] is not None and layer >= c["max_window_layers"],
    "qwen3": lambda c, layer: c["sliding_window"] is not None and layer >= c["max_window_layers"],
    "qwen2_moe": lambda c, layer: (
        c["use_sliding_window"] and layer % 2 == 0 and layer < c["max_window_layers"]
    ),
    "smollm3": lambda c, layer: c["sliding_window"] is not None and not c["no_rope_layers"][layer],
    "gemma2": lambda c, layer: layer % 2 == 0,
    "gemma3_text": lambda c, layer: bool((layer + 1) % c["sliding_window_pattern"]),
}
_MAX_INTEGER = 2**63 - 1  # the largest index of a tensor
_MAX_TEXT = 2**16
# Limits of the numbers that are read here or determine the length of something
_COUNTS: Mapping[str, int] = {
    "num_labels": MAX_LABELS,
    "max_position_embeddings": MAX_POSITIONS,
    "max_window_layers": MAX_LAYERS,
    "sliding_window": MAX_POSITIONS,
}
_LISTS: Mapping[str, int] = {"id2label": MAX_LABELS, "label2id": MAX_LABELS}
_FLAGS = (
    "tie_word_embeddings",
    "use_sliding_window",
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "use_parallel_residual",
    "scale_attn_by_inverse_layer_idx",
)
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LAYER_SIZES = "per_layer_config"  # a model type without a table has the shapes of its class
# Weights that the table lacks, or code outside transformers
_REFUSED: Mapping[str, str] = {
    "quantization_config": "quantised weights are not supported; save the model unquantised",
    _LAYER_SIZES: "layers of different sizes are not supported",
    "add_cross_attention": "cross-attention is not supported",
}
# Former key of the base and the rotated share, where it is another than the usual one
_FORMER_ROPE = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
_FORMER_SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def read_model_file(folder: Path) -> Model:
    """Return the model of a folder's config.json, with the defaults that its table reads."""
    family, plain = checked_config(folder)
    with errors_as(f"{folder / 'config.json'} is not a usable config"):
        model = Model(_with_defaults(plain, family), family)
        check_config(model)
    return model.with_live_sizes(folder)


def missing_config(folder: Path) -> str:
    """Return the message for a folder without config.json, with what to use instead."""
    if (folder / "adapter_config.json").is_file():
        return "a PEFT adapter and no config.json; save its base after merge_and_unload() instead"
    below = folder / "checkpoint"
    found = (below / "config.json").is_file()
    return f"no config.json; the checkpoint is in {below}" if found else "no config.json"


def checked_config(folder: Path) -> tuple[Family, Config]:
    """Return the family and the config of a folder, without keys that name code or the folder."""
    check_links(folder)
    path = folder / "config.json"
    if not path.exists():
        lacks = f"holds {missing_config(folder)}" if folder.is_dir() else "is not a folder"
        raise TritterError(f"{folder} {lacks}.")
    plain = read_object(path)
    family = family_of(plain)
    # With either of these, transformers would load other weights than `TensorFolder`
    named = plain.get("transformers_weights")
    if named is not None:
        raise TritterError(
            f"{folder}: config.json names a file of weights (transformers_weights = "
            f"{brief(named)}); remove that key and rename the file to {SINGLE_NAME}."
        )
    if (folder / "adapter_config.json").exists():
        raise TritterError(
            f"{folder} also holds an adapter (adapter_config.json), which peft would load with the "
            "model; merge it into the weights, or remove it."
        )
    with errors_as(f"{path} is not a usable config"):
        _check_values(family, plain)
        family = family_of(plain := family.causal_config(plain))
    skipped = (*_NAMING_CODE, "_name_or_path")
    return family, {key: value for key, value in plain.items() if key not in skipped}


@contextmanager
def errors_as(what: str) -> Iterator[None]:
    """Convert any error of a block into a one-line TritterError that names the file.

    Args:
        what: beginning of the message, such as `FILE is not a usable config`.
    """
    try:
        yield
    except RequestError as error:
        reason = str(error).removeprefix("config.json: ")
        raise TritterError(f"{what}: {reason}") from error
    except TritterError:
        raise
    # Libraries raise anything over a damaged file: missing packages, bad ranges, endless nesting,
    # failed assertions
    except Exception as error:
        reason = " ".join(str(error).split())  # without the advice on further lines
        raise TritterError(
            f"{what}: {reason[:_MAX_REASON_CHARACTERS] or type(error).__name__}"
        ) from error


def _with_defaults(plain: Config, family: Family) -> Config:
    """Return a config with the defaults of optional keys that the family table reads."""
    model_type = str(plain["model_type"])
    config = {**_DEFAULTS.get(model_type, family.defaults), **plain}
    if model_type in ("mixtral", "qwen3_moe") and "num_experts" in config:
        config.setdefault("num_local_experts", config["num_experts"])
    if config.get("use_sliding_window", True) is False:
        config["sliding_window"] = None
    layers = range(family.dimensions(config).num_hidden_layers)
    if model_type == "smollm3" and config["no_rope_layers"] is None:
        interval: Any = config["no_rope_layer_interval"]
        config["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in layers]
    if config.get("layer_types") is None and model_type in _IS_WINDOWED:
        windowed = [_IS_WINDOWED[model_type](config, layer) for layer in layers]
        config["layer_types"] = [
            "sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed
        ]
    return config


# Checks of values and sizes


def _check_values(family: Family, config: Config) -> None:
    """Refuse single values that are too large or of the wrong type; keys may be missing."""
    for key, value in config.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        allowed = ""
        if key in _REFUSED and value and (family.has_table or key != _LAYER_SIZES):
            allowed = _REFUSED[key]
        elif key in _COUNTS and value is not None:
            if not is_whole or not 0 <= value <= _COUNTS[key]:  # type: ignore[operator]
                allowed = f"must be a whole number from 0 to {_COUNTS[key]:,}"
        elif key in _FLAGS and not isinstance(value, bool | None):
            allowed = "must be true or false"
        elif key in _DTYPE_KEYS and value is not None:
            if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
                allowed = f"must be one of {', '.join(_DTYPES)}"
        elif key in _LISTS and value is not None:
            if not isinstance(value, dict) or len(value) > _LISTS[key]:
                allowed = f"must be an object of at most {_LISTS[key]:,} entries"
        elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
            allowed = f"must be a whole number of at most {_MAX_INTEGER:,}"
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            allowed = f"must be text of at most {_MAX_TEXT:,} characters"
        if allowed:
            raise RequestError(f"config.json: {key[:60]} = {brief(value)}; {allowed}.")
    for name, key in family.sizes.items():
        if config.get(key) is not None:
            require_size(name, key, config[key])
        if key != name and config.get(name) is not None and not family.has_experts:
            raise RequestError(
                f"config.json: {name} = {brief(config[name])}; {family.model_type} calls this "
                f"{key}: set {key} only."
            )
    for key in _EPSILONS if family.has_table else ():
        value = config.get(key, 0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:  # type: ignore[operator]
            raise RequestError(
                f"config.json: {key} = {brief(value)}; must be a number of at least 0."
            )


def check_config(model: Model) -> None:
    """Refuse a config that describes too large a model, lacks a size, or has an invalid value."""
    family, config = model.family, model.config
    _check_values(family, config)
    layers = model.sizes.num_hidden_layers
    for key in family.per_layer_config_keys:
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != layers:
            raise RequestError(
                f"config.json: {key} = {brief(values)}; must be a list of num_hidden_layers = "
                f"{layers} entries."
            )
    model.check_ffn_sizes()
    exempt = config.get("mlp_only_layers")
    exempt = () if exempt is None else exempt
    is_list = isinstance(exempt, list | tuple) and len(exempt) <= layers
    if not is_list or not all(isinstance(layer, int) for layer in exempt):  # type: ignore[attr-defined]
        raise RequestError(
            f"config.json: mlp_only_layers = {brief(exempt)}; must be a list of layers."
        )
    model.check_size()


def with_former_keys(config: Config) -> Config:
    """Return a config with the keys of transformers 4 in addition to those of transformers 5.

    Both have the same values: transformers 5 reads either, and 4 would take its default for the
    rotary base, without an error.
    """
    former: dict[str, Any] = {}
    if "num_local_experts" in config:
        former["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        nested = {kind: each for kind, each in rope.items() if isinstance(each, Mapping)}
        full = nested.get("full_attention", {} if nested else rope)
        base, share = _FORMER_ROPE.get(
            str(config.get("model_type")), ("rope_theta", "partial_rotary_factor")
        )
        if full.get("rope_type", "default") not in _FORMER_SCALINGS:  # of a class that 4 lacks
            return config
        if "rope_theta" in full:
            former[base] = full["rope_theta"]
        if "partial_rotary_factor" in full:
            former[share] = full["partial_rotary_factor"]
        if full.get("rope_type", "default") != "default":
            kept = ("rope_theta", "partial_rotary_factor")
            former["rope_scaling"] = {k: v for k, v in full.items() if k not in kept}
        if "rope_theta" in nested.get("sliding_attention", {}):
            former["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
    return {**config, **{key: value for key, value in former.items() if config.get(key) is None}}
