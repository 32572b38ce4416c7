"""How unlike what is known a batch is: by its loss, or by where its features lie.

B samples of a batch
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tritter.novelty.library import SkillLibrary
from tritter.novelty.observation import Observation
from tritter.options import options

THRESHOLD = 6.0  # deviations of batch means


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """How unlike what is known a batch is.

    Args:
        values: float64 [B], whose mean is the batch's novelty.
        samples: float64 [B], of each sample against what is nearest to it.
        threshold: novelty above it is unusual.
        nearest: the skill that the batch is most like.
        by_skill: skill → novelty against it alone.
    """

    values: Tensor
    samples: Tensor
    threshold: float
    nearest: str
    by_skill: Mapping[str, float]


@options
class Detector(ABC):
    """Says how unlike each known skill samples are; from outside, options with this base."""

    @abstractmethod
    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        """Return skill → novelty of each sample against it, float64 [B]; large is unlike.

        A skill that is left out is not what the batch could be.
        """

    @abstractmethod
    def limit(self, library: SkillLibrary) -> float:
        """Return the novelty above which a batch is unusual, with so many skills known."""

    def samples_against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        """Return skill → novelty of each sample by itself, whatever else is in its batch."""
        return self.against(seen, library)

    def score(self, seen: Observation, library: SkillLibrary) -> Scores:
        """Return the novelty of a batch: that against the skill it is most like."""
        against = self.against(seen, library)
        by_skill = {name: float(values.mean()) for name, values in against.items()}
        nearest = min(by_skill, key=by_skill.__getitem__)
        samples = self.samples_against(seen, library)
        return Scores(
            values=against[nearest],
            samples=torch.stack(list(samples.values())).amin(dim=0),
            threshold=self.limit(library),
            nearest=nearest,
            by_skill=by_skill,
        )


@options
class MahalanobisNovelty(Detector):
    """The z-score of the distance of a batch's mean features from each known skill."""

    threshold: Annotated[float, Field(gt=0)] = THRESHOLD

    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        return {skill.name: library.z("centre", skill.name, seen) for skill in library}

    def samples_against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        return {skill.name: library.z("distance", skill.name, seen) for skill in library}

    def limit(self, library: SkillLibrary) -> float:
        return self.threshold


@options
class LossNovelty(Detector):
    """The z-score of the batch loss, or that of the distance of its features if it is larger.

    A batch is like a skill if neither lies above what is usual of that. By its loss alone nothing
    that the base finds no harder than its own text is ever new, and no skill has a name: a repeated
    one is as hard for the frozen base as it was, and two may be equally hard.

    Args:
        with_features: False: the loss alone.
    """

    threshold: Annotated[float, Field(gt=0)] = THRESHOLD
    with_features: bool = True

    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        found = {}
        for skill in library:
            both = [library.z("loss", skill.name, seen)]
            if self.with_features:
                both.append(library.z("centre", skill.name, seen))
            found[skill.name] = max(both, key=lambda values: float(values.mean()))
        return found

    def samples_against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        found = {skill.name: library.z("loss", skill.name, seen) for skill in library}
        if self.with_features:
            for name, losses in found.items():
                found[name] = torch.maximum(losses, library.z("distance", name, seen))
        return found

    def limit(self, library: SkillLibrary) -> float:
        return self.threshold
