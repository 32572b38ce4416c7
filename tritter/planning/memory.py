"""The memory that training takes: what is counted from shapes, and what can only be estimated.

Parameters, gradients and optimizer states are exact, byte by byte; a test holds them against a
real AdamW. Activations are an estimate of what stock transformers save for the backward pass with
a fused attention kernel. What a GPU needs besides (CUDA's own context, fragmentation) is not in.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritter.core.families import (
    Config,
    Family,
    LogicalTensor,
    StoredTensor,
    count_parameters,
    family_of,
    ffn_sizes,
    layout,
)
from tritter.errors import RequestError, nearest, refused

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
OPTIMIZERS = ("adamw", "adamw8bit")
_STEP_BYTES = 4  # torch keeps each tensor's step counter in float32
# bitsandbytes: 8-bit moments in blocks with one float32 scale each; small tensors stay in float32.
_BLOCK_SIZE = 256
_SMALLEST_8BIT_TENSOR = 4096
_MOMENTS = 2
_FLOAT32 = 4
_ACTIVATION = "activation_function"  # as GPT-2 calls it
_STEPS = {"gelu_new": 3}  # what it keeps beside its input and its result


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """How a model is trained, as far as memory goes.

    Args:
        precision: Lightning's name.
        optimizer: `adamw` or `adamw8bit` (bitsandbytes).
        is_attention_frozen: attention has no gradients and no optimizer state.
        batch_size: sequences on the device at once.
        sequence_length: tokens of a sequence.
        is_checkpointed: activations of a layer are computed again in the backward pass.

    Raises:
        RequestError: names the value, and what is allowed.
    """

    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    is_attention_frozen: bool = False
    batch_size: int = 1
    sequence_length: int = 2048
    is_checkpointed: bool = False

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in allowed:
                reason = f"allowed is one of {', '.join(allowed)}"
                raise refused(key, value, reason, near=nearest(value, allowed))
        for key, count in (
            ("batch_size", self.batch_size),
            ("sequence_length", self.sequence_length),
        ):
            if count < 1:
                raise refused(key, count, "a whole number, at least 1")

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on the device; the first three are exact, activations are an estimate."""

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
    config: Config, setup: TrainingSetup, *, kept_per_parameter: float = _MOMENTS
) -> TrainingMemory:
    """Compute the memory of training a model of this config.

    Args:
        kept_per_parameter: numbers that an optimizer which is no 8-bit one keeps for each
            parameter: of Adam two.

    Raises:
        RequestError: unknown family.
    """
    parameter_bytes, width = _BYTES[setup.precision]

    def trained(config: Config) -> list[StoredTensor]:
        is_frozen = setup.is_attention_frozen
        stored = layout(config, "live")
        return [t for t in stored if not (is_frozen and is_attention(t.parts[0].tensor))]

    def optimizer_bytes(config: Config) -> int:
        return sum(
            _optimizer_bytes(math.prod(t.shape), setup, kept_per_parameter) for t in trained(config)
        )

    # The peak is at the start of the backward pass: logits and their gradient besides
    logits = family_of(config).dimensions(config).vocab_size * (width + _FLOAT32)
    return TrainingMemory(
        parameters_bytes=parameter_bytes * count_parameters(config),
        gradients_bytes=parameter_bytes * over_layers(config, lambda c: _count(trained(c))),
        optimizer_bytes=over_layers(config, optimizer_bytes),
        activations_bytes=saved_bytes(config, setup) + setup.num_tokens * logits,
    )


def states_bytes(
    config: Config,
    setup: TrainingSetup,
    *,
    trained: Iterable[tuple[int, int]],
    kept_per_parameter: float = _MOMENTS,
) -> int:
    """Return the bytes of parameters, gradients and optimizer states where some are trained.

    Args:
        trained: sizes of parameters that are, each with how many have it.
        kept_per_parameter: see `training_memory`.

    Raises:
        RequestError: unknown family.
    """
    parameter_bytes, _ = _BYTES[setup.precision]
    held = parameter_bytes * count_parameters(config)
    for size, count in trained:
        held += count * (parameter_bytes * size + _optimizer_bytes(size, setup, kept_per_parameter))
    return held


def over_layers(config: Config, measure: Callable[[Config], int]) -> int:
    """Return what adds up over layers, measured where there is one of each kind.

    Args:
        measure: of a config of the first layer, and of that layer and one more.
    """
    family = family_of(config)
    kinds = family.layer_kinds(config)
    alike = list(zip(kinds, ffn_sizes(config) or [0] * len(kinds), strict=True))
    one = measure(family.with_layers(config, [0]))
    each = {
        kind: measure(family.with_layers(config, [0, alike.index(kind)])) - one
        for kind in set(alike)
    }
    return one + sum(each[kind] for kind in alike[1:])


def is_attention(tensor: LogicalTensor) -> bool:
    """Return whether a tensor is a projection of attention, or a norm within it."""
    return tensor.kind.startswith("attention.")


