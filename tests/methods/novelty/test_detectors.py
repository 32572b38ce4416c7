"""Scores of each detector compared with independent formulas; similarity over the right axis."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.novelty.factories import BATCH, SIZE, centre_of, drawn, library, scores_of
from tritter.errors import RequestError, TritterError
from tritter.methods.novelty import NoveltyDetector, Observation, SkillLibrary
from tritter.methods.novelty.detectors import NovelSamples
from tritter.methods.novelty.library import (
    Projection,
    ProjectionOptions,
    _contrast,
)
from tritter.methods.novelty.options import (
    DETECTORS,
    CosineNovelty,
    Detector,
    LossNovelty,
    MahalanobisNovelty,
    _mean_cosines,
)
from tritter.methods.novelty.statistics import Moments
from tritter.options import options, read_part


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normed(rows: np.ndarray) -> np.ndarray:
    """Layer-norm each row, then scale it to unit norm: over features, not samples."""
    offsets = rows - rows.mean(axis=1, keepdims=True)
    offsets /= np.sqrt(offsets.var(axis=1, keepdims=True) + 1e-5)
    return offsets / np.linalg.norm(offsets, axis=1, keepdims=True)


def test_the_loss_alone_is_a_z_score_of_held_out_batch_means(generator: torch.Generator) -> None:
    held = [drawn(generator=generator) for _ in range(40)]
    known = SkillLibrary()
    known.add("prose", held, is_base=True)
    means = [float(each.losses.mean()) for each in held]
    seen = drawn(generator=generator, loss=5)
    scores = scores_of(LossNovelty(with_features=False), seen, known)
    expected = (float(seen.losses.mean()) - np.mean(means)) / np.std(means, ddof=1)
    assert float(scores.values.mean()) == pytest.approx(expected, rel=1e-6)
    assert scores.by_skill == {"prose": pytest.approx(expected)}


def test_a_distance_is_held_against_batches_that_its_statistics_never_saw(
    generator: torch.Generator,
) -> None:
    """Folds by hand, with an explicit inverse; in-sample distances would be smaller."""
    held = [drawn(generator=generator) for _ in range(40)]
    known = SkillLibrary()
    skill = known.add("prose", held, is_base=True)
    found = []
    for fold in range(5):
        rest = torch.cat([b.features for i, b in enumerate(held) if i % 5 != fold]).double()
        inverse = np.linalg.inv(Moments.of(rest).shrunk_covariance().numpy())
        for batch in held[fold::5]:
            offset = (batch.features.double().mean(dim=0) - rest.mean(dim=0)).numpy()
            found.append(np.sqrt(16 * offset @ inverse @ offset / SIZE))
    assert skill.centre.mean == pytest.approx(np.mean(found), rel=1e-6)
    assert skill.centre.own_deviation == pytest.approx(np.std(found, ddof=1), rel=1e-5)
    seen = drawn(centre_of(1), generator=generator)
    values = scores_of(MahalanobisNovelty(), seen, known).values
    gaussian = known.gaussian("prose")
    distance = float(gaussian.centre_distance(seen.features).mean())
    expected = (distance - np.mean(found)) / np.std(found, ddof=1)
    assert float(values.mean()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["loss", "mahalanobis"])
def test_the_nearest_skill_is_named(name: str, generator: torch.Generator) -> None:
    known, detector = library(generator), DETECTORS[name]()
    for centre, loss, expected in ((0.0, 4.0, "prose"), (centre_of(2), 6.0, "sorting")):
        scores = scores_of(detector, drawn(centre, generator=generator, loss=loss), known)
        assert scores.nearest == expected and float(scores.values.mean()) < 6
    other = scores_of(detector, drawn(centre_of(4), generator=generator, loss=6), known)
    assert min(other.by_skill.values()) > 6


def test_equal_losses_are_told_apart_by_features_and_equal_features_by_losses(
    generator: torch.Generator,
) -> None:
    known = library(generator)
    elsewhere = drawn(centre_of(4), generator=generator, loss=6)
    harder = drawn(centre_of(2), generator=generator, loss=9)
    easier = drawn(centre_of(2), generator=generator, loss=5)
    loss, alone = LossNovelty(), LossNovelty(with_features=False)
    assert min(scores_of(loss, elsewhere, known).by_skill.values()) > 6
    assert scores_of(alone, elsewhere, known).nearest == "sorting"
    assert min(scores_of(alone, elsewhere, known).by_skill.values()) < 6
    assert min(scores_of(loss, harder, known).by_skill.values()) > 6
    assert scores_of(loss, easier, known).by_skill["sorting"] < 6


def test_values_of_a_cosine_average_to_it_and_spread_as_jackknifed_ones(
    generator: torch.Generator,
) -> None:
    samples = SkillLibrary().embed(drawn(1.0, generator=generator, batch=40).features)
    skills = torch.randn(3, SIZE, generator=generator, dtype=torch.float64)
    values = _mean_cosines(samples, skills)
    assert values.shape == (3, 40)

    def cosine(rows: np.ndarray, skill: np.ndarray) -> float:
        mean = rows.mean(axis=0)
        return float(mean @ skill / np.linalg.norm(mean) / np.linalg.norm(skill))

    rows = samples.numpy()
    for skill, found in zip(skills.numpy(), values.numpy(), strict=True):
        whole = cosine(rows, skill)
        assert found.mean() == pytest.approx(whole)
        left_out = [cosine(np.delete(rows, i, axis=0), skill) for i in range(40)]
        jackknifed = np.std([40 * whole - 39 * each for each in left_out], ddof=1)
        assert found.std(ddof=1) == pytest.approx(jackknifed, rel=0.05)


def test_similarity_is_taken_over_the_features(generator: torch.Generator) -> None:
    """Over the wrong axis it would always be 1: opposite batches must differ."""
    batch = drawn(generator=generator).features + torch.tensor([3.0, 0, 0, -3, 0, 0])
    seen = Observation(losses=torch.ones(16), features=batch)
    opposite = Observation(losses=torch.ones(16), features=-batch)
    known = SkillLibrary()
    known.add("prose", [seen] * 30, is_base=True)
    cosine = CosineNovelty()
    assert float(scores_of(cosine, seen, known).values.mean()) == pytest.approx(0, abs=1e-6)
    assert float(scores_of(cosine, opposite, known).values.mean()) == pytest.approx(2, abs=1e-6)
    assert np.allclose(SkillLibrary().embed(batch), _normed(batch.double().numpy()), atol=1e-6)
    mixed = scores_of(
        cosine,
        Observation(losses=torch.ones(2), features=torch.stack([batch[0], -batch[0]])),
        known,
    )
    assert float(mixed.samples[1]) > 1 > float(mixed.samples[0])  # each separately


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("reduction", ["max", "mean", "median"])
@pytest.mark.parametrize("num_skills", [1, 2, 3, 4])
def test_reductions_are_those_of_numpy(
    reduction: str, num_skills: int, generator: torch.Generator
) -> None:
    known = SkillLibrary()
    prototypes = []
    for number in range(num_skills):
        batches = [drawn(centre_of(number), generator=generator) for _ in range(30)]
        known.add(f"skill {number}", batches, is_base=True)
        prototypes.append(_normed(torch.cat([b.features for b in batches]).double().numpy()))
    seen = drawn(centre_of(5), generator=generator)
    mean = _normed(seen.features.double().numpy()).mean(axis=0)
    cosines = [
        mean @ rows.mean(axis=0) / np.linalg.norm(mean) / np.linalg.norm(rows.mean(axis=0))
        for rows in prototypes
    ]
    scores = scores_of(CosineNovelty(reduction=reduction), seen, known)
    expected = {"max": np.max, "mean": np.mean, "median": np.median}[reduction](cosines)
    assert float(scores.values.mean()) == pytest.approx(1 - expected, abs=1e-5)
    assert scores.samples.shape == (16,)
    assert scores.nearest == f"skill {int(np.argmax(cosines))}"


@given(st.floats(-1, 1), st.floats(0, 2), st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 1000))
def test_tau_falls_with_the_library_and_stays_in_its_bounds(
    base: float, decay: float, one: float, two: float, count: int
) -> None:
    low, high = sorted((one, two))
    detector = CosineNovelty(threshold=base, decay=decay, lowest=low, highest=high)
    expected = min(high, max(low, base - decay * math.log(1 + count)))
    assert detector.tau(count) == pytest.approx(expected)
    assert detector.tau(count + 1) <= detector.tau(count)


def test_tau_is_the_threshold_of_the_library(generator: torch.Generator) -> None:
    known = library(generator)
    detector = CosineNovelty(decay=0.1)
    assert detector.limit(known) == pytest.approx(1 - (0.75 - 0.1 * math.log(3)))
    assert CosineNovelty().tau(0) == 0.75


def test_nt_xent_by_loops(generator: torch.Generator) -> None:
    one, two = (
        torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=1)
        for _ in range(2)
    )
    groups = torch.tensor([0, 0, 1, 2, 3])
    views, both = torch.cat([one, two]), [0, 0, 1, 2, 3] * 2
    losses = []
    for i in range(10):
        partner = (i + 5) % 10
        others = [j for j in range(10) if both[j] != both[i]]
        weight = {j: math.exp(float(views[i] @ views[j]) / 0.3) for j in [partner, *others]}
        losses.append(-math.log(weight[partner] / sum(weight.values())))
    assert float(_contrast(one, two, groups, temperature=0.3)) == pytest.approx(np.mean(losses))


@pytest.mark.full
def test_a_trained_head_draws_skills_apart_and_is_drawn_again_alike(
    generator: torch.Generator,
) -> None:
    """Raw features share a large component and are all similar; a head learns the differences."""
    shared = torch.tensor([9.0, -9, 9, -9, 9, -9])
    prose, sorting = (
        torch.cat([drawn(shared + c, generator=generator).features for _ in range(30)])
        for c in (torch.zeros(SIZE), 2 * centre_of(0, 1.0))
    )
    mix = torch.stack([x[torch.randperm(480, generator=generator)] for x in prose.T], dim=1)
    held = {"prose": prose, "sorting": sorting}
    asked = ProjectionOptions(steps=100, size=8, hidden_size=16)
    head = Projection.trained(held, mix, asked)

    def cosine(projection: Projection | None) -> float:
        library = SkillLibrary()
        library.projection = projection
        one, two = (library.embed(x).mean(dim=0) for x in (prose, sorting))
        return float(torch.cosine_similarity(one, two, dim=0))

    assert cosine(None) > 0.95
    assert cosine(head) < 0.75
    again = Projection.trained(held, mix, asked)
    assert all(torch.equal(a, b) for a, b in zip(_weights(head), _weights(again), strict=True))
    known = SkillLibrary()
    known.add("prose", [Observation(losses=torch.ones(16), features=prose[:16])] * 30, is_base=True)
    with pytest.raises(RequestError, match="samples of prose"):
        known.train_projection({"sorting": sorting}, mix, asked)
    with pytest.raises(RequestError, match="sorting has too few"):
        Projection.trained({"sorting": sorting[:1]}, mix, asked)
    known.train_projection({"prose": prose}, mix, asked)
    assert known["prose"].embedding.shape == (8,)


def _weights(head: Projection) -> list[Tensor]:
    return list(head.state_dict().values())


@given(st.integers(1, 9), st.integers(2, 7), st.integers(1, 3), st.integers(0, 99))
def test_scores_follow_their_samples(batch: int, size: int, num_skills: int, seed: int) -> None:
    """One value per sample, independent of its position; their mean is the novelty of the batch."""
    generator = torch.Generator().manual_seed(seed)
    known = SkillLibrary()
    for number in range(num_skills):
        batches = [drawn(number, generator=generator, size=size, batch=4) for _ in range(30)]
        known.add(f"skill {number}", batches, is_base=True)
    seen = drawn(2.0, generator=generator, size=size, batch=batch)
    order = torch.randperm(batch, generator=generator)
    for name in DETECTORS:
        detector = DETECTORS[name]()
        scores, shuffled = (scores_of(detector, x, known) for x in (seen, seen.rows(order)))
        assert scores.values.shape == scores.samples.shape == (batch,)
        assert scores.by_skill.keys() == {f"skill {number}" for number in range(num_skills)}
        mean = float(scores.values.mean())
        assert mean == pytest.approx(scores.by_skill[scores.nearest], abs=1e-9)
        assert mean == min(scores.by_skill.values())
        assert torch.allclose(scores.values[order], shuffled.values)
        assert torch.allclose(scores.samples[order], shuffled.samples, atol=1e-6)


@options
class LongNovelty(Detector):
    """A user's detector: the loss itself, independent of the library."""

    nats: float = 5.0

    def against(self, seen: Observation, library: SkillLibrary) -> dict[str, Tensor]:
        return {skill.name: seen.losses for skill in library}

    def limit(self, library: SkillLibrary) -> float:
        return self.nats


