"""Who is who among a run's experts: which skill is whose, how old each is, what is trained now.

Decisions only, on numbers that all processes share; `tritter.methods.experts.callback` carries them
out.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from tritter.methods.experts.gates import Routing
from tritter.methods.experts.options import FIRST, DynamicOptions, Timing
from tritter.methods.novelty import NoveltyDetector, Observation
from tritter.methods.novelty.detectors import Decision
from tritter.methods.novelty.library import FORMAT_VERSION, check_format
from tritter.methods.novelty.statistics import CALIBRATION_BATCHES

_USAGE_DECAY = 0.98

Stall = Literal["", "widen", "freeze"]


@dataclass(slots=True, kw_only=True)
class Member:
    """One expert.

    Args:
        steps: that it was trained.
        usage: moving average of its mean gate.
        losses: of its steps since the last look at whether it stalls; `before` the mean then.
        is_frozen: it is trained no more, at least in part.
        is_whole: nothing of a frozen one is trained.
    """

    steps: int = 0
    usage: float = 0.0
    losses: list[float] = field(default_factory=list)
    before: float | None = None
    is_mature: bool = False
    is_frozen: bool = False
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Novel:
    """A skill that was found new.

    Args:
        decision: None where it was told; `batches` are those that it rests on.
        sequences: int64 [N, T] of these.
        gain: nats per token that the base finds it harder than the text it knows.
    """

    decision: Decision | None
    sequences: Tensor
    gain: float
    batches: tuple[Observation, ...] = ()


class ExpertRegistry:
    """Skills, experts, and what the batch at hand is for.

    Args:
        asked: the options of experts.
        timing: its schedules.
        detector: with what is known so far; None: boundaries are told.
    """

    def __init__(
        self, asked: DynamicOptions, *, timing: Timing, detector: NoveltyDetector | None
    ) -> None:
        self.asked, self.timing, self.detector = asked, timing, detector
        self.members: dict[str, Member] = {FIRST: Member(is_mature=True)}
        self.expert_of: dict[str, str] = {}  # skill → expert
        self.counter = 1  # experts that ever were
        self.settled_steps = 0  # since all experts are mature
        self.batches = dict.fromkeys(("known", "new", "unsure", "idle"), 0)
        self.active: str | None = None
        self.score: float | None = None  # novelty of the latest batch
        self.novel: Novel | None = None
        self._sequences: list[Tensor] = []  # of the batches of the detector's run
        self._young: dict[str, list[Observation]] = {}  # batches that a new skill is measured by

    def see(self, seen: Observation, sequences: Tensor) -> str | None:
        """Take what the base says of a batch; set what it is for.

        Args:
            sequences: int64 [N, T] of the batch.

        Returns:
            The expert whose text the batch is, where that is sure.
        """
        assert self.detector is not None
        decision = self.detector.observe(seen)
        self._sequences = [*self._sequences, sequences][-max(1, len(self.detector.run)) :]
        self.batches[decision.kind] += 1
        self.score = decision.score
        expert = self.expert_of.get(decision.skill, FIRST)
        if decision.kind == "new":
            known = [skill.loss.mean for skill in self.detector.library if skill.is_base]
            run = self.detector.run
            gain = float(torch.cat([each.losses for each in run]).mean()) - fmean(known)
            self.novel = Novel(
                decision=decision,
                sequences=torch.cat(self._sequences),
                gain=gain,
                batches=run,
            )
        self.aim(None if self.detector.is_run_new else expert)
        if decision.kind != "known":
            return None
        # A new skill is measured again once there is more of it than the burst it was found in
        held = self._young.get(decision.skill)
        if held is not None:
            held.append(seen)
            if len(held) >= CALIBRATION_BATCHES:
                self.detector.recalibrate(decision.skill, held)
                del self._young[decision.skill]
        return expert

    def tell(self, skill: str, sequences: Tensor) -> str | None:
        """Take the name of the skill that a batch is of; see `see`."""
        expert = self.expert_of.get(skill)
        if expert is None:
            self.novel = Novel(decision=None, sequences=sequences, gain=float("inf"))
        self.batches["new" if expert is None else "known"] += 1
        self.aim(expert)
        return expert

    def aim(self, expert: str | None) -> None:
        """Let a batch train an expert, or none."""
        is_trained = expert is not None and not self.members[expert].is_whole
        self.active = expert if is_trained else None
        self.batches["idle"] += self.active is None

    def usage(self) -> dict[str, float]:
        """Return expert → mean gate of the last steps: averages that began at 0, as shares of 1."""
        total = sum(member.usage for member in self.members.values()) or 1.0
        return {name: member.usage / total for name, member in self.members.items()}

    def stepped(self, loss: float, usage: Mapping[str, float]) -> None:
        """Take note of a step: its loss, nats per token, and the mean gate of each expert."""
        for name, member in self.members.items():
            now = usage.get(name, 0.0)
            member.usage = _USAGE_DECAY * member.usage + (1 - _USAGE_DECAY) * now
        if self.active is not None:
            member = self.members[self.active]
            member.steps += 1
            if self.active != FIRST:  # of which nobody asks whether it stalls
                member.losses.append(loss)
        self.settled_steps = self.settled_steps + 1 if self.are_mature else 0

    def matured(self) -> list[str]:
        """Return who became mature just now."""
        found = []
        for name, member in self.members.items():
            if not member.is_mature and member.steps >= self.timing.maturity:
                member.is_mature = True
                found.append(name)
        return found

    def stalled(self, rank: int) -> Stall:
        """Return what is to be done about the active expert, of a rank, if it gains no more."""
        if self.active in (None, FIRST):
            return ""
        assert self.active is not None
        member = self.members[self.active]
        if len(member.losses) < self.timing.stall:
            return ""
        mean, before = fmean(member.losses), member.before
        member.losses, member.before = [], mean
        if before is None or before - mean >= self.asked.stall_gain or member.is_frozen:
            return ""
        if 2 * rank <= self.asked.max_rank:
            member.before = None  # it is another expert from here on
            return "widen"
        return "freeze" if self.asked.freeze_converged else ""

    @property
    def are_mature(self) -> bool:
        return all(member.is_mature for member in self.members.values())

    @property
    def routing(self) -> Routing:
        """How gates are made in the next step: dense, then top-2, then `top_k`, ever colder."""
        asked, anneal = self.asked, self.timing.anneal
        if not self.are_mature:
            return Routing(capacity_factor=asked.capacity_factor)
        share = min(1.0, self.settled_steps / anneal) if anneal else 1.0
        top_k = asked.top_k if share == 1.0 else max(2, asked.top_k)
        temperature = 1 + share * (asked.temperature - 1)
        return Routing(top_k=top_k, temperature=temperature, capacity_factor=asked.capacity_factor)

    def next_name(self) -> str:
        """Return the name of the next expert, which no other ever had."""
        while (name := f"expert_{self.counter}") in {*self.members, *self.expert_of}:
            self.counter += 1
        self.counter += 1
        return name

    def enrol(self, skill: str, expert: str) -> None:
        """Let a skill be an expert's, maybe a new one's; it is known from here on."""
        assert self.novel is not None
        if expert not in self.members:
            self.members[expert] = Member(is_mature=not self.timing.maturity)
            self.settled_steps = 0
        self.expert_of[skill] = expert
        if self.detector is not None:
            self.detector.add(skill, self.novel.batches)
            self._young[skill] = []
        self.novel = None

    def dismiss(self, expert: str, *, heir: str | None = None) -> None:
        """Forget an expert, with its skills unless there is an heir to them."""
        del self.members[expert]
        for skill in [skill for skill, own in self.expert_of.items() if own == expert]:
            if heir is not None:
                self.expert_of[skill] = heir
                continue
            del self.expert_of[skill]
            self._young.pop(skill, None)
            if self.detector is not None:
                self.detector.library.remove(skill)

    def most_similar(self) -> tuple[str, str] | None:
        """Return two experts, the older first, whose skills are most alike; None: there are not."""
        if self.detector is None:
            return None
        library = self.detector.library
        units = {
            skill: library[skill].embedding / library[skill].embedding.norm()
            for skill, expert in self.expert_of.items()
            if expert != FIRST
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

    def nearest(self, novel: Novel) -> str:
        """Return the expert of the known skill that a new one is most like.

        The base's last, and before it those that are trained no more.
        """
        by_skill = {} if novel.decision is None else novel.decision.by_skill
        distances = {
            self.expert_of[skill]: -by_skill[skill] for skill in by_skill if skill in self.expert_of
        }
        order = list(self.members)

        def suits(name: str) -> tuple[bool, bool, float, int]:
            near = distances.get(name, float("-inf"))
            return (name != FIRST, not self.members[name].is_whole, near, order.index(name))

        return max(order, key=suits)

    def thaw(self, name: str) -> None:
        """Let an expert be trained again, as one that has not stalled."""
        member = self.members[name]
        member.is_frozen = member.is_whole = False
        member.losses, member.before = [], None

    def stay_within(self, names: Collection[str]) -> None:
        """Forget experts that a mixture has not, and take up those that came from elsewhere."""
        for name in [name for name in self.members if name not in names]:
            self.dismiss(name)
        for name in names:
            self.members.setdefault(name, Member(is_mature=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but options and schedules as plain values."""
        return {
            "format_version": FORMAT_VERSION,
            "members": {name: asdict(member) for name, member in self.members.items()},
            "expert_of": dict(self.expert_of),
            "counter": self.counter,
            "settled_steps": self.settled_steps,
            "batches": dict(self.batches),
            "sequences": list(self._sequences),
            "young": {
                skill: [replace(each, digests=()).state_dict() for each in held]
                for skill, held in self._young.items()
            },
            "detector": None if self.detector is None else self.detector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            TritterError: it is of another format.
        """
        check_format(state, "experts: a state")
        self.members = {
            name: Member(**{**each, "losses": list(each["losses"])})
            for name, each in state["members"].items()
        }
        self.expert_of = dict(state["expert_of"])
        self.counter = int(state["counter"])
        self.settled_steps = int(state["settled_steps"])
        self.batches = dict(state["batches"])
        self._sequences = list(state["sequences"])
        self._young = {
            skill: [Observation.of_state(each) for each in held]
            for skill, held in state["young"].items()
        }
        if self.detector is not None and state["detector"] is not None:
            self.detector.load_state_dict(state["detector"])
