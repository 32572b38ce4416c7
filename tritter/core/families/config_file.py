"""A folder's config.json read as JSON and checked against the family's table.

What a file leaves out is what the class in transformers takes then, as far as a table reads it.
transformers builds what a config says: a name for each of a billion labels, an entry for each of
a million layers. So nothing is handed to it that was not checked here.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritter.core.families.dimensions import FFN_SIZES, Config, ffn_sizes, require_size
from tritter.core.families.family import Family
from tritter.core.families.tables import family_of
from tritter.errors import RequestError, TritterError, brief
from tritter.limits import (
    MAX_LABELS,
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_POSITIONS,
    MAX_TENSORS,
)
from tritter.storage.reading import LINEAGE_NAME, check_links, read_object
from tritter.storage.tensors import SINGLE_NAME

_LONGEST_REASON = 300
# Whatever names code: a class beside the model, a kernel from the hub.
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
_SILENT: Mapping[str, Config] = {
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
    "gpt2": {"tie_word_embeddings": True, "n_inner": None},
    "mixtral": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 8},
    "qwen2_moe": {**_QWEN, **_PATTERN, "num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": {**_QWEN, **_PATTERN, "num_key_value_heads": 4},
}


def read_config_file(folder: Path) -> Config:
    """Return what a folder's config.json says, with the silent values that its table reads.

    Raises:
        RequestError: a family that there is no table for; names those there are.
        TritterError: there is none, or its sizes are beyond all limits.
    """
    family, plain = sane_config(folder)
    with refused_as(f"{folder / 'config.json'} is not a usable config"):
        config = with_silent(plain)
        check_config(family, config)
    return with_live_sizes(family, config, folder)


def no_config(folder: Path) -> str:
    """Say that a folder has no config.json; of that of a run, where its checkpoint lies."""
    below = folder / "checkpoint"
    found = (below / "config.json").is_file()
    return f"no config.json; one lies in {below}" if found else "no config.json"


def sane_config(folder: Path) -> tuple[Family, Config]:
    """Return a family and what the file says, less what names code or the folder's place.

    Raises:
        RequestError: a family that there is no table for.
        TritterError: there is no file, it means other weights, or a value is out of all bounds.
    """
    check_links(folder)
    path = folder / "config.json"
    if not path.exists():
        lacks = f"holds {no_config(folder)}" if folder.is_dir() else "is not a folder"
        raise TritterError(f"{folder} {lacks}.")
    plain = read_object(path)
    family = family_of(plain)
    # With any of these, transformers would take other weights than `TensorFolder`
    named = plain.get("transformers_weights")
    if named is not None:
        raise TritterError(
            f"{folder}: config.json names a file of weights itself (transformers_weights = "
            f"{brief(named)}); take that out and call the file {SINGLE_NAME}."
        )
    if (folder / "adapter_config.json").exists():
        raise TritterError(
            f"{folder} holds an adapter (adapter_config.json) beside the model, which peft adds on "
            "loading; merge it into the weights, or take it out."
        )
    with refused_as(f"{path} is not a usable config"):
        check_values(family, plain)
    skipped = (*_NAMING_CODE, "_name_or_path")
    return family, {key: value for key, value in plain.items() if key not in skipped}


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """Turn what libraries raise over a damaged file into one line that names the file."""
    try:
        yield
    except RequestError as error:
        reason = str(error).removeprefix("config.json: ")
        raise TritterError(f"{what}: {reason}") from error
    except TritterError:
        raise
    # The border to libraries that build what a file says: packages that are not installed, bad
    # ranges, endless nesting and failed assertions come out of them as whatever they happen to be
    except Exception as error:
        reason = " ".join(str(error).split())  # without the advice on further lines
        raise TritterError(f"{what}: {reason[:_LONGEST_REASON] or type(error).__name__}") from error


def with_silent(plain: Config) -> Config:
    """Return a config with what its family's table reads and the file may leave out."""
    model_type = str(plain["model_type"])
    config = {**_SILENT.get(model_type, family_of(plain).silent), **plain}
    if model_type in ("mixtral", "qwen3_moe") and "num_experts" in config:
        config.setdefault("num_local_experts", config["num_experts"])
    if config.get("use_sliding_window", True) is False:
        config["sliding_window"] = None
    layers = range(family_of(plain).dimensions(config).num_hidden_layers)
    if model_type == "smollm3" and config["no_rope_layers"] is None:
        interval: Any = config["no_rope_layer_interval"]
        config["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in layers]
    if config.get("layer_types") is None and model_type in _IS_WINDOWED:
        windowed = [_IS_WINDOWED[model_type](config, layer) for layer in layers]
        config["layer_types"] = [
            "sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed
        ]
    return config


# Family → whether a layer's attention is windowed where the config does not list the layers
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


# Checks of values and sizes

_MAX_INTEGER = 2**63 - 1  # what a tensor's index holds
_MAX_TEXT = 2**16
# Of the keys that are read here or decide how long something gets: type, and limit of numbers.
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
# Other weights than the tensors of the table, or other code than transformers' own.
_REFUSED: Mapping[str, str] = {
    "quantization_config": "quantised weights are not read; save the model without quantisation",
    "per_layer_config": "layers of different sizes are not read",
    "add_cross_attention": "layers that read another model's states are not read",
}


def check_values(family: Family, config: Config) -> None:
    """Refuse single values that are too large or of another kind; keys may be missing.

    Raises:
        RequestError: names the key, the value and what is allowed.
    """
    for key, value in config.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        allowed = ""
        if key in _REFUSED and value:
            allowed = _REFUSED[key]
        elif key in _COUNTS and value is not None:
            if not is_whole or not 0 <= value <= _COUNTS[key]:  # type: ignore[operator]
                allowed = f"allowed is a whole number from 0 to {_COUNTS[key]:,}"
        elif key in _FLAGS and not isinstance(value, bool | None):
            allowed = "allowed is true or false"
        elif key in _DTYPE_KEYS and value is not None:
            if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
                allowed = f"allowed is one of {', '.join(_DTYPES)}"
        elif key in _LISTS and value is not None:
            if not isinstance(value, dict) or len(value) > _LISTS[key]:
                allowed = f"allowed is an object of at most {_LISTS[key]:,} entries"
        elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
            allowed = "no whole number is that large"
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            allowed = f"allowed is text of at most {_MAX_TEXT:,} characters"
        if allowed:
            raise RequestError(f"config.json: {key[:60]} = {brief(value)}; {allowed}.")
    for name, key in family.sizes.items():
        if config.get(key) is not None:
            require_size(name, key, config[key])
        if key != name and config.get(name) is not None and not family.has_experts:
            raise RequestError(
                f"config.json: {name} = {brief(config[name])}; {family.model_type} calls this "
                f"{key}, and one name is enough: state {key} alone."
            )
    for key in _EPSILONS:
        value = config.get(key, 0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:  # type: ignore[operator]
            raise RequestError(
                f"config.json: {key} = {brief(value)}; allowed is a number from 0 on."
            )


def check_config(family: Family, config: Config) -> None:
    """Refuse a config that is too large as a whole, that lacks a size, or has a wrong value.

    Raises:
        RequestError: names the key, the value and what is allowed.
    """
    check_values(family, config)
    layers = family.dimensions(config).num_hidden_layers
    for key in family.per_layer_config_keys:
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != layers:
            raise RequestError(
                f"config.json: {key} = {brief(values)}; allowed is a list of num_hidden_layers = "
                f"{layers} entries."
            )
    _check_ffn_sizes(family, config)
    exempt = config.get("mlp_only_layers")
    exempt = () if exempt is None else exempt
    is_list = isinstance(exempt, list | tuple) and len(exempt) <= layers
    if not is_list or not all(isinstance(layer, int) for layer in exempt):  # type: ignore[attr-defined]
        raise RequestError(
            f"config.json: mlp_only_layers = {brief(exempt)}; allowed is a list of layers."
        )
    check_size(family, config)


def check_size(family: Family, config: Config) -> None:
    """Refuse a model that is too large to be listed; counts, and lists nothing.

    Raises:
        RequestError: names the size, and what is allowed.
    """
    family.dimensions(config)
    tensors, parameters = family.count_tensors(config), family.count_parameters(config)
    if tensors > MAX_TENSORS:
        raise RequestError(
            f"config.json: its layers and experts make {tensors:,} tensors; allowed is at most "
            f"{MAX_TENSORS:,}."
        )
    if parameters > MAX_PARAMETERS:
        raise RequestError(
            f"config.json: its sizes make {parameters:,} parameters; allowed is at most "
            f"{MAX_PARAMETERS:,}."
        )


def with_live_sizes(
    family: Family, config: Config, folder: Path, *, ffn_sizes: Sequence[int] | None = None
) -> Config:
    """Return the config of a folder's config.json with the widths that its tritter.json states.

    Args:
        ffn_sizes: those widths; None: the file was not read yet.

    Raises:
        RequestError: config.json states them itself.
        TritterError: tritter.json can't be read, or its widths are none of this model.
    """
    if FFN_SIZES in config:
        raise RequestError(
            f"config.json: {FFN_SIZES} = {brief(config[FFN_SIZES])}; the widths of single layers "
            f"stand in {LINEAGE_NAME}, beside a model that is padded to the widest."
        )
    path = folder / LINEAGE_NAME
    if ffn_sizes is None and path.exists():
        ffn_sizes = read_object(path).get(FFN_SIZES)
    if not ffn_sizes:
        return config
    live = {**config, FFN_SIZES: ffn_sizes}
    try:
        _check_ffn_sizes(family, live)
    except RequestError as error:
        raise TritterError(f"{path}: {error}") from error
    return live


def _check_ffn_sizes(family: Family, config: Config) -> None:
    if FFN_SIZES not in config:
        return
    if family.has_experts:
        raise RequestError(
            f"{FFN_SIZES}: in {family.model_type} the experts of a layer share one tensor in "
            "memory, and all layers one width; allowed are families without experts."
        )
    if family.has_stacked_ffn:
        raise RequestError(
            f"{FFN_SIZES}: in {family.model_type} gate and up are one tensor, and all layers have "
            "one width; allowed are families in which they are two."
        )
    stated, widest = ffn_sizes(config), family.dimensions(config)
    layers = widest.num_hidden_layers
    are_sizes = len(stated) == layers and all(type(size) is int and size >= 1 for size in stated)
    if not are_sizes or max(stated) != widest.intermediate_size:
        raise RequestError(
            f"{FFN_SIZES} = {brief(config.get(FFN_SIZES))}; allowed is a width from 1 for each of "
            f"the {layers} layers, the widest of them {family.sizes['intermediate_size']} = "
            f"{widest.intermediate_size}."
        )
