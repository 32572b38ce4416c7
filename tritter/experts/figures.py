"""What is logged of experts while they are trained, and kept for the plots."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from tritter.experts.adapters import parameters_of, shape_of
from tritter.experts.gates import Gates
from tritter.experts.losses import entropies
from tritter.experts.mixture import ExpertMixture
from tritter.models import live_shape


class Figures:
    """Mean gates between two entries of the log, and what became of gates and ranks."""

    def __init__(self) -> None:
        self._usage: dict[str, list[float]] = {}  # since it was logged last
        self._over_time: dict[str, Any] = {"steps": [], "usage": [], "ranks": []}

    def note(self, usage: Mapping[str, float]) -> None:
        """Take the mean gate of each expert in a batch."""
        for name, value in usage.items():
            self._usage.setdefault(name, []).append(value)

    def logged(
        self, mixture: ExpertMixture, gates: Sequence[Gates], *, step: int
    ) -> dict[str, float]:
        """Return metrics since the last entry, and of the last gates; the next begins anew."""
        model, times = mixture.model, self._over_time
        means = {n: sum(v) / len(v) for n, v in self._usage.items() if n in mixture.names}
        ranks = {name: shape_of(model, name).rank for name in mixture.adapters}
        times["steps"].append(step)
        times["usage"].append(means)
        times["ranks"].append(ranks)
        self._usage = {}
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        whole = sum(prod(live_shape(p)) for p in model.parameters())
        values = {f"experts/usage/{name}": value for name, value in means.items()}
        values |= {f"experts/rank/{name}": float(rank) for name, rank in ranks.items()}
        values["experts/number"] = float(len(mixture.adapters))
        values["experts/trainable_share"] = trained / whole
        if gates:
            told = torch.stack([entropies(each.probabilities.detach()).mean() for each in gates])
            values["experts/routing_entropy"] = float(told.mean())
            values["experts/dropped"] = sum(each.dropped for each in gates) / len(gates)
        return values

    def report(self) -> dict[str, Any]:
        """Return gates and ranks over time, as summary.json has them; null where there was none."""
        times = self._over_time
        found = {}
        for kind, of, rows in (("usage", "gates", "usage"), ("ranks", "ranks", "ranks")):
            names = dict.fromkeys(name for row in times[rows] for name in row)
            values = {name: [row.get(name) for row in times[rows]] for name in names}
            found[f"{kind}_over_time"] = {"steps": times["steps"], of: values}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"usage": self._usage, "over_time": self._over_time}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._usage = {name: list(each) for name, each in state["usage"].items()}
        self._over_time = {name: list(each) for name, each in state["over_time"].items()}


def gradient_norms(mixture: ExpertMixture) -> dict[str, float]:
    """Return the gradient norm of each expert's parameters."""
    found = {}
    for name in mixture.adapters:
        own = parameters_of(mixture.model, name).values()
        norm = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        found[f"experts/gradient_norm/{name}"] = float(norm)
    return found
