"""The detector of the DyLoRA plan: cosine of mean embeddings, against a falling threshold.

B samples of a batch · K skills · E size of an embedding
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tritter.novelty.detectors import Detector, Scores
from tritter.novelty.library import SkillLibrary
from tritter.novelty.observation import Observation
from tritter.novelty.projection import embedded
from tritter.options import options

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
        skills = torch.stack([skill.embedding for skill in library])
        values_KB = mean_cosines(embedded(seen.features, library.projection), skills)
        return {skill.name: 1 - each for skill, each in zip(library, values_KB, strict=True)}

    def score(self, seen: Observation, library: SkillLibrary) -> Scores:
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
