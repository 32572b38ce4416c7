"""Merging a mixture into one adapter with fixed gates, and the resulting change of the logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritter.errors import RequestError
from tritter.evaluation.inference import eval_mode
from tritter.methods.experts.adapters import AdapterShape, Factors
from tritter.methods.experts.gates import usage
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder, StoredAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitChange:
    """Difference of a merged adapter from the mixture, on some tokens.

    Args:
        largest: max |Δ logit| in standard deviations of the mixture's logits.
        mean: root mean square of Δ logit, in the same unit.
        same_best: share of tokens with the same most probable next token.
        num_tokens: number of tokens.
    """

    largest: float
    mean: float
    same_best: float
    num_tokens: int


def merged_adapter(
    experts: ExpertFolder, gates: Mapping[str, float], *, rank: int | None = None
) -> tuple[StoredAdapter, float]:
    """Merge experts into one adapter, each weighted by its gate.

    Args:
        experts: the experts of a checkpoint.
        gates: expert → gate; the gates of adapters plus the base's share sum to 1.
        rank: rank of the adapter. None: the smallest that loses nothing.

    Returns:
        The adapter nearest to the sum of all adapters times their gates, and the lost share
        ‖sum − adapter‖ / ‖sum‖, maximum over layers; 0 if the rank suffices.
    """
    layers: dict[str, list[tuple[str, Factors]]] = {}
    embeddings: set[str] = set()
    for name, stored in experts.adapters.items():
        embeddings |= stored.embeddings
        for layer, (down, up) in stored.factors.items():
            wide = torch.promote_types(down.dtype, torch.float32)
            own = Factors(down.to(wide), up.to(wide), stored.shape.scaling)
            layers.setdefault(layer, []).append((name, own))
    if not layers:
        raise RequestError("there is no expert to merge: the mixture consists of its base only.")
    whole = max(_whole_rank([part for _, part in parts]) for parts in layers.values())
    size, lost, found = rank or whole, 0.0, {}
    for layer, parts in layers.items():
        factors, weights = [part for _, part in parts], [gates[name] for name, _ in parts]
        one = Factors.merged(factors, weights, rank=size, alpha=float(size))
        found[layer] = one.down, one.up
        if size < _whole_rank(factors):
            lost = max(lost, one.lost_share(factors, weights))
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    shape = AdapterShape(size, float(size), targets)
    return StoredAdapter(shape, found, frozenset(embeddings)), lost


def mean_gates(mixture: ExpertMixture, texts: Sequence[Tensor]) -> dict[str, float]:
    """Return expert → mean gate over layers and tokens, with equal weight per batch of data.

    Args:
        mixture: the mixture.
        texts: int64 [B, T] each, at least one.
    """
    found = torch.zeros(len(mixture.names), dtype=torch.float64)
    with eval_mode(mixture.model) as device:
        for each in texts:
            for ids in each.to(device).split(1):  # logits take much memory
                mixture.model(input_ids=ids, use_cache=False)
                found += usage(mixture.gates()).double().cpu() / (len(each) * len(texts))
    return dict(zip(mixture.names, found.tolist(), strict=True))


def logit_change(mixture: ExpertMixture, adapter: StoredAdapter, input_ids: Tensor) -> LogitChange:
    """Measure the change of the logits if one adapter replaces the mixture, in the model's dtype.

    One sequence at a time, since logits take much memory. The mixture is the same afterwards.

    Args:
        mixture: the mixture.
        adapter: the merged adapter.
        input_ids: int64 [B, T].
    """
    model, largest, sums = mixture.model, torch.zeros(()), torch.zeros(4, dtype=torch.float64)
    name = next(each for n in range(300) if (each := f"merged_{n}") not in mixture.names)

    def logits(ids: Tensor) -> Tensor:
        with eval_mode(model) as device:
            return model(input_ids=ids.to(device), use_cache=False).logits.double()

    for ids in input_ids.split(1):
        before = logits(ids)
        mixture.open(name, adapter.shape, seed=0)
        adapter.load_into(model, name)
        with mixture.only(name):
            after = logits(ids)
        mixture.close(name)
        moved, same_best = after - before, (after.argmax(-1) == before.argmax(-1)).sum()
        largest = torch.maximum(largest, moved.abs().max().cpu())  # keeps NaN
        parts = before.sum(), before.square().sum(), moved.square().sum(), same_best
        sums += torch.stack(parts).cpu()
    total, squares, moves, best = sums
    number = input_ids.numel() * before.shape[-1]
    deviation = ((squares - total**2 / number).clamp(min=0) / (number - 1)).sqrt()
    return LogitChange(
        largest=float(largest / deviation),
        mean=float((moves / number).sqrt() / deviation),
        same_best=float(best / input_ids.numel()),
        num_tokens=input_ids.numel(),
    )


def _whole_rank(parts: list[Factors]) -> int:
    """Return the maximum rank of a sum of adapters of one layer."""
    sizes = parts[0].down.shape[1], parts[0].up.shape[0]
    return min(sum(part.rank for part in parts), *sizes)
