"""Novel samples of mixed batches: collected in groups, reported as bursts."""

import io

import pytest
import torch

from tests.methods.novelty.factories import centre_of, drawn, library
from tritter.errors import RequestError, TritterError
from tritter.methods.novelty import Observation
from tritter.methods.novelty.detectors import Burst, NovelSamples
from tritter.methods.novelty.options import BurstOptions, LossNovelty


def gatherer(generator: torch.Generator, **options: float) -> NovelSamples:
    made = NovelSamples(LossNovelty(), library(generator), BurstOptions(**options))
    made.calibrate([drawn(generator=generator) for _ in range(40)])
    return made


def mixed(generator: torch.Generator, num_new: int, axis: int = 4) -> Observation:
    new = drawn(centre_of(axis, 8.0), generator=generator, loss=6, batch=num_new)
    return Observation.concatenated([new, drawn(generator=generator, batch=16 - num_new)])


def after(made: NovelSamples, generator: torch.Generator, num_new: int) -> tuple[int, Burst]:
    for step in range(1, 65):
        marks = [torch.tensor(index) for index in range(16)]
        if (burst := made.add(mixed(generator, num_new), marks)) is not None:
            return step, burst
    raise AssertionError("no burst came")


def test_a_burst_holds_enough_samples_of_one_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    step, burst = after(gatherer(generator, similarity=0.8), generator, 2)
    assert 14 <= step <= 20
    assert len(burst.seen) == len(burst.rows) >= 32
    is_new = torch.tensor([int(row) < 2 for row in burst.rows])
    assert is_new.float().mean() > 0.9
    assert float(burst.seen.losses[is_new].mean()) == pytest.approx(6, abs=0.2)
    assert burst.usual < burst.lower < burst.share


def test_two_kinds_make_two_bursts() -> None:
    generator = torch.Generator().manual_seed(0)
    made, found = gatherer(generator), []
    for _ in range(12):
        seen = Observation.concatenated([mixed(generator, 4, axis=4), mixed(generator, 4, axis=5)])
        burst = made.add(seen, [torch.tensor(0)] * 32)
        found += [] if burst is None else [int(burst.seen.features.mean(dim=0).argmax())]
    assert {*found} == {4, 5}


@pytest.mark.full
def test_known_samples_make_no_burst() -> None:
    """5,000 known batches, with sorting in between."""
    generator = torch.Generator().manual_seed(0)
    made = gatherer(generator)
    rows = [torch.tensor(0)] * 16
    prose = drawn(generator=generator, batch=4000)
    sorting = drawn(centre_of(2), generator=generator, loss=6, batch=4000)
    for _ in range(1000):
        some = torch.randint(4000, (16,), generator=generator)
        assert made.add(prose.rows(some), rows) is None
    novel = made.novel(sorting).double().mean()
    assert float(novel) < 0.3  # samples of a known skill are hardly more novel than those of prose


def test_old_samples_are_forgotten() -> None:
    generator = torch.Generator().manual_seed(0)
    made = gatherer(generator, window_samples=64)
    for _ in range(40):
        assert made.add(mixed(generator, 2), [torch.tensor(0)] * 16) is None
    assert sum(len(group["rows"]) for group in made.state_dict()["groups"]) <= 20


def test_a_resumed_gatherer_hands_over_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    one = gatherer(generator)
    batches = [mixed(generator, 3) for _ in range(16)]
    rows = [torch.tensor([index, index]) for index in range(16)]
    for seen in batches[:6]:
        one.add(seen, rows)
    two = NovelSamples(one.detector, one.library, one.options)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(TritterError, match="format 7"):
        two.load_state_dict({**one.state_dict(), "format_version": 7})
    found = []
    for seen in batches[6:]:
        bursts = [each.add(seen, rows) for each in (one, two)]
        assert (bursts[0] is None) == (bursts[1] is None)
        if bursts[0] is not None:
            found.append(bursts)
    assert len(found) == 1
    assert torch.equal(found[0][0].seen.features, found[0][1].seen.features)
    assert all(torch.equal(a, b) for a, b in zip(found[0][0].rows, found[0][1].rows, strict=True))


def test_too_little_to_calibrate_by_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    made = NovelSamples(LossNovelty(), library(generator), BurstOptions(usual_share=0.01))
    with pytest.raises(RequestError, match="at least 101 samples"):
        made.calibrate([drawn(generator=generator)])
    with pytest.raises(RequestError, match="calibrate the bursts"):
        made.novel(drawn(generator=generator))
