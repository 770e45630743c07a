"""An exponent that is a mean over few sequences, and its confidence interval."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

__all__ = ["NORMAL_QUANTILE", "Estimate", "student_t_quantile"]

NORMAL_QUANTILE = 1.96
"""How many standard errors a 95 % interval reaches to either side, where the number of sequences is not known."""


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


class Estimate(NamedTuple):
    """The last value of an exponent.

    Attributes:
        value: nats per step.
        stderr: its standard error.
        num_sequences: how many sequences, or segments of one, it is from.
        layer: the name of its layer.
        step: the step of the loggers.
        length: the mean length of the sequences that the layer was called with.
        is_extra: whether it was taken only because a run was resumed: without the break there would be none.
    """

    value: float
    stderr: float
    num_sequences: int
    layer: str
    step: int
    length: float = math.nan
    is_extra: bool = False

    @property
    def log10_gradient_gain(self) -> float:
        """The decades by which a gradient grows over a whole sequence."""
        return self.value * self.length / math.log(10)

    def quantile(self, probability: float = 0.975) -> float:
        """Return how many standard errors the confidence interval reaches to either side.

        Args:
            probability: that the truth is below the upper end, or above the lower one; 0.975 for a 95 % interval.
        """
        return student_t_quantile(probability, self.num_sequences - 1)

    def margin(self, probability: float = 0.975) -> float:
        """Return how far an end of the confidence interval is from the value; see :meth:`quantile`."""
        return self.quantile(probability) * self.stderr

    def bounds(self, probability: float = 0.975) -> "tuple[Estimate, Estimate]":
        """Return the ends of the confidence interval; see :meth:`quantile`."""
        margin = self.margin(probability)
        return self._replace(value=self.value - margin), self._replace(value=self.value + margin)
