"""What the training of a model with experts asks of its routers, as terms of the loss.

Balance (Switch), small logits (z), tokens for experts that are new, and old tokens where they
were. All terms are taken from raw logits and averaged over the layers that have experts.

Shapes: N sequences of T tokens, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn

from tritter.data.ranks import this_rank
from tritter.errors import TritterError
from tritter.families import family_of, forward_flops
from tritter.models import config_of
from tritter.routing import (
    Record,
    Routing,
    expert_counts,
    load_balancing_loss,
    new_expert_mass,
    router_z_loss,
    routing_divergence,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """Weights of the terms; zero leaves a term out.

    Args:
        auxiliary_loss: of the load balancing loss (arXiv 2101.03961, eq. 4-6).
        z_loss: of the router z-loss (arXiv 2202.08906, eq. 5).
        bias_update_rate: step of the selection bias of balancing without a loss (arXiv
            2408.15664), in probability; the bias is gone when the model is saved.
        hold_old: of the divergence from the old routing of old text, which `OldRouting` holds.
        capacity_factor: of the dropped fraction that is logged; nothing is dropped.
        encouragement: of the probability of `new_experts`, which is subtracted from the loss.
        new_experts: whose probability that is.
    """

    auxiliary_loss: float = 0.01
    z_loss: float = 1e-3
    bias_update_rate: float = 0.0
    hold_old: float = 0.0
    capacity_factor: float = 1.25
    encouragement: float = 0.0
    new_experts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class OldRouting:
    """Where routers sent old text before a training.

    Args:
        sequences: int [N, T].
        probabilities: one [N, T, E] for each layer that has experts.
        batch_size: sequences that each step is held against.
        flops: that the look took.
    """

    sequences: Tensor
    probabilities: tuple[Tensor, ...]
    batch_size: int
    flops: float

    @classmethod
    def of(cls, model: nn.Module, sequences: Tensor, *, batch_size: int) -> "OldRouting":
        """Look at a model before it is trained; it is in evaluation mode meanwhile.

        Raises:
            TritterError: the model has no experts, or there is no sequence.
        """
        routing = Routing.of(model)
        if routing is None or not len(sequences):
            raise TritterError("routing.hold_old needs a model with experts, and old text.")
        seen: list[list[Tensor]] = [[] for _ in routing.layers]
        with routing.recording(), torch.no_grad(), _evaluating(model):
            for batch in sequences.split(max(1, batch_size)):
                model(input_ids=batch.long().to(_device(model)), use_cache=False)
                for held, record in zip(seen, routing.recorded(), strict=True):
                    held.append(record.probabilities.view(*batch.shape, -1).cpu())
        config = config_of(model)
        flops = len(sequences) * forward_flops(family_of(config), config).of(sequences.shape[1])
        return cls(sequences, tuple(torch.cat(held) for held in seen), batch_size, flops)

    def rows(self, step: int) -> Tensor:
        """Return which sequences a step is held against: all in turn."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size) % len(
            self.sequences
        )


class RoutingObjective:
    """The routing terms of one training, and what its last step decided.

    Args:
        model: has experts; its routers are attached to, see `tritter.routing.Routing`.
        old: what `hold_old` is measured against.

    Raises:
        TritterError: the model has no experts.
    """

    def __init__(
        self, model: nn.Module, settings: RoutingSettings, *, old: OldRouting | None = None
    ) -> None:
        routing = Routing.of(model)
        if routing is None:
            raise TritterError("routing: the model has no experts.")
        self.routing = routing
        self.settings = settings
        self.records: tuple[Record, ...] = ()
        self.counts: tuple[Tensor, ...] = ()  # [E] of each layer, of all processes together
        self._old = old

    def terms(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the forward pass that was recorded last, without their weights.

        Also keeps what was decided, without its graph, as `records`, and the load as `counts`.

        Args:
            batch: what the pass was of; new experts are not encouraged on what is replayed of it.
        """
        records = self.routing.recorded()
        self.records = tuple(map(_without_graph, records))
        counts = [expert_counts(r.selected, self.routing.num_experts) for r in records]
        self.counts = tuple(_summed(torch.stack(counts)))
        terms = {
            "auxiliary_loss": _mean(
                [
                    load_balancing_loss(r.logits, r.selected, counts=counts)
                    for r, counts in zip(records, self.counts, strict=True)
                ]
            ),
            "z_loss": _mean([router_z_loss(r.logits) for r in records]),
        }
        if self.settings.new_experts:
            experts, weights = self.settings.new_experts, _weights_of_new(batch)
            masses = [new_expert_mass(r.logits, experts, weights=weights) for r in records]
            terms["new_expert_mass"] = _mean(masses)
        return terms

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """Return what `terms` adds to the loss."""
        settings = self.settings
        loss = settings.auxiliary_loss * terms["auxiliary_loss"]
        loss = loss + settings.z_loss * terms["z_loss"]
        if "new_expert_mass" in terms:
            loss = loss - settings.encouragement * terms["new_expert_mass"]
        return loss

    @property
    def held_batch(self) -> torch.Size | None:
        """The shape [N, T] of the old text that each step is held against; None: none is."""
        if self._old is None or not self.settings.hold_old:
            return None
        return self._old.sequences[self._old.rows(0)].shape

    @property
    def looked_flops(self) -> float:
        """The FLOPs of the look at the old routing, before any step."""
        return 0.0 if self._old is None else self._old.flops

    def divergence(self, model: nn.Module, step: int) -> Tensor | None:
        """Return how far old text is from its old routing, nats per token; None if not asked for.

        It costs a forward and a backward pass over some old sequences.
        """
        if self._old is None or self.held_batch is None:
            return None
        rows = self._old.rows(step)
        device = _device(model)
        model(input_ids=self._old.sequences[rows].long().to(device), use_cache=False)
        return _mean(
            [
                routing_divergence(old[rows].flatten(0, 1).to(device), record.logits)
                for old, record in zip(
                    self._old.probabilities, self.routing.recorded(), strict=True
                )
            ]
        )


def _weights_of_new(batch: Mapping[str, Tensor]) -> Tensor:
    """Return [N·T], by which the tokens of a batch count that are not replayed.

    All alike, and in all processes: one may hold none of them, and a small batch none at all.
    """
    input_ids, is_replay = batch["input_ids"], batch.get("is_replay")
    is_new = torch.ones(len(input_ids), device=input_ids.device)
    if is_replay is not None:
        is_new = is_new.masked_fill(is_replay, 0)
    count = _summed(is_new.sum()) * input_ids.shape[1] / this_rank().count
    return (is_new / count.clamp(min=1e-6)).repeat_interleave(input_ids.shape[1])


def _summed(counts: Tensor) -> Tensor:
    """Return counts of all processes together, in place."""
    if this_rank().count > 1:
        distributed.all_reduce(counts)
    return counts


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def _without_graph(record: Record) -> Record:
    return replace(
        record,
        own_logits=record.own_logits.detach(),
        logits=record.logits.detach(),
        probabilities=record.probabilities.detach(),
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
