"""Depth: layers copied into new places.

A depth expansion is a list of source layers, one per target layer. The first occurrence of a
layer is the layer itself; every further one is a copy, which identity initialisation turns into
an identity block by zeroing whatever it writes to the residual stream.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tritter.errors import RequestError
from tritter.families import Axis, Config, Family, Port
from tritter.parameter_map import ParameterMap, TensorMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Dus:
    """Depth up-scaling as in SOLAR (arXiv 2312.15166): two overlapping copies of the stack.

    From n layers to t: copy 1 without its last m, then copy 2 without its first m layers, with
    m = n − t/2. Not function-preserving unless `identity_init`.

    Args:
        target_layers: t, even, n < t ≤ 2n. Default: the even count nearest to 1.5 n.
        drop_layers: m. Default: what t asks for; alone it sets t = 2 (n − m).
        identity_init: zero what the copies write, so that the function is preserved.
    """

    name: ClassVar[str] = "dus"
    expansion_type: ClassVar[str] = "depth"
    target_layers: int | None = field(default=None, metadata={"minimum": 2})
    drop_layers: int | None = field(default=None, metadata={"minimum": 0})
    identity_init: bool = False

    @property
    def is_exact(self) -> bool:
        return self.identity_init

    @property
    def new_blocks_only(self) -> bool:
        return False

    def target_config(self, family: Family, config: Config) -> Config:
        layers = family.dimensions(config).num_hidden_layers
        sources = depth_upscale_sources(
            layers, target_layers=self.target_layers, drop_layers=self.drop_layers
        )
        return _deeper_config(family, config, sources)

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        sources = depth_upscale_sources(
            family.dimensions(source).num_hidden_layers,
            target_layers=family.dimensions(target).num_hidden_layers,
        )
        zeroed = repeated_layers(sources) if self.identity_init else frozenset()
        return layer_map(family, source, sources, zeroed=zeroed, fresh=zeroed)

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaPro:
    """Block expansion as in LLaMA Pro (arXiv 2401.02415): identity copies between the layers.

    A new block is a copy of the block below with attention output and FFN down projection zero,
    so the function is preserved; its optimiser state starts anew.

    Args:
        target_layers: layers afterwards. Default: n + ⌈n/2⌉, or n + the number of positions.
        positions: source layers that a new block follows (a layer may stand more than once).
            Default: evenly spread.
        new_blocks_only: train the new blocks alone. A frozen weight is not a frozen function:
            at our scale this forgets more and learns less, so the default trains everything.
    """

    name: ClassVar[str] = "llama_pro"
    expansion_type: ClassVar[str] = "depth"
    target_layers: int | None = field(default=None, metadata={"minimum": 2})
    positions: tuple[int, ...] | None = field(default=None, metadata={"minimum": 0})
    new_blocks_only: bool = False

    @property
    def is_exact(self) -> bool:
        return True

    def target_config(self, family: Family, config: Config) -> Config:
        layers = family.dimensions(config).num_hidden_layers
        return _deeper_config(family, config, self._sources(layers))

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        sources = self._sources(family.dimensions(source).num_hidden_layers)
        new = repeated_layers(sources)
        return layer_map(family, source, sources, zeroed=new, fresh=new)

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        return ()

    def _sources(self, layers: int) -> tuple[int, ...]:
        return block_insertion_sources(
            layers, target_layers=self.target_layers, positions=self.positions
        )


def depth_upscale_sources(
    layers: int, *, target_layers: int | None = None, drop_layers: int | None = None
) -> tuple[int, ...]:
    """Return the source layer of every target layer under SOLAR's rule.

    Raises:
        RequestError: no m fits, or target and m contradict each other; names what would work.
    """
    target = target_layers
    if target is None:
        target = 2 * (layers - drop_layers) if drop_layers is not None else _default_target(layers)
    allowed = range(layers + 1 + (layers + 1) % 2, 2 * layers + 1, 2)
    if target not in allowed:
        closest = _closest(target, allowed)
        by_drop = target_layers is None and drop_layers is not None
        key, value = ("drop_layers", drop_layers) if by_drop else ("target_layers", target)
        raise RequestError(
            f"expansion.dus.{key} = {value}: from {layers} layers dus reaches the even counts "
            f"{_listed(allowed)} (dropping {_listed([layers - t // 2 for t in allowed])} layers); "
            f"nearest: {layers - closest // 2 if by_drop else closest}."
        )
    drop = layers - target // 2
    if drop_layers is not None and drop_layers != drop:
        raise RequestError(
            f"expansion.dus.drop_layers = {drop_layers} contradicts target_layers = {target}: "
            f"from {layers} layers, {target} need drop_layers = {drop}, and drop_layers = "
            f"{drop_layers} gives {2 * (layers - drop_layers)}."
        )
    return (*range(layers - drop), *range(drop, layers))


def block_insertion_sources(
    layers: int, *, target_layers: int | None = None, positions: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the source layer of every target layer when copies follow chosen layers.

    Raises:
        RequestError: a position does not exist, or target and positions contradict each other.
    """
    if positions is not None:
        wrong = [position for position in positions if not 0 <= position < layers]
        if wrong or not positions:
            raise RequestError(
                f"expansion.llama_pro.positions = {list(positions)}: name at least one source "
                f"layer from 0 to {layers - 1} that a new block is to follow."
            )
        if target_layers is not None and target_layers != layers + len(positions):
            raise RequestError(
                f"expansion.llama_pro.target_layers = {target_layers} contradicts the "
                f"{len(positions)} positions: {layers} + {len(positions)} = "
                f"{layers + len(positions)}."
            )
        return tuple(sorted([*range(layers), *positions]))
    target = layers + math.ceil(layers / 2) if target_layers is None else target_layers
    if target <= layers:
        raise RequestError(
            f"expansion.llama_pro.target_layers = {target}: the model has {layers} layers "
            f"already; ask for at least {layers + 1}."
        )
    added = target - layers
    spread = [math.ceil((block + 1) * layers / added) - 1 for block in range(added)]
    return tuple(sorted([*range(layers), *spread]))


