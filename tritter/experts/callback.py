"""Dynamic experts as a callback of a training: what is new gets an expert of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from tritter.data.apart import kept_tokens
from tritter.data.ranks import this_rank
from tritter.experts.adapters import AdapterShape, parameters_of, shape_of
from tritter.experts.changing import Changing
from tritter.experts.exemplars import Exemplars
from tritter.experts.figures import Figures, gradient_norms
from tritter.experts.losses import usage
from tritter.experts.module import ExpertModule
from tritter.experts.roster import FIRST, Novel, Roster
from tritter.families import forward_flops
from tritter.models import config_of
from tritter.novelty import Observation, observe
from tritter.novelty.observation import joined
from tritter.seeds import derived_seed
from tritter.training.work import WorkCount, ends_step

EXPERTS = "experts"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What the base knows already, for a training that no other went before.

    Args:
        batches: domain → batches [B, T] of its text, of the size that decisions will see.
        tokens: int64, all that is counted of it.
    """

    batches: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class ExpertCallback(Callback):
    """Look at every batch, decide what it is for, and change the mixture between two steps.

    Stands behind what counts the step that was taken, and before evaluations and what saves.

    Args:
        shape: of new experts.
        known: looked at before the first step, where nothing is known yet.
        skill: that all batches are told to be of; None: that is found out.
        domains: what the text is called, for the record.
        seed: of what new adapters are drawn from.
    """

    report_name = EXPERTS

    def __init__(
        self,
        roster: Roster,
        *,
        shape: AdapterShape,
        known: Known | None = None,
        skill: str | None = None,
        domains: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.roster = roster
        self._shape, self._known, self._skill = shape, known or Known(), skill
        self._domains, self._seed = tuple(domains), seed
        asked = roster.asked
        self._exemplars = Exemplars(asked.exemplars, seed=seed) if asked.rehearsal else None
        self.events: list[dict[str, Any]] = []
        self._figures = Figures()
        self._restored: Mapping[str, Any] | None = None
        self._aims: list[str | None] = []  # of the batches of a step
        self._losses: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.roster.load_state_dict(state["roster"])
            self.events = [dict(event) for event in state["events"]]
            self._figures.load_state_dict(state["figures"])
            self.take_up(state)
        elif not self.roster.expert_of:
            self._learn_what_is_known(trainer, _module(pl_module))
        self.roster.stay_within(_module(pl_module).mixture.adapters)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module, ids = _module(pl_module), batch["input_ids"]
        is_old = batch.get("is_replay", torch.zeros_like(ids[:, 0], dtype=torch.bool))
        own = ids[~is_old]
        everywhere = torch.cat(_of_all(own.cpu()))
        if len(everywhere):  # else old text alone, which nothing is said of
            self._see(trainer, module, own, everywhere)
        active = self.roster.active
        self._aims.append(active)
        is_young = active is not None and not self.roster.members[active].is_mature
        young = active if is_young and len(module.mixture.names) > 1 else None
        if young != module.young:
            module.young = young
            _work(trainer).count_anew()
        if active is not None and self._exemplars is not None:
            self._rehearse(batch, is_old)

    def _see(self, trainer: Trainer, module: ExpertModule, own: Tensor, everywhere: Tensor) -> None:
        """Find out what sequences are for.

        Args:
            own: [b, T] of this process; `everywhere` [N, T] of all.
        """
        roster = self.roster
        if self._skill is not None:
            expert = roster.tell(self._skill, everywhere)
        else:
            seen = _of_all(_observed(module, own) if len(own) else None)
            expert = roster.see(joined([each for each in seen if each]), everywhere)
            _work(trainer).flops += _looking_flops(module, *everywhere.shape)
        if expert is not None:
            self._take(module, expert, everywhere)

    def _take(self, module: ExpertModule, expert: str, sequences: Tensor) -> None:
        """Count sequences [N, T] as text of an expert, and keep some of them."""
        mixture = module.mixture
        if mixture.evidence is not None:
            mixture.evidence.count(mixture.names.index(expert), sequences.to(module.device))
        if self._exemplars is not None:
            self._exemplars.add(expert, sequences)

    def _rehearse(self, batch: dict[str, Tensor], is_old: Tensor) -> None:
        """Put text of other experts in the place of the last rows of a batch."""
        assert self._exemplars is not None and self.roster.active is not None
        rank, ids, held = this_rank(), batch["input_ids"], self._exemplars
        held.owed = min(held.owed + self.roster.asked.rehearsal * len(ids), float(len(ids)))
        count = int(held.owed)
        rows = held.sample(count * rank.count, without=self.roster.active)
        places = (~is_old).nonzero().flatten()
        places = places[len(places) - min(count, len(places) // 2) :]  # its own text is half of it
        held.owed -= count if len(rows) else 0  # in every process alike
        if len(rows) and len(places):
            ids, is_old = ids.clone(), is_old.clone()
            ids[places] = rows[rank.index :: rank.count][: len(places)].to(ids)
            is_old[places] = True
            batch["input_ids"], batch["is_replay"] = ids, is_old

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        module = _module(pl_module)
        active = self._aims[0] if len(set(self._aims)) == 1 else None
        if active is None:  # of the batches of a step all were for one, or none is trained on
            self.roster.batches["idle"] += len([each for each in self._aims if each is not None])
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(gradient_norms(module.mixture))
        # What gets no gradient is left alone by the optimizer, momentum and weight decay too
        for name in module.mixture.adapters:
            if name != active:
                for parameter in parameters_of(module.model, name).values():
                    parameter.grad = None
        if active is None:
            optimizer.zero_grad(set_to_none=True)
        self.roster.active = active

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = _module(pl_module)
        mixture = module.mixture
        self._losses.append(float(trainer.callback_metrics["train/loss"]))
        gates = module.gates
        own = usage(gates) if gates else torch.ones(len(mixture.names))
        mean = trainer.strategy.reduce(own.to(pl_module.device), reduce_op="mean").tolist()
        now = dict(zip(mixture.names, mean, strict=True))
        self._figures.note(now)
        if not ends_step(trainer, batch_idx):
            return
        loss = sum(self._losses) / len(self._losses)
        if math.isfinite(loss):  # else the step was refused
            self.roster.stepped(loss, now)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = self._figures.logged(mixture, gates, step=trainer.global_step)
            if self.roster.score is not None:
                values["experts/novelty"] = self.roster.score
            module.log_dict(values, sync_dist=True)
        self._aims, self._losses = [], []
        self._act(Changing(trainer, module), trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mixture = _module(pl_module).mixture
        members = self.roster.members
        mixture.extra = {
            "roster": self.roster.state_dict(),
            "usage": self.roster.usage(),
            "maturity": {name: member.is_mature for name, member in members.items()},
            "boundaries": self.roster.asked.boundaries,
            "frozen": [
                name
                for expert in mixture.adapters
                for name, parameter in parameters_of(mixture.model, expert).items()
                if not parameter.requires_grad
            ],
            "exemplars": None if self._exemplars is None else self._exemplars.state_dict(),
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Have the exemplars that a training before left, or this one before it was killed."""
        if self._exemplars is not None and state.get("exemplars") is not None:
            self._exemplars.load_state_dict(state["exemplars"])

    @property
    def exemplar_length(self) -> int:
        """Tokens of an exemplar; 0 where there are none."""
        return 0 if self._exemplars is None else self._exemplars.sequence_length

    def report(self) -> dict[str, Any]:
        """Return what became of the experts, as summary.json has it."""
        batches = dict(self.roster.batches)
        return {"events": self.events, "batches": batches, **self._figures.report()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "roster": self.roster.state_dict(),
            "events": self.events,
            "figures": self._figures.state_dict(),
            "exemplars": None if self._exemplars is None else self._exemplars.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads callbacks before on_fit_start, where the model has its experts again
        self._restored = state_dict

    def _learn_what_is_known(self, trainer: Trainer, module: ExpertModule) -> None:
        """Measure what the base knows, and count its tokens."""
        roster, known = self.roster, self._known
        if module.mixture.evidence is not None:
            number = module.mixture.names.index(FIRST)
            module.mixture.evidence.count(number, known.tokens.to(module.device))
        for domain, batches in known.batches.items():
            roster.expert_of[domain] = FIRST
            if roster.detector is not None:
                seen = [_observed(module, ids.to(module.device).long()) for ids in batches]
                roster.detector.add(domain, seen, is_base=True)
                for ids in batches:
                    _work(trainer).flops += _looking_flops(module, *ids.shape)

    def _act(self, changing: Changing, step: int) -> None:
        """Do what is due between two steps."""
        roster, module = self.roster, changing.module
        for name in roster.matured():
            self._note(step, "mature", name, f"trained for {roster.members[name].steps} steps")
        if roster.novel is not None:
            self._take_in(changing, roster.novel, step)
        elif roster.active is not None and roster.active in module.mixture.adapters:
            self._grow(changing, roster.active, step)
        if roster.routing != module.mixture.routing:
            module.mixture.routing = roster.routing
            _work(changing.trainer).count_anew()

    def _take_in(self, changing: Changing, novel: Novel, step: int) -> None:
        """Give a new skill an expert: one of its own, if it is worth one and there is room."""
        roster, mixture = self.roster, changing.module.mixture
        skill = self._skill or f"skill_{len(roster.expert_of)}_{step}"
        asked = roster.asked
        if novel.gain < asked.min_gain:
            roster.enrol(skill, FIRST)
            why = f"gains at most {novel.gain:.3f} nats, below experts.min_gain"
            self._note(step, "refused", FIRST, why)
            return
        obstacle = self._obstacle(changing)
        limit = asked.max_trainable_parameters
        is_of_use = limit is None or changing.parameters_beside_first(self._shape) <= limit
        is_of_use &= asked.when_full != "stop"
        while obstacle and is_of_use and len(mixture.adapters) > 1:
            self._make_room(changing, step)
            obstacle = self._obstacle(changing)
        if obstacle:
            heir = roster.nearest(novel)
            self._thaw(changing, heir)
            roster.enrol(skill, heir)
            self._take(changing.module, heir, novel.sequences)
            self._note(step, "refused", heir, f"{obstacle}; it learns the new skill too")
            return
        name = roster.next_name()
        changing.spawn(name, self._shape, seed=derived_seed(self._seed, name))
        skill = self._skill or name
        roster.enrol(skill, name)
        self._take(changing.module, name, novel.sequences)
        self._note(step, "spawned", name, "something new", **self._born(skill, novel))

    def _born(self, skill: str, novel: Novel) -> dict[str, Any]:
        """Return by what a new skill was found."""
        found: dict[str, Any] = {"skill": skill, "domain": ", ".join(self._domains)}
        if novel.decision is None or self.roster.detector is None:
            return found
        decision = novel.decision
        similarity = self.roster.detector.library[skill].similarity_at_creation
        return found | {
            "similarity": dict(similarity),
            "score": decision.score,
            "threshold": decision.threshold,
            "batches": decision.num_batches,
            "samples": decision.num_samples,
            "gain": novel.gain,
        }

    def _obstacle(self, changing: Changing) -> str:
        """Return why there is no room for another expert; empty: there is."""
        asked, mixture = self.roster.asked, changing.module.mixture
        if len(mixture.adapters) >= asked.max_experts:
            return f"experts.max_experts = {asked.max_experts} is reached"
        limit = asked.max_trainable_parameters
        if limit is not None and changing.parameters_with(self._shape) > limit:
            return f"experts.max_trainable_parameters = {limit:,} is reached"
        return ""

    def _make_room(self, changing: Changing, step: int) -> None:
        roster, mixture = self.roster, changing.module.mixture
        pair = roster.most_similar() if roster.asked.when_full == "merge" else None
        if pair is None:
            gone = roster.least_used()
            changing.evict(gone)
            roster.dismiss(gone)
            self._forget(gone, heir=None)
            self._note(step, "evicted", gone, "the least used, to make room")
            return
        kept, gone = pair
        weights = [max(roster.members[name].usage, 1e-6) for name in pair]
        lost = changing.merge(kept, gone, weights)
        if mixture.evidence is not None:
            numbers = [mixture.names.index(name) for name in pair]
            mixture.evidence.counts[numbers[0]] += mixture.evidence.counts[numbers[1]]
        self._thaw(changing, kept)
        changing.evict(gone)
        roster.dismiss(gone, heir=kept)
        self._forget(gone, heir=kept)
        why = f"the most similar, {gone} and {kept}, are one; {100 * lost:.0f} % of it is lost"
        self._note(step, "merged", kept, why, gone=gone)

    def _thaw(self, changing: Changing, name: str) -> None:
        if self.roster.members[name].is_frozen:
            changing.thaw(name)
            self.roster.thaw(name)

    def _forget(self, gone: str, *, heir: str | None) -> None:
        if self._exemplars is not None:
            self._exemplars.move(gone, heir=heir)

    def _grow(self, changing: Changing, name: str, step: int) -> None:
        """Let an expert that stalls have a larger rank, or be."""
        roster, model = self.roster, changing.module.model
        rank = shape_of(model, name).rank
        due = roster.stalled(rank)
        if due == "widen":
            limit = roster.asked.max_trainable_parameters
            if limit is not None and changing.parameters_widened(name) > limit:
                return
            changing.widen(name, 2 * rank, seed=derived_seed(self._seed, name, str(rank)))
            self._note(step, "widened", name, f"it stalled; rank {rank} → {2 * rank}")
        elif due == "freeze":
            member, parts = roster.members[name], roster.asked.freeze_projections
            member.is_frozen, member.is_whole = True, changing.freeze(name, parts)
            what = "it" if member.is_whole else " and ".join(parts or ())
            self._note(step, "frozen", name, f"it stalled at rank {rank}; {what} stays as it is")

    def _note(self, step: int, kind: str, expert: str, why: str, **more: Any) -> None:
        self.events.append({"step": step, "kind": kind, "expert": expert, "why": why, **more})


def _module(module: LightningModule) -> ExpertModule:
    assert isinstance(module, ExpertModule)
    return module


def _work(trainer: Trainer) -> WorkCount:
    return next(c for c in trainer.callbacks if isinstance(c, WorkCount))  # type: ignore[attr-defined]


def _observed(module: ExpertModule, ids: Tensor) -> Observation:
    """Return what the frozen base says of sequences [B, T]."""
    kept = kept_tokens(module.model, ids)
    mask = None if kept is None else kept.long()
    with module.mixture.off():
        return observe(module.model, ids, mask)


def _looking_flops(module: ExpertModule, number: int, length: int) -> float:
    return forward_flops(config_of(module.model)).of(length) * number


def _of_all(own: Any) -> list[Any]:
    """Return what each process holds, in the order of their ranks."""
    rank = this_rank()
    held = [own] * rank.count
    if rank.count > 1:
        distributed.all_gather_object(held, own)
    return held
