"""Changes of a mixture in a live training, by the one surgery."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning import Trainer

from tritter.experts.adapters import (
    AdapterShape,
    adapted_layers,
    factors,
    parameters_of,
    set_rank,
    shape_of,
)
from tritter.experts.changes import RouterRow, evicted, router_names, spawned, widened
from tritter.experts.merging import lost_share, merged
from tritter.experts.module import ExpertModule
from tritter.training import surgery


@dataclass(frozen=True, slots=True)
class Changing:
    """A training between two of its steps."""

    trainer: Trainer
    module: ExpertModule

    def spawn(self, name: str, shape: AdapterShape, *, seed: int) -> None:
        """Add an expert that computes nothing yet, with router rows of zeros."""
        mixture, model = self.module.mixture, self.module.model
        size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        mixture.open(name, shape, seed=seed)
        rows = {router: RouterRow(torch.zeros(size), 0.0) for router in router_names(mixture)}
        surgery.apply(self.trainer, self.module, spawned(mixture, name, rows), reason="spawned")

    def evict(self, name: str) -> None:
        """Take an expert off, with all that is kept of it."""
        mixture = self.module.mixture
        surgery.apply(self.trainer, self.module, evicted(mixture, name), reason="evicted")
        mixture.close(name)

    def widen(self, name: str, rank: int, *, seed: int) -> None:
        """Give an expert a larger rank; the function is kept."""
        change = widened(self.module.mixture, name, rank, seed=seed)
        surgery.apply(self.trainer, self.module, change, reason="widened")
        set_rank(self.module.model, name, rank)

    def freeze(self, name: str, projections: Sequence[str] | None) -> bool:
        """Train an expert no more, or only not in layers of some names; return whether whole."""
        own = parameters_of(self.module.model, name)
        chosen = [
            key
            for key in own
            if projections is None or any(f".{each}." in key for each in projections)
        ]
        surgery.freeze(self.trainer, self.module, chosen)
        return len(chosen) == len(own)

    def thaw(self, name: str) -> None:
        """Let an expert be trained again."""
        own = parameters_of(self.module.model, name)
        surgery.thaw(self.trainer, self.module, [k for k in own if not own[k].requires_grad])

    def merge(self, kept: str, gone: str, weights: Sequence[float]) -> float:
        """Let an expert be the mean of itself and another, weighted; return the share that is lost.

        Its moments begin anew: they were of other factors.
        """
        model, (optimizer,) = self.module.model, self.trainer.optimizers
        parts = [weight / sum(weights) for weight in weights]
        shape, lost = shape_of(model, kept), []
        for _, layer in adapted_layers(model):
            both = [factors(layer, kept), factors(layer, gone)]
            if both[0] is None or both[1] is None:
                continue
            pair = [each for each in both if each is not None]
            one = merged(pair, parts, rank=shape.rank, alpha=shape.alpha)
            lost.append(lost_share(pair, parts, one))
            with torch.no_grad():
                pair[0].down.copy_(one.down)
                pair[0].up.copy_(one.up)
            for parameter in (pair[0].down, pair[0].up):
                optimizer.state.pop(parameter, None)
        return sum(lost) / max(1, len(lost))

    def parameters_with(self, shape: AdapterShape) -> int:
        """Count what the adapters would have with another one, on the layers of the first."""
        return self._count() + self._size(shape)

    def parameters_beside_first(self, shape: AdapterShape) -> int:
        """Count what the first adapter and another one would have."""
        return self._of(self.module.mixture.adapters[0]) + self._size(shape)

    def parameters_widened(self, name: str) -> int:
        """Count what the adapters would have with one of twice its rank."""
        return self._count() + self._of(name)

    def _count(self) -> int:
        return sum(map(self._of, self.module.mixture.adapters))

    def _of(self, name: str) -> int:
        return sum(each.numel() for each in parameters_of(self.module.model, name).values())

    def _size(self, shape: AdapterShape) -> int:
        first = self.module.mixture.adapters[0]
        return self._of(first) // shape_of(self.module.model, first).rank * shape.rank
