"""Depth expansions, which copy layers.

A depth expansion has a rule for the source of each layer and an initialisation of the copies.
Plain copies change the function. Identity copies write zeros to the residual stream and preserve
it.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain, islice
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema

from tritter.core.families import Config, Model, Port, logical_name
from tritter.core.parameter_map import AxisFactor, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused, show
from tritter.limits import MAX_LAYERS
from tritter.options import options
from tritter.seeds import derived_seed

_ZEROED_ROW_NOISE = 0.01
_Layer = Annotated[int, Field(ge=0, le=MAX_LAYERS)]


class CopiedLayers(ABC):
    """Base of depth methods: a rule for layer sources, and whether copies are identities."""

    expansion_type: ClassVar[str] = "depth"
    new_blocks_only: bool = False

    @abstractmethod
    def layer_sources(self, layers: int) -> tuple[int, ...]:
        """Return the source layer of each target layer.

        The first occurrence of a layer is the layer itself; further ones are copies.

        Args:
            layers: number of source layers.

        Raises:
            RequestError: the target is impossible; names possible ones.
        """

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """True if the function is preserved, unless a layer after the last source is dropped."""

    def identity_layers(self, sources: Sequence[int]) -> frozenset[int]:
        """Return the target layers that start as identities with fresh optimizer state.

        Args:
            sources: source layer of each target layer.
        """
        return repeated_layers(sources) if self.is_exact else frozenset()

    def target_config(self, source: Model) -> Config:
        method = getattr(self, "name", "depth")
        family = source.family
        if family.layer_index_key and source.config.get(family.layer_index_key):
            reason = (
                f"config.json has {family.layer_index_key} = true: each layer of this "
                f"{source.model_type} divides its attention scores by its index, so a moved layer "
                "would change its function; grow the width instead"
            )
            raise RequestError(Problem(f"expansion.{method}", reason=reason))
        sources = self.layer_sources(source.sizes.num_hidden_layers)
        identities = self.identity_layers(sources)
        copied = {sources[layer] for layer in identities}
        if copied and (reason := family.inexact_reason(source.config, copied)):
            raise RequestError(Problem(f"expansion.{method}", reason=reason))
        return family.with_layers(source.config, sources, identities or None)

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        """Return the map from the tensors of each source layer to its target layers."""
        family, layers = source.family, source.sizes.num_hidden_layers
        sources = self.layer_sources(layers)
        identities = self.identity_layers(sources)
        other = target
        if len(sources) == layers:  # the shapes do not show what has a block per layer
            try:
                other = source.changed(family.with_layers(source.config, [layers - 1]))
            except RequestError:  # no config has this layer alone
                other = source.changed(family.with_layers(source.config, [0]))
        shapes, other_shapes = source.shapes, other.shapes
        tensors: dict[str, TensorMap] = {}
        for tensor in target.tensors:
            if tensor.layer is None:
                sizes, others = shapes[tensor.name], other_shapes[tensor.name]
                axes = _axes_of_layers(sizes, others, layers, sources, identities)
                tensors[tensor.name] = TensorMap(source=tensor.name, axes=axes)
                continue
            is_identity = tensor.layer in identities
            is_zeroed = is_identity and family.branch_output(tensor)
            # An earlier expansion may have left zero rows. Before a gain of zero they would never
            # get a gradient, so they get noise, which the zeroed norm hides.
            is_before_zeroed_norm = any(
                output.port is Port.WRITE and output.space.is_branch_output
                for output in tensor.axes[:1]  # a single number has no axis
            )
            layer = sources[tensor.layer]
            tensors[tensor.name] = TensorMap(
                source=logical_name(tensor.kind, layer=layer, expert=tensor.expert),
                is_zeroed=is_zeroed,
                offset=-family.zero_of(tensor) if is_zeroed else 0.0,
                state="fresh" if is_identity else "carry",
                is_copy=is_identity and is_before_zeroed_norm,
                noise=_ZEROED_ROW_NOISE if is_identity and is_before_zeroed_norm else 0.0,
                noise_seed=derived_seed(seed, "noise", tensor.name) if is_before_zeroed_norm else 0,
            )
        return ParameterMap(tensors=tensors, layer_sources=sources)

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        return ()


def _read_slices(slices: Any) -> tuple[tuple[int, int], ...]:
    """Return the start and the end of ranges such as "0:20" or [0, 20]."""
    found = []
    for each in slices if isinstance(slices, list | tuple) else (slices,):
        typed = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", each) if isinstance(each, str) else None
        pair = each if typed is None else [int(word) for word in typed.groups()]
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(type(n) is int and 0 <= n <= MAX_LAYERS for n in pair):
            raise ValueError(
                f"{show(each)} is not a range of layers: write '0:20' (in quotes in YAML) or "
                f"[0,20], with numbers of at most {MAX_LAYERS}"
            )
        found.append((pair[0], pair[1]))
    return tuple(found)


_SLICES = (PlainValidator(_read_slices), WithJsonSchema({"type": "array"}))


@options
class Dus(CopiedLayers):
    """Depth up-scaling as in SOLAR (arXiv 2312.15166): two overlapping copies of the stack.

    From n layers to t: copy 1 without its last m, then copy 2 without its first m layers, with
    m = n − t/2. Not function-preserving unless `identity_init`.

    Args:
        target_layers: t, even, n < t ≤ 2n. Default: the even number nearest to 1.5 n.
        drop_layers: m. Default: derived from t; without t, it sets t = 2 (n − m).
        identity_init: zero the output projections of the copies, which preserves the function.
    """

    name: ClassVar[str] = "dus"
    target_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] | None = None
    drop_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] | None = None
    identity_init: bool = False

    @property
    def is_exact(self) -> bool:
        return self.identity_init

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        chosen, chosen_drop = self.target_layers, self.drop_layers
        allowed = range(layers + 1 + (layers + 1) % 2, 2 * layers + 1, 2)
        if chosen is not None:
            target = chosen
        elif chosen_drop is not None:
            target = 2 * (layers - chosen_drop)
        else:
            target = 2 * round(1.5 * layers / 2)
            target = target if target in allowed else 2 * layers
        if target not in allowed:
            closest = min(allowed, key=lambda count: (abs(count - target), count))
            by_drop = chosen is None and chosen_drop is not None
            key, value = ("drop_layers", chosen_drop) if by_drop else ("target_layers", target)
            raise refused(
                f"expansion.dus.{key}",
                value,
                f"from {layers} layers dus reaches the even counts {_join_numbers(allowed)} "
                f"(dropping {_join_numbers([layers - t // 2 for t in allowed])} layers); "
                f"nearest: {layers - closest // 2 if by_drop else closest}",
            )
        drop = layers - target // 2
        if chosen_drop not in (None, drop):
            raise refused(
                "expansion.dus.drop_layers",
                chosen_drop,
                f"it contradicts {key_name('expansion.dus.target_layers')} = {target}: from "
                f"{layers} layers, {target} need {drop}, and {chosen_drop} gives "
                f"{2 * (layers - chosen_drop)}",
            )
        return (*range(layers - drop), *range(drop, layers))


@options
class Stack(CopiedLayers):
    """Depthwise stacking (G_stack of arXiv 2405.15319): whole copies of the stack.

    Layer i of the result is layer i mod n. Not function-preserving unless `identity_init`.

    Args:
        target_layers: a multiple of n. Default: 2n.
        partial: allow any number above n; the last copy is then cut after its first layers.
        identity_init: zero the output projections of the copies, which preserves the function.
    """

    name: ClassVar[str] = "stack"
    target_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] | None = None
    partial: bool = False
    identity_init: bool = False

    @property
    def is_exact(self) -> bool:
        return self.identity_init

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        target = self.target_layers or 2 * layers
        _check_grows("stack", target, layers, at_least=layers + 1 if self.partial else 2 * layers)
        rest = target % layers
        if rest and not self.partial:
            multiples = sorted({max(target - rest, 2 * layers), target - rest + layers})
            raise refused(
                "expansion.stack.target_layers",
                target,
                f"stack makes whole copies of the {layers} layers; nearest: "
                f"{' or '.join(map(str, multiples))}. {key_name('expansion.stack.partial')} allows "
                f"a partial last copy, here its first {_layers_text(rest)}",
            )
        return tuple(layer % layers for layer in range(target))

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        layers = source.sizes.num_hidden_layers
        rest = target.sizes.num_hidden_layers % layers
        return (f"the last copy is partial: {rest} of {layers} layers",) if rest else ()


@options
class Interpolate(CopiedLayers):
    """Copies of each layer right after the layer (interpolation, arXiv 2405.15319).

    Each layer is repeated ⌊t/n⌋ times. The remainder of t adds one copy to single layers, evenly
    spread over the gaps between layers, so below 2n no copy follows the last layer. Not
    function-preserving unless `identity_init`.

    Args:
        target_layers: t, any number above n. Default: 1.5 n, rounded up.
        identity_init: zero the output projections of the copies, which preserves the function.
    """

    name: ClassVar[str] = "interpolate"
    target_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] | None = None
    identity_init: bool = False

    @property
    def is_exact(self) -> bool:
        return self.identity_init

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        target = self.target_layers or math.ceil(1.5 * layers)
        _check_grows("interpolate", target, layers, at_least=layers + 1)
        times, rest = divmod(target, layers)
        repeated = {(2 * copy + 1) * (layers - 1) // (2 * rest) for copy in range(rest)}
        return tuple(n for n in range(layers) for _ in range(times + (n in repeated)))

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        layers = source.sizes.num_hidden_layers
        if self.target_layers is not None or layers % 2 == 0:
            return ()
        rounded = target.sizes.num_hidden_layers
        return (f"1.5 times {layers} layers are {1.5 * layers:g}, rounded up to {rounded}",)


@options
class LlamaPro(CopiedLayers):
    """Block expansion as in LLaMA Pro (arXiv 2401.02415): identity copies between the layers.

    A new block is a copy of the block below with zeroed attention output and FFN down projections,
    which preserves the function. Its optimizer state is fresh.

    Args:
        target_layers: number of layers of the result. Default: n + ⌈n/2⌉, or n + the number of
            positions.
        positions: source layers after which new blocks are inserted; repeat a layer for several
            blocks. Default: evenly spread.
        new_blocks_only: freeze all other blocks during training. Frozen weights do not freeze the
            function: in our benchmarks this forgets more and learns less, so it is off.
    """

    name: ClassVar[str] = "llama_pro"
    target_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] | None = None
    positions: tuple[Annotated[int, Field(ge=0, le=MAX_LAYERS)], ...] | None = None
    new_blocks_only: bool = False

    @property
    def is_exact(self) -> bool:
        return True

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        positions, target = self.positions, self.target_layers
        if positions is not None:
            if not positions or not all(0 <= position < layers for position in positions):
                raise refused(
                    "expansion.llama_pro.positions",
                    list(positions),
                    f"list at least one source layer from 0 to {layers - 1}; each gets a new "
                    "block after it",
                )
            if target not in (None, layers + len(positions)):
                raise refused(
                    "expansion.llama_pro.target_layers",
                    target,
                    f"it contradicts the {len(positions)} positions: {layers} + {len(positions)} "
                    f"= {layers + len(positions)}",
                )
            return tuple(sorted([*range(layers), *positions]))
        target = target or layers + math.ceil(layers / 2)
        _check_grows("llama_pro", target, layers, at_least=layers + 1)
        added = target - layers
        spread = [math.ceil((block + 1) * layers / added) - 1 for block in range(added)]
        return tuple(sorted([*range(layers), *spread]))


@options
class Layers(CopiedLayers):
    """Any layer table, such as the self-merges of mergekit's passthrough.

    Layers may be repeated, reordered and dropped. Function-preserving only if the layers that are
    no identities are the layers of the source, each once and in their order.

    Args:
        sources: source layer of each target layer.
        slices: ranges of source layers, joined in order: [start, end] or "start:end" without the
            end. Instead of `sources`.
        identity: target layers that start as identities. True: each copy of a layer after the
            first. Default: none.
    """

    name: ClassVar[str] = "layers"
    sources: tuple[_Layer, ...] | None = None
    slices: Annotated[tuple[tuple[int, int], ...], *_SLICES] | None = None
    identity: bool | tuple[_Layer, ...] | None = None

    @property
    def is_exact(self) -> bool:
        kept = self._kept(sources := self._table())
        return kept == list(range(max(sources, default=0) + 1))

    def identity_layers(self, sources: Sequence[int]) -> frozenset[int]:
        if isinstance(self.identity, bool | None):
            return repeated_layers(sources) if self.identity else frozenset()
        return frozenset(self.identity)

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        names = [key_name(f"expansion.layers.{name}") for name in ("sources", "slices")]
        if (self.sources is None) == (self.slices is None):
            reason = f"set exactly one of {names[0]} and {names[1]}"
            raise RequestError(Problem("expansion.layers", reason=reason))
        wrong: list[object] = [layer for layer in self.sources or () if not 0 <= layer < layers]
        ranges = _read_slices(self.slices or ())
        wrong += [f"{start}:{end}" for start, end in ranges if not 0 <= start < end <= layers]
        sources = self._table()
        if wrong or not sources:
            key, reason = "sources", f"list source layers from 0 to {layers - 1}"
            if self.slices is not None:
                key, reason = "slices", f"list ranges start:end with 0 ≤ start < end ≤ {layers}"
            raise refused(f"expansion.layers.{key}", wrong[0] if wrong else [], reason)
        for layer in self.identity_layers(sources):
            if not 0 <= layer < len(sources):
                reason = f"list target layers from 0 to {len(sources) - 1}, or set true"
                raise refused("expansion.layers.identity", layer, reason)
        return sources

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        layers = source.sizes.num_hidden_layers
        sources = self.layer_sources(layers)
        dropped = sorted(set(range(layers)) - set(self._kept(sources)))
        found = {
            "identity layers": sorted(self.identity_layers(sources)),
            "dropped source layers": dropped,
        }
        return tuple(f"{name}: {' '.join(map(str, n))}" for name, n in found.items() if n)

    def _table(self) -> tuple[int, ...]:
        """Return the source layers, unchecked; at most one more than a model may have."""
        ranges = (range(start, end) for start, end in _read_slices(self.slices or ()))
        return tuple(islice(chain(self.sources or (), *ranges), MAX_LAYERS + 1))

    def _kept(self, sources: Sequence[int]) -> list[int]:
        """Return the source layers of the target layers that are no identities."""
        identities = self.identity_layers(sources)
        return [source for target, source in enumerate(sources) if target not in identities]


def _axes_of_layers(
    sizes: Sequence[int],
    others: Sequence[int],
    layers: int,
    sources: Sequence[int],
    identities: frozenset[int],
) -> tuple[AxisFactor | None, ...]:
    """Return the factors of a tensor outside the layers; an axis may have a block per layer.

    The first copy of a layer that is no identity carries the gradient.

    Args:
        sizes: its shape in the source.
        others: its shape in a model with another number of layers.
        layers: number of source layers.
        sources: source layer of each target layer.
        identities: target layers that are identities.
    """
    if tuple(sizes) == tuple(others):
        return ()
    import torch

    kept = [None if target in identities else source for target, source in enumerate(sources)]
    is_first = [source is not None and source not in kept[:n] for n, source in enumerate(kept)]
    factors: list[AxisFactor | None] = []
    for size, other in zip(sizes, others, strict=True):
        if size == other:
            factors.append(None)
            continue
        index = torch.arange(size).view(layers, -1)[list(sources)].flatten()
        gradient = torch.tensor(is_first).double().repeat_interleave(size // layers)
        factors.append(AxisFactor(index, torch.ones_like(gradient), gradient))
    return tuple(factors)


def repeated_layers(sources: Sequence[int]) -> frozenset[int]:
    """Return the target layers that repeat the source of an earlier layer."""
    first = {source: target for target, source in reversed(list(enumerate(sources)))}
    return frozenset(target for target, source in enumerate(sources) if first[source] != target)


def _check_grows(method: str, target: int, layers: int, *, at_least: int) -> None:
    if target <= layers:
        raise refused(
            f"expansion.{method}.target_layers",
            target,
            f"the model already has {_layers_text(layers)}; set at least {at_least}",
        )


def _layers_text(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _join_numbers(values: Sequence[int]) -> str:
    texts = [str(value) for value in values]
    if len(texts) <= 6:
        return ", ".join(texts)
    return ", ".join([*texts[:3], "…", texts[-1]])
