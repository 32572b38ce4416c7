"""What a pass through a model costs in model FLOPs, counted from shapes.

Counted are matrix products and attention, 2 FLOPs a multiply-add: each token meets every matrix
once (of the experts, those that it is routed to), and attends to itself and to the tokens before
it, in a window where its layer has one. Norms, rotary positions, softmax, the lookup of embeddings
and the optimizer are left out, and so is whatever a kernel computes twice or throws away.

A backward pass computes a gradient of the weights for a matrix that is trained, and one of its
input where something that is trained lies below it. With everything trained that is twice the
forward pass.

Low-rank adapters stand beside matrices, as two of their own: of rank r they cost r · (in + out)
multiply-adds for the tokens that come to them, on an embedding r · out, the lookup being free.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tritter.core.families.dimensions import Config
from tritter.core.families.logical import LogicalTensor
from tritter.core.families.tables import family_of

Loss = Literal["head", "routers"]
IsTrained = Callable[[LogicalTensor], bool]


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of a pass over a sequence, for any length of it.

    Args:
        matrices: of each token.
        attention: of each token and key, by the window that the keys lie in; None: there is none.
    """

    matrices: float = 0.0
    attention: Mapping[int | None, int] = field(default_factory=dict)

    def of(self, length: int) -> float:
        """Return the FLOPs of one sequence of so many tokens."""
        keys = sum(flops * num_keys(length, window) for window, flops in self.attention.items())
        return length * self.matrices + keys

    def of_all(self, lengths: Mapping[int, int]) -> float:
        """Return the FLOPs of sequences, by length how many."""
        return sum(number * self.of(length) for length, number in lengths.items())

    def per_token(self, length: int) -> float:
        """Return the mean over the tokens of a sequence of so many."""
        return self.of(length) / length

    def __add__(self, other: "Flops") -> "Flops":
        windows = {**self.attention, **other.attention}
        return Flops(
            self.matrices + other.matrices,
            {w: self.attention.get(w, 0) + other.attention.get(w, 0) for w in windows},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """An adapter beside a matrix, of a rank: B A x.

    Args:
        trains_down, trains_up: A is trained, B is.
        share: of the tokens, those that come to it.
        has_down: False where A x is counted at another matrix, which B x stands below.
    """

    rank: int
    trains_down: bool
    trains_up: bool
    share: float = 1
    has_down: bool = True


@dataclass(frozen=True, slots=True)
class Gating:
    """What says in a decoder layer how much each adapter counts: a matrix [size, hidden]."""

    size: int
    is_trained: bool


@dataclass(frozen=True, slots=True)
class Adapters:
    """What stands beside a model's own tensors.

    Args:
        low_rank: by the logical name of a matrix, `embed`, or `head` whether tied or not.
        gating: by decoder layer, where gates are learned.
    """

    low_rank: Mapping[str, Sequence[LowRank]] = field(default_factory=dict)
    gating: Mapping[int, Gating] = field(default_factory=dict)


NO_ADAPTERS = Adapters()


def num_keys(length: int, window: int | None = None) -> int:
    """Return how many keys the tokens of a sequence attend to, all together.

    The token at place t, from 0, attends to t + 1 keys, or to `window` of them.
    """
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def everything(tensor: LogicalTensor) -> bool:
    """Return that a tensor is trained, as all are."""
    return True


def forward_flops(
    config: Config,
    *,
    routed_to: Collection[int] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:
    """Count a forward pass, output head included.

    Args:
        routed_to: the experts that share the tokens evenly. Default: all.
        adapters: what stands beside the model's own tensors.
    """
    return _Walk(config, everything, routed_to, adapters).sum(lambda product: product.forward)


def backward_flops(
    config: Config,
    *,
    is_trained: IsTrained = everything,
    loss_at: Loss = "head",
    routed_to: Collection[int] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:
    """Count the backward pass of a loss.

    Args:
        is_trained: says so of a tensor.
        loss_at: `head`, a loss of the logits; or `routers`, one of what routers say, whose
            gradient passes through nothing that stands above the last of them.
        routed_to, adapters: as for `forward_flops`.
    """
    walk = _Walk(config, is_trained, routed_to, adapters)
    if loss_at == "head":
        return walk.sum(lambda product: product.backward)
    return walk.sum(lambda product: product.backward * product.is_below_router)


def training_flops(
    config: Config,
    *,
    is_trained: IsTrained = everything,
    routed_to: Collection[int] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:
    """Count a forward and a backward pass; arguments as for `backward_flops`."""
    forward = forward_flops(config, routed_to=routed_to, adapters=adapters)
    return forward + backward_flops(
        config, is_trained=is_trained, routed_to=routed_to, adapters=adapters
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """Products of the forward pass that are alike, and those that their gradients take.

    Args:
        size: multiply-adds of one, for each token; in attention for each token and key.
        forward: how many of them the forward pass has.
        backward: how many the backward pass has.
        is_below_router: a router's decision depends on it.
        is_routed: each token meets a share of it.
        share: of the tokens, those that meet it.
        is_attention: its size is that of a key.
        window: that the keys lie in.
    """

    size: int
    forward: int = 1
    backward: int
    is_below_router: bool
    is_routed: bool = False
    share: float = 1
    is_attention: bool = False
    window: int | None = None


class _Walk:
    """The products of a model from the embedding up, with what needs a gradient on the way."""

    def __init__(
        self,
        config: Config,
        is_trained: IsTrained,
        routed_to: Collection[int] | None,
        adapters: Adapters,
    ) -> None:
        family = family_of(config)
        is_parallel = bool(config.get(family.parallel_if, False))
        self._sizes = family.dimensions(config)
        self._experts = range(self._sizes.num_experts) if routed_to is None else routed_to
        self._held: dict[str, tuple[int, ...]] = {}  # name → shape
        self._trained: set[str] = set()
        for tensor in family.logical_tensors(config):
            self._held[tensor.name] = family.shape(tensor, config)
            if is_trained(tensor):
                self._trained.add(tensor.name)
        kinds = family.layer_kinds(config)
        sparse = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        self._last_sparse = f"layers.{sparse[-1]}." if sparse else ""
        self._is_below_router = bool(sparse)
        self._products: list[_Product] = []
        self._adapters = adapters
        self._gates = False  # whether the gates of adapters need a gradient
        vocabulary, hidden = self._held["embed"]
        # Whether the residual stream needs a gradient
        stream = self._low_rank("embed", hidden, vocabulary, read=False, is_lookup=True)
        stream |= not self._trained.isdisjoint(("embed", "embed_positions"))
        for layer in range(len(kinds)):
            window = family.attention_window(config, layer)
            self._gates = self._gating(layer, hidden, stream)
            added = self._attention(f"layers.{layer}.", stream, window)
            stream = added | self._ffn(f"layers.{layer}.", stream if is_parallel else added)
        self._gates = False
        read = self._normed(stream, "final_norm")
        self._matrix("head" if "head" in self._held else "embed", read)
        self._low_rank("head", vocabulary, hidden, read)

    def sum(self, times: Callable[[_Product], int]) -> Flops:
        """Add the products up, each taken so many times."""
        whole: float = 0
        routed: float = 0
        attention: dict[int | None, int] = {}
        for product in self._products:
            flops = 2 * product.size * times(product)
            if product.is_attention:
                attention[product.window] = attention.get(product.window, 0) + flops
            elif product.is_routed:
                routed += flops * product.share
            else:
                whole += flops * product.share
        share = self._sizes.experts_per_token * routed / max(1, len(self._experts))
        return Flops(whole + share, attention)

    def _attention(self, layer: str, stream: bool, window: int | None) -> bool:
        """Add the products of a layer's attention; return whether the stream needs a gradient."""
        read, part = self._normed(stream, layer + "attention_norm"), layer + "attention."
        names = ("qkv",) if part + "qkv" in self._held else ("q", "k", "v")
        found = [
            self._matrix(part + name, read, part + name + "_bias", part + name + "_norm")
            for name in names
        ]
        query, key, value = found * (3 // len(found))
        weights = query or key
        self._products.append(
            _Product(
                size=self._sizes.query_size,
                forward=2,  # queries and keys, weights and values
                backward=query + key + weights + value,
                is_below_router=self._is_below_router,
                is_attention=True,
                window=window,
            )
        )
        added = self._matrix(
            part + "o", weights or value, part + "o_bias", layer + "attention_output_norm"
        )
        return stream or added

    def _ffn(self, layer: str, stream: bool) -> bool:
        """Add the products of a layer's FFN or experts; return as `_attention` does."""
        read = self._normed(stream, layer + "ffn_norm")
        if layer + "router" not in self._held:
            added = self._dense(layer + "ffn", read, layer + "ffn_output_norm")
            return stream or added
        added = self._matrix(layer + "router", read)
        self._is_below_router &= layer != self._last_sparse
        for expert in self._experts:
            added |= self._dense(f"{layer}experts.{expert}", read, is_routed=True)
        if layer + "shared_expert.gate" in self._held:
            added |= self._dense(layer + "shared_expert", read)
            added |= self._matrix(layer + "shared_expert_gate", read)
        return stream or added

    def _dense(self, name: str, read: bool, *behind: str, is_routed: bool = False) -> bool:
        gate, up, down = (f"{name}.{part}" for part in ("gate", "up", "down"))
        inner = self._matrix(up, read, up + "_bias", is_routed=is_routed)
        if gate in self._held:
            inner |= self._matrix(gate, read, gate + "_bias", is_routed=is_routed)
        return self._matrix(down, inner, down + "_bias", *behind, is_routed=is_routed)

    def _matrix(self, name: str, read: bool, *behind: str, is_routed: bool = False) -> bool:
        """Add the product with a matrix.

        Args:
            read: its input needs a gradient.
            behind: vectors that its output meets.

        Returns:
            Whether what comes out needs a gradient.
        """
        rows, columns = self._held[name]
        self._add(rows * columns, read + (name in self._trained), is_routed=is_routed)
        added = name not in ("head", "embed") and self._low_rank(name, rows, columns, read)
        return self._needs(read or added, name, *behind)

    def _gating(self, layer: int, hidden: int, stream: bool) -> bool:
        """Add the product that gates come from; return whether these need a gradient."""
        own = self._adapters.gating.get(layer)
        if own is None:
            return False
        self._add(own.size * hidden, stream + own.is_trained)
        return stream or own.is_trained

    def _low_rank(
        self, name: str, rows: int, columns: int, read: bool, *, is_lookup: bool = False
    ) -> bool:
        """Add the products of the adapters beside a matrix [rows, columns].

        Returns:
            Whether what they add needs a gradient, be it only for their gates.
        """
        needs = False
        for each in self._adapters.low_rank.get(name, ()):
            inner = read or each.trains_down
            if each.has_down and not is_lookup:
                self._add(each.rank * columns, read + each.trains_down, share=each.share)
            backward = (inner or self._gates) + each.trains_up
            self._add(rows * each.rank, backward, share=each.share)
            needs |= inner or self._gates or each.trains_up
        return needs

    def _add(self, size: int, backward: int, *, is_routed: bool = False, share: float = 1) -> None:
        self._products.append(
            _Product(
                size=size,
                backward=backward,
                is_below_router=self._is_below_router,
                is_routed=is_routed,
                share=share,
            )
        )

    def _normed(self, stream: bool, norm: str) -> bool:
        return self._needs(stream, norm, norm + "_bias")

    def _needs(self, stream: bool, *names: str) -> bool:
        return stream or not self._trained.isdisjoint(names)
