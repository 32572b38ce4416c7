"""The skills that are known, as a frozen base sees them: sums, no text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tritter.errors import RequestError, TritterError, did_you_mean
from tritter.novelty.observation import Observation
from tritter.novelty.projection import (
    Projection,
    ProjectionOptions,
    embedded,
    train_projection,
)
from tritter.novelty.statistics import (
    CALIBRATION_BATCHES,
    Calibration,
    Gaussian,
    Moments,
    merged,
)

FORMAT_VERSION = 1
MOST_DIGESTS = 64  # of a skill
_MOST_FOLDS = 5

Measure = Literal["loss", "centre", "distance"]
Part = TypeVar("Part")
Gather = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skill:
    """What is known of a skill; everything is of the frozen base's space.

    Args:
        is_base: the base itself knows it; otherwise there is an expert for it.
        moments: of its features.
        embedding: float64 [E], sum of its embeddings.
        loss: of its losses.
        centre: of the distances of its batches' means, `distance` of its samples' distances, each
            from statistics of batches that it is none of.
        similarity_at_creation: skill known before → cosine of the two mean embeddings.
        digests: of exemplars.
    """

    name: str
    is_base: bool
    moments: Moments
    embedding: Tensor
    loss: Calibration
    centre: Calibration
    distance: Calibration
    similarity_at_creation: Mapping[str, float]
    digests: tuple[str, ...]

    @property
    def n(self) -> int:
        """Samples that its statistics rest on."""
        return self.moments.n

    @property
    def mean(self) -> Tensor:
        return self.moments.mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "is_base": self.is_base,
            "moments": self.moments.state_dict(),
            "embedding": self.embedding,
            "loss": asdict(self.loss),
            "centre": asdict(self.centre),
            "distance": asdict(self.distance),
            "similarity_at_creation": dict(self.similarity_at_creation),
            "digests": list(self.digests),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Skill":
        return cls(
            **{
                **state,
                "moments": Moments(**state["moments"]),
                "loss": Calibration(**state["loss"]),
                "centre": Calibration(**state["centre"]),
                "distance": Calibration(**state["distance"]),
                "digests": tuple(state["digests"]),
            }
        )


def alone(own: Part) -> Sequence[Part]:
    """Gather nothing: there is one process."""
    return [own]


class SkillLibrary:
    """Skills by name, in the order in which they became known.

    The first is what the base was trained on. Its covariance is what those of others are shrunk
    towards, as long as they rest on few samples.
    """

    def __init__(self) -> None:
        self._skills: dict[str, Skill] = {}
        self._gaussians: dict[str, Gaussian] = {}
        self.projection: Projection | None = None

    def __len__(self) -> int:
        return len(self._skills)

    def __iter__(self) -> Iterator[Skill]:
        return iter(self._skills.values())

    def __contains__(self, name: object) -> bool:
        return name in self._skills

    def __getitem__(self, name: str) -> Skill:
        if name not in self._skills:
            known = ", ".join(self._skills) or "none"
            near = did_you_mean(name, self._skills)
            raise RequestError(f"novelty: no skill is called '{name}'; known: {known}.{near}")
        return self._skills[name]

    def add(
        self,
        name: str,
        batches: Sequence[Observation],
        *,
        is_base: bool = False,
        gather: Gather = alone,
    ) -> Skill:
        """Take up a skill.

        Args:
            batches: of a process, in the size and order that decisions will see; of what the base
                knows 30 at least, held out from its training.
            is_base: the base knows it. The first skill must be such a one.
            gather: returns what all processes hold, in the order of their ranks, from one's own.

        Raises:
            RequestError: the name is taken, it is the first and not the base's, or there are too
                few batches or samples.
        """
        if name in self._skills or not name:
            raise RequestError(f"novelty: '{name}' is taken, or empty; each skill has a name.")
        if not self._skills and not is_base:
            raise RequestError(
                f"novelty: '{name}' can't be the first skill; begin with what the base was "
                "trained on (is_base=True)."
            )
        skill = self._measured(name, batches, is_base=is_base, gather=gather)
        mean = skill.embedding / skill.embedding.norm()
        similar = {old.name: float(mean @ old.embedding / old.embedding.norm()) for old in self}
        return self._put(replace(skill, similarity_at_creation=similar))

    def recalibrate(
        self, name: str, batches: Sequence[Observation], *, gather: Gather = alone
    ) -> Skill:
        """Replace a skill's statistics by those of other batches; arguments as of `add`.

        Training an expert moves none of them, as they are the frozen base's. But those of a burst
        rest on few samples, and after a change of the base itself all skills need it, the first
        skill first.
        """
        old = self[name]
        new = self._measured(name, batches, is_base=old.is_base, gather=gather)
        digests = (*old.digests, *(d for d in new.digests if d not in old.digests))
        return self._put(
            replace(
                new,
                similarity_at_creation=old.similarity_at_creation,
                digests=digests[:MOST_DIGESTS],
            )
        )

    def remove(self, name: str) -> None:
        """Forget a skill, as when its expert is evicted.

        Raises:
            RequestError: there is none, or it is the first, which others rest on.
        """
        if name == self.reference.name or name not in self:
            raise RequestError(
                f"novelty: '{self[name].name}' is what other skills are measured by."
            )
        del self._skills[name]
        self._gaussians.pop(name, None)

    @property
    def reference(self) -> Skill:
        """The first skill.

        Raises:
            RequestError: the library is empty.
        """
        if not self._skills:
            raise RequestError(
                "novelty: nothing is known yet; add what the base was trained on (is_base=True)."
            )
        return next(iter(self))

    def gaussian(self, name: str) -> Gaussian:
        """Return a skill's centre and covariance."""
        if name not in self._gaussians:
            skill, reference = self[name], self.reference
            is_first = skill.name == reference.name
            towards = None if is_first else reference.moments.shrunk_covariance()
            self._gaussians[name] = _fitted(skill.moments, towards)
        return self._gaussians[name]

    def z(self, measure: Measure, name: str, seen: Observation) -> Tensor:
        """Return how far samples lie above what is usual of a skill, float64 [B].

        In deviations of batch means, so that their mean is the z-score of the batch.
        """
        skill = self[name]
        calibration: Calibration = getattr(skill, measure)
        usual = max((_relative(getattr(s, measure)) for s in self if s.is_base), default=0.0)
        if measure == "loss":
            return calibration.z(seen.losses, usual=usual, size=len(seen))
        return calibration.z(_measure(self.gaussian(name), measure, seen), usual=usual)

    def train_projection(
        self, features: Mapping[str, Tensor], mix: Tensor, asked: ProjectionOptions
    ) -> None:
        """Train the head of `cosine` on samples of all known skills; see `projection`.

        Raises:
            RequestError: samples [n, H] of a skill are missing, since its place in the new space
                can't be told from the old one's.
        """
        missing = [skill.name for skill in self if skill.name not in features]
        if missing:
            raise RequestError(f"novelty: a projection needs samples of {', '.join(missing)} too.")
        self.projection = train_projection(features, mix, asked)
        for skill in list(self):
            total = embedded(features[skill.name], self.projection).sum(dim=0)
            self._skills[skill.name] = replace(skill, embedding=total)

    def state_dict(self) -> dict[str, Any]:
        head = None if self.projection is None else self.projection.state_dict()
        skills = [skill.state_dict() for skill in self]
        return {"format_version": FORMAT_VERSION, "skills": skills, "projection": head}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            TritterError: it is of another format.
        """
        if state.get("format_version") != FORMAT_VERSION:
            raise TritterError(
                f"novelty: a library of format {state.get('format_version')}; this Tritter reads "
                f"{FORMAT_VERSION}"
            )
        head = state["projection"]
        self.projection = None if head is None else Projection(**head)
        self._skills = {held["name"]: Skill.of_state(held) for held in state["skills"]}
        self._gaussians = {}

    def _put(self, skill: Skill) -> Skill:
        self._skills[skill.name] = skill
        if skill.name == self.reference.name:
            self._gaussians = {}
        self._gaussians.pop(skill.name, None)
        return skill

    def _measured(
        self, name: str, batches: Sequence[Observation], *, is_base: bool, gather: Gather
    ) -> Skill:
        parts = _folds(name, batches)
        own = [Moments.of(torch.cat([b.features for b in part])) for part in parts]
        folds = [merged(each) for each in zip(*gather(own), strict=True)]
        moments = merged(folds)
        size = len(self.reference.mean) if self._skills else len(moments.mean)
        if len(moments.mean) != size:
            raise RequestError(
                f"novelty: features of '{name}' have {len(moments.mean)} entries, those that are "
                f"known {size}; one library belongs to one base."
            )
        is_first = not self._skills or name == self.reference.name
        towards = None if is_first else self.reference.moments.shrunk_covariance()
        others = [_fitted(moments - fold, towards) for fold in folds]
        held_out = {
            measure: Calibration.of(
                _measure(other, measure, batch)
                for other, part in zip(others, parts, strict=True)
                for batch in part
            )
            for measure in ("centre", "distance")
        }
        embedding = embedded(torch.cat([b.features for b in batches]), self.projection).sum(dim=0)
        loss = merged(gather(Calibration.of(b.losses for part in parts for b in part)))
        if is_base and loss.batches < CALIBRATION_BATCHES:
            raise RequestError(
                f"novelty: {loss.batches} batches of '{name}'; to know what is usual of what the "
                f"base knows takes {CALIBRATION_BATCHES}."
            )
        digests = [d for held in gather([d for b in batches for d in b.digests]) for d in held]
        return Skill(
            name=name,
            is_base=is_base,
            moments=moments,
            embedding=torch.stack(list(gather(embedding))).sum(dim=0),
            loss=loss,
            centre=merged(gather(held_out["centre"])),
            distance=merged(gather(held_out["distance"])),
            similarity_at_creation={},
            digests=tuple(dict.fromkeys(digests))[:MOST_DIGESTS],
        )


def _measure(gaussian: Gaussian, measure: str, seen: Observation) -> Tensor:
    if measure == "centre":
        return gaussian.centre_distance(seen.features)
    return gaussian.distances(seen.features)


def _fitted(moments: Moments, towards: Tensor | None) -> Gaussian:
    """Return the Gaussian of a skill, its covariance shrunk; None: towards the identity."""
    covariance = (
        moments.shrunk_covariance() if towards is None else moments.covariance_towards(towards)
    )
    return Gaussian.of(moments.mean, covariance)


def _folds(name: str, batches: Sequence[Observation]) -> list[list[Observation]]:
    """Part batches, five-fold or two-fold; a single one is cut in half.

    Raises:
        RequestError: there are no four samples.
    """
    if sum(map(len, batches)) < 4:
        raise RequestError(f"novelty: '{name}' needs four samples at least.")
    held = list(batches)
    if len(held) == 1:
        halves = torch.arange(len(held[0])).chunk(2)
        held = [held[0].rows(half) for half in halves]
    count = _MOST_FOLDS if len(held) >= 2 * _MOST_FOLDS else 2
    return [held[fold::count] for fold in range(count)]


def _relative(calibration: Calibration) -> float:
    return calibration.own_deviation / abs(calibration.mean) if calibration.mean else 0.0
