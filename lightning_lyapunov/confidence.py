"""Confidence intervals of an exponent that is a mean over few sequences."""

import math
from functools import cache

import numpy as np

__all__ = ["student_t_quantile"]


@cache
def student_t_quantile(probability: float, degrees: int) -> float:
    r"""Return the quantile of Student's distribution; infinity for no degree of freedom.

    With ``t = sqrt(degrees) tan(a)`` its density is proportional to ``cos(a)^(degrees - 1)``, which is summed by the
    trapezoidal rule.

    Args:
        probability: from 0.5 to 1.
        degrees: the degrees of freedom; less than 1 leaves everything possible.

    Example::

        >>> round(student_t_quantile(0.95, 15), 3)
        1.753
    """
    if degrees < 1:
        return math.inf
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    areas = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    angle = np.interp(2 * probability - 1, areas / areas[-1], angles)
    return float(np.sqrt(degrees) * np.tan(angle))
