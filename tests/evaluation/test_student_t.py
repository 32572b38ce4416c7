import math

import pytest

from tritter.evaluation.student_t import normal_quantile, student_t_cdf, student_t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees_of_freedom", "quantile"),
    [
        (0.95, 1, 6.3138),
        (0.975, 2, 4.3027),
        (0.95, 5, 2.0150),
        (0.975, 10, 2.2281),
        (0.99, 30, 2.4573),
        (0.995, 60, 2.6603),
        (0.95, 120, 1.6577),
        (0.9995, 8, 5.0413),
    ],
)
def test_quantiles_of_the_printed_table(probability, degrees_of_freedom, quantile):
    assert student_t_quantile(probability, degrees_of_freedom) == pytest.approx(quantile, abs=6e-5)


def test_one_degree_of_freedom_is_cauchy():
    for t in (-3.0, -0.2, 0.0, 1.5, 40.0):
        assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-13)


def test_quantile_inverts_the_distribution_on_both_sides():
    for degrees_of_freedom in (1, 3, 17, 400, 9_999):
        for probability in (0.02, 0.4, 0.5, 0.8, 0.999):
            t = student_t_quantile(probability, degrees_of_freedom)
            assert student_t_cdf(t, degrees_of_freedom) == pytest.approx(probability, abs=1e-10)


def test_large_degrees_of_freedom_join_smoothly_and_end_in_the_normal():
    below, above = student_t_quantile(0.99, 9_999), student_t_quantile(0.99, 10_000)
    assert 0 < below - above < 1e-6
    assert student_t_quantile(0.99, 10**8) == pytest.approx(normal_quantile(0.99), abs=1e-7)


def test_nothing_is_known_without_degrees_of_freedom():
    assert student_t_quantile(0.95, 0) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        student_t_quantile(1.0, 5)
