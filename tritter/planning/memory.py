"""The memory that training takes: what is counted from shapes, and what can only be estimated.

Parameters, gradients and optimiser states are exact, byte by byte; a test holds them against a
real AdamW. Activations are an estimate of what stock transformers save for the backward pass with
a fused attention kernel. What a GPU needs besides (CUDA's own context, fragmentation) is not in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tritter.errors import RequestError, did_you_mean
from tritter.families import Config, Family, LogicalTensor, StoredTensor, family_of, layout

# Lightning's name of a precision → bytes of a parameter, its gradient and each plain moment, and
# bytes of an activation. Autocast keeps parameters in float32 and computes with halved copies.
_BYTES = {
    "32-true": (4, 4),
    "bf16-true": (2, 2),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
    "64-true": (8, 8),
}
PRECISIONS = tuple(_BYTES)
OPTIMISERS = ("adamw", "adamw8bit")
_STEP_BYTES = 4  # torch keeps each tensor's step counter in float32
# bitsandbytes: 8-bit moments in blocks with one float32 scale each; small tensors stay in float32.
_BLOCK_SIZE = 256
_SMALLEST_8BIT_TENSOR = 4096
_MOMENTS = 2
_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """How a model is trained, as far as memory goes.

    Args:
        precision: Lightning's name.
        optimiser: `adamw` or `adamw8bit` (bitsandbytes).
        is_attention_frozen: attention has no gradients and no optimiser state.
        batch_size: sequences on the device at once.
        sequence_length: tokens of a sequence.
        is_checkpointed: activations of a layer are computed again in the backward pass.

    Raises:
        RequestError: names the value, and what is allowed.
    """

    precision: str = "bf16-mixed"
    optimiser: str = "adamw"
    is_attention_frozen: bool = False
    batch_size: int = 1
    sequence_length: int = 2048
    is_checkpointed: bool = False

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimiser, OPTIMISERS),
        ):
            if value not in allowed:
                raise RequestError(
                    f"{key} = {value}: allowed is one of {', '.join(allowed)}."
                    f"{did_you_mean(value, allowed)}"
                )
        for key, count in (
            ("batch_size", self.batch_size),
            ("sequence_length", self.sequence_length),
        ):
            if count < 1:
                raise RequestError(f"{key} = {count}: a whole number, at least 1.")

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on the device; the first three are exact, activations are an estimate."""

    parameters_bytes: int
    gradients_bytes: int
    optimiser_bytes: int
    activations_bytes: int

    @property
    def states_bytes(self) -> int:
        """Parameters, gradients and optimiser states."""
        return self.parameters_bytes + self.gradients_bytes + self.optimiser_bytes

    @property
    def total_bytes(self) -> int:
        return self.states_bytes + self.activations_bytes


def training_memory(config: Config, setup: TrainingSetup) -> TrainingMemory:
    """Compute the memory of training a model of this config.

    Raises:
        RequestError: unknown family.
    """
    family = family_of(config)
    stored = layout(family, config, "live")
    is_frozen = setup.is_attention_frozen
    trained = [t for t in stored if not (is_frozen and is_attention(t.parts[0].tensor))]
    parameter_bytes, _ = _BYTES[setup.precision]
    return TrainingMemory(
        parameters_bytes=parameter_bytes * _count(stored),
        gradients_bytes=parameter_bytes * _count(trained),
        optimiser_bytes=sum(_optimiser_bytes(math.prod(t.shape), setup) for t in trained),
        activations_bytes=_activations_bytes(config, setup),
    )


def is_attention(tensor: LogicalTensor) -> bool:
    """Return whether a tensor is a projection of attention, or a norm within it."""
    return ".attention." in tensor.name


def _count(stored: Sequence[StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in stored)


def _optimiser_bytes(size: int, setup: TrainingSetup) -> int:
    if setup.optimiser == "adamw":
        parameter_bytes, _ = _BYTES[setup.precision]
        return _MOMENTS * parameter_bytes * size + _STEP_BYTES
    if size < _SMALLEST_8BIT_TENSOR:
        return _MOMENTS * _FLOAT32 * size
    return _MOMENTS * (size + _FLOAT32 * -(-size // _BLOCK_SIZE))


def saved_bytes(config: Config, setup: TrainingSetup) -> int:
    """Return what the forward pass leaves for the backward pass, apart from parameters.

    A matrix product keeps its input, attention with a fused kernel q, k, v and its result, SwiGLU
    gate, activated gate, up and their product, a norm its input in float32 and the normed value in
    the precision of parameters, the loss its log-probabilities in float32. Autocast keeps halved
    copies of the matrices.
    """
    family = family_of(config)
    sizes = family.dimensions(config)
    parameter_bytes, width = _BYTES[setup.precision]
    layers = [
        _layer_bytes(family, config, layer, setup) for layer in range(sizes.num_hidden_layers)
    ]
    kept = sum(layers)
    if setup.is_checkpointed:
        kept = sizes.num_hidden_layers * sizes.hidden_size * parameter_bytes + max(layers)
    end = sizes.hidden_size * (_FLOAT32 + parameter_bytes + width) + sizes.vocab_size * _FLOAT32
    return setup.num_tokens * (kept + end) + _autocast_bytes(family, config, setup)


def _activations_bytes(config: Config, setup: TrainingSetup) -> int:
    """Estimate the peak, at the start of the backward pass: logits and their gradient besides."""
    sizes = family_of(config).dimensions(config)
    _, width = _BYTES[setup.precision]
    logits = sizes.vocab_size * (width + _FLOAT32)
    return saved_bytes(config, setup) + setup.num_tokens * logits


def _layer_bytes(family: Family, config: Config, layer: int, setup: TrainingSetup) -> int:
    """Return the bytes that one layer keeps per token."""
    sizes = family.dimensions(config)
    parameter_bytes, width = _BYTES[setup.precision]
    ffn_units = sizes.intermediate_size
    if family.is_sparse(config, layer):
        ffn_units = sizes.experts_per_token * sizes.expert_size + sizes.shared_expert_size
    normed = sum(
        {"q_norm": sizes.query_size, "k_norm": sizes.key_value_size}.get(part, sizes.hidden_size)
        for part in _norms_of_layer(family)
    )
    attention = 2 * (sizes.query_size + sizes.key_value_size)
    products = 2 * sizes.hidden_size + attention + 4 * ffn_units
    statistics = sizes.num_attention_heads * _FLOAT32
    return normed * (_FLOAT32 + parameter_bytes) + products * width + statistics


def _norms_of_layer(family: Family) -> list[str]:
    names = [t.name for t in family.tensors if "{layer}" in t.name and len(t.axes) == 1]
    return [name.rpartition(".")[2] for name in names if name.endswith("norm")]


def _autocast_bytes(family: Family, config: Config, setup: TrainingSetup) -> int:
    """Return the bytes of the halved copies of what autocast multiplies with."""
    if not setup.precision.endswith("-mixed"):
        return 0
    _, width = _BYTES[setup.precision]
    stored = layout(family, config, "live")
    is_tied = bool(config.get("tie_word_embeddings"))
    multiplied = [t for t in stored if len(t.shape) > 1 and (is_tied or not _is_embedding(t))]
    return width * _count(multiplied)


def _is_embedding(stored: StoredTensor) -> bool:
    return stored.parts[0].tensor.name == "embed"
