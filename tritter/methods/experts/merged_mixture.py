"""A mixture as one adapter, by fixed gates in place of the router's; and what that changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritter.errors import RequestError
from tritter.evaluation.inference import evaluating
from tritter.methods.experts.adapters import AdapterShape, Factors
from tritter.methods.experts.changes import lost_share, merged
from tritter.methods.experts.gates import usage
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder, StoredAdapter, put_values

NAME = "merged"


@dataclass(frozen=True, slots=True, eq=False)
class MergedAdapter:
    """Several adapters as one.

    Args:
        adapter: nearest to the sum of all, each times its gate.
        lost: ‖sum − adapter‖ / ‖sum‖ of the layer where that is largest; 0 where the rank holds
            everything.
    """

    adapter: StoredAdapter
    lost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitChange:
    """How far a merged mixture is from the mixture, on some tokens.

    Args:
        largest: max |Δ logit| in standard deviations of the mixture's logits.
        mean: root mean square of Δ logit, in the same.
        same_best: share of the tokens after which the likeliest next token is the same.
        num_tokens: that were read.
    """

    largest: float
    mean: float
    same_best: float
    num_tokens: int


def merged_adapter(
    held: ExpertFolder, gates: Mapping[str, float], *, rank: int | None = None
) -> MergedAdapter:
    """Return the experts as one adapter, each times its gate.

    Args:
        gates: expert → gate; the base's share, if it has one, is what the others lack of 1.
        rank: None: as much as loses nothing.

    Raises:
        RequestError: there is no expert to merge.
    """
    layers: dict[str, list[tuple[str, Factors]]] = {}
    embeddings: set[str] = set()
    for name, stored in held.adapters.items():
        embeddings |= stored.embeddings
        for layer, (down, up) in stored.factors.items():
            wide = torch.promote_types(down.dtype, torch.float32)
            own = Factors(down.to(wide), up.to(wide), stored.shape.scaling)
            layers.setdefault(layer, []).append((name, own))
    if not layers:
        raise RequestError("there is no expert to merge: the mixture is its base alone.")
    whole = max(_whole_rank([part for _, part in parts]) for parts in layers.values())
    size, lost, found = rank or whole, 0.0, {}
    for layer, parts in layers.items():
        factors, weights = [part for _, part in parts], [gates[name] for name, _ in parts]
        one = merged(factors, weights, rank=size, alpha=float(size))
        found[layer] = one.down, one.up
        if size < _whole_rank(factors):
            lost = max(lost, lost_share(factors, weights, one))
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    shape = AdapterShape(size, float(size), targets)
    return MergedAdapter(StoredAdapter(shape, found, frozenset(embeddings)), lost)


def deltas(adapter: StoredAdapter) -> dict[str, Tensor]:
    """Return layer → what an adapter adds to its weight, of an embedding [V, H]."""
    scaling = adapter.shape.scaling
    found = {n: Factors(down, up, scaling).delta() for n, (down, up) in adapter.factors.items()}
    return {n: delta.T if n in adapter.embeddings else delta for n, delta in found.items()}


def mean_gates(mixture: ExpertMixture, texts: Sequence[Tensor]) -> dict[str, float]:
    """Return expert → mean gate over layers and tokens, texts counted evenly.

    Args:
        texts: int64 [B, T] each, one at least.
    """
    found = torch.zeros(len(mixture.names), dtype=torch.float64)
    with evaluating(mixture.model) as device:
        for input_ids in texts:
            mixture.model(input_ids=input_ids.to(device), use_cache=False)
            found += usage(mixture.gates()).double().cpu() / len(texts)
    return dict(zip(mixture.names, found.tolist(), strict=True))


def logit_change(mixture: ExpertMixture, adapter: StoredAdapter, input_ids: Tensor) -> LogitChange:
    """Measure what one adapter in place of the mixture changes, in the model's dtype.

    The adapter stays on the model, which is of no use afterwards.

    Args:
        input_ids: int64 [B, T].
    """
    model = mixture.model
    numbered = (f"{NAME}_{number}" for number in range(300))
    name = next(each for each in (NAME, *numbered) if each not in mixture.names)
    with evaluating(model) as device:
        ids = input_ids.to(device)
        before = model(input_ids=ids, use_cache=False).logits.double()
        mixture.open(name, adapter.shape, seed=0)
        put_values(model, name, adapter)
        with mixture.alone(name):
            after = model(input_ids=ids, use_cache=False).logits.double()
    difference, deviation = after - before, before.std()
    return LogitChange(
        largest=float(difference.abs().max() / deviation),
        mean=float(difference.square().mean().sqrt() / deviation),
        same_best=float((after.argmax(-1) == before.argmax(-1)).double().mean()),
        num_tokens=ids.numel(),
    )


def _whole_rank(parts: list[Factors]) -> int:
    """Return the rank that a sum of adapters of one layer has at most."""
    sizes = parts[0].down.shape[1], parts[0].up.shape[0]
    return min(sum(part.rank for part in parts), *sizes)
