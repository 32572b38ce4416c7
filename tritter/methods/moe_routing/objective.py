"""Router terms in the training loss of a model with experts.

Load balance (Switch), small logits (z-loss), tokens for new experts, and stable routing of old
data. All terms are computed from raw logits and averaged over the layers with experts.

Shapes: N sequences of T tokens, E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from tritter.core.families import forward_flops, training_flops
from tritter.core.models import model_of
from tritter.core.stock_routers import Record, RouterControl
from tritter.data.batches import num_ranks
from tritter.data.packing import DocumentMask, kept_tokens, lengths_of
from tritter.evaluation.inference import device_of, eval_mode
from tritter.evaluation.losses import batch_that_fits, vocab_size_of
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.training import SideLoss
from tritter.training.callbacks import ends_step
from tritter.training.parameters import trained_tensors


class RoutingObjective(SideLoss):
    """The routing terms of a training run, and the routing of its last step.

    Args:
        model: a model with experts; attaches to its routers, see
            `tritter.core.stock_routers.RouterControl`.
        options: weights of the terms.
        encouragement: weight of the probability of `new_experts`, subtracted from the loss.
        new_experts: indices of the new experts.

    Attributes:
        old_probabilities: routing that `hold` preserves: [N, T, E] for each layer with experts.
    """

    # With router logits in the output, a stock model adds its own balance loss
    forward_options: Mapping[str, bool] = {"output_router_logits": False}

    def __init__(
        self,
        model: nn.Module,
        options: RoutingOptions,
        *,
        encouragement: float = 0.0,
        new_experts: Sequence[int] = (),
    ) -> None:
        routing = RouterControl.of(model)
        assert routing is not None
        self.routing = routing
        self.options = options
        self.records: tuple[Record, ...] = ()
        self.counts: tuple[Tensor, ...] = ()  # [E] of each layer, of all processes together
        self.flops = 0.0  # of computing the old routing
        self.old_probabilities: tuple[Tensor, ...] = ()
        self._encouragement, self._new_experts = encouragement, tuple(new_experts)
        self._old_sequences, self._old_batch_size = torch.empty(0, 0), 0
        self._document_mask = DocumentMask.of(model)

    def hold(self, before: nn.Module, sequences: Tensor, *, batch_size: int) -> None:
        """Preserve the routing that a model has before training, in evaluation mode.

        Args:
            before: the model.
            sequences: int [N, T] of old data.
            batch_size: sequences that are compared in each step.
        """
        routing = RouterControl.of(before)
        assert routing is not None
        seen: list[list[Tensor]] = [[] for _ in routing.layers]
        with routing.recording(), eval_mode(before) as device:
            for batch in sequences.split(batch_size):
                before(input_ids=batch.long().to(device), use_cache=False)
                for layer, record in zip(seen, routing.recorded(), strict=True):
                    layer.append(record.probabilities.view(*batch.shape, -1).cpu())
        self.old_probabilities = tuple(torch.cat(layer) for layer in seen)
        self._old_sequences, self._old_batch_size = sequences, batch_size
        lengths = lengths_of(DocumentMask.of(before), sequences)
        self.flops = forward_flops(model_of(before)).of_all(lengths)

    def old_rows(self, step: int) -> Tensor:
        """Return the indices of the old sequences compared in a step: all in turn."""
        first = step * self._old_batch_size
        return torch.arange(first, first + self._old_batch_size) % len(self._old_sequences)

    def terms(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms of the last recorded forward pass, without their weights.

        Also stores the detached routing as `records`, and the load as `counts`. Padding is excluded
        from both.

        Args:
            batch: the batch of the pass; replayed rows do not count for new experts.
        """
        records = self._record_routing(batch["input_ids"])
        decided = ("own_logits", "logits", "probabilities")
        self.records = tuple(
            replace(r, **{name: getattr(r, name).detach() for name in decided}) for r in records
        )
        counts = [_expert_counts(r.selected, self.routing.num_experts) for r in records]
        self.counts = tuple(_sum_ranks(torch.stack(counts)))
        ranks = num_ranks()
        factor: Tensor | float = 1.0
        if ranks > 1:  # with padding, processes have different numbers of tokens
            factor = ranks * records[0].selected.numel() / self.counts[0].sum()
        terms = {
            "auxiliary_loss": factor
            * _mean(
                [
                    load_balancing_loss(r.logits, r.selected, counts=counts)
                    for r, counts in zip(records, self.counts, strict=True)
                ]
            ),
            "z_loss": factor * _mean([_router_z_loss(r.logits) for r in records]),
        }
        if self._new_experts:
            # Average over the new rows of a step, of all its batches and processes: some of them
            # may have none
            weights, window = self._new_tokens(batch), batch.get("window", [batch])
            total = torch.stack([self._new_tokens(each).sum() for each in window]).sum()
            mean = _sum_ranks(total) / (len(window) * num_ranks())
            weights = weights / mean.clamp(min=1e-6)
            masses = [
                new_expert_mass(r.logits, self._new_experts, weights=weights) for r in records
            ]
            terms["new_expert_mass"] = _mean(masses)
        return terms

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms, without `hold_old`."""
        loss = self.options.auxiliary_loss * terms["auxiliary_loss"]
        loss = loss + self.options.z_loss * terms["z_loss"]
        if "new_expert_mass" in terms:
            loss = loss - self._encouragement * terms["new_expert_mass"]
        return loss

    def loss(
        self, model: nn.Module, batch: Mapping[str, Any], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(batch)
        loss = self.weighted(terms)
        divergence = self.divergence(model, step)
        if divergence is not None:
            terms["old_divergence"] = divergence
            loss = loss + self.options.hold_old * divergence
        return loss, {f"routing/{name}": value for name, value in terms.items()}

    def step_flops(self, model: nn.Module) -> float:
        if not self.old_probabilities:
            return 0.0
        whole, trained = model_of(model), trained_tensors(model)
        flops = training_flops(
            whole, is_trained=lambda tensor: tensor.name in trained, loss_at="routers"
        )
        # Each process reads the same old data, which is counted once; the mean over all of it
        sequences = self._old_sequences
        mean = flops.of_all(lengths_of(self._document_mask, sequences)) / len(sequences)
        return self._old_batch_size * mean

    def callbacks(self) -> tuple[Callback, ...]:
        return (RoutingCallback(self),)

    def divergence(self, model: nn.Module, step: int) -> Tensor | None:
        """Return the divergence of old data from its old routing in nats per token, if enabled.

        It costs a forward and a backward pass over some old sequences.
        """
        if not self.old_probabilities:
            return None
        rows = self.old_rows(step)
        input_ids = self._old_sequences[rows].long().to(device_of(model))
        model(input_ids=input_ids, use_cache=False)
        kept, terms = self._select_tokens(input_ids), list[Tensor]()
        for probabilities, record in zip(
            self.old_probabilities, self._record_routing(input_ids), strict=True
        ):
            old = probabilities[rows].flatten(0, 1).to(input_ids.device)
            terms.append(_routing_divergence(old if kept is None else old[kept], record.logits))
        return _mean(terms)

    def _new_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return 1 for each token of new rows and 0 for replayed ones, without padding, [N]."""
        input_ids, is_replay = batch["input_ids"], batch.get("is_replay")
        is_new = torch.ones(len(input_ids), device=input_ids.device)
        if is_replay is not None:
            is_new = is_new.masked_fill(is_replay, 0)
        is_new, kept = is_new.repeat_interleave(input_ids.shape[1]), self._select_tokens(input_ids)
        return is_new if kept is None else is_new[kept]

    def _select_tokens(self, input_ids: Tensor) -> Tensor | None:
        """Return the mask of tokens that are not padding, bool [N·T]; None: there is no padding."""
        return (
            None
            if self._document_mask is None
            else ~self._document_mask.padding(input_ids).flatten()
        )

    def _record_routing(self, input_ids: Tensor) -> tuple[Record, ...]:
        """Return the routing recorded in the last pass, which read `input_ids`, without padding."""
        records, kept = tuple(self.routing.recorded()), self._select_tokens(input_ids)
        if kept is None:
            return records
        names = ("own_logits", "logits", "probabilities", "selected")
        return tuple(
            replace(r, **{name: getattr(r, name)[kept] for name in names}) for r in records
        )