def repeated_layers(sources: Sequence[int]) -> frozenset[int]:
    """Return the target layers that are further copies of a layer that stands already."""
    first = {source: target for target, source in reversed(list(enumerate(sources)))}
    return frozenset(target for target, source in enumerate(sources) if first[source] != target)


def layer_map(
    family: Family,
    source: Config,
    layer_sources: Sequence[int],
    *,
    zeroed: frozenset[int],
    fresh: frozenset[int],
) -> ParameterMap:
    """Return the map that gives each target layer the tensors of its source layer.

    Args:
        zeroed: target layers whose writes to the residual stream become zero.
        fresh: target layers whose moments and importances start anew.
    """
    tensors: dict[str, TensorMap] = {}
    deeper = {**source, "num_hidden_layers": len(layer_sources)}
    templates = family.layer_tensors(source)
    per_layer: dict[str, TensorMap] = {}
    for target_layer, source_layer in enumerate(layer_sources):
        state: Literal["carry", "fresh"] = "fresh" if target_layer in fresh else "carry"
        for template in templates:
            per_layer[template.for_layer(target_layer).name] = TensorMap(
                source=template.for_layer(source_layer).name,
                is_zeroed=target_layer in zeroed and Axis("residual", Port.WRITE) in template.axes,
                state=state,
            )
    for tensor in family.logical_tensors(deeper):
        tensors[tensor.name] = per_layer.get(tensor.name) or TensorMap(source=tensor.name)
    return ParameterMap(tensors=tensors, layer_sources=tuple(layer_sources))


def _deeper_config(family: Family, config: Config, layer_sources: Sequence[int]) -> Config:
    deeper: Config = {**config, "num_hidden_layers": len(layer_sources)}
    for key in family.per_layer_config_keys:
        values = config.get(key)
        if isinstance(values, list):
            deeper[key] = [values[source] for source in layer_sources]
    return deeper


def _default_target(layers: int) -> int:
    target = 2 * round(1.5 * layers / 2)
    return target if layers < target <= 2 * layers else 2 * layers


def _listed(values: Sequence[int]) -> str:
    texts = [str(value) for value in values]
    if len(texts) <= 6:
        return ", ".join(texts)
    return ", ".join([*texts[:3], "…", texts[-1]])


def _closest(value: int, allowed: Sequence[int]) -> int:
    return min(allowed, key=lambda candidate: (abs(candidate - value), candidate))
