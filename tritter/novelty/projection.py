"""The space that cosines are taken in: layer-normed features, or a small head's view of them.

n samples · H hidden size · E size of the embedding
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize

from tritter.errors import RequestError
from tritter.options import Count, WholeNumber, options

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
        one, two, groups = _pairs(skills, others, asked.pairs, generator)
        head = Projection(drawn.centre, drawn.scale, *weights)
        views = [_view(head, each, asked.view_dropout, generator) for each in (one, two)]
        loss = contrast(views[0], views[1], groups, temperature=asked.temperature)
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
    return Projection(drawn.centre, drawn.scale, *(weight.detach() for weight in weights))


def _pairs(
    skills: list[Tensor], mix: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs [count, H] twice and their groups; half of them, at least one, of the mix."""
    of_mix = max(1, count // 2)
    rows = torch.randint(len(mix), (of_mix,), generator=generator)
    one, two = [mix[rows]], [mix[rows]]
    which = torch.randint(len(skills), (count - of_mix,), generator=generator)
    for skill in which.tolist():
        held = skills[skill]
        pair = torch.randperm(len(held), generator=generator)[:2]
        one.append(held[pair[:1]])
        two.append(held[pair[1:]])
    groups = torch.cat([len(skills) + rows, which])
    return torch.cat(one), torch.cat(two), groups


def _view(head: Projection, features: Tensor, share: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(features.shape, generator=generator) >= share
    return normalize(head.of_standardised(features * kept / (1 - share)), dim=-1)
