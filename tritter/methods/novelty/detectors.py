"""Decisions whether batches are new, and bursts of novel samples in mixed batches.

B samples of a batch
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tritter.errors import RequestError, raise_problems
from tritter.methods.novelty.library import Skill, SkillLibrary, Versioned
from tritter.methods.novelty.observation import Observation
from tritter.methods.novelty.options import DETECTORS, BurstOptions, Detector, NoveltyOptions
from tritter.methods.novelty.statistics import share_bound, t_bounds
from tritter.options import checked, read_part

_NEW = ""  # label of batches that match no skill
_Kind = Literal["known", "new", "unsure"]


# Novelty of single samples: novel samples of mixed batches are collected until they form a burst.
#
# A batch with a tenth of new samples is hardly unusual as a whole. Here each sample counts on its
# own, and similar samples are reported together, so that they can be trained on separately.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Burst:
    """A group of similar novel samples.

    Args:
        seen: losses and features of the samples.
        rows: tensors that were passed with the samples, such as token ids.
        share: share of all samples in the window.
        lower: its lower bound, which is above `usual`.
        usual: upper bound of the share for known samples.
    """

    seen: Observation
    rows: tuple[Tensor, ...]
    share: float
    lower: float
    usual: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """Similar samples and their positions; `directions` are their unit offsets, each [H]."""

    seen: list[Observation]
    rows: list[Tensor]
    directions: list[Tensor]
    at: list[int]


class NovelSamples(Versioned):
    """Collects novel samples across batches.

    A sample is novel if it is less similar to every skill than all but `usual_share` of held-out
    samples. At least `min_samples` novel samples with a similar direction form a burst, once the
    lower bound of their share in the window exceeds the upper bound of the largest such group among
    held-out samples.
    """

    state_name = "novelty: gathered samples"

    def __init__(
        self, detector: Detector, library: SkillLibrary, options: BurstOptions | None = None
    ) -> None:
        self.detector, self.library = detector, library
        self.options = options or BurstOptions()
        self._threshold, self._usual, self._count = float("nan"), 1.0, 0
        self._groups: list[_Group] = []

    def calibrate(self, batches: Sequence[Observation]) -> None:
        """Set the threshold from held-out batches of known skills.

        The batches must not be those that the library was computed from.
        """
        samples = torch.cat([self.detector.samples(each, self.library) for each in batches])
        share = self.options.usual_share
        if len(samples) * share < 1:
            raise RequestError(
                f"novelty: calibration with usual_share = {share:g} needs at least "
                f"{int(1 / share) + 1} samples, and there are {len(samples)}."
            )
        self._threshold = float(samples.quantile(1 - share))
        groups: list[_Group] = []
        for each in batches:
            self._gather(each, [torch.zeros(0)] * len(each), groups, at=0)
        largest = max((len(group.at) for group in groups), default=0)
        self._usual = share_bound(largest, len(samples), confidence=0.95, is_lower=False)

    def novel(self, seen: Observation) -> Tensor:
        """Return a mask of novel samples, bool [B]; `calibrate` must have been called."""
        if self._threshold != self._threshold:
            raise RequestError("novelty: calibrate the bursts on held-out batches first.")
        return self.detector.samples(seen, self.library) > self._threshold

    def add(self, seen: Observation, rows: Sequence[Tensor]) -> Burst | None:
        """Add a batch; if that completes a burst, return it and drop its samples.

        Args:
            rows: one tensor per sample, with the data needed to train on it.
        """
        assert len(rows) == len(seen), "one row per sample"
        self._gather(seen, rows, self._groups, at=self._count)
        self._count += len(seen)
        first = self._count - self.options.window_samples
        for group in self._groups:
            kept = [index for index, when in enumerate(group.at) if when >= first]
            for name in ("seen", "rows", "directions", "at"):
                setattr(group, name, [getattr(group, name)[index] for index in kept])
        self._groups = [group for group in self._groups if group.at]
        options, window = self.options, min(self._count, self.options.window_samples)
        for group in self._groups:
            n = len(group.at)
            lower = share_bound(n, window, confidence=options.confidence, is_lower=True)
            if n >= options.min_samples and lower > self._usual:
                self._groups.remove(group)
                return Burst(
                    seen=Observation.concatenated(group.seen),
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
            "format_version": self.format_version,
            "threshold": self._threshold,
            "usual": self._usual,
            "count": self._count,
            "groups": groups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.check_format(state)
        self._threshold, self._usual = state["threshold"], state["usual"]
        self._count = state["count"]
        self._groups = [
            _Group(
                seen=[Observation(**one) for one in each["seen"]],
                rows=list(each["rows"]),
                directions=list(each["directions"]),
                at=list(each["at"]),
            )
            for each in state["groups"]
        ]

    def _gather(
        self, seen: Observation, rows: Sequence[Tensor], groups: list[_Group], *, at: int
    ) -> None:
        """Add the novel samples of a batch to similar groups, or to new ones."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision after a batch, and the numbers it is based on.

    Args:
        kind: known (as `skill`), new, or unsure so far.
        skill: the skill that the latest batch is most similar to.
        score: mean novelty of the samples that the decision is based on.
        lower: one-sided lower bound of the score.
        upper: one-sided upper bound of the score.
        threshold: the threshold that the bounds are compared with.
        num_samples: number of samples that the decision is based on.
        num_batches: number of batches that the decision is based on.
        by_skill: novelty of the latest batch relative to each known skill.
        reason: reason for `unsure`.
    """

    kind: _Kind
    skill: str
    score: float
    lower: float
    upper: float
    threshold: float
    num_samples: int
    num_batches: int
    by_skill: Mapping[str, float]
    reason: str = ""


class NoveltyDetector(Versioned):
    """Decides batch by batch whether the data of a frozen base is new.

    Consecutive batches of the same kind (unusual, or nearest to the same skill) form a run. A
    decision uses the latest batches of a run, as many as are needed for `min_samples`. They are new
    if the lower bound of their mean novelty exceeds the threshold and they are at least `in_a_row`
    batches, and known if the upper bound is below the threshold.

    Args:
        library: the known skills; an empty library by default.
        detector: a name (mahalanobis, loss, cosine), `name` and options, or a `Detector`.
        options: options of the decision.
    """

    state_name = "novelty: a state"

    def __init__(
        self,
        library: SkillLibrary | None = None,
        *,
        detector: str | Mapping[str, Any] | Detector = "mahalanobis",
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
        """Add the next batch, of all processes together, and decide.

        Raises:
            RequestError: the library is empty.
        """
        options = self.options
        assert self.library.reference.is_base, "the first skill is that of the base"
        against = self.detector.checked(seen, self.library)
        by_skill = {name: float(values.mean()) for name, values in against.items()}
        nearest, values = min(by_skill, key=by_skill.__getitem__), self.detector.values(against)
        # Means of few samples deviate more
        share = max(0.5, min(1.0, math.sqrt(len(seen) / self.detector.full_batch)))
        threshold, mean = share * self.detector.limit(self.library), float(values.mean())
        old = mean if self._average is None else self._average
        self._average = options.moving_average * old + (1 - options.moving_average) * mean
        values = values + (self._average - mean)
        like = _NEW if float(values.mean()) > threshold else nearest
        if like != self._run:
            self._seen, self._values = [], []
        self._run = like
        self._seen.append(seen)
        self._values.append(values)
        # Keep the latest batches of a run, as many as a decision needs
        while len(self._seen) > max(1, options.in_a_row):
            if sum(map(len, self._seen[1:])) < options.min_samples:
                break
            del self._seen[0], self._values[0]
        num_batches, gathered = len(self._values), torch.cat(self._values)
        lower, upper = t_bounds(gathered, confidence=options.confidence)
        kind: _Kind = "unsure"
        reason = ""
        if len(gathered) < options.min_samples:
            reason = f"{len(gathered)} of {options.min_samples} samples"
        elif like != _NEW:
            kind = "known" if upper <= threshold else "unsure"
        elif num_batches < options.in_a_row:
            reason = f"{num_batches} of {options.in_a_row} batches in a row"
        elif self._cooldown:
            reason = f"cooldown for {self._cooldown} more batches"
        elif lower > threshold:
            kind = "new"
        if kind == "unsure" and not reason:
            reason = "the interval contains the threshold"
        self._cooldown = options.cooldown if kind == "new" else max(0, self._cooldown - 1)
        return Decision(
            kind=kind,
            skill=nearest,
            score=float(gathered.double().mean()),
            lower=lower,
            upper=upper,
            threshold=threshold,
            num_samples=len(gathered),
            num_batches=num_batches,
            by_skill=by_skill,
            reason=reason,
        )

    @property
    def is_run_new(self) -> bool:
        """True if the latest batches match no known skill, whether decided or not."""
        return self._run == _NEW and bool(self._seen)

    @property
    def run(self) -> tuple[Observation, ...]:
        """The batches that the latest decision is based on."""
        return tuple(self._seen)

    def add(
        self, name: str, batches: Sequence[Observation] | None = None, *, is_base: bool = False
    ) -> Skill:
        """Add a skill to the library, by default from the batches just called new.

        Raises:
            RequestError: as for `SkillLibrary.add`; or there are no new batches.
        """
        if batches is None:
            if self._run != _NEW or not self._seen:
                raise RequestError(
                    f"novelty: there are no new batches to name '{name}'; pass batches."
                )
            batches = self.run
        skill = self.library.add(name, batches, is_base=is_base)
        self.restart()
        return skill

    def recalibrate(self, name: str, batches: Sequence[Observation]) -> Skill:
        """Replace the statistics of a skill; see `SkillLibrary.recalibrate`."""
        skill = self.library.recalibrate(name, batches)
        self.restart()
        return skill

    def state_dict(self) -> dict[str, Any]:
        """Return library, run, average and cooldown as plain values; options are not included."""
        return {
            "format_version": self.format_version,
            "library": self.library.state_dict(),
            "run": self._run,
            "seen": [each.state_dict() for each in self._seen],
            "values": list(self._values),
            "average": self._average,
            "cooldown": self._cooldown,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.check_format(state)
        self.library.load_state_dict(state["library"])
        if self.detector.reads_losses:
            self.library.check_losses()
        self._run = state["run"]
        self._seen = [Observation(**each) for each in state["seen"]]
        self._values = list(state["values"])
        self._average, self._cooldown = state["average"], state["cooldown"]

    def restart(self, *, keeps_cooldown: bool = True) -> None:
        """Discard the batches of the run, which refer to an older library or to earlier data."""
        self._seen, self._values, self._average = [], [], None
        if not keeps_cooldown:
            self._cooldown = 0
