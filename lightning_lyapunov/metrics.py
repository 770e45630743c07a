"""A Lyapunov spectrum over many sequences, and the numbers read off it, as torchmetrics.

All of them share one state, sums over sequences, so a :class:`~torchmetrics.MetricCollection` updates it once and any
split of the data over batches or processes gives the same result.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_lyapunov.invariants import kaplan_yorke_dimension, kolmogorov_sinai_entropy, num_positive
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR

__all__ = [
    "KaplanYorkeDimension",
    "KolmogorovSinaiEntropy",
    "Log10GradientGain",
    "LyapunovSpectrum",
    "LyapunovStandardError",
    "LyapunovSummary",
    "MaximalLyapunovExponent",
    "MaximalLyapunovStandardError",
    "MeanLyapunovExponent",
    "MemorySteps",
    "NumFlooredExponents",
    "NumPositiveExponents",
    "NumSequences",
    "ShareNearZero",
    "lyapunov_metrics",
]


class _Estimate(NamedTuple):
    """Exponents and their errors, ``(num_exponents,)``, largest first; how many samples; mean steps of a sequence."""

    spectrum: Tensor
    stderr: Tensor
    samples: Tensor
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
        # Rows: growth, growth^2, growth x steps, steps, steps^2, samples, sequences. In float64, because the variance
        # is what is left of a difference.
        self.add_state("moments", torch.zeros(7, num_exponents, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, spectrum: Tensor, steps: Tensor | float = 1.0, segments: int = 1) -> None:
        """Add spectra.

        Args:
            spectrum: exponents of some sequences, nats per step, ``(batch, num_exponents)``. Columns are averaged as
                they come and sorted afterwards. What is at the floor, or below, counts as minus infinity.
            steps: the steps that each was averaged over, ``(batch,)`` or one number. A sequence of none is ignored.
            segments: 1 for spectra of whole sequences; otherwise of so many stretches of each: they are samples for the
                error, and a sequence is as long as all of its stretches.

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
        growth = spectrum.masked_fill(spectrum <= EXPONENT_FLOOR, -math.inf) * steps
        ones = torch.ones_like(steps)
        rows = torch.stack((growth, growth.square(), growth * steps, steps, steps.square(), ones, ones / segments))
        self.moments += rows.masked_fill(steps <= 0, 0).sum(1)

    def _estimate(self) -> _Estimate:
        growth, growth_sq, growth_steps, steps, steps_sq, count, sequences = self.moments
        mean = growth / steps
        deviations = (growth_sq - 2 * mean * growth_steps + mean.square() * steps_sq).clamp(min=0)
        stderr = (deviations * count / (count - 1)).sqrt() / steps
        stderr = stderr.masked_fill(count < 2, math.nan).masked_fill(mean.isneginf(), 0)
        spectrum, order = mean.clamp(min=EXPONENT_FLOOR).sort(descending=True)
        samples = count.masked_fill(steps.isnan(), math.nan)
        return _Estimate(spectrum, stderr[order], samples[0], (steps / sequences)[0])

    def compute(self) -> Any:
        """Return what the class stands for; NaN before the first update."""
        return self._read(self._estimate())

    @staticmethod
    def _read(estimate: _Estimate) -> Any:
        raise NotImplementedError


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

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.spectrum


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

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.stderr


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

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.spectrum[0]


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

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.stderr[0]


class MeanLyapunovExponent(_ScalarMetric):
    """The mean of the exponents; for a full spectrum, the mean log-volume change per step and direction.

    Example::

        >>> from torch import tensor
        >>> metric = MeanLyapunovExponent(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.5]]))
        >>> metric.compute()
        tensor(-0.5000, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.spectrum.mean()


class KaplanYorkeDimension(_ScalarMetric):
    """:func:`~lightning_lyapunov.kaplan_yorke_dimension` of the mean spectrum.

    Example::

        >>> from torch import tensor
        >>> metric = KaplanYorkeDimension(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0]]))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return kaplan_yorke_dimension(estimate.spectrum)


