"""What quantisers and inference engines do not take of a model's shape."""

from collections.abc import Iterator
from operator import eq
from typing import Any

from tritter.core.families import Model

# Block → what fails for sizes that are no multiples of it
_BLOCKS = {
    32: "llama.cpp keeps it in 16 bits",
    64: "bitsandbytes nf4 fails at the first forward pass on a CPU",
    256: "K-quants of llama.cpp fall back to larger types",
}
_SIZES = {"hidden_size": "hidden size", "intermediate_size": "FFN", "expert_size": "expert size"}
_NUM_DEVICES = (2, 4, 8)


def serving_notes(model: Model, source: Model) -> tuple[str, ...]:
    """Return the limits of quantisers and engines that a model breaks and its source did not.

    Args:
        model: the model.
        source: the model from which it grows.
    """
    known = {(key, block) for key, block, _, _ in _findings(source)}
    if not source.sizes.expert_size:  # its FFN becomes the experts
        known |= {("expert_size", block) for key, block in known if key == "intermediate_size"}
    found = {(key, block): (subject, problem) for key, block, subject, problem in _findings(model)}
    notes: dict[str, list[str]] = {}
    for (key, block), (subject, problem) in found.items():
        is_implied = block == max(_BLOCKS) and (key, min(_BLOCKS)) in found
        if (key, block) not in known and not is_implied:
            notes.setdefault(subject, []).append(problem)
    lost = [str(n) for n in _NUM_DEVICES if _shares(source, n) and not _shares(model, n)]
    if lost:
        heads, groups = model.sizes.num_attention_heads, model.sizes.num_key_value_heads
        subject = f"{heads} attention heads, {groups} key/value heads"
        notes[subject] = [f"no tensor parallelism over {', '.join(lost)} GPUs"]
    for key in model.family.per_layer_config_keys:
        if (period := _period(source, key)) is not None and _period(model, key) != period:
            problem = f"llama.cpp would compute another function: it expects period {period}"
            notes[f"{key} of {model.sizes.num_hidden_layers} layers"] = [problem]
    return tuple(f"{subject}: {'; '.join(problems)}" for subject, problems in notes.items())


def _findings(model: Model) -> Iterator[tuple[str, int, str, str]]:
    """Yield the limits that sizes break: the size, its block, a subject and a problem."""
    sizes = model.sizes
    for key, name in _SIZES.items():
        size = getattr(sizes, key)
        for block, problem in _BLOCKS.items():
            if size % block:
                yield key, block, f"{name} {size}", f"not a multiple of {block} ({problem})"


def _period(model: Model, key: str) -> int | None:
    """Return the period in which a setting of the layers repeats; None if it does not."""
    values: Any = model.config.get(key) or ()
    found = (n for n in range(2, len(values)) if all(map(eq, values, values[n:])))
    return next(found, None) if len({*values}) > 1 else None


def _shares(model: Model, devices: int) -> bool:
    """Return whether GPUs can share the heads evenly; each may need a copy of a key/value head."""
    sizes = model.sizes
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    return heads % devices == 0 and (groups % devices == 0 or devices % groups == 0)
