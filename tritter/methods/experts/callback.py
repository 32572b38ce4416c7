"""The callback of dynamic experts: every new skill gets its own expert; their usage on data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn

from tritter.checkpoints.expert_files import AdapterShape
from tritter.core.families import Flops, Model, forward_flops
from tritter.core.models import live_shape, model_of
from tritter.data.batches import num_ranks, this_rank
from tritter.data.chat import CONTEXT, ids_of
from tritter.data.packing import IGNORED, DocumentMask, MarkedText, kept_tokens, labels_of
from tritter.data.replay import Reservoir
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.losses import batch_that_fits, vocab_size_of
from tritter.methods.experts.adapters import Factors
from tritter.methods.experts.gates import Gates, usage
from tritter.methods.experts.mixture import ExpertMixture, mixture_on
from tritter.methods.experts.module import ExpertModule
from tritter.methods.experts.registry import ExpertRegistry
from tritter.methods.novelty import Observation, observe
from tritter.seeds import derived_seed
from tritter.training import surgery
from tritter.training.callbacks import WorkCount, ends_step


class ExpertCallback(Callback):
    """Inspect every batch, choose its expert, and change the mixture between steps.

    It runs after the callback that counts the step, and before evaluation and checkpointing.

    Args:
        registry: the expert registry.
        shape: size of new adapters.
        known: domain that the base knows → batches [B, T], in the size of later decisions; measured
            before the first step if no skill is known yet.
        known_tokens: int64, tokens of these domains that are counted as evidence then.
        skill: the skill of all batches, if it is given; None: skills are detected.
        domains: names of the data, for the records.
        seed: seed of new adapters.
    """

    report_name = "experts"

    def __init__(
        self,
        registry: ExpertRegistry,
        *,
        shape: AdapterShape,
        known: Mapping[str, Sequence[Tensor]] | None = None,
        known_tokens: Tensor | None = None,
        skill: str | None = None,
        domains: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.registry = registry
        self._shape, self._known, self._skill = shape, known or {}, skill
        self._known_tokens = known_tokens
        self._domains, self._seed = tuple(domains), seed
        options = registry.options
        self._exemplars = _Exemplars(options.exemplars, seed=seed) if options.rehearsal else None
        self.events: list[dict[str, Any]] = []
        self._usage_log = _UsageLog()
        self._restored: Mapping[str, Any] | None = None
        self._aims: list[str | None] = []  # of the batches of a step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (novelty := self.registry.detector) is not None:
            self._reads_losses, model = novelty.detector.reads_losses, _module(pl_module).model
            self._reading = _observation_flops(model_of(model), with_losses=self._reads_losses)
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.registry.load_state_dict(state["roster"])
            self.events = [dict(event) for event in state["events"]]
            self._usage_log.load_state_dict(state["figures"])
            self.load_exemplars(state)
        elif not self.registry.expert_of:  # measure the base's data and count its tokens
            registry, tokens, module = self.registry, self._known_tokens, _module(pl_module)
            if module.mixture.evidence is not None and tokens is not None:
                number = module.mixture.names.index(registry.options.first)
                module.mixture.evidence.count(number, tokens.to(module.device))
            for domain, batches in self._known.items():
                registry.expert_of[domain] = registry.options.first
                if registry.detector is not None:
                    on_device = [ids.to(module.device).long() for ids in batches]
                    seen = [self._observe(module, ids) for ids in on_device]
                    registry.detector.add(domain, seen, is_base=True)
                    WorkCount.of(trainer).flops += sum(map(self._flops_of, batches))
        self.registry.sync_with(_module(pl_module).mixture.adapters)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module, ids = _module(pl_module), batch["input_ids"]
        batch.pop("window", None)  # rows of each batch may be replaced: it is averaged alone
        is_old = batch.get("is_replay", torch.zeros_like(ids[:, 0], dtype=torch.bool))
        is_old_everywhere = _gather_rows(is_old)
        everywhere = _gather_rows(ids)[~is_old_everywhere]
        expert = None  # if all rows are replayed
        if len(everywhere) and self._skill is not None:
            expert = self.registry.observe_named(self._skill, everywhere)
        elif len(everywhere):
            local = None if is_old.all() else self._observe(module, ids[~is_old])
            seen = Observation.concatenated([each for each in _gather_ranks(local) if each])
            # In the order of `everywhere`: a new skill is measured on the halves of its batch
            ranks = (~is_old_everywhere).nonzero()[:, 0] % num_ranks()
            order = ranks.argsort(stable=True).argsort()
            expert = self.registry.observe(seen.rows(order), everywhere)
            WorkCount.of(trainer).flops += self._flops_of(everywhere)
        if expert is not None:
            self._add_sequences(module, expert, everywhere)
        active = self.registry.active
        self._aims.append(active)
        is_young = active is not None and not self.registry.members[active].is_mature
        young = active if is_young and len(module.mixture.names) > 1 else None
        if young != module.young:
            module.young = young
            WorkCount.of(trainer).reset_step_flops()
        if active is not None and self._exemplars is not None:
            self._rehearse(batch, is_old, is_old_everywhere)
        if active is not None:
            _limit_beginnings(module, batch)

    def _observe(self, module: ExpertModule, ids: Tensor) -> Observation:
        """Return features, and losses if needed, of sequences [B, T] under the frozen base."""
        kept, reads_losses = kept_tokens(module.model, ids), self._reads_losses
        mask = None if kept is None else kept.long()
        reading = MarkedText.of(module.model)
        has_starts = reading is not None and bool(reading.bounds.start)
        labels = labels_of(module.model, ids) if has_starts else None
        with module.mixture.off(), module.trainer.precision_plugin.forward_context():
            return observe(module.model, ids_of(ids), mask, labels=labels, with_losses=reads_losses)

    def _flops_of(self, ids: Tensor) -> float:
        """Return the FLOPs of observing sequences [B, T]."""
        return self._reading.of(ids.shape[1]) * len(ids)

    def _add_sequences(self, module: ExpertModule, expert: str, sequences: Tensor) -> None:
        """Count sequences [N, T] as evidence for an expert, and keep some as exemplars."""
        mixture = module.mixture
        if mixture.evidence is not None:
            mixture.evidence.count(mixture.names.index(expert), sequences.to(module.device))
        if self._exemplars is not None:
            self._exemplars.add(expert, sequences)

    def _rehearse(
        self, batch: dict[str, Tensor], is_old: Tensor, is_old_everywhere: Tensor
    ) -> None:
        """Replace the last new rows of the batch of all processes by exemplars of other experts."""
        assert self._exemplars is not None and self.registry.active is not None
        ids, exemplars = batch["input_ids"], self._exemplars
        size = len(is_old_everywhere)
        exemplars.owed = min(exemplars.owed + self.registry.options.rehearsal * size, float(size))
        count = int(exemplars.owed)
        rows = exemplars.sample(count, without=self.registry.active)
        positions = (~is_old_everywhere).nonzero().flatten()
        most = min(count, len(positions) // 2)  # at least half of the new rows stay
        positions = positions[len(positions) - most :]
        exemplars.owed -= count if len(rows) else 0  # equal in every process
        if len(rows) and len(positions):
            is_own = positions % num_ranks() == this_rank()
            positions = positions[is_own] // num_ranks()
            ids, is_old = ids.clone(), is_old.clone()
            ids[positions] = rows[: len(is_own)][is_own].to(ids)
            is_old[positions] = True
            batch["input_ids"], batch["is_replay"] = ids, is_old

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        module = _module(pl_module)
        active = self._aims[0] if len(set(self._aims)) == 1 else None
        if active is None:  # train only if all batches of the step are for one expert
            self.registry.batches["idle"] += len([each for each in self._aims if each is not None])
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name in module.mixture.adapters:
                own = module.mixture.lora.parameters(name).values()
                norm = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
                pl_module.log(f"experts/gradient_norm/{name}", float(norm))
        # The optimizer skips parameters without gradient, including momentum and weight decay
        for name in module.mixture.adapters:
            if name != active:
                for parameter in module.mixture.lora.parameters(name).values():
                    parameter.grad = None
        if active is None:
            optimizer.zero_grad(set_to_none=True)
        self.registry.active = active

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _module(pl_module)
        mixture = module.mixture
        gates = module.gates
        own = module.share * usage(gates) if gates else torch.ones(len(mixture.names))
        mean = trainer.strategy.reduce(own.to(pl_module.device), reduce_op="mean").tolist()
        now = dict(zip(mixture.names, mean, strict=True))
        self._usage_log.note(now)
        if not ends_step(trainer, batch_idx):
            return
        loss = float(trainer.callback_metrics["train/loss"])
        if math.isfinite(loss):  # otherwise the step was skipped
            self.registry.record_step(loss, now)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = self._usage_log.logged(mixture, gates, step=trainer.global_step)
            if gates:
                values["experts/routing_entropy"] *= module.share
            if self.registry.score is not None:
                values["experts/novelty"] = self.registry.score
            module.log_dict(values, sync_dist=True)
        self._aims = []
        # Changes between two steps
        registry = self.registry
        for name in registry.matured():
            why = f"trained for {registry.members[name].steps} steps"
            self._record_event(trainer, "mature", name, why)
        if registry.new_sequences is not None:
            self._assign_expert(trainer, module, registry.new_sequences)
        elif registry.active is not None and registry.active in mixture.adapters:
            self._grow(trainer, module, registry.active)
        if registry.routing != mixture.routing:
            mixture.routing = registry.routing
            WorkCount.of(trainer).reset_step_flops()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mixture = _module(pl_module).mixture
        members = self.registry.members
        mixture.extra = {
            "roster": self.registry.state_dict(),
            "usage": self.registry.usage(),
            "maturity": {name: member.is_mature for name, member in members.items()},
            "boundaries": self.registry.options.boundaries,
            "frozen": [
                name
                for expert in mixture.adapters
                for name, parameter in mixture.lora.parameters(expert).items()
                if not parameter.requires_grad
            ],
            "exemplars": None if self._exemplars is None else self._exemplars.state_dict(),
        }

    def load_exemplars(self, state: Mapping[str, Any]) -> None:
        """Load the exemplars of an earlier run, or of this run before an interruption."""
        if self._exemplars is not None and state.get("exemplars") is not None:
            self._exemplars.load_state_dict(state["exemplars"])

    @property
    def exemplar_length(self) -> int:
        """Tokens of an exemplar; 0 if there are none."""
        return 0 if self._exemplars is None else self._exemplars.sequence_length

    def report(self) -> dict[str, Any]:
        """Return the report of experts, in the format of summary.json."""
        first, members = self.registry.options.first, self.registry.members
        members = {name: each for name, each in members.items() if name != first}
        return {
            "events": self.events,
            "batches": dict(self.registry.batches),
            "domains": {name: each.domain for name, each in members.items() if each.domain},
            "states": {name: each.state for name, each in members.items()},
            **self._usage_log.report(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "roster": self.registry.state_dict(),
            "events": self.events,
            "figures": self._usage_log.state_dict(),
            "exemplars": None if self._exemplars is None else self._exemplars.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads callbacks before on_fit_start, which restores the experts of the model
        self._restored = state_dict

    def _assign_expert(self, trainer: Trainer, module: ExpertModule, sequences: Tensor) -> None:
        """Assign an expert to a new skill: a new expert if there is room, else the nearest."""
        registry, mixture, lora = self.registry, module.mixture, module.mixture.lora
        options, decision = registry.options, registry.decision
        skill = self._skill or f"skill_{len(registry.expert_of)}_{trainer.global_step}"
        limit, first = options.max_trainable_parameters, mixture.adapters[0]
        new = lora.num_parameters(first) // lora.shape(first).rank * self._shape.rank

        def obstacle() -> str:
            """Return the limit that prevents another expert; empty if there is none."""
            if len(mixture.adapters) >= options.max_experts:
                return f"experts.max_experts = {options.max_experts} is reached"
            if limit is not None and lora.num_parameters(*mixture.adapters) + new > limit:
                return f"experts.max_trainable_parameters = {limit:,} is reached"
            return ""

        is_of_use = limit is None or lora.num_parameters(first) + new <= limit
        is_of_use &= options.when_full != "stop"
        while (why := obstacle()) and is_of_use and len(mixture.adapters) > 1:
            self._make_room(trainer, module)
        if why:
            successor = registry.nearest()
            self._thaw(trainer, module, successor)
            registry.assign(skill, successor)
            self._add_sequences(module, successor, sequences)
            why = f"{why}; it also learns the new skill"
            self._record_event(trainer, "refused", successor, why)
            return
        name = registry.next_name()
        mixture.open(name, self._shape, seed=derived_seed(self._seed, name))
        surgery.apply(trainer, module, mixture.spawn_change(name), reason="spawned")
        skill = self._skill or name
        registry.assign(skill, name)
        registry.members[name].domain = domain = ", ".join(self._domains)
        self._add_sequences(module, name, sequences)
        found: dict[str, Any] = {"skill": skill, "domain": domain}
        if decision is not None and registry.detector is not None:
            found |= {
                "similarity": dict(registry.detector.library[skill].similarity_at_creation),
                "score": decision.score,
                "threshold": decision.threshold,
                "batches": decision.num_batches,
                "samples": decision.num_samples,
            }
        self._record_event(trainer, "spawned", name, "new skill", **found)

    def _make_room(self, trainer: Trainer, module: ExpertModule) -> None:
        """Remove the least used expert, or merge the two most similar."""
        registry, mixture = self.registry, module.mixture
        pair = registry.most_similar() if registry.options.when_full == "merge" else None
        if pair is None:
            first, members = registry.options.first, registry.members
            others = {name: each.usage for name, each in members.items() if name != first}
            gone = min(others, key=others.__getitem__)
            self._evict(trainer, module, gone, successor=None)
            self._record_event(trainer, "evicted", gone, "least used expert, removed to make room")
            return
        kept, gone = pair
        weights = [max(registry.members[name].usage, 1e-6) for name in pair]
        weights = [weight / sum(weights) for weight in weights]
        (optimizer,), shape, lost = trainer.optimizers, mixture.lora.shape(kept), []
        for _, layer in mixture.lora:
            both = [each for name in pair if (each := Factors.of(layer, name)) is not None]
            if len(both) < 2:
                continue
            one = Factors.merged(both, weights, rank=shape.rank, alpha=shape.alpha)
            lost.append(one.lost_share(both, weights))
            for parameter, value in ((both[0].down, one.down), (both[0].up, one.up)):
                with torch.no_grad():
                    parameter.copy_(value)
                optimizer.state.pop(parameter, None)  # its moments belong to the old factors
        if mixture.evidence is not None:
            numbers = [mixture.names.index(name) for name in pair]
            mixture.evidence.counts[numbers[0]] += mixture.evidence.counts[numbers[1]]
        self._thaw(trainer, module, kept)
        self._evict(trainer, module, gone, successor=kept)
        share = 100 * sum(lost) / max(1, len(lost))
        why = f"{gone} and {kept} were the most similar; {share:.0f} % of their sum is lost"
        self._record_event(trainer, "merged", kept, why, gone=gone)

    def _thaw(self, trainer: Trainer, module: ExpertModule, name: str) -> None:
        if self.registry.members[name].is_frozen:
            own = module.mixture.lora.parameters(name)
            frozen = [key for key in own if not own[key].requires_grad]
            surgery.set_trained(trainer, module, frozen, is_trained=True)
            self.registry.thaw(name)

    def _evict(
        self, trainer: Trainer, module: ExpertModule, gone: str, *, successor: str | None
    ) -> None:
        """Remove an expert, with its exemplars and skills unless an heir takes them."""
        surgery.apply(trainer, module, module.mixture.evict_change(gone), reason="evicted")
        module.mixture.close(gone)
        self.registry.remove(gone, successor=successor)
        if self._exemplars is not None:
            self._exemplars.move(gone, successor=successor)

    def _grow(self, trainer: Trainer, module: ExpertModule, name: str) -> None:
        """Widen or freeze an expert that has stalled."""
        registry, mixture, lora = self.registry, module.mixture, module.mixture.lora
        rank = lora.shape(name).rank
        due = registry.stalled(rank)
        if due == "widen":
            limit = registry.options.max_trainable_parameters
            if limit is not None and lora.num_parameters(*mixture.adapters, name) > limit:
                return
            seed = derived_seed(self._seed, name, str(rank))
            change = mixture.widen_change(name, 2 * rank, seed=seed)
            surgery.apply(trainer, module, change, reason="widened")
            lora.set_rank(name, 2 * rank)
            self._record_event(trainer, "widened", name, f"stalled; rank {rank} → {2 * rank}")
        elif due == "freeze":
            member, parts = registry.members[name], registry.options.freeze_projections
            own = lora.parameters(name)
            chosen = [
                key for key in own if parts is None or any(f".{each}." in key for each in parts)
            ]
            surgery.set_trained(trainer, module, chosen, is_trained=False)
            member.is_frozen, member.is_whole = True, len(chosen) == len(own)
            what = "it" if member.is_whole else " and ".join(parts or ())
            self._record_event(trainer, "frozen", name, f"stalled at rank {rank}; {what} is frozen")

    def _record_event(
        self, trainer: Trainer, kind: str, expert: str, why: str, **more: Any
    ) -> None:
        record = {"step": trainer.global_step, "kind": kind, "expert": expert, "why": why}
        self.events.append(record | more)


def _module(module: LightningModule) -> ExpertModule:
    assert isinstance(module, ExpertModule)
    return module


def _limit_beginnings(module: ExpertModule, batch: dict[str, Tensor]) -> None:
    """Predict the first token of only some new documents: 1/n of all beginnings, for n experts.

    Only there, the tokens do not identify an expert, so all experts share one prediction. With
    more beginnings of its own, an expert would take over the shares of all others.
    """
    ids, is_old = batch["input_ids"], batch.get("is_replay")
    document_mask = DocumentMask.of(module.model)
    if is_old is None or document_mask is None:  # a stream: earlier documents are read
        return
    is_first = document_mask.positions(ids) == len(document_mask.bounds.prefix)
    is_first &= labels_of(module.model, ids) != IGNORED
    everywhere = _gather_rows(is_first)
    new = (everywhere & ~_gather_rows(is_old).unsqueeze(1)).nonzero()  # [N, 2]
    num_new, num_old = len(new), int(everywhere.sum()) - len(new)
    kept = max(1, round(num_old / max(1, len(module.mixture.names) - 1)))
    if num_old and kept < num_new:
        is_own = new[:, 0] % num_ranks() == this_rank()
        is_own[torch.arange(kept) * num_new // kept] = False
        rows, columns = new[is_own].T
        batch["input_ids"] = ids.clone()
        batch["input_ids"][rows // num_ranks(), columns] |= CONTEXT


def _observation_flops(model: Model, *, with_losses: bool) -> Flops:
    if with_losses:
        return forward_flops(model)
    layers, head = model.sizes.num_hidden_layers, model.sizes.hidden_size * model.sizes.vocab_size
    half = forward_flops(model.with_layers(range(-(-layers // 2))))
    return replace(half, matrices=half.matrices - 2 * head)


def _gather_ranks(own: Any) -> list[Any]:
    """Return the values of all processes, in rank order."""
    gathered = [own] * num_ranks()
    if len(gathered) > 1:
        distributed.all_gather_object(gathered, own)
    return gathered


def _gather_rows(own: Tensor) -> Tensor:
    """Return the rows of all processes on the CPU, in the order of a batch of one process."""
    return torch.stack(_gather_ranks(own.cpu()), dim=1).flatten(0, 1)


class _UsageLog:
    """Collects mean gates between two log entries, and gates and ranks over time."""

    def __init__(self) -> None:
        self._usage: dict[str, list[float]] = {}  # since the last log entry
        self._over_time: dict[str, Any] = {"steps": [], "usage": [], "ranks": []}

    def note(self, usage: Mapping[str, float]) -> None:
        """Add the mean gate of each expert in a batch."""
        for name, value in usage.items():
            self._usage.setdefault(name, []).append(value)

    def logged(
        self, mixture: ExpertMixture, gates: Sequence[Gates], *, step: int
    ) -> dict[str, float]:
        """Return the metrics since the last entry, and start the next entry."""
        model, times = mixture.model, self._over_time
        means = {n: sum(v) / len(v) for n, v in self._usage.items() if n in mixture.names}
        ranks = {name: mixture.lora.shape(name).rank for name in mixture.adapters}
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
            entropy = torch.stack([each.entropy_loss().detach() for each in gates])
            values["experts/routing_entropy"] = float(entropy.mean())
            values["experts/dropped"] = sum(each.dropped for each in gates) / len(gates)
        return values

    def report(self) -> dict[str, Any]:
        """Return gates and ranks over time, as in summary.json; null before an expert existed."""
        times, found = self._over_time, {}
        for kind, unit in (("usage", "gates"), ("ranks", "ranks")):
            names = dict.fromkeys(name for row in times[kind] for name in row)
            values = {name: [row.get(name) for row in times[kind]] for name in names}
            found[f"{kind}_over_time"] = {"steps": times["steps"], unit: values}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"usage": self._usage, "over_time": self._over_time}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._usage = {name: list(each) for name, each in state["usage"].items()}
        self._over_time = {name: list(each) for name, each in state["over_time"].items()}


def expert_usage(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the experts of a model, and the mean gate of each on the data of each domain.

    Args:
        model: the model, with a mixture.
        sequences: domain → int64 [N, T].
        progress: called with the number of sequences that are read, and the total.
    """
    mixture = mixture_on(model)
    assert mixture is not None
    total, done = sum(map(len, sequences.values())), 0
    by_domain: dict[str, dict[str, float]] = {}
    with eval_mode(model) as device:
        for domain, ids in sequences.items():
            gates, number = torch.zeros(len(mixture.names), dtype=torch.float64), 0
            for rows in ids.split(batch_that_fits(8, ids.shape[1], vocab_size_of(model))):
                kept = kept_tokens(model, rows.to(device))
                model(input_ids=rows.to(device), use_cache=False)
                num_kept = rows.numel() if kept is None else int(kept.sum())
                gates += usage(mixture.gates(kept)).double().cpu() * num_kept
                number += num_kept
                done += len(rows)
                if progress is not None:
                    progress(done, total)
            by_domain[domain] = dict(zip(mixture.names, (gates / number).tolist(), strict=True))
    num_routing = sum(p.numel() for router in mixture.routers() for p in router.parameters())
    named = model.named_parameters()
    num_base = sum(prod(live_shape(p)) for n, p in named if ".lora_" not in n) - num_routing
    trainable = mixture.lora.num_parameters(*mixture.adapters) + num_routing
    return {
        "number": len(mixture.adapters),
        "names": list(mixture.names),
        "usage": by_domain,
        "ranks": {name: mixture.lora.shape(name).rank for name in mixture.adapters},
        "parameters": {
            "base": num_base,
            "trainable": trainable,
            "share": trainable / (num_base + trainable),
        },
        "routing": {
            "router": mixture.router,
            "top_k": mixture.routing.top_k,
            "temperature": mixture.routing.temperature,
        },
    }


