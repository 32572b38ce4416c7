"""How unlike what is known a batch is, by its loss or its features, and whether that is new.

B samples of a batch
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tritter.errors import RequestError, raise_problems
from tritter.methods.novelty.library import (
    FORMAT_VERSION,
    Gather,
    Skill,
    SkillLibrary,
    alone,
    check_format,
)
from tritter.methods.novelty.observation import Observation, joined
from tritter.methods.novelty.options import DETECTORS, Confidence, Detector, NoveltyOptions
from tritter.methods.novelty.statistics import share_bound, t_interval
from tritter.options import Count, checked, options, read_part


@options
class BurstOptions:
    """When novel samples of mixed batches are handed over.

    Args:
        min_samples: alike ones, of a burst.
        window_samples: seen last, among which they are.
        usual_share: of samples of known skills that may look novel.
        confidence: with which their share is above that of the largest group of known samples.
        similarity: cosine of whitened features with the mean of those it joins, at least.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    window_samples: Count = 1024
    usual_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    confidence: Confidence = 0.99
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.3


# Novelty of single samples: novel ones of mixed batches are gathered until they make a burst.
#
# A batch of which a tenth is new looks hardly unusual as a whole. Here each sample counts by
# itself, and those that are alike are handed over together, for training on them alone.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Burst:
    """Alike novel samples.

    Args:
        seen: what the base says of them.
        rows: what the caller gave of each, as its token ids.
        share: of all samples of the window; its lower bound lies above `usual`.
    """

    seen: Observation
    rows: tuple[Tensor, ...]
    share: float
    lower: float
    usual: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """Alike samples, and when each was seen; `direction` [H] is the sum of their unit offsets."""

    seen: list[Observation]
    rows: list[Tensor]
    directions: list[Tensor]
    at: list[int]


class NovelSamples:
    """Gathers novel samples, whichever batches they come in.

    A sample is novel if it is less like anything known than all but `usual_share` of held-out
    samples are. Of those that lie in one direction from what the base knows, `min_samples` are a
    burst, once they are more of the samples seen last than the largest such group was of the
    held-out ones: with a confidence, against the upper bound of that.
    """

    def __init__(
        self, detector: Detector, library: SkillLibrary, asked: BurstOptions | None = None
    ) -> None:
        self.detector, self.library = detector, library
        self.options = asked or BurstOptions()
        self._threshold, self._usual, self._count = float("nan"), 1.0, 0
        self._groups: list[_Group] = []

    def calibrate(self, batches: Sequence[Observation]) -> None:
        """Learn from held-out batches of known skills what samples of these look like.

        They are to be others than those that the library rests on.

        Raises:
            RequestError: they are too few to tell the usual share.
        """
        samples = torch.cat([self.detector.score(each, self.library).samples for each in batches])
        share = self.options.usual_share
        if len(samples) * share < 1:
            raise RequestError(
                f"novelty: {len(samples)} samples don't tell what a share of {share:g} of them "
                f"looks like; that takes {int(1 / share) + 1}."
            )
        self._threshold = float(samples.quantile(1 - share))
        groups: list[_Group] = []
        for each in batches:
            self._gather(each, [torch.zeros(0)] * len(each), groups, at=0)
        alike = max((len(group.at) for group in groups), default=0)
        self._usual = share_bound(alike, len(samples), confidence=0.95, is_lower=False)

    def novel(self, seen: Observation) -> Tensor:
        """Return which samples are novel, bool [B].

        Raises:
            RequestError: `calibrate` was not called.
        """
        if self._threshold != self._threshold:
            raise RequestError("novelty: calibrate the bursts on held-out batches first.")
        return self.detector.score(seen, self.library).samples > self._threshold

    def add(self, seen: Observation, rows: Sequence[Tensor]) -> Burst | None:
        """Take a batch; return a burst as soon as there is one, and forget its samples.

        Args:
            rows: whatever training on a sample takes, one tensor for each.
        """
        assert len(rows) == len(seen), "each sample has something that it can be trained on by"
        self._gather(seen, rows, self._groups, at=self._count)
        self._count += len(seen)
        first = self._count - self.options.window_samples
        for group in self._groups:
            kept = [index for index, when in enumerate(group.at) if when >= first]
            for name in ("seen", "rows", "directions", "at"):
                setattr(group, name, [getattr(group, name)[index] for index in kept])
        self._groups = [group for group in self._groups if group.at]
        asked, window = self.options, min(self._count, self.options.window_samples)
        for group in self._groups:
            n = len(group.at)
            lower = share_bound(n, window, confidence=asked.confidence, is_lower=True)
            if n >= asked.min_samples and lower > self._usual:
                self._groups.remove(group)
                return Burst(
                    seen=joined(group.seen),
                    rows=tuple(group.rows),
                    share=n / window,
                    lower=lower,
                    usual=self._usual,
                )
        return None

    def state_dict(self) -> dict[str, Any]:
        groups = [
            {
                "seen": [each.state_dict() for each in group.seen],
                "rows": list(group.rows),
                "directions": list(group.directions),
                "at": list(group.at),
            }
            for group in self._groups
        ]
        return {
            "format_version": FORMAT_VERSION,
            "threshold": self._threshold,
            "usual": self._usual,
            "count": self._count,
            "groups": groups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            TritterError: it is of another format.
        """
        check_format(state, "novelty: gathered samples")
        self._threshold, self._usual = state["threshold"], state["usual"]
        self._count = state["count"]
        self._groups = [
            _Group(
                seen=[Observation.of_state(each) for each in held["seen"]],
                rows=list(held["rows"]),
                directions=list(held["directions"]),
                at=list(held["at"]),
            )
            for held in state["groups"]
        ]

    def _gather(
        self, seen: Observation, rows: Sequence[Tensor], groups: list[_Group], *, at: int
    ) -> None:
        """Put the novel samples of a batch into the groups they are like, or into new ones."""
        novel = self.novel(seen).nonzero().flatten()
        centre = self.library.gaussian(self.library.reference.name)
        directions = normalize(centre.whitened(seen.features[novel]), dim=1)
        for index, direction in zip(novel.tolist(), directions, strict=True):
            for group in groups:
                mean = normalize(torch.stack(group.directions).sum(dim=0), dim=0)
                if float(mean @ direction) >= self.options.similarity:
                    break
            else:
                group = _Group(seen=[], rows=[], directions=[], at=[])
                groups.append(group)
            group.seen.append(seen.rows(torch.tensor([index])))
            group.rows.append(rows[index].detach().clone())
            group.directions.append(direction)
            group.at.append(at + index)


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
        mean = float(scores.values.mean())
        old = mean if self._average is None else self._average
        self._average = asked.moving_average * old + (1 - asked.moving_average) * mean
        values = scores.values + (self._average - mean)
        like = _NEW if float(values.mean()) > scores.threshold else scores.nearest
        if like != self._run:
            self._seen, self._values = [], []
        self._run = like
        self._seen.append(seen)
        self._values.append(values)
        # The latest batches of a run are kept, as many as a decision takes
        while len(self._seen) > max(1, asked.in_a_row):
            if sum(map(len, self._seen[1:])) < asked.min_samples:
                break
            del self._seen[0], self._values[0]
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
        check_format(state, "novelty: a state")
        self.library.load_state_dict(state["library"])
        self._run = state["run"]
        self._seen = [Observation.of_state(each) for each in state["seen"]]
        self._values = list(state["values"])
        self._average, self._cooldown = state["average"], state["cooldown"]

    def _begin_anew(self) -> None:
        """Drop what was measured against an older library."""
        self._seen, self._values, self._average = [], [], None
