"""A config.json held against what its family needs and what a machine bears, before it is used.

transformers builds what a config says: a name for each of a billion labels, an entry for each of
a million layers. So nothing is handed to it that has not been here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritter.errors import RequestError, TritterError, brief
from tritter.families.dimensions import FFN_SIZES, Config, check_ffn_sizes, require_size
from tritter.families.family import Family
from tritter.limits import (
    MAX_LABELS,
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_POSITIONS,
    MAX_TENSORS,
)
from tritter.storage.reading import LINEAGE_NAME, read_object

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
        _check_value(key, value)
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


def _check_value(key: str, value: object) -> None:
    def refuse(allowed: str) -> None:
        raise RequestError(f"config.json: {key[:60]} = {brief(value)}; {allowed}.")

    if key in _REFUSED and value:
        refuse(_REFUSED[key])
    if key in _COUNTS and value is not None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _COUNTS[key]:
            refuse(f"allowed is a whole number from 0 to {_COUNTS[key]:,}")
    elif key in _FLAGS and not isinstance(value, bool | None):
        refuse("allowed is true or false")
    elif key in _DTYPE_KEYS and value is not None:
        if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
            refuse(f"allowed is one of {', '.join(_DTYPES)}")
    elif key in _LISTS and value is not None:
        if not isinstance(value, dict) or len(value) > _LISTS[key]:
            refuse(f"allowed is an object of at most {_LISTS[key]:,} entries")
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        refuse("no whole number is that large")
    elif isinstance(value, str) and len(value) > _MAX_TEXT:
        refuse(f"allowed is text of at most {_MAX_TEXT:,} characters")


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
    sizes = family.dimensions(config)
    check_ffn_sizes(
        config,
        layers=sizes.num_hidden_layers,
        widest=sizes.intermediate_size,
        key=family.sizes["intermediate_size"],
    )
