"""The library of known skills: statistics of the frozen base's features, without any data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, layer_norm, normalize

from tritter.errors import RequestError, TritterError, did_you_mean
from tritter.methods.novelty.observation import Observation
from tritter.methods.novelty.statistics import Calibration, Gaussian, Moments
from tritter.options import Count, WholeNumber, options

# Cosines are computed on layer-normed features, or on embeddings of a small head.
#
# n samples · H hidden size · E size of the embedding

_MAX_FOLDS = 5
_Measure = Literal["loss", "centre", "distance"]


@options
class ProjectionOptions:
    """Training of the projection head.

    Args:
        size: size of the embedding, E.
        hidden_size: size of the head's hidden layer.
        steps: number of training steps.
        pairs: pairs per step.
        learning_rate: of Adam.
        temperature: of the contrastive loss.
        view_dropout: share of a sample's features that is dropped in each of its two views.
        seed: seed of weights, samples and views.
    """

    size: Count = 32
    hidden_size: Count = 64
    steps: Count = 200
    pairs: Annotated[int, Field(ge=2, le=10_000)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    temperature: Annotated[float, Field(gt=0)] = 0.2
    view_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: WholeNumber = 0


class Projection(nn.Module):
    """A head of two layers over standardised features.

    Args:
        centre: [H], mean of the training features; without it, what all data shares would dominate.
        scale: [H], standard deviation of the training features.
        weights: `first` [hidden, H], `first_bias` [hidden], `second` [E, hidden] and `second_bias`
            [E].
    """

    centre: Tensor
    scale: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def __init__(self, centre: Tensor, scale: Tensor, **weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    @classmethod
    def initialised(cls, normed: Tensor, options: ProjectionOptions) -> "Projection":
        """Return an untrained head for features such as `normed` [n, H].

        Its weights are random, with variance 2 / fan_in.
        """
        generator = torch.Generator().manual_seed(options.seed)

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5

        return cls(
            normed.mean(dim=0),
            normed.std(dim=0, correction=0) + 1e-6,
            first=weight(options.hidden_size, normed.shape[1]),
            first_bias=torch.zeros(options.hidden_size),
            second=weight(options.size, options.hidden_size),
            second_bias=torch.zeros(options.size),
        )

    @classmethod
    def trained(
        cls, features: Mapping[str, Tensor], mix: Tensor, options: ProjectionOptions
    ) -> "Projection":
        """Return a head trained to separate samples of each skill from others and from a mix.

        A pair consists of two samples of one skill, or of one sample of the mix twice. Each view
        drops some features.

        Args:
            features: skill → [n, H], with n ≥ 2.
            mix: [n, H], random data; every sample is its own class.
        """
        few = [name for name, samples in features.items() if len(samples) < 2]
        if not features or few or not len(mix):
            raise RequestError(
                "novelty: a projection needs at least two samples of each skill and a mix of "
                f"others; {', '.join(few) or 'the mix'} has too few."
            )
        skills = [layer_norm(samples.float(), samples.shape[-1:]) for samples in features.values()]
        others = layer_norm(mix.float(), mix.shape[-1:])
        generator = torch.Generator().manual_seed(options.seed + 1)
        head = cls.initialised(torch.cat([*skills, others]), options).requires_grad_()
        skills, others = [head.standardised(each) for each in skills], head.standardised(others)
        weights = list(head.parameters())
        optimizer = torch.optim.Adam(weights, lr=options.learning_rate)
        for _ in range(options.steps):
            # Half of the pairs, at least one, come from the mix
            rows = torch.randint(len(others), (max(1, options.pairs // 2),), generator=generator)
            which = torch.randint(len(skills), (options.pairs - len(rows),), generator=generator)
            one, two = [others[rows]], [others[rows]]
            for skill in which.tolist():
                samples = skills[skill]
                pair = torch.randperm(len(samples), generator=generator)[:2]
                one.append(samples[pair[:1]])
                two.append(samples[pair[1:]])
            groups = torch.cat([len(skills) + rows, which])
            views = []
            for samples in (torch.cat(one), torch.cat(two)):
                kept = torch.rand(samples.shape, generator=generator) >= options.view_dropout
                viewed = head.of_standardised(samples * kept / (1 - options.view_dropout))
                views.append(normalize(viewed, dim=-1))
            loss = _contrast(views[0], views[1], groups, temperature=options.temperature)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
        optimizer.zero_grad()
        return head.requires_grad_(False)

    def standardised(self, normed: Tensor) -> Tensor:
        return (normed - self.centre) / self.scale

    def of_standardised(self, features: Tensor) -> Tensor:
        """Return the embeddings [n, E] of standardised features [n, H]."""
        hidden = torch.relu(features @ self.first.T + self.first_bias)
        return hidden @ self.second.T + self.second_bias

    def forward(self, normed: Tensor) -> Tensor:
        return self.of_standardised(self.standardised(normed))


def _contrast(one_nE: Tensor, two_nE: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Return the NT-Xent loss of n pairs of unit vectors (SimCLR, Chen et al. 2020, equation 1).

    Unlike there, other samples of the same skill (groups [n]) do not count as negatives.
    """
    n = len(one_nE)
    views = torch.cat([one_nE, two_nE])
    partner = torch.arange(2 * n).roll(n)
    logits = views @ views.T / temperature
    both = groups.repeat(2)
    is_masked = both.unsqueeze(0) == both.unsqueeze(1)
    is_masked[torch.arange(2 * n), partner] = False
    return cross_entropy(logits.masked_fill(is_masked, -torch.inf), partner)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skill:
    """Statistics of a skill in the feature space of the frozen base.

    Args:
        name: name in the library.
        is_base: True if the base itself knows the skill; otherwise it has an expert.
        moments: of the features.
        embedding: float64 [E], sum of the embeddings.
        loss: of the losses; None if the detector needs none.
        centre: of the distances of batch means, cross-validated.
        distance: of the distances of samples, cross-validated.
        similarity_at_creation: earlier skill → cosine of the two mean embeddings.
    """

    name: str
    is_base: bool
    moments: Moments
    embedding: Tensor
    loss: Calibration | None
    centre: Calibration
    distance: Calibration
    similarity_at_creation: Mapping[str, float]

    @property
    def mean(self) -> Tensor:
        return self.moments.mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "is_base": self.is_base,
            "moments": self.moments.state_dict(),
            "embedding": self.embedding,
            "loss": None if self.loss is None else asdict(self.loss),
            "centre": asdict(self.centre),
            "distance": asdict(self.distance),
            "similarity_at_creation": dict(self.similarity_at_creation),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Skill":
        return cls(
            **{
                **{key: value for key, value in state.items() if key != "digests"},  # of older ones
                "moments": Moments(**state["moments"]),
                "loss": None if state["loss"] is None else Calibration(**state["loss"]),
                "centre": Calibration(**state["centre"]),
                "distance": Calibration(**state["distance"]),
            }
        )


