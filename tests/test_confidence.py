"""Quantiles for confidence intervals, against tables."""

import pytest

from lightning_lyapunov.confidence import student_t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    # Abramowitz & Stegun, table 26.10.
    [
        (0.95, 1, 6.314),
        (0.975, 2, 4.303),
        (0.95, 7, 1.895),
        (0.975, 15, 2.131),
        (0.995, 30, 2.750),
        (0.95, 10**4, 1.645),
    ],
)
def test_students_quantiles_are_those_of_the_tables(probability, degrees, quantile):
    assert student_t_quantile(probability, degrees) == pytest.approx(quantile, abs=6e-4)