class RoutingCallback(Callback):
    """Record the routing, log load statistics, and update the selection bias.

    Args:
        objective: the objective of the trained module.
    """

    is_of_weights = True  # offsets and biases, which are not among the saved weights

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
        is_taken = any(p.grad is not None for p in pl_module.parameters())  # the step
        if (rate := objective.options.bias_update_rate) and is_taken:
            loads = [sum(counts) for counts in zip(*self._counts, strict=True)]
            for record, load in zip(objective.records, loads, strict=True):
                bias = objective.routing.selection_bias(record.layer)
                moved = _bias_update(bias, load, rate=rate)
                objective.routing.set_selection_bias(record.layer, moved)
        self._counts.clear()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Means over the layers, for the batch of all processes
            factor = objective.options.capacity_factor
            layers = [
                _layer_statistics(record, counts=counts, capacity_factor=factor)
                for record, counts in zip(objective.records, objective.counts, strict=True)
            ]
            for name in layers[0]:
                pl_module.log(f"routing/{name}", sum(each[name] for each in layers) / len(layers))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._objective.routing.stop_recording()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        self._objective.routing.stop_recording()  # Lightning does not call teardown then

    def state_dict(self) -> dict[str, Any]:
        return {"routing": self._objective.routing.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._objective.routing.load_state_dict(state_dict["routing"])


def _sum_ranks(counts: Tensor) -> Tensor:
    """Return counts summed over all processes, in place."""
    if num_ranks() > 1:
        distributed.all_reduce(counts)
    return counts


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


# Losses on router logits, each a pure function of one layer's tensors.
#
# All of them start from raw logits: a softmax of a softmax would always be nearly uniform. They
# compute in float32, or float64 for float64 logits, and average over tokens.
#
# Shapes: N tokens, E experts, k experts per token. The tokens of several layers may be in one
# tensor, as in transformers, or each layer may have its own loss.


def load_balancing_loss(
    logits: Tensor, selected: Tensor, *, counts: Tensor | None = None
) -> Tensor:
    """Return E · Σ f_e · P_e, the load balancing loss (arXiv 2101.03961, eq. 4-6).

    f_e is the number of tokens sent to expert e divided by N, and P_e its mean probability; even
    routing gives k. The value equals that of transformers for the same tokens.

    Args:
        logits: [N, E].
        selected: int64 [N, k], the experts that the tokens were sent to.
        counts: int64 [E], the load of a larger batch that contains these tokens, in distributed
            training: the mean of the processes' losses is then that of the whole batch.
    """
    num_experts = logits.shape[-1]
    probabilities = _wide(logits).softmax(dim=-1)
    if counts is None:
        counts = torch.bincount(selected.flatten(), minlength=num_experts)
    load = counts.to(probabilities.dtype) * selected.shape[-1] / counts.sum()
    return num_experts * (load * probabilities.mean(dim=0)).sum()


def _router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean of (log Σ exp logits)², logits [N, E] (arXiv 2202.08906, equation 5)."""
    return _wide(logits).logsumexp(dim=-1).square().mean()


def _routing_divergence(old_probabilities: Tensor, logits: Tensor) -> Tensor:
    """Return KL(old ‖ new) in nats per token, the shift of a router.

    Experts that were added since have no old probability, so all of theirs counts as shift.

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
    """Return the mean probability of some experts together, from 0 to 1.

    Args:
        logits: [N, E].
        experts: their indices.
        weights: [N], weights of the tokens in the mean; default: 1/N each.
    """
    mass = _wide(logits).softmax(dim=-1)[:, list(experts)].sum(dim=-1)
    return mass.mean() if weights is None else (weights.to(mass.dtype) * mass).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# Load statistics of a model's routers.
#
# Shapes: N tokens, E experts, k experts per token.


def _layer_statistics(
    record: Record, *, counts: Tensor, capacity_factor: float
) -> dict[str, float]:
    """Return the use of one layer's experts over the tokens of a forward pass (a collective call).

    `entropy` is the mean entropy of the router's probabilities per token, in nats; 0 is certain.
    `max_load` is the largest load divided by the mean load; 1 is even, E/k is all to the same
    experts. `dropped_fraction` is the share of assignments that a limited capacity would drop.

    Args:
        record: routing of the layer in this process.
        counts: int64 [E], the load in all processes.
        capacity_factor: capacity of an expert relative to an even load. Stock models drop nothing:
            the statistic predicts the loss of a deployment with this limit.
    """
    probabilities = record.probabilities.detach()
    entropy = -_sum_ranks(torch.xlogy(probabilities, probabilities).sum())
    num_tokens = int(counts.sum()) / record.selected.shape[-1]
    return {
        "entropy": float(entropy) / num_tokens,
        "max_load": int(counts.max()) * len(counts) / int(counts.sum()),
        "dropped_fraction": _dropped_fraction(counts, capacity_factor=capacity_factor),
    }


def _expert_counts(selected: Tensor, num_experts: int) -> Tensor:
    """Return the number of tokens sent to each expert, int64 [E]; counts of batches add up.

    Args:
        selected: int64 [N, k].
        num_experts: E.
    """
    return torch.bincount(selected.flatten(), minlength=num_experts)


def _dropped_fraction(counts: Tensor, *, capacity_factor: float) -> float:
    """Return the share of all assignments beyond a capacity of ⌈factor · N · k / E⌉ per expert.

    Args:
        counts: [E], of the tokens that share the capacity.
        capacity_factor: capacity relative to an even load.
    """
    total = int(counts.sum())
    capacity = math.ceil(capacity_factor * total / len(counts))
    return int((counts - capacity).clamp(min=0).sum()) / total


def _bias_update(selection_bias: Tensor, load: Tensor, *, rate: float) -> Tensor:
    """Return the next selection bias: b + rate · sign(mean load − load) (arXiv 2408.15664, alg. 1).

    Args:
        selection_bias: [E].
        load: [E], counts or shares of the step's assignments.
        rate: u of the paper, in probability per step.
    """
    load = load.to(selection_bias.dtype)
    return selection_bias + rate * (load.mean() - load).sign()


def moe_usage(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the use of a MoE model's experts on the data of each domain.

    `usage` is [layer][expert] by domain: each expert's share of the assignments in a layer, without
    padding. `progress` is called with the number of sequences that are read, and the total.
    """
    routing = RouterControl.of(model)
    assert routing is not None
    shares, total, done = {}, sum(map(len, sequences.values())), 0
    with eval_mode(model) as device, routing.recording():
        for domain, of_domain in sequences.items():
            counts = torch.zeros(len(routing.layers), routing.num_experts)
            size = batch_that_fits(8, of_domain.shape[1], vocab_size_of(model))
            for batch in of_domain.split(size):
                input_ids = batch.long().to(device)
                model(input_ids=input_ids, use_cache=False)
                kept = kept_tokens(model, input_ids)
                for row, record in zip(counts, routing.recorded(), strict=True):
                    chosen = record.selected if kept is None else record.selected[kept.flatten()]
                    row += _expert_counts(chosen, routing.num_experts).cpu()
                done += len(batch)
                if progress is not None:
                    progress(done, total)
            shares[domain] = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    return {
        "number": routing.num_experts,
        "experts_per_token": routing.top_k,
        "layers": list(routing.layers),
        "usage": shares,
    }
