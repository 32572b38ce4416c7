"""A base trained on the standard library's prose: shipped skills, repeats, no false alarm."""

from pathlib import Path

import pytest

from experiments.benchmarks.novelty import SHUFFLED, seen_by_a_base, stationary, stream_of
from tritter.data.skills import SKILLS


@pytest.mark.slow
def test_shipped_skills_are_found_and_recognised_and_prose_is_not_new(tmp_path: Path) -> None:
    seen = seen_by_a_base(steps=300, seed=0, skills=[*SKILLS, "code"], cache=tmp_path)
    for detector in ("loss", "mahalanobis"):
        row = stationary(detector, seen, steps=5_000, seed=0, stream=SHUFFLED)
        assert row.per_1000_upper <= 1
        row = stream_of(detector, seen, orders=1, seed=1)
        assert row.found == row.skills == 10 and row.largest_delay <= 5
        assert row.recognised == row.repeats == 10
        assert row.spawned_again == row.false_alarms == 0
