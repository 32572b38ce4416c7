"""Depth: layers copied into new places.

A depth expansion is a rule and a choice: what further copies of a
layer begin as. As they are, they change the function; as identities, which write zeros to the
residual stream, they keep it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from tritter.core.families import Config, Family, Port, logical_name
from tritter.core.parameter_map import ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused
from tritter.limits import MAX_LAYERS
from tritter.options import options
from tritter.seeds import derived_seed

_SILENT_NOISE = 0.01


class CopiedLayers(ABC):
    """A depth method: its rule says where layers come from, its exactness what copies write."""

    __slots__ = ()
    expansion_type: ClassVar[str] = "depth"
    new_blocks_only: bool = False

    @abstractmethod
    def layer_sources(self, layers: int) -> tuple[int, ...]:
        """Return the source layer of every target layer.

        The first occurrence of a layer is the layer itself; every further one is a copy.

        Raises:
            RequestError: the targets cannot be had from so many layers; names what would work.
        """

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """True when copies begin as identities, whose optimizer state starts anew."""

    def target_config(self, family: Family, config: Config) -> Config:
        if family.layer_index_key and config.get(family.layer_index_key):
            reason = (
                f"config.json says {family.layer_index_key} = true, so that each layer of this "
                f"{family.model_type} divides its attention scores by its own number, and layers "
                "at other places would compute something else; grow its width"
            )
            method = getattr(self, "name", "depth")
            raise RequestError(Problem(f"expansion.{method}", reason=reason))
        sources = self.layer_sources(family.dimensions(config).num_hidden_layers)
        return family.with_layers(config, sources)

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        """Return the map that gives each target layer the tensors of its source layer."""
        sources = self.layer_sources(family.dimensions(source).num_hidden_layers)
        # What these write to the residual stream becomes zero; their state starts anew
        identities = repeated_layers(sources) if self.is_exact else frozenset()
        tensors: dict[str, TensorMap] = {}
        for tensor in family.logical_tensors(target):
            if tensor.layer is None:
                tensors[tensor.name] = TensorMap(source=tensor.name)
                continue
            is_identity = tensor.layer in identities
            is_zeroed = is_identity and family.branch_output(tensor)
            output = tensor.axes[0]
            # A row that writes nothing to a gain of zero would stay so: rows that an expansion
            # before this one left zero are among what is copied. Silent as the norm is, noise
            # costs nothing.
            is_silenced = output.port is Port.WRITE and output.space.is_branch_output
            layer = sources[tensor.layer]
            tensors[tensor.name] = TensorMap(
                source=logical_name(tensor.kind, layer=layer, expert=tensor.expert),
                is_zeroed=is_zeroed,
                offset=family.norm_offset if is_zeroed and tensor.is_norm else 0.0,
                state="fresh" if is_identity else "carry",
                is_copy=is_identity and is_silenced,
                noise=_SILENT_NOISE if is_identity and is_silenced else 0.0,
                noise_seed=derived_seed(seed, "noise", tensor.name) if is_silenced else 0,
            )
        return ParameterMap(tensors=tensors, layer_sources=sources)

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        return ()


@options
class Dus(CopiedLayers):
    """Depth up-scaling as in SOLAR (arXiv 2312.15166): two overlapping copies of the stack.

    From n layers to t: copy 1 without its last m, then copy 2 without its first m layers, with
    m = n − t/2. Not function-preserving unless `identity_init`.

    Args:
        target_layers: t, even, n < t ≤ 2n. Default: the even count nearest to 1.5 n.
        drop_layers: m. Default: what t asks for; alone it sets t = 2 (n − m).
        identity_init: zero what the copies write, so that the function is preserved.
    """

    name: ClassVar[str] = "dus"
    target_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] | None = None
    drop_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] | None = None
    identity_init: bool = False

    @property
    def is_exact(self) -> bool:
        return self.identity_init

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        asked, asked_drop = self.target_layers, self.drop_layers
        allowed = range(layers + 1 + (layers + 1) % 2, 2 * layers + 1, 2)
        if asked is not None:
            target = asked
        elif asked_drop is not None:
            target = 2 * (layers - asked_drop)
        else:
            target = 2 * round(1.5 * layers / 2)
            target = target if target in allowed else 2 * layers
        if target not in allowed:
            closest = min(allowed, key=lambda count: (abs(count - target), count))
            by_drop = asked is None and asked_drop is not None
            key, value = ("drop_layers", asked_drop) if by_drop else ("target_layers", target)
            raise refused(
                f"expansion.dus.{key}",
                value,
                f"from {layers} layers dus reaches the even counts {_listed(allowed)} "
                f"(dropping {_listed([layers - t // 2 for t in allowed])} layers); "
                f"nearest: {layers - closest // 2 if by_drop else closest}",
            )
        drop = layers - target // 2
        if asked_drop not in (None, drop):
            raise refused(
                "expansion.dus.drop_layers",
                asked_drop,
                f"it contradicts {key_name('expansion.dus.target_layers')} = {target}: from "
                f"{layers} layers, {target} need {drop}, and {asked_drop} gives "
                f"{2 * (layers - asked_drop)}",
            )
        return (*range(layers - drop), *range(drop, layers))


@options
class Stack(CopiedLayers):
    """Depthwise stacking (G_stack of arXiv 2405.15319): whole copies of the stack.

    Layer i of the result is layer i mod n. Not function-preserving unless `identity_init`.

    Args:
        target_layers: a multiple of n. Default: 2n.
        partial: allow any count above n; the last copy then holds its first layers only.
        identity_init: zero what the copies write, so that the function is preserved.
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
                f"stack takes whole copies of the {layers} layers; nearest: "
                f"{' or '.join(map(str, multiples))}. With {key_name('expansion.stack.partial')} "
                f"the last copy may be cut, here after its first {_layers_text(rest)}",
            )
        return tuple(layer % layers for layer in range(target))

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        layers = family.dimensions(source).num_hidden_layers
        rest = family.dimensions(target).num_hidden_layers % layers
        return (f"the last copy is partial: {rest} of {layers} layers",) if rest else ()


