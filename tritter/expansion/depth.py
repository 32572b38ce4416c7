"""Depth: layers copied into new places.

A depth expansion is a rule of `tritter.expansion.layers` and a choice: what further copies of a
layer begin as. As they are, they change the function; as identities, which write zeros to the
residual stream, they keep it.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tritter.errors import RequestError
from tritter.expansion.layers import (
    block_insertion_sources,
    depth_upscale_sources,
    interpolation_sources,
    repeated_layers,
    stack_sources,
)
from tritter.families import Config, Family
from tritter.limits import MAX_LAYERS
from tritter.options import options

if TYPE_CHECKING:
    from tritter.parameter_map import ParameterMap


class CopiedLayers(ABC):
    """A depth method: its rule says where layers come from, its exactness what copies write."""

    __slots__ = ()
    expansion_type: ClassVar[str] = "depth"
    new_blocks_only: bool = False

    @abstractmethod
    def layer_sources(self, layers: int) -> tuple[int, ...]:
        """Return the source layer of every target layer.

        Raises:
            RequestError: the targets cannot be had from so many layers.
        """

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """True when copies begin as identities, whose optimizer state starts anew."""

    def target_config(self, family: Family, config: Config) -> Config:
        if family.numbered_if and config.get(family.numbered_if):
            raise RequestError(
                f"expansion={getattr(self, 'name', 'depth')}: config.json says "
                f"{family.numbered_if} = true, so that each layer of this {family.model_type} "
                "divides its attention scores by its own number, and layers at other places would "
                "compute something else; grow its width."
            )
        sources = self.layer_sources(family.dimensions(config).num_hidden_layers)
        return family.with_layers(config, sources)

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> "ParameterMap":
        from tritter.expansion.layer_map import layer_map  # a plan needs no maps, nor torch

        sources = self.layer_sources(family.dimensions(source).num_hidden_layers)
        identities = repeated_layers(sources) if self.is_exact else frozenset()
        return layer_map(family, target, sources, identities=identities, seed=seed)

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
        return depth_upscale_sources(
            layers, target_layers=self.target_layers, drop_layers=self.drop_layers
        )


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
        return stack_sources(layers, target_layers=self.target_layers, is_partial=self.partial)

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        layers = family.dimensions(source).num_hidden_layers
        rest = family.dimensions(target).num_hidden_layers % layers
        return (f"the last copy is partial: {rest} of {layers} layers",) if rest else ()


@options
class Interpolate(CopiedLayers):
    """Copies between the layers, each directly behind its own (interpolation, arXiv 2405.15319).

    Not function-preserving unless `identity_init`.

    Args:
        target_layers: any count above n; copies are spread as evenly as can be.
            Default: 1.5 n, rounded up.
        identity_init: zero what the copies write, so that the function is preserved.
    """

    name: ClassVar[str] = "interpolate"
    target_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] | None = None
    identity_init: bool = False

    @property
    def is_exact(self) -> bool:
        return self.identity_init

    def layer_sources(self, layers: int) -> tuple[int, ...]:
        return interpolation_sources(layers, target_layers=self.target_layers)

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
        return block_insertion_sources(
            layers, target_layers=self.target_layers, positions=self.positions
        )