def _count(stored: Sequence[StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in stored)


def _optimizer_bytes(size: int, setup: TrainingSetup, kept: float) -> int:
    if setup.optimizer == "adamw":
        parameter_bytes, _ = _BYTES[setup.precision]
        steps = _STEP_BYTES if kept == _MOMENTS else 0
        return round(kept * parameter_bytes * size) + steps
    if size < _SMALLEST_8BIT_TENSOR:
        return _MOMENTS * _FLOAT32 * size
    return _MOMENTS * (size + _FLOAT32 * -(-size // _BLOCK_SIZE))


def saved_bytes(config: Config, setup: TrainingSetup) -> int:
    """Return what the forward pass leaves for the backward pass, apart from parameters.

    A matrix product keeps its input, attention with a fused kernel q, k, v and its result, SwiGLU
    gate, activated gate, up and their product, an FFN without a gate its sum and what becomes of
    it, an RMSNorm its input in float32 and the normed value in the precision of parameters, a
    LayerNorm its input alone, the loss its log-probabilities in float32. Where q, k and v come out
    of one product, it stays whole for the sake of v. Autocast keeps halved copies of the matrices.
    GPT-2's activation is put together of single steps, which keep three times their size besides;
    the masks of dropout are left out.
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
    in_float32 = 0 if family.subtracts_mean else _FLOAT32
    end = sizes.hidden_size * (in_float32 + parameter_bytes + width) + sizes.vocab_size * _FLOAT32
    return setup.num_tokens * (kept + end) + _autocast_bytes(config, setup)


def _layer_bytes(family: Family, config: Config, layer: int, setup: TrainingSetup) -> int:
    """Return the bytes that one layer keeps per token."""
    sizes = family.dimensions(config, layer=layer)
    parameter_bytes, width = _BYTES[setup.precision]
    ffn_units = sizes.intermediate_size
    if family.has_experts and family.layer_kinds(config)[layer] == "sparse":
        ffn_units = sizes.experts_per_token * sizes.expert_size + sizes.shared_expert_size
    per_head = {"attention.q_norm": sizes.query_size, "attention.k_norm": sizes.key_value_size}
    norms = [t for t in family.tensors if t.is_per_layer and t.is_norm]
    normed = sum(per_head.get(norm.kind, sizes.hidden_size) for norm in norms)
    attention = 2 * (sizes.query_size + sizes.key_value_size)
    if any(tensor.kind == "attention.qkv" for tensor in family.tensors):
        attention += sizes.query_size + sizes.key_value_size
    for_each_unit = (4 if family.has_gate else 2) + _STEPS.get(str(config.get(_ACTIVATION)), 0)
    products = 2 * sizes.hidden_size + attention + for_each_unit * ffn_units
    statistics = sizes.num_attention_heads * _FLOAT32
    norms_bytes = normed * (_FLOAT32 + parameter_bytes)
    if family.subtracts_mean:  # two that read the same stream keep it once
        is_parallel = bool(config.get(family.parallel_residual_key, False))
        norms_bytes = normed * parameter_bytes // (2 if is_parallel else 1)
    return norms_bytes + products * width + statistics


def _autocast_bytes(config: Config, setup: TrainingSetup) -> int:
    """Return the bytes of the halved copies of what autocast multiplies with."""
    if not setup.precision.endswith("-mixed"):
        return 0
    _, width = _BYTES[setup.precision]
    only_looked_up = ["embed_positions"]
    if not config.get("tie_word_embeddings"):
        only_looked_up.append("embed")

    def is_looked_up(stored: StoredTensor) -> bool:
        return stored.parts[0].tensor.name in only_looked_up

    def multiplied(config: Config) -> int:
        stored = layout(config, "live")
        return _count([t for t in stored if len(t.shape) > 1 and not is_looked_up(t)])

    return width * over_layers(config, multiplied)


PROCESS_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# Version 1 writes a huge number where there is no limit, rounded down to a page.
_NO_LIMIT = 2**62


def machine_memory(*, process_groups: Path = PROCESS_GROUPS, groups: Path = GROUPS) -> int | None:
    """Return the bytes that this process may use: the machine's, or its group's if that is less.

    Args:
        process_groups: the file that lists the groups of the process.
        groups: where the groups' own files are mounted.

    Returns:
        None where the system does not tell.
    """
    found = [*_group_limits(process_groups, groups)]
    with suppress(ValueError, OSError, AttributeError):  # a system that has no such numbers
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _group_limits(process_groups: Path, groups: Path) -> Iterator[int]:
    """Yield the limits of the process's group and of those above it, of both versions.

    In a container the path may be one of the host, which does not exist within: then the mount's
    own file holds the limit.
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


# How FSDP2 shares the parameters of a model out, from shapes alone.
#
# Every parameter is cut along its first dimension into as many pieces as there are ranks, of
# equal height but for the last ones. A layer is whole on every rank while it computes.


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingPlan:
    """What each rank holds.

    Args:
        parameters: by rank, of its own.
        gathered: of the largest group that is whole on every rank for a time: a layer, or what
            stands in none (embeddings, the last norm, the head).
    """

    parameters: tuple[int, ...]
    gathered: int


def sharding_plan(config: Config, *, ranks: int) -> ShardingPlan:
    """Return what each of so many ranks holds of a model of this config.

    Raises:
        RequestError: unknown family, or no ranks.
    """
    if ranks < 1:
        raise RequestError(f"ranks = {ranks}: a whole number, at least 1.")
    groups = Counter[int | None]()
    parts = [0] * ranks
    for stored in layout(config, "live"):
        size = math.prod(stored.shape)
        groups[stored.layer] += size
        height = -(-stored.shape[0] // ranks)
        for rank in range(ranks):  # the last ones may have nothing
            rows = max(0, min(height, stored.shape[0] - rank * height))
            parts[rank] += rows * size // stored.shape[0]
    return ShardingPlan(parameters=tuple(parts), gathered=max(groups.values()))
