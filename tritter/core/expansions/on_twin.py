"""Verification of growth in width and of experts on a twin of a model type without a table."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from tritter.core.families import Config, Dimensions, Model, pack_all, unpack_all
from tritter.core.families.config_file import errors_as
from tritter.core.families.discovery.configs import Key, reason_of
from tritter.core.families.discovery.family import shallow
from tritter.core.families.discovery.twin import TOLERANCE, Twin, one_thread
from tritter.core.parameter_map import AxisFactor, Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, TritterError, key_name


def check_on_twin(spec: Any, source: Model, target: Model) -> None:
    """Refuse growth in width, or of experts, that changes the function of a twin."""
    old, new = source.sizes, target.sizes
    before, after = _sizes(old), _sizes(new)
    factors = tuple(
        (name, 2.0 if after[name] % size == 0 else 1.5)
        for name, size in before.items()
        if after[name] != size
    )
    plain = replace(spec, noise=0.0, **(dict.fromkeys(before) if factors else {}))
    grown, control = _logit_changes(plain, Key.of(source.config), factors)
    if not grown <= TOLERANCE:
        reason = f"the logits of a small {source.model_type} change by {grown:.1e}"
        if new.hidden_size != old.hidden_size and getattr(spec, "init", "") in (
            "fresh",
            "zero_pad",
        ):
            reason += (
                f"; use {key_name('expansion.width.init')}=net2net with a multiple of the hidden "
                f"size of {old.hidden_size}, or let only FFN or depth grow"
            )
        raise RequestError(Problem(f"expansion.{spec.name}", reason=reason))
    if not control > TOLERANCE:
        raise RequestError(
            f"config.json: {spec.name} could not be verified on a small {source.model_type}: no "
            "change of the grown weights changes the logits"
        )


def check_rotations(config: Config, target: Config) -> None:
    """Refuse rotary parameters that the class of a model does not read, or not where they help."""
    new, kinds, reason = Key.of({"new": target["rope_parameters"]}), config.get("layer_types"), ""
    if not _rotation_change(Key.of(config), new) > TOLERANCE:
        reason = f"{config['model_type']} computes the same with other rotary parameters"
    elif isinstance(kinds, list) and "sliding_attention" in kinds:
        whole = {**config, "layer_types": ["full_attention"] * len(kinds)}
        if not _rotation_change(Key.of(whole), new) > TOLERANCE:
            reason = "it has rotary embeddings in layers with a window only"
    if reason:
        raise RequestError(Problem("expansion.context", reason=reason))


@lru_cache(maxsize=64)
@one_thread()
def _rotation_change(key: Key, new: Key) -> float:
    """Return the largest change of a twin's float64 logits by other rotary parameters.

    Args:
        key: config of the model.
        new: the parameters, as `new`.
    """
    twin = Twin.of(shallow(key.config))
    changed = {**twin.config.to_dict(), "rope_parameters": new.config["new"]}
    try:
        with errors_as(f"the class of {twin.text.model_type} refuses the new rotary parameters"):
            model = twin.sibling(changed)
    except TritterError as error:
        raise RequestError(Problem("expansion.context", reason=str(error))) from error
    model.load_state_dict(twin.model.state_dict(), strict=False)
    return float((twin.logits(model) - twin.logits()).abs().max())


def _sizes(sizes: Dimensions) -> dict[str, int]:
    """Return option of `Width` → its size in a model."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    return {"intermediate_size": sizes.ffn_size, **{name: getattr(sizes, name) for name in names}}


@contextmanager
def _other_sizes() -> Iterator[None]:
    """Refuse sizes with which a config or model class fails."""
    try:
        yield
    except Exception as error:  # config and model classes may raise anything
        raise RequestError(
            f"config.json: its class refuses other sizes: {reason_of(error)}"
        ) from error


@lru_cache(maxsize=64)
@one_thread()
def _logit_changes(
    spec: Any, key: Key, factors: tuple[tuple[str, float], ...]
) -> tuple[float, float]:
    """Return the largest change of a twin's float64 logits by growth in width.

    Args:
        spec: of the growth; its sizes are replaced.
        key: config of the model.
        factors: size → factor by which it grows; empty for experts.

    Returns:
        The change by the growth, and by the growth without shares and zeros (the control).
    """
    twin = Twin.of(shallow(key.config))
    source = Model(twin.config.to_dict()).widened
    if factors:
        sizes = _sizes(source.sizes)
        sizes |= {name: math.ceil(sizes[name] * factor) for name, factor in factors}
        spec = replace(spec, **sizes)
    target = source.changed(spec.target_config(source))
    before = twin.logits()
    with _other_sizes():
        model = twin.sibling(target.config)
    exact = spec.parameter_map(source, target, seed=0)

    def load(maps: Mapping[str, TensorMap]) -> None:
        values = unpack_all(source.layout("live"), twin.model.state_dict())
        grown = {name: each.mapped(values.__getitem__) for name, each in maps.items()}
        model.load_state_dict(pack_all(target.layout("live"), grown), strict=False)

    def change() -> float:
        return float((twin.logits(model) - before).abs().max())

    try:
        load(exact.tensors)
    except (RuntimeError, IndexError, KeyError) as error:
        reason = f"grown weights do not fit the shapes of a small {source.model_type}"
        raise RequestError(f"config.json: {reason}") from error
    with _other_sizes():
        by_growth = change()
    load(_without_zeros(exact))
    return by_growth, change()


def _without_zeros(exact: ParameterMap) -> Mapping[str, TensorMap]:
    """Return maps that copy with noise and without shares, and fill new entries at random."""

    def plain(factor: AxisFactor | None) -> AxisFactor | None:
        return factor and replace(factor, weight=torch.ones_like(factor.weight))

    fill = Fill("random", std=0.1)
    return {
        name: replace(each, axes=tuple(map(plain, each.axes)), fill=fill, noise=1.0, noise_seed=1)
        for name, each in exact.tensors.items()
    }