# A few sequences of each expert's data, rehearsed while others learn.
#
# At the start of a sequence the skill is not yet known, so all experts contribute. Training one
# expert there would change the output on data of the others; a few exemplars prevent it.


class _Exemplars:
    """A reservoir sample of sequences for each expert."""

    def __init__(self, capacity: int, *, seed: int) -> None:
        self.capacity, self._seed = capacity, seed
        self._reservoirs: dict[str, Reservoir] = {}
        self._turn = 0
        self.owed = 0.0  # fractional rows that are still due

    def add(self, expert: str, sequences: Tensor) -> None:
        """Add sequences [N, T] of an expert's data to its reservoir."""
        if expert not in self._reservoirs:
            own = derived_seed(self._seed, "exemplars", expert)
            self._reservoirs[expert] = Reservoir(self.capacity, seed=own)
        self._reservoirs[expert].add(sequences)

    def sample(self, count: int, *, without: str) -> Tensor:
        """Return sequences of all other experts in turn, int64 [count, T]; empty if none exist."""
        others = [name for name in self._reservoirs if name != without]
        if not others or not count:
            return torch.empty(0, 0, dtype=torch.int64)
        turns = [others[(self._turn + number) % len(others)] for number in range(count)]
        self._turn += count
        return torch.cat([self._reservoirs[name].next_sequences(1) for name in turns])

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence; 0 if there are none."""
        return max((each.sequence_length for each in self._reservoirs.values()), default=0)

    def move(self, expert: str, *, successor: str | None) -> None:
        """Remove the exemplars of an expert, or pass them to an heir."""
        gone = self._reservoirs.pop(expert, None)
        if gone is not None and successor is not None:
            self.add(successor, gone.sequences)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain containers and tensors."""
        return {
            "held": {name: each.state_dict() for name, each in self._reservoirs.items()},
            "turn": self._turn,
            "owed": self.owed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, up to the current capacity."""
        self._reservoirs, self._turn = {}, int(state["turn"])
        self.owed = float(state["owed"])
        for name, each in state["held"].items():
            own = derived_seed(self._seed, "exemplars", name)
            self._reservoirs[name] = Reservoir(self.capacity, seed=own)
            if len(each["sequences"]) > self.capacity:  # the capacity is smaller now
                self._reservoirs[name].add(each["sequences"])
            else:
                self._reservoirs[name].load_state_dict(each)
