"""Random observations: Gaussian features around a centre, losses around a level."""

from types import SimpleNamespace

import torch
from torch import Tensor

from tritter.methods.novelty import Observation, SkillLibrary
from tritter.methods.novelty.options import Detector

SIZE, BATCH = 6, 16


def drawn(
    centre: Tensor | float = 0.0,
    *,
    generator: torch.Generator,
    loss: float = 4.0,
    size: int = SIZE,
    batch: int = BATCH,
) -> Observation:
    """Return a batch: losses of deviation 0.2, correlated features of deviation 1."""
    noise = torch.randn(batch, size, generator=generator)
    noise[:, 1] += 0.8 * noise[:, 0]
    losses = loss + 0.2 * torch.randn(batch, generator=generator, dtype=torch.float64)
    return Observation(
        losses=losses,
        features=centre + noise,
    )


def centre_of(axis: int, distance: float = 4.0) -> Tensor:
    return distance * torch.nn.functional.one_hot(torch.tensor(axis), SIZE).float()


def library(generator: torch.Generator, *, batches: int = 40) -> SkillLibrary:
    """Return a library that knows prose (around 0) and sorting (along the third axis)."""
    made = SkillLibrary()
    made.add("prose", [drawn(generator=generator) for _ in range(batches)], is_base=True)
    made.add("sorting", [drawn(centre_of(2), generator=generator, loss=6) for _ in range(batches)])
    return made


def scores_of(detector: Detector, seen: Observation, known: SkillLibrary) -> SimpleNamespace:
    """Return the novelty of a batch and of its samples, as detectors and bursts use it."""
    against = detector.checked(seen, known)
    by_skill = {name: float(values.mean()) for name, values in against.items()}
    return SimpleNamespace(
        values=detector.values(against),
        samples=detector.samples(seen, known),
        by_skill=by_skill,
        nearest=min(by_skill, key=by_skill.__getitem__),
    )
