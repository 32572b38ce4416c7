"""When a batch is called new, and how unlike what is known it is: by its loss, or by its features.

Options alone are read before a run is judged, so torch is imported by what touches tensors.

B samples of a batch
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tritter.options import Count, WholeNumber, options

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.methods.novelty.library import SkillLibrary
    from tritter.methods.novelty.observation import Observation

Confidence = Annotated[float, Field(ge=0.5, lt=1)]


@options
class NoveltyOptions:
    """When a run of batches is called new, or known.

    Args:
        min_samples: that a decision rests on, at least.
        in_a_row: batches above the threshold, one after the other.
        confidence: of the bound that has to lie beyond the threshold, one-sided.
        cooldown: batches behind something new in which nothing else is called so.
        moving_average: share of its old value in the novelty that is compared; 0: none.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    in_a_row: Count = 2
    confidence: Confidence = 0.99
    cooldown: WholeNumber = 30
    moving_average: Annotated[float, Field(ge=0, lt=1)] = 0.0


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

    name: ClassVar[str] = ""  # of ours, in `DETECTORS`

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
        import torch

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

    name: ClassVar[str] = "mahalanobis"

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

    name: ClassVar[str] = "loss"

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
        import torch

        found = {skill.name: library.z("loss", skill.name, seen) for skill in library}
        if self.with_features:
            for name, losses in found.items():
                found[name] = torch.maximum(losses, library.z("distance", name, seen))
        return found

    def limit(self, library: SkillLibrary) -> float:
        return self.threshold


# The detector of the DyLoRA plan: cosine of mean embeddings, against a falling threshold.
#
# B samples of a batch · K skills · E size of an embedding

Reduction = Literal["max", "mean", "median"]
_Similarity = Annotated[float, Field(ge=-1, le=1)]


@options
class CosineNovelty(Detector):
    """A batch is unusual if the cosine of its mean embedding with the library's is too small.

    Novelty is 1 − cosine. Raw features all look alike, so that without a trained head little is
    ever below 0.75; with `mean` and `median` a repeated skill may count as new, since the other
    skills take part in it.

    Args:
        threshold: of the cosine, with no skill known.
        decay: δ of τ_k = threshold − δ · log(1 + k) with k skills known.
        lowest, highest: between which τ_k stays.
        reduction: over the library.
    """

    name: ClassVar[str] = "cosine"

    threshold: _Similarity = 0.75
    decay: Annotated[float, Field(ge=0)] = 0.0
    lowest: _Similarity = 0.0
    highest: _Similarity = 0.99
    reduction: Reduction = "max"

    def tau(self, num_skills: int) -> float:
        """Return τ_k."""
        tau = self.threshold - self.decay * math.log1p(num_skills)
        return min(max(tau, self.lowest), self.highest)

    def limit(self, library: SkillLibrary) -> float:
        return 1 - self.tau(len(library))

    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        import torch

        from tritter.methods.novelty.library import embedded

        skills = torch.stack([skill.embedding for skill in library])
        values_KB = mean_cosines(embedded(seen.features, library.projection), skills)
        return {skill.name: 1 - each for skill, each in zip(library, values_KB, strict=True)}

    def score(self, seen: Observation, library: SkillLibrary) -> Scores:
        import torch

        from tritter.methods.novelty.library import embedded

        against = self.against(seen, library)
        by_skill = {name: float(values.mean()) for name, values in against.items()}
        values_KB = torch.stack(list(against.values()))
        skills_KE = torch.stack([skill.embedding for skill in library])
        samples_KB = 1 - _unit(skills_KE) @ embedded(seen.features, library.projection).T
        order, count = values_KB.mean(dim=1).argsort(), len(values_KB)
        # Of a median the one or two skills in the middle are the batch's, for all its samples
        chosen = {
            "max": order[:1],
            "mean": order,
            "median": order[(count - 1) // 2 : count // 2 + 1],
        }[self.reduction]
        reduced = {"max": samples_KB.amin(0), "mean": samples_KB.mean(0)}
        return Scores(
            values=values_KB[chosen].mean(dim=0),
            samples=reduced.get(self.reduction, samples_KB.quantile(0.5, dim=0)),
            threshold=self.limit(library),
            nearest=min(by_skill, key=by_skill.__getitem__),
            by_skill=by_skill,
        )


def mean_cosines(samples_BE: Tensor, skills_KE: Tensor) -> Tensor:
    """Return the cosines of a batch's mean with each skill, as values [K, B] of its samples.

    The mean of a row is the cosine itself, exactly; what a sample's value differs from it by is the
    sample's influence on it (the infinitesimal jackknife), so that intervals can be taken.

    Args:
        samples_BE: float64, unit vectors.
        skills_KE: float64, of any length.
    """
    mean_E = samples_BE.mean(dim=0)
    norm = mean_E.norm().clamp_min(1e-12)
    along_KB = _unit(skills_KE) @ samples_BE.T / norm
    cosine_K1 = along_KB.mean(dim=1, keepdim=True)
    length_B = samples_BE @ mean_E / norm.square()
    return along_KB - cosine_K1 * (length_B - 1)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


DETECTORS: Mapping[str, type[Detector]] = {
    kind.name: kind for kind in (LossNovelty, MahalanobisNovelty, CosineNovelty)
}
