"""Decisions: is what comes known, and as what, is it new, or is it too early to say?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tritter.errors import RequestError, TritterError, raise_problems
from tritter.novelty.library import Gather, Skill, SkillLibrary, alone
from tritter.novelty.observation import Observation
from tritter.novelty.options import DETECTORS, Detector, NoveltyOptions
from tritter.novelty.statistics import t_interval
from tritter.options import checked, read_part

FORMAT_VERSION = 1
_NEW = ""  # the name of a run of batches that are like no skill

Kind = Literal["known", "new", "unsure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is decided after a batch, and by which numbers.

    Args:
        kind: known (as `skill`), new, or unsure as yet.
        skill: the one that the latest batch is most like.
        score: novelty of the samples that the decision rests on, the mean; one-sided bounds of it
            are `lower` and `upper`.
        threshold: that they are held against.
        num_samples: that it rests on; `num_batches` likewise.
        by_skill: novelty of the latest batch against each known skill.
        reason: why it is unsure.
    """

    kind: Kind
    skill: str
    score: float
    lower: float
    upper: float
    threshold: float
    num_samples: int
    num_batches: int
    by_skill: Mapping[str, float]
    reason: str = ""


class NoveltyDetector:
    """Decides batch by batch whether what a frozen base sees is new.

    Batches that are alike (unusual, or most like the same skill) follow each other as a run; a
    decision rests on the latest of a run, as many as hold `min_samples`, and is made where the
    bound of their mean novelty lies beyond the threshold: the lower one for something new, which
    takes `in_a_row` batches as well, the upper one for something known.

    Args:
        library: what is known; an empty one by default.
        detector: a name (loss, mahalanobis, cosine), `name` and options, or a `Detector`.
        options: of the decision.
    """

    def __init__(
        self,
        library: SkillLibrary | None = None,
        *,
        detector: str | Mapping[str, Any] | Detector = "loss",
        options: NoveltyOptions | None = None,
    ) -> None:
        self.library = SkillLibrary() if library is None else library
        self.detector = read_part("novelty.detector", detector, DETECTORS, base=Detector)
        self.options = options or NoveltyOptions()
        raise_problems(checked(self.options, prefix="novelty"))
        self._run = _NEW  # what the batches of the run are like
        self._seen: list[Observation] = []
        self._values: list[Tensor] = []
        self._average: float | None = None
        self._cooldown = 0

    def observe(self, seen: Observation) -> Decision:
        """Take the next batch, of all processes together, and decide.

        Raises:
            RequestError: nothing is known yet.
        """
        asked = self.options
        assert self.library.reference.is_base, "a library begins with what the base knows"
        scores = self.detector.score(seen, self.library)
        values = scores.values + self._shift(float(scores.values.mean()))
        like = _NEW if float(values.mean()) > scores.threshold else scores.nearest
        if like != self._run:
            self._forget_run()
        self._run = like
        self._seen.append(seen)
        self._values.append(values)
        self._drop_old()
        num_batches, gathered = len(self._values), torch.cat(self._values)
        found = t_interval(gathered, confidence=asked.confidence)
        kind: Kind = "unsure"
        reason = ""
        if len(gathered) < asked.min_samples:
            reason = f"{len(gathered)} of {asked.min_samples} samples"
        elif like != _NEW:
            kind = "known" if found.upper <= scores.threshold else "unsure"
        elif num_batches < asked.in_a_row:
            reason = f"{num_batches} of {asked.in_a_row} batches in a row"
        elif self._cooldown:
            reason = f"cooldown for {self._cooldown} more batches"
        elif found.lower > scores.threshold:
            kind = "new"
        if kind == "unsure" and not reason:
            reason = "the interval holds the threshold"
        self._cooldown = asked.cooldown if kind == "new" else max(0, self._cooldown - 1)
        return Decision(
            kind=kind,
            skill=scores.nearest,
            score=found.value,
            lower=found.lower,
            upper=found.upper,
            threshold=scores.threshold,
            num_samples=len(gathered),
            num_batches=num_batches,
            by_skill=scores.by_skill,
            reason=reason,
        )

    @property
    def is_run_new(self) -> bool:
        """Say whether the latest batches are like nothing known, decided or not."""
        return self._run == _NEW and bool(self._seen)

    @property
    def run(self) -> tuple[Observation, ...]:
        """The batches that the latest decision rests on."""
        return tuple(self._seen)

    def add(
        self,
        name: str,
        batches: Sequence[Observation] | None = None,
        *,
        is_base: bool = False,
        gather: Gather = alone,
    ) -> Skill:
        """Make something known under a name, by default the batches just called new.

        Raises:
            RequestError: as `SkillLibrary.add`; or there are no new batches.
        """
        if batches is None:
            if self._run != _NEW or not self._seen:
                raise RequestError(
                    f"novelty: nothing new was seen that '{name}' could name; give batches."
                )
            batches = self.run
        skill = self.library.add(name, batches, is_base=is_base, gather=gather)
        self._begin_anew()
        return skill

    def recalibrate(
        self, name: str, batches: Sequence[Observation], *, gather: Gather = alone
    ) -> Skill:
        """Replace what is known of a skill; see `SkillLibrary.recalibrate`."""
        skill = self.library.recalibrate(name, batches, gather=gather)
        self._begin_anew()
        return skill

    def state_dict(self) -> dict[str, Any]:
        """Return library, run, average and cooldown as plain values; options are the caller's."""
        return {
            "format_version": FORMAT_VERSION,
            "library": self.library.state_dict(),
            "run": self._run,
            "seen": [each.state_dict() for each in self._seen],
            "values": list(self._values),
            "average": self._average,
            "cooldown": self._cooldown,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            TritterError: it is of another format.
        """
        if state.get("format_version") != FORMAT_VERSION:
            raise TritterError(
                f"novelty: a state of format {state.get('format_version')}; this Tritter reads "
                f"{FORMAT_VERSION}"
            )
        self.library.load_state_dict(state["library"])
        self._run = state["run"]
        self._seen = [Observation.of_state(each) for each in state["seen"]]
        self._values = list(state["values"])
        self._average, self._cooldown = state["average"], state["cooldown"]

    def _shift(self, mean: float) -> float:
        """Return what the moving average adds to a batch's novelty."""
        share = self.options.moving_average
        old = mean if self._average is None else self._average
        self._average = share * old + (1 - share) * mean
        return self._average - mean

    def _drop_old(self) -> None:
        """Keep the latest batches of a run, as many as a decision takes."""
        asked = self.options
        while len(self._seen) > max(1, asked.in_a_row):
            if sum(map(len, self._seen[1:])) < asked.min_samples:
                break
            del self._seen[0], self._values[0]

    def _forget_run(self) -> None:
        self._seen, self._values = [], []

    def _begin_anew(self) -> None:
        """Drop what was measured against an older library."""
        self._forget_run()
        self._average = None