class Versioned:
    """Base of classes whose `state_dict` names its format."""

    format_version: ClassVar[int] = 1
    state_name: ClassVar[str]  # in messages

    def check_format(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another format."""
        if (version := state.get("format_version")) != self.format_version:
            raise TritterError(
                f"{self.state_name} has format {version}; this version of Tritter reads format "
                f"{self.format_version}"
            )


class SkillLibrary(Versioned):
    """Skills by name, in the order in which they were added.

    The first one describes the base's own training data. Covariances of other skills are shrunk
    towards its covariance while they are based on few samples.
    """

    state_name = "novelty: a library"

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

    def add(self, name: str, batches: Sequence[Observation], *, is_base: bool = False) -> Skill:
        """Add a skill.

        Args:
            name: its name.
            batches: batches of all processes, in the size and order of later decisions; for a skill
                of the base at least 30, held out from its training.
            is_base: True if the base knows the skill, as it must for the first one.

        Raises:
            RequestError: the name is empty or exists, the first skill is not the base's, or there
                are too few batches or samples.
        """
        if name in self._skills or not name:
            raise RequestError(f"novelty: '{name}' is empty or already the name of a skill.")
        if not self._skills and not is_base:
            raise RequestError(
                f"novelty: '{name}' can't be the first skill; first add data that the base was "
                "trained on (is_base=True)."
            )
        skill = self._measure_skill(name, batches, is_base=is_base)
        own = skill.embedding  # no `@`: its last bit depends on the address, so on a resume
        similar = {old.name: float(cosine_similarity(own, old.embedding, dim=0)) for old in self}
        return self._store(replace(skill, similarity_at_creation=similar))

    def recalibrate(self, name: str, batches: Sequence[Observation]) -> Skill:
        """Replace a skill's statistics by those of other batches; arguments as for `add`.

        Training an expert does not change them, because they are those of the frozen base. But
        bursts have few samples, and a change of the base affects all skills; then recalibrate the
        first skill first.
        """
        old = self[name]
        new = self._measure_skill(name, batches, is_base=old.is_base)
        return self._store(replace(new, similarity_at_creation=old.similarity_at_creation))

    def remove(self, name: str) -> None:
        """Remove a skill, for example when its expert is evicted.

        Raises:
            RequestError: the skill does not exist, or it is the first one, which others depend on.
        """
        if name == self.reference.name or name not in self:
            raise RequestError(
                f"novelty: '{self[name].name}' can't be removed: it is the reference of the others."
            )
        del self._skills[name]
        self._gaussians.pop(name, None)

    @property
    def reference(self) -> Skill:
        """The first skill."""
        if not self._skills:
            raise RequestError(
                "novelty: the library is empty; first add data that the base was trained on "
                "(is_base=True)."
            )
        return next(iter(self))

    def gaussian(self, name: str) -> Gaussian:
        """Return a skill's centre and covariance."""
        if name not in self._gaussians:
            skill, reference = self[name], self.reference
            prior = None if skill is reference else reference.moments.shrunk_covariance()
            self._gaussians[name] = _gaussian_of(skill.moments, prior)
        return self._gaussians[name]

    def z(self, measure: _Measure, name: str, seen: Observation) -> Tensor:
        """Return z-scores of samples relative to a skill, float64 [B].

        They are in deviations of batch means, so their mean is the z-score of the batch.
        """
        calibration: Calibration = getattr(self[name], measure)
        if measure == "loss":
            self.check_losses()
        known: list[Calibration] = [getattr(each, measure) for each in self if each.is_base]
        usual = max((c.own_deviation / abs(c.mean) for c in known if c.mean), default=0.0)
        if measure != "loss":
            return calibration.z(_measure(self.gaussian(name), measure, seen), usual=usual)
        if seen.losses is None:
            raise RequestError("novelty: the batch was observed with with_losses=False.")
        return calibration.z(seen.losses, usual=usual, size=len(seen))

    def check_losses(self) -> None:
        """Raise a RequestError if a skill was measured without losses, which `loss` reads."""
        for skill in self:
            if skill.loss is None:
                reason = "was measured without losses; use the detector mahalanobis or cosine"
                raise RequestError(f"novelty: '{skill.name}' {reason} (experts.detector).")

    def embed(self, features: Tensor) -> Tensor:
        """Return unit vectors float64 [n, E] of layer-normed features [n, H], by the head."""
        normed = layer_norm(features.float(), features.shape[-1:])
        head = self.projection
        return normalize((normed if head is None else head(normed)).double(), dim=-1)

    def train_projection(
        self, features: Mapping[str, Tensor], mix: Tensor, options: ProjectionOptions
    ) -> None:
        """Train the head of `cosine` on samples of all known skills; see `Projection.trained`."""
        missing = [skill.name for skill in self if skill.name not in features]
        if missing:
            raise RequestError(
                f"novelty: a projection needs samples of {', '.join(missing)} as well."
            )
        self.projection = Projection.trained(features, mix, options)
        for skill in list(self):
            total = self.embed(features[skill.name]).sum(dim=0)
            self._skills[skill.name] = replace(skill, embedding=total)

    def state_dict(self) -> dict[str, Any]:
        head = None if self.projection is None else self.projection.state_dict()
        skills = [skill.state_dict() for skill in self]
        return {"format_version": self.format_version, "skills": skills, "projection": head}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.check_format(state)
        head = state["projection"]
        self.projection = None if head is None else Projection(**head)
        self._skills = {each["name"]: Skill.of_state(each) for each in state["skills"]}
        self._gaussians = {}

    def _store(self, skill: Skill) -> Skill:
        self._skills[skill.name] = skill
        if skill.name == self.reference.name:
            self._gaussians = {}
        self._gaussians.pop(skill.name, None)
        return skill

    def _measure_skill(self, name: str, batches: Sequence[Observation], *, is_base: bool) -> Skill:
        if sum(map(len, batches)) < 4:
            raise RequestError(f"novelty: '{name}' needs at least four samples.")
        whole = list(batches)
        if len(whole) == 1:
            halves = torch.arange(len(whole[0])).chunk(2)
            whole = [whole[0].rows(half) for half in halves]
        number = _MAX_FOLDS if len(whole) >= 2 * _MAX_FOLDS else 2
        parts = [whole[fold::number] for fold in range(number)]
        folds = [Moments.of(torch.cat([b.features for b in part])) for part in parts]
        moments = reduce(add, folds)
        size = len(self.reference.mean) if self._skills else len(moments.mean)
        if len(moments.mean) != size:
            raise RequestError(
                f"novelty: features of '{name}' have size {len(moments.mean)}, those of the "
                f"library {size}; a library belongs to one base."
            )
        is_first = not self._skills or name == self.reference.name
        prior = None if is_first else self.reference.moments.shrunk_covariance()
        others = [_gaussian_of(moments - fold, prior) for fold in folds]
        held_out = {
            measure: Calibration.of(
                _measure(other, measure, batch)
                for other, part in zip(others, parts, strict=True)
                for batch in part
            )
            for measure in ("centre", "distance")
        }
        embedding = self.embed(torch.cat([b.features for b in batches])).sum(dim=0)
        losses, loss = [b.losses for part in parts for b in part if b.losses is not None], None
        if len(losses) == sum(map(len, parts)):
            loss = Calibration.of(losses)
        centre = held_out["centre"]
        if is_base and centre.batches < Calibration.full:
            raise RequestError(
                f"novelty: '{name}' has {centre.batches} batches; a skill of the base needs at "
                f"least {Calibration.full}."
            )
        return Skill(
            name=name,
            is_base=is_base,
            moments=moments,
            embedding=embedding,
            loss=loss,
            centre=centre,
            distance=held_out["distance"],
            similarity_at_creation={},
        )


def _measure(gaussian: Gaussian, measure: str, seen: Observation) -> Tensor:
    if measure == "centre":
        return gaussian.centre_distance(seen.features)
    return gaussian.distances(seen.features)


def _gaussian_of(moments: Moments, prior: Tensor | None) -> Gaussian:
    """Return the Gaussian of a skill, its covariance shrunk; None: towards the identity."""
    covariance = moments.shrunk_covariance() if prior is None else moments.covariance_towards(prior)
    return Gaussian.of(moments.mean, covariance)