class KolmogorovSinaiEntropy(_ScalarMetric):
    """:func:`~lightning_lyapunov.kolmogorov_sinai_entropy` of the mean spectrum, in nats per step.

    Example::

        >>> from torch import tensor
        >>> metric = KolmogorovSinaiEntropy(num_exponents=3)
        >>> metric.update(tensor([[0.5, 0.25, -1.0]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return kolmogorov_sinai_entropy(estimate.spectrum)


class NumPositiveExponents(_ScalarMetric):
    """How many directions grow.

    Example::

        >>> from torch import tensor
        >>> metric = NumPositiveExponents(num_exponents=3)
        >>> metric.update(tensor([[0.5, 0.25, -1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return num_positive(estimate.spectrum)


class NumFlooredExponents(_ScalarMetric):
    """How many directions are wiped out: their exponents are at the floor.

    Example::

        >>> from torch import tensor
        >>> metric = NumFlooredExponents(num_exponents=2)
        >>> metric.update(tensor([[0.5, -float("inf")]]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        spectrum = estimate.spectrum
        return (spectrum <= EXPONENT_FLOOR).float().sum().masked_fill(spectrum.isnan().any(), math.nan)


class NumSequences(_ScalarMetric):
    """How many sequences, or stretches of one, the others are from; NaN if the steps of one are: it was not measured.

    Example::

        >>> from torch import tensor
        >>> metric = NumSequences(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.samples


class Log10GradientGain(_ScalarMetric):
    r"""The decades by which a gradient grows (+) or fades (-) over the steps averaged: ``lambda_1 T / ln 10``.

    Example::

        >>> from torch import tensor
        >>> metric = Log10GradientGain(num_exponents=1)
        >>> metric.update(tensor([[-0.0230259]]), steps=100)
        >>> metric.compute()
        tensor(-1.0000, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return estimate.spectrum[0] * estimate.steps / math.log(10)


class MemorySteps(_ScalarMetric):
    """The steps in which the slowest direction fades to 1/e: ``1 / |lambda_1|``, at most the steps averaged.

    Where ``lambda_1`` is positive, those in which the fastest direction grows e-fold. Beyond the steps averaged nothing
    is known: an exponent that is an average over ``T`` steps is off by the order of ``1 / T`` (measured over RNN, LSTM
    and GRU networks, 80 steps after 20 of warm-up: 0.01 to 1.6 times that). A value of the steps averaged therefore
    means so many or more.

    Example::

        >>> from torch import tensor
        >>> metric = MemorySteps(num_exponents=2)
        >>> metric.update(tensor([[-0.05, -1.0]]), steps=80)
        >>> metric.compute()
        tensor(20.0000, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        return torch.minimum(1 / estimate.spectrum[0].abs(), estimate.steps)


class ShareNearZero(_ScalarMetric):
    """The share of the exponents within one over the steps averaged of zero: directions that neither grow nor fade.

    Over those steps they change by less than a factor e, which is what so many steps can tell from no change; see
    :class:`MemorySteps`.

    Example::

        >>> from torch import tensor
        >>> metric = ShareNearZero(num_exponents=4)
        >>> metric.update(tensor([[0.5, 0.01, -0.01, -1.0]]), steps=80)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> Tensor:
        folds = estimate.spectrum.abs() * estimate.steps
        return (folds < 1).to(folds).mean().masked_fill(folds.isnan().any(), math.nan)


_SUMMARY: dict[str, type[_SpectrumMetric]] = {
    "max": MaximalLyapunovExponent,
    "max_stderr": MaximalLyapunovStandardError,
    "mean": MeanLyapunovExponent,
    "kaplan_yorke_dimension": KaplanYorkeDimension,
    "kolmogorov_sinai_entropy": KolmogorovSinaiEntropy,
    "num_positive": NumPositiveExponents,
    "log10_gradient_gain": Log10GradientGain,
    "memory_steps": MemorySteps,
    "share_near_zero": ShareNearZero,
    "spectrum": LyapunovSpectrum,
    "stderr": LyapunovStandardError,
    "num_sequences": NumSequences,
}


class LyapunovSummary(_SpectrumMetric):
    """The values of :func:`lyapunov_metrics` as a dictionary, without a collection's cost.

    A collection shares the state and yet gathers it over the processes once for each of its metrics.

    Example::

        >>> from torch import tensor
        >>> metric = LyapunovSummary(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.5]]))
        >>> metric.compute()["mean"]
        tensor(-0.5000, dtype=torch.float64)
    """

    @staticmethod
    def _read(estimate: _Estimate) -> dict[str, Tensor]:
        return {name: metric._read(estimate) for name, metric in _SUMMARY.items()}


def lyapunov_metrics(num_exponents: int, prefix: str | None = None) -> MetricCollection:
    """Return the metrics that :class:`~lightning_lyapunov.LyapunovMonitor` logs for a cell, sharing one state.

    Args:
        num_exponents: number of exponents of each spectrum.
        prefix: what to put before the names, such as ``"lyapunov/lstm/"``.
    """
    metrics: dict[str, Metric] = {name: metric(num_exponents) for name, metric in _SUMMARY.items()}
    # Said rather than found out: torchmetrics would compare the first values, and NaN never equals NaN.
    return MetricCollection(metrics, prefix=prefix, compute_groups=[list(metrics)])  # type: ignore[arg-type]
