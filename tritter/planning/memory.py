"""Memory requirements of training, computed from shapes.

Parameters, gradients and optimizer states are exact to the byte. Activations are an estimate for
stock transformers, which fuse attention unless its scores are capped (Gemma 2). The CUDA context
and fragmentation are not included.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritter.core.families import Model, StoredTensor
from tritter.errors import nearest, refused

# Lightning's precision → bytes of a parameter (also of its gradient and each unquantised moment),
# and bytes of an activation. Autocast keeps float32 parameters and computes with 16-bit copies.
_BYTES = {
    "32-true": (4, 4),
    "bf16-true": (2, 2),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
    "64-true": (8, 8),
}
_PRECISIONS = tuple(_BYTES)
_OPTIMIZERS = ("adamw", "adamw8bit")
_STEP_BYTES = 4  # torch has a float32 step counter per tensor
# bitsandbytes: 8-bit moments in blocks with one float32 scale each; small tensors use float32.
_BLOCK_SIZE = 256
_MIN_8BIT_TENSOR = 4096
_MOMENTS = 2
_FLOAT32 = 4
_ACTIVATION = "activation_function"  # GPT-2's config key
_STEPS = {"gelu_new": 3}  # intermediate tensors saved in addition to input and output
_PROCESS_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# cgroup v1 reports a huge number if there is no limit, rounded down to a page.
_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """Training options that determine memory requirements.

    Args:
        precision: precision of Lightning.
        optimizer: `adamw` or `adamw8bit` (bitsandbytes).
        is_attention_frozen: attention has no gradients and no optimizer state.
        batch_size: sequences per device and step.
        sequence_length: tokens per sequence.
        is_checkpointed: activation checkpointing per layer.

    Raises:
        RequestError: a value is not allowed.
    """

    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    is_attention_frozen: bool = False
    batch_size: int = 1
    sequence_length: int = 2048
    is_checkpointed: bool = False

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("precision", self.precision, _PRECISIONS),
            ("optimizer", self.optimizer, _OPTIMIZERS),
        ):
            if value not in allowed:
                reason = f"must be one of {', '.join(allowed)}"
                raise refused(key, value, reason, near=nearest(value, allowed))
        for key, count in (
            ("batch_size", self.batch_size),
            ("sequence_length", self.sequence_length),
        ):
            if count < 1:
                raise refused(key, count, "must be at least 1")

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on the device; activations are an estimate, all others are exact."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def states_bytes(self) -> int:
        """Parameters, gradients and optimizer states."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        return self.states_bytes + self.activations_bytes


def training_memory(
    model: Model, setup: TrainingSetup, *, kept_per_parameter: float = _MOMENTS
) -> TrainingMemory:
    """Compute the memory requirements of training a model.

    Args:
        model: the model.
        setup: the training options.
        kept_per_parameter: optimizer state per parameter, in numbers; 2 for Adam.
    """
    parameter_bytes, width = _BYTES[setup.precision]

    def trained(model: Model) -> list[StoredTensor]:
        is_frozen = setup.is_attention_frozen
        stored = model.layout("live")
        return [t for t in stored if not (is_frozen and t.parts[0].tensor.is_attention)]

    def optimizer_bytes(model: Model) -> int:
        return sum(
            _optimizer_bytes(math.prod(t.shape), setup, kept_per_parameter) for t in trained(model)
        )

    # The peak is at the start of the backward pass and includes logits and their gradient
    logits = model.sizes.vocab_size * (width + _FLOAT32)
    return TrainingMemory(
        parameters_bytes=parameter_bytes * model.num_parameters,
        gradients_bytes=parameter_bytes * _over_layers(model, lambda each: _count(trained(each))),
        optimizer_bytes=_over_layers(model, optimizer_bytes),
        activations_bytes=_saved_bytes(model, setup) + setup.num_tokens * logits,
    )


def states_bytes(
    model: Model,
    setup: TrainingSetup,
    *,
    trained: Iterable[tuple[int, int]],
    kept_per_parameter: float = _MOMENTS,
) -> int:
    """Return the bytes of parameters, gradients and optimizer states of a partly trained model.

    Args:
        model: the model.
        setup: the training options.
        trained: size and number of the trained tensors.
        kept_per_parameter: see `training_memory`.
    """
    parameter_bytes, _ = _BYTES[setup.precision]
    total = parameter_bytes * model.num_parameters
    for size, count in trained:
        optimizer_bytes = _optimizer_bytes(size, setup, kept_per_parameter)
        total += count * (parameter_bytes * size + optimizer_bytes)
    return total


def _over_layers(model: Model, measure: Callable[[Model], int]) -> int:
    """Return a sum over all layers, measuring each kind of layer only once.

    Args:
        model: the model.
        measure: an additive function of a model; it receives models of one or two layers.
    """
    kinds = model.layer_kinds
    layers = list(zip(kinds, model.ffn_sizes or [0] * len(kinds), strict=True))
    one = measure(model.with_layers([0]))
    each = {kind: measure(model.with_layers([0, layers.index(kind)])) - one for kind in set(layers)}
    return one + sum(each[kind] for kind in layers[1:])


