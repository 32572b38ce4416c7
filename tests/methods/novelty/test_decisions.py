"""Decisions: rules, false alarms on stationary losses, delays, repeats, resuming."""

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.benchmarks.novelty import levels
from tests.methods.novelty.factories import centre_of, drawn, library, scores_of
from tritter import NoveltyDetector, SkillLibrary
from tritter.errors import RequestError, TritterError
from tritter.methods.novelty import NoveltyOptions, Observation
from tritter.methods.novelty.statistics import Calibration, share_bound

STEPS = 5_000
DETECTORS = ("loss", "mahalanobis", {"name": "cosine", "threshold": 0.5})


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def of_losses(losses: Tensor) -> Observation:
    return Observation(losses=losses.double(), features=torch.ones(len(losses), 2))


def by_loss(options: NoveltyOptions | None = None) -> NoveltyDetector:
    """Return a detector that uses losses alone, around 4 with batch means of deviation 0.1."""
    made = NoveltyDetector(detector={"name": "loss", "with_features": False}, options=options)
    ends = torch.tensor([-1.0, 1.0]).repeat(8)
    means = 4 + 0.1 * torch.tensor([-1.0, 1.0]).repeat(15) * (29 / 30) ** 0.5
    made.add("prose", [of_losses(mean + 0.2 * ends) for mean in means], is_base=True)
    return made


