"""What the training of a model with experts asks of its routers, as terms of the loss.

Balance (Switch), small logits (z), tokens for experts that are new, and old tokens where they
were. All terms are taken from raw logits and averaged over the layers that have experts.

Shapes: N sequences of T tokens, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from tritter.core.families import backward_flops, forward_flops
from tritter.core.models import config_of
from tritter.core.stock_routers import Record, Routing
from tritter.data.batches import this_rank
from tritter.data.packing import document_mask_of, lengths_of
from tritter.errors import TritterError
from tritter.evaluation.inference import device_of, evaluating
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.training import SideLoss
from tritter.training.callbacks import ends_step
from tritter.training.parameters import trained_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings(RoutingOptions):
    """Weights of the terms, and of the probability of new experts.

    Args:
        encouragement: of the probability of `new_experts`, which is subtracted from the loss.
        new_experts: whose probability that is.
    """

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
            raise TritterError("moe_routing.hold_old needs a model with experts, and old text.")
        seen: list[list[Tensor]] = [[] for _ in routing.layers]
        with routing.recording(), evaluating(model) as device:
            for batch in sequences.split(max(1, batch_size)):
                model(input_ids=batch.long().to(device), use_cache=False)
                for held, record in zip(seen, routing.recorded(), strict=True):
                    held.append(record.probabilities.view(*batch.shape, -1).cpu())
        config = config_of(model)
        flops = forward_flops(config).of_all(lengths_of(document_mask_of(model), sequences))
        return cls(sequences, tuple(torch.cat(held) for held in seen), batch_size, flops)

    def rows(self, step: int) -> Tensor:
        """Return which sequences a step is held against: all in turn."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size) % len(
            self.sequences
        )


