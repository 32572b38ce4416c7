"""Whether transformers can build the model that a config describes, before anything is written."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tritter.errors import RequestError, TritterError
from tritter.families import Config, Family, family_of, layout, on_disk
from tritter.families.config_file import refused_as
from tritter.models import quiet, stock_config_of
from tritter.storage.reading import read_object


def check_loadable(config: Config, *, folder: Path) -> None:
    """Refuse a config from which transformers would not build the model of its family's table.

    One layer of each kind is built, without memory for its tensors.

    Args:
        folder: where its generation settings lie, which are read on loading too.

    Raises:
        RequestError: says what transformers made of it.
    """
    _check_generation_settings(folder)
    family, config = family_of(config), on_disk(config)
    shallow = family.with_layers(config, _layers_of_each_kind(family, config))
    try:
        with torch.device("meta"), quiet():
            stock_config_of(config)
            model = AutoModelForCausalLM.from_config(stock_config_of(shallow))
            found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # The border to classes that trust their config: they raise whatever its values lead them to
    except Exception as error:
        raise RequestError(
            f"config.json: transformers can't build this model: {_blamed(config, error)}."
        ) from error
    expected = {stored.name: stored.shape for stored in layout(shallow, "live")}
    tied = family.tied_names(shallow)
    wrong = sorted(
        name
        for name in (found.keys() | expected.keys()) - tied
        if found.get(name) != expected.get(name)
    )
    if wrong:
        raise RequestError(
            f"config.json: transformers builds another model from it: {wrong[0]} would be of shape "
            f"{found.get(wrong[0])}, not {expected.get(wrong[0])}."
        )


def _check_generation_settings(folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        with refused_as(f"{path} is not usable"), quiet():
            read_object(path)
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except TritterError as error:
        raise RequestError(str(error)) from error


def _layers_of_each_kind(family: Family, config: Config) -> list[int]:
    """Return the first layer of every kind that a config tells apart."""
    kinds: dict[tuple[object, ...], int] = {}
    stated = [config.get(key) for key in family.per_layer_config_keys]
    for layer, kind in enumerate(family.layer_kinds(config)):
        own = [str(values[layer]) for values in stated if isinstance(values, list)]
        kinds.setdefault((kind, *own), layer)
    return list(kinds.values())


def _blamed(config: Config, error: Exception) -> str:
    """Name the values of a config that an error speaks of, or say what it says."""
    if isinstance(error, KeyError) and error.args:
        for key, value in config.items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            for inner, held in nested:
                if held == error.args[0]:
                    name = f"{key}.{inner}" if inner else key
                    return f"{name} = {held} is not known to it"
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        return f"pad_token_id = {pad} is no token of a vocabulary of {size}"
    return " ".join(str(error).split()) or type(error).__name__