def at_z(z: float, *, spread: float = 0.2, batch: int = 16) -> Observation:
    return of_losses(4 + 0.1 * z + spread * torch.tensor([-1.0, 1.0]).repeat(batch // 2))


def kinds(detector: NoveltyDetector, zs: list[float], **options: float) -> list[str]:
    return [detector.observe(at_z(z, **options)).kind for z in zs]


def test_two_in_a_row_above_six_are_new():
    assert kinds(by_loss(), [9, 9]) == ["unsure", "new"]
    assert kinds(by_loss(), [0, 9, 0, 9, 0, 9]) == ["unsure"] * 6
    assert kinds(by_loss(), [0, 0]) == ["unsure", "known"]
    assert kinds(by_loss(), [5.5, 5.5]) == ["unsure", "unsure"]  # the upper bound is above six
    three = by_loss(NoveltyOptions(in_a_row=3))
    assert kinds(three, [9, 9, 9]) == ["unsure", "unsure", "new"]


@pytest.mark.parametrize(("batch", "threshold"), [(32, 6), (16, 6), (8, 18**0.5), (4, 3), (2, 3)])
def test_means_of_small_batches_deviate_more(
    generator: torch.Generator, batch: int, threshold: float
) -> None:
    """The same change of a skill is fewer deviations of the mean of fewer sequences."""
    seen = [drawn(generator=generator, batch=batch) for _ in range(31)]
    for detector, expected in zip(DETECTORS, (threshold, threshold, 0.5), strict=True):
        made = NoveltyDetector(detector=detector)
        made.add("prose", seen[:30], is_base=True)
        assert made.observe(seen[30]).threshold == pytest.approx(expected)


def test_a_decision_rests_on_enough_samples():
    assert kinds(by_loss(), [30] * 5, batch=8) == ["unsure"] * 3 + ["new"] + ["unsure"]
    many = by_loss(NoveltyOptions(min_samples=64))
    decision = [many.observe(at_z(30)) for _ in range(4)][-1]
    assert (decision.kind, decision.num_samples, decision.num_batches) == ("new", 64, 4)
    assert by_loss().observe(at_z(30)).reason == "16 of 32 samples"


def test_the_lower_bound_lies_above_the_threshold():
    """The same mean of losses with a larger variance is inconclusive."""
    close, document_mask = by_loss(), by_loss()
    assert kinds(close, [8, 8]) == ["unsure", "new"]
    document_mask.observe(at_z(8, spread=1.0))
    decision = document_mask.observe(at_z(8, spread=1.0))
    assert decision.kind == "unsure" and decision.reason == "the interval contains the threshold"
    assert decision.lower < decision.threshold == 6 < decision.score < decision.upper
    assert decision.score == pytest.approx(8, rel=1e-5)


def test_one_outlier_is_no_skill():
    detector = by_loss()
    losses = torch.full((16,), 4.0)
    losses[3] = 60.0
    for _ in range(10):
        decision = detector.observe(of_losses(losses))
        assert decision.score > 6 and decision.kind == "unsure"


def test_nothing_else_is_new_during_the_cooldown():
    detector = by_loss(NoveltyOptions(cooldown=5))
    found = kinds(detector, [20] * 9)
    assert found == ["unsure", "new", *["unsure"] * 5, "new", "unsure"]
    waiting = by_loss(NoveltyOptions(cooldown=5))
    kinds(waiting, [20, 20])
    assert waiting.observe(at_z(20)).reason == "cooldown for 5 more batches"
    waiting.restart(keeps_cooldown=False)  # as for a new run
    assert "cooldown" not in waiting.observe(at_z(20)).reason


def test_a_moving_average_delays():
    plain, slow = by_loss(), by_loss(NoveltyOptions(moving_average=0.8))
    zs = [0.0] * 4 + [12.0] * 8
    assert kinds(plain, zs).index("new") == 5
    assert kinds(slow, zs).index("new") > 6


def _stationary(kind: str, seed: int, steps: int) -> Iterator[Observation]:
    """Yield 30 held-out batches and then a stream of losses with a moving level."""
    generator = torch.Generator().manual_seed(seed)
    level = levels(kind, steps + 1000, generator)
    rows = torch.randperm(900, generator=generator)[: Calibration.full]
    for value in torch.cat([level[rows], level[1000:]]):
        noise = torch.randn(16, generator=generator, dtype=torch.float64)
        samples = noise.exp() - 1.65 if "log-normal" in kind else 0.2 * noise
        yield Observation(
            losses=4 + 0.06 * value + samples, features=torch.randn(16, 2, generator=generator)
        )


@pytest.mark.full
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "log-normal samples",
        "t3 batches",
        "autocorrelated 0.8",
        "autocorrelated 0.8, t3",
    ],
)
def test_false_alarms_on_stationary_losses_are_fewer_than_one_in_a_thousand(kind: str) -> None:
    """5,000 steps: the 95 % upper bound of their rate; two calibrations of 30 batches each."""
    count = 0
    for seed in range(2):
        stream = _stationary(kind, seed, STEPS // 2)
        detector = NoveltyDetector(detector="loss", options=NoveltyOptions(cooldown=0))
        held = [next(stream) for _ in range(Calibration.full)]
        detector.add("prose", held, is_base=True)
        count += sum(detector.observe(seen).kind == "new" for seen in stream)
    assert share_bound(count, STEPS, confidence=0.95, is_lower=False) <= 1e-3


@pytest.mark.full
def test_a_rule_of_one_batch_above_three_is_seen_to_alarm() -> None:
    """Negative control of the count above."""
    stream = _stationary("autocorrelated 0.8, t3", 0, 1000)
    detector = NoveltyDetector(
        detector={"name": "loss", "threshold": 2.0},
        options=NoveltyOptions(cooldown=0, in_a_row=1, min_samples=2, confidence=0.5),
    )
    held = [next(stream) for _ in range(Calibration.full)]
    detector.add("prose", held, is_base=True)
    assert sum(detector.observe(seen).kind == "new" for seen in stream) > 10


def test_the_cosine_finds_other_directions_and_knows_them_again(generator: torch.Generator) -> None:
    novelty = NoveltyDetector(detector="cosine")
    prose = [drawn(centre_of(0, 6.0), generator=generator) for _ in range(30)]
    novelty.add("prose", prose, is_base=True)
    for axis, name in ((3, "adding"), (4, "naming")):
        seen = [drawn(centre_of(axis, 6.0), generator=generator) for _ in range(3)]
        assert [novelty.observe(each).kind for each in seen[:2]] == ["unsure", "new"]
        novelty.add(name)
        novelty.observe(seen[0])
        decision = novelty.observe(seen[2])
        assert (decision.kind, decision.skill) == ("known", name)
        for _ in range(30):
            novelty.observe(prose[0])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("detector", DETECTORS[:2])
def test_skills_are_found_in_two_batches_and_recognised_again(
    detector: str, generator: torch.Generator
) -> None:
    novelty = NoveltyDetector(library(generator), detector=detector)
    for skill, axis in (("adding", 3), ("naming", 5)):
        centre = centre_of(axis, 6.0)
        first = [drawn(centre, generator=generator, loss=6) for _ in range(2)]
        assert [novelty.observe(each).kind for each in first] == ["unsure", "new"]
        before = _names(novelty.library)
        added = novelty.add(skill)
        assert added.moments.n == 32 and list(added.similarity_at_creation) == before
        more = [drawn(centre, generator=generator, loss=6) for _ in range(Calibration.full)]
        for seen in more:
            assert novelty.observe(seen).kind != "new"
        novelty.recalibrate(skill, more)
    for centre, loss, name in (
        (0.0, 4.0, "prose"), (centre_of(3, 6.0), 6.0, "adding"), (centre_of(5, 6.0), 6.0, "naming")
    ):  # fmt: skip
        found = [novelty.observe(drawn(centre, generator=generator, loss=loss)) for _ in range(9)]
        assert {each.kind for each in found[1:]} == {"known"}
        assert {each.skill for each in found[1:]} == {name}


def _names(known: SkillLibrary) -> list[str]:
    return [skill.name for skill in known]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("detector", DETECTORS, ids=str)
def test_a_resumed_detector_decides_the_same(detector: str, generator: torch.Generator) -> None:
    options = NoveltyOptions(moving_average=0.2, cooldown=3)
    one = NoveltyDetector(library(generator), detector=detector, options=options)
    stream = [drawn(centre_of(4), generator=generator, loss=6) for _ in range(12)]
    stream[5:7] = [drawn(generator=generator) for _ in range(2)]
    for at in (1, 3, 6):
        two = NoveltyDetector(detector=detector, options=options)
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        two.load_state_dict(torch.load(file, weights_only=True))
        for seen in stream[:at]:
            assert one.observe(seen) == two.observe(seen)
        assert _equal(one.state_dict(), two.state_dict())
    one.add("adding", stream[7:]), two.add("adding", stream[7:])
    assert [one.observe(x) for x in stream] == [two.observe(x) for x in stream]
    with pytest.raises(TritterError, match="format 9"):
        two.load_state_dict({**one.state_dict(), "format_version": 9})
    older = one.state_dict()
    older["library"]["skills"] = [{**each, "digests": ["a"]} for each in older["library"]["skills"]]
    two.load_state_dict(older)
    assert _equal(one.state_dict(), two.state_dict())


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_equal, one, two))
    return one == two


