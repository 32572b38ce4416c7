"""FFNs of different width in one model: stated per layer in memory, padded to the widest on disk.

In memory a config may state `ffn_sizes`, the width of each layer's FFN; `intermediate_size`, or
what its family calls it, is the widest of them. Stock classes know one width for all, so on disk
the narrower FFNs are padded with zeros, which changes nothing that they compute: config.json never
holds the key, tritter.json does.
"""

from collections.abc import Sequence

from tritter.errors import RequestError, brief
from tritter.families.dimensions import Config

FFN_SIZES = "ffn_sizes"


def ffn_sizes(config: Config) -> tuple[int, ...]:
    """Return the width of each layer's FFN; nothing where all are alike."""
    stated = config.get(FFN_SIZES)
    return tuple(stated) if isinstance(stated, list | tuple) else ()


def with_ffn_sizes(
    config: Config, sizes: Sequence[int], *, key: str = "intermediate_size"
) -> Config:
    """Return the config of a model whose layers' FFNs have these widths.

    Args:
        key: what the config calls the widest.
    """
    same: Config = {**on_disk(config), key: max(sizes)}
    return same if min(sizes) == max(sizes) else {**same, FFN_SIZES: list(sizes)}


def on_disk(config: Config) -> Config:
    """Return the config of the padded model, which stock classes build."""
    return {key: value for key, value in config.items() if key != FFN_SIZES}


def check_ffn_sizes(config: Config, *, layers: int, widest: int, key: str) -> None:
    """Refuse widths that are not one for each layer, up to the widest.

    Args:
        key: what the config calls the widest.

    Raises:
        RequestError: says what is allowed.
    """
    sizes = ffn_sizes(config)
    are_sizes = len(sizes) == layers and all(_is_size(size) for size in sizes)
    if not are_sizes or max(sizes) != widest:
        raise RequestError(
            f"{FFN_SIZES} = {brief(config.get(FFN_SIZES))}; allowed is a width from 1 for each of "
            f"the {layers} layers, the widest of them {key} = {widest}."
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
