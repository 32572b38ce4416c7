"""Options of novelty detection, and the detectors: loss, Mahalanobis distance, cosine.

Options are read before a run is validated, so torch is imported only by functions that use tensors.

B samples of a batch
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tritter.errors import TritterError, brief
from tritter.options import Count, WholeNumber, options

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.methods.novelty.library import SkillLibrary
    from tritter.methods.novelty.observation import Observation

_Confidence = Annotated[float, Field(ge=0.5, lt=1)]
_THRESHOLD = 6.0  # deviations of the means of batches of 16 sequences or more
_Reduction = Literal["max", "mean", "median"]
_Similarity = Annotated[float, Field(ge=-1, le=1)]


@options
class NoveltyOptions:
    """When a sequence of batches is called new or known.

    Args:
        min_samples: minimum number of samples for a decision.
        in_a_row: number of consecutive batches above the threshold.
        confidence: confidence of the one-sided bound that is compared with the threshold.
        cooldown: number of batches after something new in which nothing else is called new.
        moving_average: weight of the previous value in the smoothed novelty; 0: no smoothing.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    in_a_row: Count = 2
    confidence: _Confidence = 0.99
    cooldown: WholeNumber = 30
    moving_average: Annotated[float, Field(ge=0, lt=1)] = 0.0


@options
class BurstOptions:
    """When novel samples of mixed batches are reported as a burst.

    Args:
        min_samples: minimum number of similar samples in a burst.
        window_samples: number of recent samples that are searched.
        usual_share: share of known samples that may count as novel.
        confidence: confidence that their share exceeds that of the largest group of known samples.
        similarity: minimum cosine of a sample's whitened features with the mean of its group.
    """

    min_samples: Annotated[int, Field(ge=2, le=1_000_000)] = 32
    window_samples: Count = 1024
    usual_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    confidence: _Confidence = 0.99
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.3