def _count(stored: Sequence[StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in stored)


def _optimizer_bytes(size: int, setup: TrainingSetup, kept: float) -> int:
    if setup.optimizer == "adamw":
        parameter_bytes, _ = _BYTES[setup.precision]
        steps = _STEP_BYTES if kept == _MOMENTS else 0
        return round(kept * parameter_bytes * size) + steps
    if size < _MIN_8BIT_TENSOR:
        return round(kept * _FLOAT32 * size)
    return round(kept * (size + _FLOAT32 * -(-size // _BLOCK_SIZE)))


def _saved_bytes(model: Model, setup: TrainingSetup) -> int:
    """Return the bytes of saved activations, an estimate.

    Tensors saved for the backward pass:

    - matrix products: their input;
    - fused attention: q, k, v and the output; a fused qkv projection stays whole. With capped
      scores (Gemma 2) it is not fused, and [T, T] scores are saved;
    - SwiGLU: gate, activated gate, up and their product; an FFN without a gate: its
      pre-activation and activation (GPT-2's unfused activation needs three more tensors);
    - experts: also the input and the output of each chosen one;
    - RMSNorm: its input in float32 and the normalised value in the precision of parameters;
      LayerNorm: only its input;
    - the loss: log-probabilities in float32;
    - autocast: 16-bit copies of the matrices, except those of experts, which it leaves in float32.

    Dropout masks are not included.
    """
    family, sizes = model.family, model.sizes
    parameter_bytes, width = _BYTES[setup.precision]
    layers = [_layer_bytes(model, layer, setup) for layer in range(sizes.num_hidden_layers)]
    kept = sum(layers)
    if setup.is_checkpointed:
        kept = sizes.num_hidden_layers * sizes.hidden_size * parameter_bytes + max(layers)
    in_float32 = 0 if family.subtracts_mean else _FLOAT32
    capped = width if model.config.get("final_logit_softcapping") else 0
    end = sizes.hidden_size * (in_float32 + parameter_bytes + width)
    end += sizes.vocab_size * (_FLOAT32 + capped)
    return setup.num_tokens * (kept + end) + _autocast_bytes(model, setup)


def _layer_bytes(model: Model, layer: int, setup: TrainingSetup) -> int:
    """Return the saved bytes of one layer per token."""
    family, config, sizes = model.family, model.config, model.sizes
    parameter_bytes, width = _BYTES[setup.precision]
    for_each_unit = (4 if family.has_gate else 2) + _STEPS.get(str(config.get(_ACTIVATION)), 0)
    products = 2 * sizes.hidden_size + 2 * (sizes.query_size + sizes.key_value_size)
    if any(tensor.kind == "attention.qkv" for tensor in family.tensors):
        products += sizes.query_size + sizes.key_value_size
    experts = 0  # values of each chosen one, its input and output included
    if family.has_experts and model.layer_kinds[layer] == "sparse":
        of_each = for_each_unit * sizes.expert_size + 2 * sizes.hidden_size
        experts = sizes.experts_per_token * of_each
        if sizes.shared_expert_size:  # its output too, which has a gate
            products += for_each_unit * sizes.shared_expert_size + sizes.hidden_size
    else:
        own = model.ffn_sizes[layer] if model.ffn_sizes else sizes.intermediate_size
        products += for_each_unit * own
    of_scores = _FLOAT32  # of a head and token
    if config.get("model_type") == "gemma2":  # unfused: scores, probabilities in both types
        in_both = _FLOAT32 if width == _FLOAT32 else width + _FLOAT32
        is_capped = bool(config.get("attn_logit_softcapping"))
        of_scores = setup.sequence_length * (width * is_capped + in_both)
        products += 2 * (sizes.query_size - sizes.key_value_size)  # k and v for each query head
    values_bytes = products * width + experts * parameter_bytes  # autocast leaves experts alone
    per_head = {"attention.q_norm": sizes.query_size, "attention.k_norm": sizes.key_value_size}
    normed = sum(
        per_head.get(tensor.kind, sizes.hidden_size)
        for tensor in family.tensors
        if tensor.is_per_layer and tensor.is_norm
    )
    # A norm with an offset (Gemma) multiplies by its gain in float32
    norms_bytes = normed * (_FLOAT32 + (_FLOAT32 if family.norm_offset else parameter_bytes))
    if family.subtracts_mean:  # parallel norms share their saved input
        is_parallel = bool(config.get(family.parallel_residual_key, False))
        norms_bytes = normed * parameter_bytes // (2 if is_parallel else 1)
    return norms_bytes + values_bytes + sizes.num_attention_heads * of_scores


def _autocast_bytes(model: Model, setup: TrainingSetup) -> int:
    """Return the bytes of autocast's 16-bit copies of matrices."""
    if not setup.precision.endswith("-mixed"):
        return 0
    _, width = _BYTES[setup.precision]
    embeddings = ["embed_positions"]  # lookup tables without a matrix product
    if not model.is_tied:
        embeddings.append("embed")

    def is_uncopied(stored: StoredTensor) -> bool:
        tensor = stored.parts[0].tensor
        return tensor.name in embeddings or tensor.kind.startswith("experts.")

    def multiplied(model: Model) -> int:
        stored = model.layout("live")
        return _count([t for t in stored if len(t.shape) > 1 and not is_uncopied(t)])

    return width * _over_layers(model, multiplied)


def machine_memory(*, process_groups: Path = _PROCESS_GROUPS, groups: Path = _GROUPS) -> int | None:
    """Return the memory available to this process: that of the machine or of its cgroup.

    Args:
        process_groups: file that lists the cgroups of the process.
        groups: mount point of the cgroup file system.

    Returns:
        The smaller of the limits in bytes; None if the system reports none.
    """
    found = [*_group_limits(process_groups, groups)]
    with suppress(ValueError, OSError, AttributeError):  # not available on this system
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _group_limits(process_groups: Path, groups: Path) -> Iterator[int]:
    """Yield the limits of the process's cgroup and its parents, for cgroup v1 and v2.

    In a container the path may be that of the host, which does not exist inside. Then the root of
    the mount has the limit.
    """
    try:
        lines = process_groups.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # absent, or "max"
                limit = int((folder / name).read_text(encoding="utf-8"))
                if 0 < limit < _NO_LIMIT:
                    yield limit
            if folder == mount:
                break
