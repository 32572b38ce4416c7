"""The expert registry: the skills of each expert, its age, and the expert to train now.

It only decides, based on numbers that all processes share; `tritter.methods.experts.callback`
applies the decisions.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from tritter.methods.experts.gates import Routing
from tritter.methods.experts.options import DynamicOptions
from tritter.methods.novelty import NoveltyDetector, Observation
from tritter.methods.novelty.detectors import Decision
from tritter.methods.novelty.library import Versioned
from tritter.methods.novelty.statistics import Calibration, t_bounds

_USAGE_DECAY = 0.98

_Stall = Literal["", "widen", "freeze"]
_RECALIBRATED_AT = (8, 15, Calibration.full)  # batches of a new skill


@dataclass(slots=True, kw_only=True)
class _Member:
    """One expert.

    steps: number of its training steps.
    usage: moving average of its mean gate.
    losses: of its steps in the current stall window.
    before: those of the previous stall window.
    is_mature: it was trained for `maturity_steps`.
    is_frozen: it is frozen, at least in part.
    is_whole: it is frozen as a whole.
    domain: of the data that it was spawned on; empty if unknown.
    """

    steps: int = 0
    usage: float = 0.0
    losses: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    is_mature: bool = False
    is_frozen: bool = False
    is_whole: bool = False
    domain: str = ""

    @property
    def state(self) -> str:
        return "frozen" if self.is_frozen else "mature" if self.is_mature else "young"


class ExpertRegistry(Versioned):
    """Skills, experts, and the expert that the current batch is for.

    Args:
        options: the options of experts.
        max_steps: of the training run; schedules without a setting are shares of it.
        detector: with the skills known so far; None: boundaries are given.

    Attributes:
        new_sequences: int64 [N, T], the data so far of a skill to `assign`; None: there is none.
        decision: the decision that it is new; None if it was given by name.
    """

    state_name = "experts: a state"

    def __init__(
        self, options: DynamicOptions, *, max_steps: int, detector: NoveltyDetector | None
    ) -> None:
        self.options, self.detector = options, detector
        tenth, fifth = ceil(max_steps / 10), max(2, ceil(max_steps / 5))
        self._maturity = tenth if options.maturity_steps is None else options.maturity_steps
        self._anneal = tenth if options.anneal_steps is None else options.anneal_steps
        self._stall = fifth if options.stall_steps is None else options.stall_steps
        self.members: dict[str, _Member] = {self.options.first: _Member(is_mature=True)}
        self.expert_of: dict[str, str] = {}  # skill → expert
        self.counter = 1  # number of experts created so far
        self.settled_steps = 0  # steps since all experts are mature
        self.batches = dict.fromkeys(("known", "new", "unsure", "idle"), 0)
        self.active: str | None = None
        self.score: float | None = None  # novelty of the latest batch
        self.new_sequences: Tensor | None = None
        self.decision: Decision | None = None
        self._new_batches: tuple[Observation, ...] = ()  # that the decision is based on
        self._sequences: list[Tensor] = []  # of the batches of the detector's run
        self._young: dict[str, list[Observation]] = {}  # skill → batches to recalibrate it

    def observe(self, seen: Observation, sequences: Tensor) -> str | None:
        """Classify a batch, and choose the expert that it trains.

        Args:
            seen: losses and features of the batch under the base.
            sequences: int64 [N, T] of the batch.

        Returns:
            The expert whose data the batch is, if the decision is certain.
        """
        assert self.detector is not None
        decision = self.detector.observe(seen)
        self._sequences = [*self._sequences, sequences][-max(1, len(self.detector.run)) :]
        self.batches[decision.kind] += 1
        self.score = decision.score
        expert = self.expert_of.get(decision.skill, self.options.first)
        if decision.kind == "new":
            self.decision, self._new_batches = decision, self.detector.run
            self.new_sequences = torch.cat(self._sequences)
        self.activate(None if self.detector.is_run_new else expert)
        if decision.kind != "known":
            return None
        # Recalibrate a new skill as there are more samples than the burst that revealed it
        batches = self._young.get(decision.skill)
        if batches is not None:
            batches.append(seen)
            if len(batches) in _RECALIBRATED_AT:
                self.detector.recalibrate(decision.skill, batches)
            if len(batches) >= Calibration.full:
                del self._young[decision.skill]
        return expert

    def observe_named(self, skill: str, sequences: Tensor) -> str | None:
        """Choose the expert of a batch whose skill is known by name; see `observe`."""
        expert = self.expert_of.get(skill)
        if expert is None:
            self.new_sequences = sequences
        self.batches["new" if expert is None else "known"] += 1
        self.activate(expert)
        return expert

    def activate(self, expert: str | None) -> None:
        """Set the expert that the batch trains, or none."""
        self.active = None if expert is None or self.members[expert].is_whole else expert
        self.batches["idle"] += self.active is None

    def usage(self) -> dict[str, float]:
        """Return expert → share of the recent mean gates."""
        total = sum(member.usage for member in self.members.values()) or 1.0
        return {name: member.usage / total for name, member in self.members.items()}

    def record_step(self, loss: float, usage: Mapping[str, float]) -> None:
        """Record a step: its loss in nats per token, and the mean gate of each expert."""
        for name, member in self.members.items():
            member.usage = _USAGE_DECAY * member.usage + (1 - _USAGE_DECAY) * usage.get(name, 0.0)
        if self.active is not None:
            member = self.members[self.active]
            member.steps += 1
            if self.active != self.options.first:  # the first expert never stalls
                member.losses.append(loss)
        self.settled_steps = self.settled_steps + 1 if self.are_mature else 0

    def matured(self) -> list[str]:
        """Return the experts that have just become mature."""
        young = {name: each for name, each in self.members.items() if not each.is_mature}
        for each in young.values():
            each.is_mature = each.steps >= self._maturity
        return [name for name, each in young.items() if each.is_mature]

    def stalled(self, rank: int) -> _Stall:
        """Return the action for the active expert if it stalls: `widen`, `freeze` or none."""
        member = self.members[self.active or self.options.first]  # which never stalls
        if len(member.losses) < self._stall:
            return ""
        before, member.before, member.losses = member.before, member.losses, []
        if len(before) != len(member.before) or member.is_frozen:
            return ""
        falls = torch.tensor(before) - torch.tensor(member.before)
        is_widest, fall = 2 * rank > self.options.max_rank, float(falls.double().mean())
        # A frozen expert never learns again, so noise alone should not freeze it
        if is_widest:
            _, fall = t_bounds(falls, confidence=0.95)
        if fall >= self.options.stall_gain:
            return ""
        if is_widest:
            return "freeze" if self.options.freeze_converged else ""
        member.before = []  # start a new comparison
        return "widen"

    @property
    def are_mature(self) -> bool:
        return all(member.is_mature for member in self.members.values())

    @property
    def routing(self) -> Routing:
        """Routing of the next step: dense, then top-2, then `top_k`, at falling temperature."""
        options, anneal = self.options, self._anneal
        if not self.are_mature:
            return Routing(capacity_factor=options.capacity_factor)
        share = min(1.0, self.settled_steps / anneal) if anneal else 1.0
        top_k = options.top_k if share == 1.0 else max(2, options.top_k)
        temperature = 1 + share * (options.temperature - 1)
        return Routing(
            top_k=top_k, temperature=temperature, capacity_factor=options.capacity_factor
        )

    def next_name(self) -> str:
        """Return a new name for the next expert."""
        while (name := f"expert_{self.counter}") in {*self.members, *self.expert_of}:
            self.counter += 1
        self.counter += 1
        return name

    def assign(self, skill: str, expert: str) -> None:
        """Assign a skill to an expert, which may be new; the skill is known afterwards."""
        if expert not in self.members:
            self.members[expert] = _Member(is_mature=not self._maturity)
            self.settled_steps = 0
        self.expert_of[skill] = expert
        if self.detector is not None:
            self.detector.add(skill, self._new_batches)
            self._young[skill] = []
        self.new_sequences, self.decision = None, None

    def remove(self, expert: str, *, successor: str | None = None) -> None:
        """Remove an expert, and its skills unless an heir takes them."""
        del self.members[expert]
        for skill in [skill for skill, own in self.expert_of.items() if own == expert]:
            if successor is not None:
                self.expert_of[skill] = successor
                continue
            del self.expert_of[skill]
            self._young.pop(skill, None)
            if self.detector is not None:
                self.detector.library.remove(skill)

    def most_similar(self) -> tuple[str, str] | None:
        """Return the experts of the two most similar skills, the older first; None: no pair."""
        if self.detector is None:
            return None
        library = self.detector.library
        units = {
            skill: library[skill].embedding / library[skill].embedding.norm()
            for skill, expert in self.expert_of.items()
            if expert != self.options.first
        }
        pairs = [
            (float(units[one] @ units[two]), one, two)
            for number, one in enumerate(units)
            for two in list(units)[number + 1 :]
            if self.expert_of[one] != self.expert_of[two]
        ]
        if not pairs:
            return None
        _, one, two = max(pairs)
        order = list(self.members)
        first, second = sorted((self.expert_of[one], self.expert_of[two]), key=order.index)
        return first, second

    def nearest(self) -> str:
        """Return the expert that should learn the new skill: that of the most similar known skill.

        Frozen experts come after all others, and the expert of the base comes last.
        """
        by_skill = {} if self.decision is None else self.decision.by_skill
        distances = {
            self.expert_of[skill]: -by_skill[skill] for skill in by_skill if skill in self.expert_of
        }
        order = list(self.members)

        def suits(name: str) -> tuple[bool, bool, float, int]:
            near = distances.get(name, float("-inf"))
            is_other, is_free = name != self.options.first, not self.members[name].is_whole
            return (is_other, is_free, near, order.index(name))

        return max(order, key=suits)

    def thaw(self, name: str) -> None:
        """Unfreeze an expert, and reset its stall window."""
        member = self.members[name]
        member.is_frozen = member.is_whole = False
        member.losses, member.before = [], []

    def sync_with(self, names: Collection[str]) -> None:
        """Remove experts that a mixture does not have, and add those that it has."""
        for name in [name for name in self.members if name not in names]:
            self.remove(name)
        for name in names:
            self.members.setdefault(name, _Member(is_mature=True))

    def restart(self) -> None:
        """Reset the counts and the inconclusive batches of an earlier run."""
        self.batches = dict.fromkeys(self.batches, 0)
        self._sequences = []
        if self.detector is not None:
            self.detector.restart(keeps_cooldown=False)

    def state_dict(self) -> dict[str, Any]:
        """Return everything except options and schedules as plain values."""
        return {
            "format_version": self.format_version,
            "members": {name: asdict(member) for name, member in self.members.items()},
            "expert_of": dict(self.expert_of),
            "counter": self.counter,
            "settled_steps": self.settled_steps,
            "batches": dict(self.batches),
            "sequences": list(self._sequences),
            "young": {
                skill: [each.state_dict() for each in batches]
                for skill, batches in self._young.items()
            },
            "detector": None if self.detector is None else self.detector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.check_format(state)
        self.members = {
            name: _Member(**{key: each[key] for key in _Member.__slots__ if key in each})
            for name, each in deepcopy(state["members"]).items()
        }
        for member in self.members.values():  # earlier versions kept the mean of that window
            member.before = member.before if isinstance(member.before, list) else []
        self.expert_of = dict(state["expert_of"])
        self.counter = int(state["counter"])
        self.settled_steps = int(state["settled_steps"])
        self.batches = dict(state["batches"])
        self._sequences = list(state["sequences"])
        self._young = {
            skill: [Observation(**each) for each in batches]
            for skill, batches in state["young"].items()
        }
        if self.detector is not None and state["detector"] is not None:
            self.detector.load_state_dict(state["detector"])