def test_decisions_do_not_depend_on_how_samples_lie_in_a_batch(generator: torch.Generator) -> None:
    novelty = NoveltyDetector(library(generator))
    parts = [drawn(centre_of(4), generator=generator, batch=8) for _ in range(2)]
    one = scores_of(novelty.detector, Observation.concatenated(parts), novelty.library)
    other = scores_of(novelty.detector, Observation.concatenated(parts[::-1]), novelty.library)
    assert float(one.values.mean()) == pytest.approx(float(other.values.mean()))


def test_detectors_without_losses_decide_the_same_without_them(generator: torch.Generator) -> None:
    def without(seen: Observation) -> Observation:
        return replace(seen, losses=None)

    base = [drawn(generator=generator) for _ in range(40)]
    stream = [drawn(centre_of(4), generator=generator) for _ in range(3)] + base[:2]
    whole, half = (NoveltyDetector(detector="mahalanobis") for _ in range(2))
    whole.add("prose", base, is_base=True)
    half.add("prose", [without(each) for each in base], is_base=True)
    again = NoveltyDetector(detector="mahalanobis")
    again.load_state_dict(half.state_dict())
    for seen in stream:
        decision = whole.observe(seen)
        assert half.observe(without(seen)) == again.observe(without(seen)) == decision
    by_losses = NoveltyDetector(half.library, detector="loss")
    with pytest.raises(RequestError, match="'prose' was measured without losses"):
        by_losses.observe(stream[0])
    with pytest.raises(RequestError, match="'prose' was measured without losses"):
        NoveltyDetector(detector="loss").load_state_dict(half.state_dict())
    with pytest.raises(RequestError, match="observed with with_losses=False"):
        NoveltyDetector(whole.library, detector="loss").observe(without(stream[0]))
    assert not half.detector.reads_losses and by_losses.detector.reads_losses