class RoutingObjective(SideLoss):
    """The routing terms of one training, and what its last step decided.

    Args:
        model: has experts; its routers are attached to, see `tritter.core.stock_routers.Routing`.
        old: what `hold_old` is measured against.

    Raises:
        TritterError: the model has no experts.
    """

    # With router logits in its output a stock model adds a balance loss of its own
    forward_options: Mapping[str, bool] = {"output_router_logits": False}

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
        self.flops = 0.0 if old is None else old.flops  # of the look at the old routing
        self._held = old if settings.hold_old else None
        self._apart = document_mask_of(model)

    def terms(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the forward pass that was recorded last, without their weights.

        Also keeps what was decided, without its graph, as `records`, and the load as `counts`.
        Padding is in none of it.

        Args:
            batch: what the pass was of; new experts are not encouraged on what is replayed of it.
        """
        records = self._recorded(batch["input_ids"])
        decided = ("own_logits", "logits", "probabilities")
        self.records = tuple(
            replace(r, **{name: getattr(r, name).detach() for name in decided}) for r in records
        )
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
            # Of tokens that are not replayed, all alike, in all processes: one may hold none of
            # them, and a small batch none at all
            input_ids, is_replay = batch["input_ids"], batch.get("is_replay")
            is_new = torch.ones(len(input_ids), device=input_ids.device)
            if is_replay is not None:
                is_new = is_new.masked_fill(is_replay, 0)
            weights, kept = is_new.repeat_interleave(input_ids.shape[1]), self._kept(input_ids)
            weights = weights if kept is None else weights[kept]
            weights = weights / (_summed(weights.sum()) / this_rank().count).clamp(min=1e-6)
            experts = self.settings.new_experts
            masses = [new_expert_mass(r.logits, experts, weights=weights) for r in records]
            terms["new_expert_mass"] = _mean(masses)
        return terms

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return what `terms` adds to the loss."""
        settings = self.settings
        loss = settings.auxiliary_loss * terms["auxiliary_loss"]
        loss = loss + settings.z_loss * terms["z_loss"]
        if "new_expert_mass" in terms:
            loss = loss - settings.encouragement * terms["new_expert_mass"]
        return loss

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(batch)
        loss = self.weighted(terms)
        divergence = self.divergence(model, step)
        if divergence is not None:
            terms["old_divergence"] = divergence
            loss = loss + self.settings.hold_old * divergence
        return loss, {f"routing/{name}": value for name, value in terms.items()}

    def step_flops(self, model: nn.Module) -> float:
        if self._held is None:
            return 0.0
        config, trained = config_of(model), trained_tensors(model)
        flops = forward_flops(config) + backward_flops(
            config, is_trained=lambda tensor: tensor.name in trained, loss_at="routers"
        )
        # Each process looks at the same old text, which is counted once; the mean over all of it
        sequences = self._held.sequences
        mean = flops.of_all(lengths_of(self._apart, sequences)) / len(sequences)
        return len(self._held.rows(0)) * mean

    def callbacks(self) -> tuple[Callback, ...]:
        return (RoutingCallback(self),)

    def divergence(self, model: nn.Module, step: int) -> Tensor | None:
        """Return how far old text is from its old routing, nats per token; None if not asked for.

        It costs a forward and a backward pass over some old sequences.
        """
        if self._held is None:
            return None
        rows = self._held.rows(step)
        input_ids = self._held.sequences[rows].long().to(device_of(model))
        model(input_ids=input_ids, use_cache=False)
        kept, terms = self._kept(input_ids), list[Tensor]()
        for held, record in zip(self._held.probabilities, self._recorded(input_ids), strict=True):
            old = held[rows].flatten(0, 1).to(input_ids.device)
            terms.append(routing_divergence(old if kept is None else old[kept], record.logits))
        return _mean(terms)

    def _kept(self, input_ids: Tensor) -> Tensor | None:
        """Return which tokens are no padding, bool [N·T]; None: there can be none."""
        return None if self._apart is None else ~self._apart.padding(input_ids).flatten()

    def _recorded(self, input_ids: Tensor) -> tuple[Record, ...]:
        """Return what the last pass, which was of these, decided; of padding nothing."""
        records, kept = tuple(self.routing.recorded()), self._kept(input_ids)
        if kept is None:
            return records
        names = ("own_logits", "logits", "probabilities", "selected")
        return tuple(
            replace(r, **{name: getattr(r, name)[kept] for name in names}) for r in records
        )


class RoutingCallback(Callback):
    """Record what the routers decide, log how even it is, and move the selection bias.

    Args:
        objective: that of the module which is trained.
    """

    def __init__(self, objective: RoutingObjective) -> None:
        self._objective = objective
        self._counts: list[tuple[Tensor, ...]] = []  # of the step's batches so far

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._objective.routing.start_recording()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counts.append(self._objective.counts)
        if not ends_step(trainer, batch_idx):
            return
        objective = self._objective
        if rate := objective.settings.bias_update_rate:
            loads = [sum(counts) for counts in zip(*self._counts, strict=True)]
            for record, load in zip(objective.records, loads, strict=True):
                bias = objective.routing.selection_bias(record.layer)
                moved = bias_update(bias, load, rate=rate)
                objective.routing.set_selection_bias(record.layer, moved)
        self._counts.clear()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Means over the layers, of this process's part of the batch
            factor = objective.settings.capacity_factor
            layers = [layer_statistics(r, capacity_factor=factor) for r in objective.records]
            for name in ("entropy", "max_load", "dropped_fraction"):
                mean = sum(getattr(layer, name) for layer in layers) / len(layers)
                pl_module.log(f"routing/{name}", mean)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._objective.routing.stop_recording()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        self._objective.routing.stop_recording()  # Lightning tears no callback down then

    def state_dict(self) -> dict[str, Any]:
        return {"routing": self._objective.routing.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._objective.routing.load_state_dict(state_dict["routing"])


def _summed(counts: Tensor) -> Tensor:
    """Return counts of all processes together, in place."""
    if this_rank().count > 1:
        distributed.all_reduce(counts)
    return counts


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


# Losses on router logits, each a pure function of one layer's tensors.
#
# All of them start from raw logits: a softmax of a softmax would be nearly uniform whatever the
# router does. They compute in float32, or float64 for float64 logits, and average over tokens.
#
# Shapes: N tokens, E experts, k experts per token. Tokens of several layers may stand in one
# tensor, as transformers has it, or each layer may have its own loss.


def load_balancing_loss(
    logits: Tensor, selected: Tensor, *, counts: Tensor | None = None
) -> Tensor:
    """Return E · Σ f_e · P_e: the price of an unequal load (arXiv 2101.03961, eq. 4-6).

    f_e is the number of tokens sent to expert e over N, P_e the mean of its probability; even
    routing gives k. Where transformers computes it over the same tokens it has the same value.

    Args:
        logits: [N, E].
        selected: int64 [N, k], the experts that the tokens were sent to.
        counts: int64 [E], the load of a batch that these tokens are a part of, as processes that
            train together have it: the mean of their losses is then that of the whole batch.
    """
    num_experts = logits.shape[-1]
    probabilities = _wide(logits).softmax(dim=-1)
    if counts is None:
        counts = torch.bincount(selected.flatten(), minlength=num_experts)
    load = counts.to(probabilities.dtype) * selected.shape[-1] / counts.sum()
    return num_experts * (load * probabilities.mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean of (log Σ exp logits)², which keeps logits small (arXiv 2202.08906, eq. 5).

    Args:
        logits: [N, E].
    """
    return _wide(logits).logsumexp(dim=-1).square().mean()


def routing_divergence(old_probabilities: Tensor, logits: Tensor) -> Tensor:
    """Return KL(old ‖ new), nats per token: how far a router has moved from where it was.

    Experts that were added since have no old probability, so whatever they take counts as moved.

    Args:
        old_probabilities: [N, E_old] of the old router on the same tokens, E_old ≤ E.
        logits: [N, E].
    """
    logits = _wide(logits)
    old = old_probabilities.detach().to(logits.dtype)
    log_new = F.log_softmax(logits, dim=-1)[:, : old.shape[-1]]
    log_new = log_new.masked_fill(old == 0, 0.0)  # 0 · log 0 is 0, and so is its gradient
    return (torch.xlogy(old, old) - old * log_new).sum(dim=-1).mean()


def new_expert_mass(
    logits: Tensor, experts: Sequence[int], *, weights: Tensor | None = None
) -> Tensor:
    """Return the mean probability that the router gives to some experts together, from 0 to 1.

    Args:
        logits: [N, E].
        experts: their indices.
        weights: [N], of the tokens in the mean; equal ones of 1/N by default.
    """
    mass = _wide(logits).softmax(dim=-1)[:, list(experts)].sum(dim=-1)
    return mass.mean() if weights is None else (weights.to(mass.dtype) * mass).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# How evenly the routers of a model use their experts.
#
# Shapes: N tokens, E experts, k experts per token.


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """The use of one layer's experts over some tokens.

    Args:
        max_load: the largest load over the mean one; 1 is even, E/k all to the same experts.
        entropy: of the router's probabilities for one token, nats, on average; 0 is certain.
        dropped_fraction: of all assignments, those that experts of limited capacity would drop.
    """

    max_load: float
    entropy: float
    dropped_fraction: float


def layer_statistics(record: Record, *, capacity_factor: float) -> LayerStatistics:
    """Return the statistics of one layer over the tokens of a forward pass.

    Args:
        capacity_factor: an expert takes at most that many times its even part. Stock models drop
            nothing: this says what a deployment with such a limit would lose.
    """
    probabilities = record.probabilities.detach()
    num_experts = probabilities.shape[-1]
    counts = expert_counts(record.selected, num_experts)
    load = counts.double() / counts.sum()
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
    return LayerStatistics(
        max_load=float(load.max() * num_experts),
        entropy=float(entropy),
        dropped_fraction=dropped_fraction(counts, capacity_factor=capacity_factor),
    )


def expert_counts(selected: Tensor, num_experts: int) -> Tensor:
    """Return int64 [E], how many tokens each expert got; counts of several batches add up.

    Args:
        selected: int64 [N, k].
    """
    return torch.bincount(selected.flatten(), minlength=num_experts)


def dropped_fraction(counts: Tensor, *, capacity_factor: float) -> float:
    """Return the part of all assignments beyond a capacity of ⌈factor · N · k / E⌉ per expert.

    Args:
        counts: [E], of the tokens that share the capacity.
    """
    total = int(counts.sum())
    capacity = math.ceil(capacity_factor * total / len(counts))
    return int((counts - capacity).clamp(min=0).sum()) / total


def bias_update(selection_bias: Tensor, load: Tensor, *, rate: float) -> Tensor:
    """Return the next selection bias: b + rate · sign(mean load − load) (arXiv 2408.15664, alg. 1).

    Args:
        selection_bias: [E].
        load: [E], counts or parts of the step's assignments.
        rate: u of the paper, in probability per step.
    """
    load = load.to(selection_bias.dtype)
    return selection_bias + rate * (load.mean() - load).sign()
