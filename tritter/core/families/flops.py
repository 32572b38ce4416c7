"""Model FLOPs of a forward and backward pass, counted from shapes.

Counted are matrix products and attention, with 2 FLOPs per multiply-add. Each token is multiplied
by every matrix once (of the experts, those it is routed to) and attends to itself and the tokens
before it, within the sliding window of its layer. Norms, rotary embeddings, softmax, embedding
lookups, the optimizer and recomputation are not counted.

A backward pass computes the gradient of each trained matrix, and the gradient of its input if a
trained parameter precedes it. With all parameters trained it costs twice the forward pass.

A low-rank adapter adds two matrices: at rank r it costs r · (in + out) multiply-adds for the tokens
that are routed to it; on an embedding r · out, since the lookup is free.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from tritter.core.families.logical import LogicalTensor
from tritter.core.families.model import Model

_Loss = Literal["head", "routers"]  # of a backward pass
_Pass = Literal["forward"] | _Loss
_PASSES = ("forward", "head", "routers")
_IsTrained = Callable[[LogicalTensor], bool]


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of a pass over a sequence of any length.

    Args:
        matrices: FLOPs per token.
        attention: sliding window (None for full attention) → FLOPs per token and key.
    """

    matrices: float = 0.0
    attention: Mapping[int | None, int] = field(default_factory=dict)

    def of(self, length: int) -> float:
        """Return the FLOPs of one sequence of `length` tokens."""
        keys = sum(flops * _num_keys(length, window) for window, flops in self.attention.items())
        return length * self.matrices + keys

    def of_all(self, lengths: Mapping[int, int]) -> float:
        """Return the FLOPs of several sequences: length → number of sequences."""
        return sum(number * self.of(length) for length, number in lengths.items())

    def per_token(self, length: int) -> float:
        """Return the mean FLOPs per token of a sequence of `length` tokens."""
        return self.of(length) / length

    def __add__(self, other: "Flops") -> "Flops":
        windows = {**self.attention, **other.attention}
        return Flops(
            self.matrices + other.matrices,
            {w: self.attention.get(w, 0) + other.attention.get(w, 0) for w in windows},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A low-rank adapter of a matrix: B A x.

    Args:
        rank: of A and B.
        trains_down: A is trained.
        trains_up: B is trained.
        share: fraction of the tokens that it processes.
        has_down: False if A x is already counted at another matrix with the same input.
    """

    rank: int
    trains_down: bool
    trains_up: bool
    share: float = 1
    has_down: bool = True


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters added to a model's own tensors.

    Args:
        low_rank: logical name of a matrix, `embed` or `head` (tied or not) → its adapters.
        gating: decoder layer → number of rows of its gate, a matrix [rows, hidden], and whether the
            gate is trained.
    """

    low_rank: Mapping[str, Sequence[LowRank]] = field(default_factory=dict)
    gating: Mapping[int, tuple[int, bool]] = field(default_factory=dict)


def _num_keys(length: int, window: int | None = None) -> int:
    """Return the total number of keys that the tokens of a sequence attend to.

    The token at position t (from 0) attends to t + 1 keys, at most `window`.
    """
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def _everything(tensor: LogicalTensor) -> bool:
    """Return True: every tensor is trained."""
    return True


def forward_flops(model: Model, *, adapters: Adapters | None = None) -> Flops:
    """Return the FLOPs of a forward pass, output head included.

    Args:
        model: the model.
        adapters: of the model.
    """
    return _Walk(model, _everything, None, adapters).flops("forward")


def training_flops(
    model: Model,
    *,
    is_trained: _IsTrained = _everything,
    loss_at: _Loss = "head",
    routed_to: Collection[int] | None = None,
    adapters: Adapters | None = None,
) -> Flops:
    """Return the FLOPs of a forward and a backward pass.

    Args:
        model: the model.
        is_trained: returns True for a trained tensor.
        loss_at: `head` for a loss of the logits, or `routers` for a loss of the router outputs,
            whose gradient skips everything above the last router.
        routed_to: the experts that share the tokens evenly. Default: all.
        adapters: of the model.
    """
    walk = _Walk(model, is_trained, routed_to, adapters)
    return walk.flops("forward") + walk.flops(loss_at)


class _Walk:
    """The matrix products of a model from the embedding up, and the gradients that they need."""

    def __init__(
        self,
        model: Model,
        is_trained: _IsTrained,
        routed_to: Collection[int] | None,
        adapters: Adapters | None,
    ) -> None:
        family = model.family
        is_parallel = bool(model.config.get(family.parallel_residual_key, False))
        self._sizes = model.sizes
        self._experts = range(self._sizes.num_experts) if routed_to is None else routed_to
        self._shapes = model.shapes
        tensors = model.tensors
        self._trained = {tensor.name for tensor in tensors if is_trained(tensor)}
        kinds = model.layer_kinds
        sparse = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
        self._last_sparse = f"layers.{sparse[-1]}." if sparse else ""
        self._is_below_router = bool(sparse)
        # Pass → FLOPs per token outside routed experts, and of all routed experts together
        self._whole: dict[str, float] = dict.fromkeys(_PASSES, 0)
        self._routed: dict[str, float] = dict.fromkeys(_PASSES, 0)
        # Pass → sliding window → FLOPs per token and key
        self._of_keys: dict[str, Counter[int | None]] = {name: Counter() for name in _PASSES}
        self._adapters = adapters or Adapters()
        self._gates = False  # whether the gates of adapters need a gradient
        vocabulary, hidden = self._shapes["embed"]
        # Whether the residual stream needs a gradient
        stream = self._low_rank("embed", hidden, vocabulary, read=False, is_lookup=True)
        stream |= not self._trained.isdisjoint(("embed", "embed_positions"))
        for layer in range(len(kinds)):
            window = model.attention_window(layer)
            self._gates = self._gating(layer, hidden, stream)
            if not family.has_table:
                own = [tensor for tensor in tensors if tensor.layer == layer]
                stream = self._discovered(f"layers.{layer}.", own, stream, window)
                continue
            added = self._attention(f"layers.{layer}.", stream, window)
            stream = added | self._ffn(f"layers.{layer}.", stream if is_parallel else added)
        self._gates = False
        read = self._normed(stream, "final_norm")
        for tensor in tensors if not family.has_table else ():  # but lookups and the head
            is_product = tensor.kind != "head" and not tensor.kind.startswith("embed")
            if tensor.layer is None and is_product and len(self._shapes[tensor.name]) == 2:
                self._matrix(tensor.name, read)
        self._matrix("head" if "head" in self._shapes else "embed", read)
        self._low_rank("head", vocabulary, hidden, read)

    def flops(self, name: _Pass) -> Flops:
        """Return the FLOPs of a pass: `forward`, or the backward pass of a loss."""
        share = self._sizes.experts_per_token * self._routed[name] / max(1, len(self._experts))
        return Flops(self._whole[name] + share, dict(self._of_keys[name]))

    def _attention(self, layer: str, stream: bool, window: int | None) -> bool:
        """Add the products of a layer's attention; return True if the stream needs one."""
        read, part = self._normed(stream, layer + "attention_norm"), layer + "attention."
        names = ("qkv",) if part + "qkv" in self._shapes else ("q", "k", "v")
        found = [
            self._matrix(part + name, read, part + name + "_bias", part + name + "_norm")
            for name in names
        ]
        query, key, value = found * (3 // len(found))
        weights = query or key
        self._add_keys(window, query + key + weights + value)
        added = self._matrix(
            part + "o", weights or value, part + "o_bias", layer + "attention_output_norm"
        )
        return stream or added

    def _discovered(
        self, layer: str, tensors: Sequence[LogicalTensor], stream: bool, window: int | None
    ) -> bool:
        """Add the products of a layer without a table; return value as in `_attention`.

        A matrix needs the gradient of its input if the layer's input needs one, or if a norm or
        a tensor before it in the file is trained. The scans of recurrent layers are not counted.
        """
        trained = [tensor for tensor in tensors if tensor.name in self._trained]
        read = stream or any(tensor.kind.startswith("norm.") for tensor in trained)
        self._is_below_router &= layer != self._last_sparse
        for tensor in tensors:
            shape = self._shapes[tensor.name]
            if tensor.kind.startswith("experts."):
                is_used = tensor.expert is None or tensor.expert in self._experts
                count = len(self._experts) if tensor.expert is None else is_used
                size = prod(shape) // (shape[0] if tensor.expert is None else 1)
                self._add(size * count, read + (tensor in trained), is_routed=True)
            elif len(shape) == 2:
                self._matrix(tensor.name, read)
            else:  # convolutions; a vector costs next to nothing
                self._add(prod(shape) * (len(shape) > 2), read + (tensor in trained))
            read |= tensor in trained
        if any(tensor.is_attention for tensor in tensors):
            self._add_keys(window, 4 * read)
        return stream or bool(trained)

    def _ffn(self, layer: str, stream: bool) -> bool:
        """Add the products of a layer's FFN or experts; return value as in `_attention`."""
        read = self._normed(stream, layer + "ffn_norm")
        if layer + "router" not in self._shapes:
            added = self._dense(layer + "ffn", read, layer + "ffn_output_norm")
            return stream or added
        added = self._matrix(layer + "router", read)
        self._is_below_router &= layer != self._last_sparse
        for expert in self._experts:
            added |= self._dense(f"{layer}experts.{expert}", read, is_routed=True)
        if layer + "shared_expert.gate" in self._shapes:
            added |= self._dense(layer + "shared_expert", read)
            added |= self._matrix(layer + "shared_expert_gate", read)
        return stream or added

    def _dense(self, name: str, read: bool, *after: str, is_routed: bool = False) -> bool:
        gate, up, down = (f"{name}.{part}" for part in ("gate", "up", "down"))
        inner = self._matrix(up, read, up + "_bias", is_routed=is_routed)
        if gate in self._shapes:
            inner |= self._matrix(gate, read, gate + "_bias", is_routed=is_routed)
        return self._matrix(down, inner, down + "_bias", *after, is_routed=is_routed)

    def _matrix(self, name: str, read: bool, *after: str, is_routed: bool = False) -> bool:
        """Add the product with a matrix.

        Args:
            read: its input needs a gradient.
            after: names of the vectors that are applied to its output.

        Returns:
            True if its output needs a gradient.
        """
        rows, columns = self._shapes[name]
        self._add(rows * columns, read + (name in self._trained), is_routed=is_routed)
        added = name not in ("head", "embed") and self._low_rank(name, rows, columns, read)
        return self._needs(read or added, name, *after)

    def _gating(self, layer: int, hidden: int, stream: bool) -> bool:
        """Add the product of a layer's gate; return True if the gate needs a gradient."""
        if layer not in self._adapters.gating:
            return False
        rows, is_trained = self._adapters.gating[layer]
        self._add(rows * hidden, stream + is_trained)
        return stream or is_trained

    def _low_rank(
        self, name: str, rows: int, columns: int, read: bool, *, is_lookup: bool = False
    ) -> bool:
        """Add the products of the adapters of a matrix [rows, columns].

        Returns:
            True if their output needs a gradient, even if only for their gates.
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
        """Add a matrix product.

        Args:
            size: multiply-adds per token.
            backward: number of products in the backward pass.
            is_routed: it belongs to a routed expert.
            share: fraction of the tokens that it processes.
        """
        total = self._routed if is_routed else self._whole
        for name, times in self._passes(1, backward):
            total[name] += 2 * size * times * share

    def _add_keys(self, window: int | None, backward: int) -> None:
        """Add the products of queries and keys, and of weights and values."""
        for name, times in self._passes(2, backward):
            self._of_keys[name][window] += 2 * self._sizes.query_size * times

    def _passes(self, forward: int, backward: int) -> Iterable[tuple[str, int]]:
        """Return pass → number of products; the loss of routers skips what is above the last."""
        return zip(_PASSES, (forward, backward, backward * self._is_below_router), strict=True)

    def _normed(self, stream: bool, norm: str) -> bool:
        return self._needs(stream, norm, norm + "_bias")

    def _needs(self, stream: bool, *names: str) -> bool:
        return stream or not self._trained.isdisjoint(names)
