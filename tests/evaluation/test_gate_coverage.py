"""The simulation of the gate's bounds: independent intervals, and its reported coverage."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from scipy.special import stdtrit

from tritter.evaluation.statistics import Estimate, _bounded_ratio

FOLDER = "experiments.2026-11-20_gate_coverage"
simulation = importlib.import_module(f"{FOLDER}.gate_coverage")
intervals = importlib.import_module(f"{FOLDER}.intervals")
DAMAGES = {damage.name: damage for damage in simulation.DAMAGES}


def sample(name, num_samples, n, seed=0):
    return DAMAGES[name].sample(num_samples, n, torch.Generator().manual_seed(seed))


@pytest.mark.full
@pytest.mark.parametrize("name", DAMAGES)
def test_the_truth_of_a_damage_is_what_many_documents_say(name):
    drawn = sample(name, 1, 2_000_000)
    change = float(drawn.after.sum() / drawn.before.sum()) - 1
    assert change == pytest.approx(DAMAGES[name].truth, rel=0.03)


def test_many_samples_at_once_are_one_after_the_other():
    drawn = sample("with length", 4, 31)
    student = intervals.student_t(drawn.before, drawn.after, confidence=0.95)
    bootstrap = intervals.bootstrap_t(drawn.before, drawn.after, confidence=0.95)
    for index, (before, after) in enumerate(zip(drawn.before, drawn.after, strict=True)):
        ratio, estimate = Estimate.of_ratio(after, before), _bounded_ratio(after, before)
        margin = stdtrit(30, 0.95) * ratio.standard_error
        assert float(student.upper[index]) == pytest.approx(ratio.value + margin - 1)
        assert float(bootstrap.upper[index]) == pytest.approx(estimate.upper(0.95) - 1)
        assert float(bootstrap.lower[index]) == pytest.approx(estimate.lower(0.95) - 1)


def test_empirical_likelihood_of_two_points_by_hand():
    """Weights 2/3 and 1/3 bring the mean of -1 and 2 to zero: −2 log(4/3 · 2/3)."""
    terms = torch.tensor([[-1.0, 2.0], [1.0, 2.0], [-3.0, 3.0]]).double()
    statistic = intervals.log_likelihood_ratio(terms)
    assert statistic.tolist() == pytest.approx([-2 * math.log(8 / 9), math.inf, 0.0], abs=1e-9)


def test_empirical_likelihood_is_calibrated_by_chi_square():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(4000, 100, generator=generator, dtype=torch.float64)
    statistic = intervals.log_likelihood_ratio(terms)
    for limit, part in ((0.4549, 0.5), (2.7055, 0.9), (3.8415, 0.95)):
        assert float((statistic <= limit).double().mean()) == pytest.approx(part, abs=0.02)


def test_all_intervals_agree_where_nothing_is_hard():
    """200 documents of equal length with normal changes; four samples on average."""
    generator = torch.Generator().manual_seed(0)
    before = torch.ones(4, 200, dtype=torch.float64)
    after = before * (1.02 + 0.05 * torch.randn(4, 200, generator=generator, dtype=torch.float64))
    uppers = [
        float(interval(before, after, confidence=0.95).upper.mean())
        for interval in intervals.INTERVALS.values()
    ]
    assert max(uppers) - min(uppers) < 0.1 * (uppers[0] - 0.02)


@pytest.mark.full
def test_small_samples_of_rare_damage_show_what_students_t_misses(tmp_path):
    rows = {
        row.interval: row
        for row in simulation.simulate(DAMAGES["rare"], 60, num_samples=400, seed=1)
    }
    assert rows["t"].upper_coverage < 0.82 and rows["bootstrap-t"].upper_coverage > 0.91
    assert rows["t"].passed > 0.08 > 0.05 > rows["bootstrap-t"].passed
    path = tmp_path / "rows.csv"
    simulation.write(path, list(rows.values()))
    assert simulation.read(path) == list(rows.values())


def test_the_readme_shows_the_results():
    folder = Path(simulation.__file__).parent
    readme = (folder / "README.md").read_text("utf-8")
    rows = simulation.read(folder / "results.csv")
    numbers = {(row.damage, row.documents) for row in rows}
    assert len(numbers) == len(simulation.DAMAGES) * len(simulation.NUM_DOCUMENTS)
    for line in simulation.tables(rows):
        assert line in readme