def test_a_detector_from_outside_decides(generator: torch.Generator) -> None:
    novelty = NoveltyDetector(library(generator), detector=LongNovelty())
    found = [
        novelty.observe(drawn(generator=generator, loss=loss)).kind for loss in (4, 4, 6, 6, 4)
    ]
    assert found == ["unsure", "known", "unsure", "new", "unsure"]


@pytest.mark.parametrize(
    ("skill", "values", "message"),
    [
        ("other", torch.ones(BATCH), "LongNovelty must return known skill → .* of other"),
        ("", torch.ones(1), r"finite novelty of each of the \d+ sequences, not \[1.0\] of"),
        ("", torch.ones(BATCH, 3), r"not \[\[1.0, 1.0, 1.0\]"),
        ("", torch.full((BATCH,), math.nan), r"not \[nan, "),
    ],
)
def test_a_detector_from_outside_with_a_mistake_is_refused(
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    skill: str,
    values: Tensor,
    message: str,
) -> None:
    known = library(generator)
    found = {skill or known.reference.name: values}
    monkeypatch.setattr(LongNovelty, "against", lambda *_: found)
    with pytest.raises(TritterError, match=message):
        NoveltyDetector(known, detector=LongNovelty()).observe(drawn(generator=generator))
    with pytest.raises(TritterError, match=message):
        NovelSamples(LongNovelty(), known).calibrate([drawn(generator=generator)])


def read_detector(value: object) -> Detector:
    return read_part("novelty.detector", value, DETECTORS, base=Detector)


def test_detectors_are_chosen_by_name_and_options() -> None:
    assert read_detector("mahalanobis") == MahalanobisNovelty()
    assert read_detector({"name": "cosine", "reduction": "mean"}).reduction == "mean"
    made = LossNovelty(threshold=4.0)
    assert read_detector(made) is made
    with pytest.raises(RequestError, match="Did you mean mahalanobis"):
        read_detector("mahalanobi")
    with pytest.raises(RequestError, match=r"novelty\.detector\.reduction"):
        read_detector({"name": "cosine", "reduction": "least"})
    with pytest.raises(RequestError, match=r"novelty\.detector\.threshold"):
        read_detector(LossNovelty(threshold=-1.0))