def test_wrong_uses_are_refused(generator: torch.Generator) -> None:
    novelty = NoveltyDetector()
    seen = drawn(generator=generator)
    with pytest.raises(RequestError, match="the library is empty"):
        novelty.observe(seen)
    with pytest.raises(RequestError, match="can't be the first"):
        novelty.add("sorting", [seen])
    with pytest.raises(RequestError, match="'prose' has 12 batches"):
        novelty.add("prose", [seen] * 12, is_base=True)
    novelty = NoveltyDetector(library(generator))
    with pytest.raises(RequestError, match="there are no new batches"):
        novelty.add("adding")
    for _ in range(2):
        novelty.observe(seen)
    with pytest.raises(RequestError, match="there are no new batches"):
        novelty.add("adding")
    with pytest.raises(RequestError, match="'sorting' is empty or already"):
        novelty.add("sorting", [seen])
    with pytest.raises(RequestError, match="Did you mean 'sorting'"):
        novelty.recalibrate("sortin", [seen])
    with pytest.raises(RequestError, match="at least four samples"):
        novelty.add("adding", [])
    with pytest.raises(RequestError, match="a library belongs to one base"):
        novelty.add("adding", [drawn(generator=generator, size=9)])
    with pytest.raises(RequestError, match="the reference of the others"):
        novelty.library.remove("prose")
    with pytest.raises(RequestError, match=r"novelty\.confidence"):
        NoveltyDetector(options=NoveltyOptions(confidence=1.5))
    novelty.library.remove("sorting")
    assert _names(novelty.library) == ["prose"]


def test_similarities_do_not_depend_on_where_a_skill_lies_in_memory(
    generator: torch.Generator,
) -> None:
    """A loaded tensor begins anywhere in its file, and the last bit of a BLAS product tells."""
    one, two = library(generator), SkillLibrary()
    batches = [drawn(centre_of(5), generator=generator, loss=5) for _ in range(30)]
    for number in range(20):
        one.add(f"skill_{number}", batches[number : number + 8])
    state = one.state_dict()
    for skill in state["skills"]:
        skill["embedding"] = torch.cat([torch.zeros(1).double(), skill["embedding"]])[1:]
    two.load_state_dict(state)
    found = [each.add("new", batches).similarity_at_creation for each in (one, two)]
    assert len(found[0]) == 22 and found[0] == found[1]


def test_a_recalibrated_skill_keeps_what_it_was_created_by(generator: torch.Generator) -> None:
    known = library(generator)
    old = known["sorting"]
    batches = [drawn(centre_of(3), generator=generator, loss=5) for _ in range(30)]
    new = known.recalibrate("sorting", batches)
    assert new.similarity_at_creation == old.similarity_at_creation != {}
    assert new.loss.mean == pytest.approx(5, abs=0.1) and new.moments.n == 480
    assert torch.argmax(new.mean) == 3
    assert float(known.z("centre", "sorting", batches[0]).mean()) < 6
