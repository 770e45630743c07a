"""A Lyapunov spectrum over many sequences, and the numbers read off it, as torchmetrics.

All of them share one state, sums over sequences, so a :class:`~torchmetrics.MetricCollection` updates it once and any
split of the data over batches or processes gives the same result.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_lyapunov.invariants import kaplan_yorke_dimension, kolmogorov_sinai_entropy, num_positive
from lightning_lyapunov.spectrum import FLOOR

__all__ = [
    "KaplanYorkeDimension",
    "KolmogorovSinaiEntropy",
    "Log10GradientGain",
    "LyapunovSpectrum",
    "LyapunovStandardError",
    "MaximalLyapunovExponent",
    "MaximalLyapunovStandardError",
    "MeanLyapunovExponent",
    "NumDegenerateExponents",
    "NumPositiveExponents",
    "NumSequences",
    "lyapunov_metrics",
    "student_t_quantile",
]


class _Estimate(NamedTuple):
    """Exponents, their standard errors, both ``(num_exponents,)`` and largest first, and the mean steps averaged."""

    spectrum: Tensor
    stderr: Tensor
    steps: Tensor


class _SpectrumMetric(Metric):
    """The shared state. Exponents of sequences of different lengths weigh by their steps (a ratio estimate).

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``num_exponents`` is not a positive integer.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    moments: Tensor

    def __init__(self, num_exponents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_exponents, int) or num_exponents < 1:
            raise ValueError(f"Expected argument `num_exponents` to be a positive integer but got {num_exponents}.")
        self.num_exponents = num_exponents
        # Rows: growth, growth^2, growth x steps, steps, steps^2, sequences. In float64, because the variance is what
        # is left of a difference.
        self.add_state("moments", torch.zeros(6, num_exponents, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, spectrum: Tensor, steps: Tensor | float = 1.0) -> None:
        """Add spectra.

        Args:
            spectrum: exponents of some sequences, nats per step, ``(batch, num_exponents)``. Columns are averaged as
                they come and sorted afterwards. What is at the floor, or below, counts as minus infinity.
            steps: the steps that each was averaged over, ``(batch,)`` or one number. A sequence of none is ignored.

        Raises:
            ValueError: if ``spectrum`` is not ``(batch, num_exponents)``.
        """
        if spectrum.ndim != 2 or spectrum.shape[1] != self.num_exponents:
            raise ValueError(
                f"Expected argument `spectrum` to be of shape (batch, {self.num_exponents}) "
                f"but got {tuple(spectrum.shape)}."
            )
        spectrum = spectrum.detach().to(self.moments)
        steps = torch.as_tensor(steps).to(self.moments).expand(len(spectrum)).unsqueeze(-1).expand_as(spectrum)
        growth = spectrum.masked_fill(spectrum <= FLOOR, -math.inf) * steps
        rows = torch.stack((growth, growth.square(), growth * steps, steps, steps.square(), torch.ones_like(steps)))
        self.moments += rows.masked_fill(steps <= 0, 0).sum(1)

    def _estimate(self) -> _Estimate:
        growth, growth_sq, growth_steps, steps, steps_sq, count = self.moments
        mean = growth / steps
        deviations = (growth_sq - 2 * mean * growth_steps + mean.square() * steps_sq).clamp(min=0)
        stderr = (deviations * count / (count - 1)).sqrt() / steps
        stderr = stderr.masked_fill(count < 2, math.nan).masked_fill(mean.isneginf(), 0)
        spectrum, order = mean.clamp(min=FLOOR).sort(descending=True)
        return _Estimate(spectrum, stderr[order], (steps / count)[0])


class _VectorMetric(_SpectrumMetric):
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or several values, over the index of the exponent.

        Args:
            val: a value of :meth:`compute`, or several; the metric's own by default.
            ax: a matplotlib axis to draw in; a new figure by default.

        Returns:
            The figure and the axis.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        from matplotlib import pyplot

        figure, ax = (ax.get_figure(), ax) if ax is not None else pyplot.subplots()
        values = [self.compute()] if val is None else val if isinstance(val, list | tuple) else [val]
        for value in values:
            ax.plot(range(1, self.num_exponents + 1), value.detach().cpu().reshape(-1), ".-")
        ax.axhline(0, color="0.6", linewidth=1)
        ax.set(xlabel="exponent", ylabel="nats per step", title=type(self).__name__)
        return figure, ax


class LyapunovSpectrum(_VectorMetric):
    """The Lyapunov spectrum of a set of sequences, ``(num_exponents,)``, largest first, in nats per step.

    Example::

        >>> from torch import tensor
        >>> metric = LyapunovSpectrum(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0], [0.1, -1.4]]))
        >>> metric.compute()
        tensor([ 0.3000, -1.2000], dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the mean spectrum; NaN before the first update."""
        return self._estimate().spectrum


class _ScalarMetric(_SpectrumMetric):
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or several values over their step; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class LyapunovStandardError(_VectorMetric):
    """The standard error of each exponent of :class:`LyapunovSpectrum` over the sequences, ``(num_exponents,)``.

    NaN for fewer than two sequences, 0 for an exponent at the floor.

    Example::

        >>> from torch import tensor
        >>> metric = LyapunovStandardError(num_exponents=2)
        >>> metric.update(tensor([[0.1, -1.0], [0.3, -1.0]]))
        >>> metric.compute()
        tensor([0.1000, 0.0000], dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the standard errors, in the order of the spectrum."""
        return self._estimate().stderr


class MaximalLyapunovExponent(_ScalarMetric):
    """The largest exponent, in nats per step: perturbations and gradients grow (> 0) or fade (< 0) at this rate.

    Example::

        >>> from torch import tensor
        >>> metric = MaximalLyapunovExponent(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0], [0.1, -1.4]]))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the largest exponent."""
        return self._estimate().spectrum[0]


class MaximalLyapunovStandardError(_ScalarMetric):
    """The standard error of the largest exponent over the sequences; NaN for fewer than two.

    Example::

        >>> from torch import tensor
        >>> metric = MaximalLyapunovStandardError(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]))
        >>> metric.compute()
        tensor(0.1000, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the standard error of the largest exponent."""
        return self._estimate().stderr[0]


class MeanLyapunovExponent(_ScalarMetric):
    """The mean of the exponents; for a full spectrum, the mean log-volume change per step and direction.

    Example::

        >>> from torch import tensor
        >>> metric = MeanLyapunovExponent(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.5]]))
        >>> metric.compute()
        tensor(-0.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the mean exponent."""
        return self._estimate().spectrum.mean()


class KaplanYorkeDimension(_ScalarMetric):
    """:func:`~lightning_lyapunov.kaplan_yorke_dimension` of the mean spectrum.

    Example::

        >>> from torch import tensor
        >>> metric = KaplanYorkeDimension(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0]]))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the dimension."""
        return kaplan_yorke_dimension(self._estimate().spectrum)


class KolmogorovSinaiEntropy(_ScalarMetric):
    """:func:`~lightning_lyapunov.kolmogorov_sinai_entropy` of the mean spectrum, in nats per step.

    Example::

        >>> from torch import tensor
        >>> metric = KolmogorovSinaiEntropy(num_exponents=3)
        >>> metric.update(tensor([[0.5, 0.25, -1.0]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the sum of the positive exponents."""
        return kolmogorov_sinai_entropy(self._estimate().spectrum)


class NumPositiveExponents(_ScalarMetric):
    """How many directions grow.

    Example::

        >>> from torch import tensor
        >>> metric = NumPositiveExponents(num_exponents=3)
        >>> metric.update(tensor([[0.5, 0.25, -1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the number of positive exponents."""
        return num_positive(self._estimate().spectrum)


class NumDegenerateExponents(_ScalarMetric):
    """How many directions are wiped out: their exponents are at the floor.

    Example::

        >>> from torch import tensor
        >>> metric = NumDegenerateExponents(num_exponents=2)
        >>> metric.update(tensor([[0.5, -float("inf")]]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the number of exponents at the floor; NaN for a network that is not finite."""
        spectrum = self._estimate().spectrum
        return (spectrum <= FLOOR).float().sum().masked_fill(spectrum.isnan().any(), math.nan)


class NumSequences(_ScalarMetric):
    """How many sequences the others are estimated from; NaN if the steps of one are, so that it was not measured.

    Example::

        >>> from torch import tensor
        >>> metric = NumSequences(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the number of sequences."""
        return self.moments[5, 0].masked_fill(self.moments[3, 0].isnan(), math.nan)


class Log10GradientGain(_ScalarMetric):
    r"""The decades by which a gradient grows (+) or fades (-) over the steps averaged: ``lambda_1 T / ln 10``.

    Example::

        >>> from torch import tensor
        >>> metric = Log10GradientGain(num_exponents=1)
        >>> metric.update(tensor([[-0.0230259]]), steps=100)
        >>> metric.compute()
        tensor(-1.0000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the decades over the mean number of steps averaged."""
        estimate = self._estimate()
        return estimate.spectrum[0] * estimate.steps / math.log(10)


def lyapunov_metrics(num_exponents: int, prefix: str | None = None) -> MetricCollection:
    """Return the metrics that :class:`~lightning_lyapunov.LyapunovMonitor` logs for a cell, sharing one state.

    Args:
        num_exponents: number of exponents of each spectrum.
        prefix: what to put before the names, such as ``"lyapunov/lstm/"``.
    """
    metrics: dict[str, Metric] = {
        "max": MaximalLyapunovExponent(num_exponents),
        "max_stderr": MaximalLyapunovStandardError(num_exponents),
        "mean": MeanLyapunovExponent(num_exponents),
        "kaplan_yorke_dimension": KaplanYorkeDimension(num_exponents),
        "kolmogorov_sinai_entropy": KolmogorovSinaiEntropy(num_exponents),
        "num_positive": NumPositiveExponents(num_exponents),
        "log10_gradient_gain": Log10GradientGain(num_exponents),
        "spectrum": LyapunovSpectrum(num_exponents),
        "stderr": LyapunovStandardError(num_exponents),
        "num_sequences": NumSequences(num_exponents),
    }
    # Said rather than found out: torchmetrics would compare the first values, and NaN never equals NaN.
    return MetricCollection(metrics, prefix=prefix, compute_groups=[list(metrics)])  # type: ignore[arg-type]


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
