"""A folder's config.json read as JSON, held against the family's table.

What a file leaves out is what the class in transformers takes then, as far as a table reads it.
Whether transformers builds a model from the rest is asked where one is built or written.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritter.errors import RequestError, TritterError, brief
from tritter.families import (
    Config,
    Family,
    check_config,
    check_values,
    family_of,
    with_live_sizes,
)
from tritter.storage.reading import check_links, read_object
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
    config = {**_SILENT[model_type], **plain}
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
