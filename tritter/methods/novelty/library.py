"""The skills that are known, as a frozen base sees them: sums, no text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize

from tritter.errors import RequestError, TritterError, did_you_mean
from tritter.methods.novelty.observation import Observation
from tritter.methods.novelty.statistics import (
    CALIBRATION_BATCHES,
    Calibration,
    Gaussian,
    Moments,
)
from tritter.options import Count, WholeNumber, options

# The space that cosines are taken in: layer-normed features, or a small head's view of them.
#
# n samples · H hidden size · E size of the embedding

_TRAINED = ("first", "first_bias", "second", "second_bias")


@options
class ProjectionOptions:
    """How a head is trained.

    Args:
        size: of the embedding, E.
        hidden_size: of the head's one hidden layer.
        temperature: of the contrast.
        view_dropout: share of a sample's features that each of its two views lacks.
        pairs: of a step.
        seed: of weights, draws and views.
    """

    size: Count = 32
    hidden_size: Count = 64
    steps: Count = 200
    pairs: Annotated[int, Field(ge=2, le=10_000)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    temperature: Annotated[float, Field(gt=0)] = 0.2
    view_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: WholeNumber = 0


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A head of two layers over standardised features.

    Args:
        centre, scale: [H], mean and deviation of the features it was trained on: what all text
            shares would otherwise be most of every feature.
        first, second: weights [hidden, H] and [E, hidden]; biases [hidden] and [E].
    """

    centre: Tensor
    scale: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    @classmethod
    def drawn(cls, normed: Tensor, asked: ProjectionOptions) -> "Projection":
        """Return a head for features like `normed` [n, H].

        Its weights are drawn by the options' seed, of variance 2 / fan_in.
        """
        generator = torch.Generator().manual_seed(asked.seed)

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5

        return cls(
            normed.mean(dim=0),
            normed.std(dim=0, correction=0) + 1e-6,
            weight(asked.hidden_size, normed.shape[1]),
            torch.zeros(asked.hidden_size),
            weight(asked.size, asked.hidden_size),
            torch.zeros(asked.size),
        )

    def standardised(self, normed: Tensor) -> Tensor:
        return (normed - self.centre) / self.scale

    def of_standardised(self, features: Tensor) -> Tensor:
        """Return [n, E] of standardised features [n, H]."""
        hidden = torch.relu(features @ self.first.T + self.first_bias)
        return hidden @ self.second.T + self.second_bias

    def __call__(self, normed: Tensor) -> Tensor:
        return self.of_standardised(self.standardised(normed))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def embedded(features: Tensor, projection: Projection | None) -> Tensor:
    """Return unit vectors float64 [n, E] of features [n, H]: layer-normed, through the head."""
    normed = layer_norm(features.float(), features.shape[-1:])
    return normalize((normed if projection is None else projection(normed)).double(), dim=-1)


def contrast(one_nE: Tensor, two_nE: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Return the NT-Xent loss of n pairs (SimCLR, Chen et al. 2020, equation 1).

    Differs from there: other samples of a pair's own skill are no negatives of it.

    Args:
        one_nE, two_nE: unit vectors, a pair in each row.
        groups: int64 [n], the skill of each pair.
    """
    n = len(one_nE)
    views = torch.cat([one_nE, two_nE])
    partner = torch.arange(2 * n).roll(n)
    logits = views @ views.T / temperature
    both = groups.repeat(2)
    is_left_out = both.unsqueeze(0) == both.unsqueeze(1)
    is_left_out[torch.arange(2 * n), partner] = False
    return cross_entropy(logits.masked_fill(is_left_out, -torch.inf), partner)


def train_projection(
    features: Mapping[str, Tensor], mix: Tensor, asked: ProjectionOptions
) -> Projection:
    """Return a head trained to hold samples of a skill together, apart from others and from a mix.

    A pair is two samples of one skill, or one sample of the mix twice, each seen with some of its
    features left out.

    Args:
        features: skill → [n, H], two samples at least.
        mix: [n, H], random text; every sample stands for itself.

    Raises:
        RequestError: there are too few samples.
    """
    few = [name for name, held in features.items() if len(held) < 2]
    if not features or few or not len(mix):
        raise RequestError(
            f"novelty: a projection needs two samples of each skill and a mix of others; "
            f"{', '.join(few) or 'the mix'} has too few."
        )
    skills = [layer_norm(held.float(), held.shape[-1:]) for held in features.values()]
    others = layer_norm(mix.float(), mix.shape[-1:])
    generator = torch.Generator().manual_seed(asked.seed + 1)
    drawn = Projection.drawn(torch.cat([*skills, others]), asked)
    skills, others = [drawn.standardised(each) for each in skills], drawn.standardised(others)
    weights = [nn.Parameter(getattr(drawn, name)) for name in _TRAINED]
    optimizer = torch.optim.Adam(weights, lr=asked.learning_rate)
    for _ in range(asked.steps):
        # Half of the pairs, at least one, are of the mix
        rows = torch.randint(len(others), (max(1, asked.pairs // 2),), generator=generator)
        which = torch.randint(len(skills), (asked.pairs - len(rows),), generator=generator)
        one, two = [others[rows]], [others[rows]]
        for skill in which.tolist():
            held = skills[skill]
            pair = torch.randperm(len(held), generator=generator)[:2]
            one.append(held[pair[:1]])
            two.append(held[pair[1:]])
        groups = torch.cat([len(skills) + rows, which])
        head = Projection(drawn.centre, drawn.scale, *weights)
        views = []
        for samples in (torch.cat(one), torch.cat(two)):
            kept = torch.rand(samples.shape, generator=generator) >= asked.view_dropout
            viewed = head.of_standardised(samples * kept / (1 - asked.view_dropout))
            views.append(normalize(viewed, dim=-1))
        loss = contrast(views[0], views[1], groups, temperature=asked.temperature)
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
    return Projection(drawn.centre, drawn.scale, *(weight.detach() for weight in weights))


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


def check_format(state: Mapping[str, Any], what: str) -> None:
    """Refuse what a `state_dict` of another format gave, such as "novelty: a library".

    Raises:
        TritterError: it is of another format.
    """
    if (version := state.get("format_version")) != FORMAT_VERSION:
        raise TritterError(f"{what} of format {version}; this Tritter reads {FORMAT_VERSION}")


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
        known: list[Calibration] = [getattr(each, measure) for each in self if each.is_base]
        usual = max((c.own_deviation / abs(c.mean) for c in known if c.mean), default=0.0)
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
        check_format(state, "novelty: a library")
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
        if sum(map(len, batches)) < 4:
            raise RequestError(f"novelty: '{name}' needs four samples at least.")
        whole = list(batches)
        if len(whole) == 1:
            halves = torch.arange(len(whole[0])).chunk(2)
            whole = [whole[0].rows(half) for half in halves]
        number = _MOST_FOLDS if len(whole) >= 2 * _MOST_FOLDS else 2
        parts = [whole[fold::number] for fold in range(number)]
        own = [Moments.of(torch.cat([b.features for b in part])) for part in parts]
        folds = [reduce(add, each) for each in zip(*gather(own), strict=True)]
        moments = reduce(add, folds)
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
        loss = reduce(add, gather(Calibration.of(b.losses for part in parts for b in part)))
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
            centre=reduce(add, gather(held_out["centre"])),
            distance=reduce(add, gather(held_out["distance"])),
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