@options
class Detector(ABC):
    """Base class of detectors; subclass it as a record of options to add your own."""

    name: ClassVar[str] = ""  # key in `DETECTORS` of built-in detectors
    full_batch: ClassVar[int] = 1  # sequences from which on the limit holds; 16 for z-scores
    reads_losses: ClassVar[bool] = True  # False: half of a forward pass suffices

    @abstractmethod
    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        """Return skill → novelty of each sample relative to it, finite float64 [B]; larger: newer.

        Skills that are excluded as candidates may be omitted.
        """

    @abstractmethod
    def limit(self, library: SkillLibrary) -> float:
        """Return the novelty above which a batch is unusual, given the known skills."""

    def samples_against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        """Return skill → novelty of each sample, independent of the rest of its batch."""
        return self.against(seen, library)

    def checked(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        """Return `against`, which a detector from outside may get wrong."""
        against = self.against(seen, library)
        for name, values in against.items():
            if name not in library or values.shape != (len(seen),) or not values.isfinite().all():
                reason = f"known skill → finite novelty of each of the {len(seen)} sequences"
                found = f"{brief(values.tolist())} of {name}"
                raise TritterError(f"{type(self).__name__} must return {reason}, not {found}.")
        return against

    def values(self, against: Mapping[str, Tensor]) -> Tensor:
        """Return float64 [B], whose mean is the novelty of a batch; by default, its lowest.

        Args:
            against: skill → novelty of each sample of the batch.
        """
        return min(against.values(), key=lambda values: float(values.mean()))

    def samples(self, seen: Observation, library: SkillLibrary) -> Tensor:
        """Return the novelty of each sample relative to its nearest skill, float64 [B]."""
        import torch

        self.checked(seen, library)
        return torch.stack(list(self.samples_against(seen, library).values())).amin(dim=0)


@options
class MahalanobisNovelty(Detector):
    """Z-score of the Mahalanobis distance of a batch's mean features from each known skill."""

    name: ClassVar[str] = "mahalanobis"
    full_batch: ClassVar[int] = 16  # means of fewer sequences deviate more
    reads_losses: ClassVar[bool] = False

    threshold: Annotated[float, Field(gt=0)] = _THRESHOLD

    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        return {skill.name: library.z("centre", skill.name, seen) for skill in library}

    def samples_against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        return {skill.name: library.z("distance", skill.name, seen) for skill in library}

    def limit(self, library: SkillLibrary) -> float:
        return self.threshold


@options
class LossNovelty(Detector):
    """Z-score of the batch loss, or of the distance of its features if that is larger.

    A batch matches a skill if both are usual for that skill. The loss alone never detects novel
    data that the base predicts as well as its own, and can't identify skills: the loss of a
    repeated skill under the frozen base does not change, and two skills may have equal losses.

    Args:
        with_features: False: use the loss alone.
    """

    name: ClassVar[str] = "loss"
    full_batch: ClassVar[int] = 16  # means of fewer sequences deviate more

    threshold: Annotated[float, Field(gt=0)] = _THRESHOLD
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


# Cosine of mean embeddings against a decreasing threshold.
#
# B samples of a batch · K skills · E size of an embedding


@options
class CosineNovelty(Detector):
    """A batch is unusual if the cosine of its mean embedding with the library is too small.

    Novelty is 1 − cosine. Cosines of raw features are all high: without a trained head they are
    rarely below 0.75. With `mean` and `median`, other skills contribute, so a repeated skill may
    count as new.

    Args:
        threshold: threshold of the cosine if no skill is known.
        decay: δ in τ_k = threshold − δ · log(1 + k) with k known skills.
        lowest: lower bound of τ_k.
        highest: upper bound of τ_k.
        reduction: over the skills of the library.
    """

    name: ClassVar[str] = "cosine"
    reads_losses: ClassVar[bool] = False

    threshold: _Similarity = 0.75
    decay: Annotated[float, Field(ge=0)] = 0.0
    lowest: _Similarity = 0.0
    highest: _Similarity = 0.99
    reduction: _Reduction = "max"

    def tau(self, num_skills: int) -> float:
        """Return the threshold τ_k for k known skills."""
        tau = self.threshold - self.decay * math.log1p(num_skills)
        return min(max(tau, self.lowest), self.highest)

    def limit(self, library: SkillLibrary) -> float:
        return 1 - self.tau(len(library))

    def against(self, seen: Observation, library: SkillLibrary) -> Mapping[str, Tensor]:
        import torch

        skills = torch.stack([skill.embedding for skill in library])
        values_KB = _mean_cosines(library.embed(seen.features), skills)
        return {skill.name: 1 - each for skill, each in zip(library, values_KB, strict=True)}

    def values(self, against: Mapping[str, Tensor]) -> Tensor:
        import torch

        values_KB = torch.stack(list(against.values()))
        order, count = values_KB.mean(dim=1).argsort(), len(values_KB)
        # The median uses the batch's one or two middle skills for all its samples
        chosen = {
            "max": order[:1],
            "mean": order,
            "median": order[(count - 1) // 2 : count // 2 + 1],
        }[self.reduction]
        return values_KB[chosen].mean(dim=0)

    def samples(self, seen: Observation, library: SkillLibrary) -> Tensor:
        import torch

        skills_KE = torch.stack([skill.embedding for skill in library])
        samples_KB = 1 - _unit(skills_KE) @ library.embed(seen.features).T
        reduced = {"max": samples_KB.amin(0), "mean": samples_KB.mean(0)}
        return reduced.get(self.reduction, samples_KB.quantile(0.5, dim=0))


def _mean_cosines(samples_BE: Tensor, skills_KE: Tensor) -> Tensor:
    """Return the cosine of a batch's mean with each skill, as values [K, B] of its samples.

    The mean of a row is exactly the cosine. The difference of a sample's value from it is the
    sample's influence (the infinitesimal jackknife), which allows intervals.
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