@options
class Interpolate(CopiedLayers):
    """Copies between the layers, each directly behind its own (interpolation, arXiv 2405.15319).

    Every layer stands ⌊t/n⌋ times in a row; what remains of t gives single layers one copy more,
    spread evenly over the gaps between the layers, so that below 2n no copy follows the last one.
    Not function-preserving unless `identity_init`.

    Args:
        target_layers: t, any count above n. Default: 1.5 n, rounded up.
        identity_init: zero what the copies write, so that the function is preserved.
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
        once_more = {(2 * copy + 1) * (layers - 1) // (2 * rest) for copy in range(rest)}
        return tuple(n for n in range(layers) for _ in range(times + (n in once_more)))

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        layers = family.dimensions(source).num_hidden_layers
        if self.target_layers is not None or layers % 2 == 0:
            return ()
        rounded = family.dimensions(target).num_hidden_layers
        return (f"1.5 times {layers} layers are {1.5 * layers:g}, rounded up to {rounded}",)


@options
class LlamaPro(CopiedLayers):
    """Block expansion as in LLaMA Pro (arXiv 2401.02415): identity copies between the layers.

    A new block is a copy of the block below with attention output and FFN down projection zero,
    so the function is preserved; its optimizer state starts anew.

    Args:
        target_layers: layers afterwards. Default: n + ⌈n/2⌉, or n + the number of positions.
        positions: source layers that a new block follows (a layer may stand more than once).
            Default: evenly spread.
        new_blocks_only: train the new blocks alone. A frozen weight is not a frozen function:
            at our scale this forgets more and learns less, so the default trains everything.
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
                    f"name at least one source layer from 0 to {layers - 1} that a new "
                    "block is to follow",
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


def repeated_layers(sources: Sequence[int]) -> frozenset[int]:
    """Return the target layers that are further copies of a layer that stands already."""
    first = {source: target for target, source in reversed(list(enumerate(sources)))}
    return frozenset(target for target, source in enumerate(sources) if first[source] != target)


def _check_grows(method: str, target: int, layers: int, *, at_least: int) -> None:
    if target <= layers:
        raise refused(
            f"expansion.{method}.target_layers",
            target,
            f"the model has {_layers_text(layers)} already; ask for at least {at_least}",
        )


def _layers_text(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _listed(values: Sequence[int]) -> str:
    texts = [str(value) for value in values]
    if len(texts) <= 6:
        return ", ".join(texts)
    return ", ".join([*texts[:3], "…", texts[-1]])
