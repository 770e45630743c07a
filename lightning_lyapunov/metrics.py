"""A Lyapunov spectrum over many sequences, and the numbers read off it, as torchmetrics.

All of them share one state, sums over sequences, so a :class:`~torchmetrics.MetricCollection` updates it once and any
split of the data over batches or processes gives the same result.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_lyapunov.invariants import kaplan_yorke_dimension, kolmogorov_sinai_entropy, num_positive
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR
from lightning_lyapunov.moments import Estimates, ScalarMetric, SpectrumMetric, VectorMetric

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
    "NumSteps",
    "SequenceLength",
    "ShareNearZero",
    "lyapunov_metrics",
]


class LyapunovSpectrum(VectorMetric):
    """The Lyapunov spectrum of a set of sequences, ``(num_exponents,)``, largest first, in nats per step.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = LyapunovSpectrum(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0], [0.1, -1.4]]))
        >>> metric.compute()
        tensor([ 0.3000, -1.2000], dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.spectrum


class LyapunovStandardError(VectorMetric):
    """The standard error of each exponent of :class:`LyapunovSpectrum` over the sequences, ``(num_exponents,)``.

    NaN for fewer than two sequences, 0 for an exponent at the floor.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = LyapunovStandardError(num_exponents=2)
        >>> metric.update(tensor([[0.1, -1.0], [0.3, -1.0]]))
        >>> metric.compute()
        tensor([0.1000, 0.0000], dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.stderr


class MaximalLyapunovExponent(ScalarMetric):
    """The largest exponent, in nats per step: perturbations and gradients grow (> 0) or fade (< 0) at this rate.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = MaximalLyapunovExponent(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0], [0.1, -1.4]]))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    higher_is_better = False

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.spectrum[..., 0]


class MaximalLyapunovStandardError(ScalarMetric):
    """The standard error of the largest exponent over the sequences; NaN for fewer than two.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = MaximalLyapunovStandardError(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]))
        >>> metric.compute()
        tensor(0.1000, dtype=torch.float64)
    """

    higher_is_better = False

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.stderr[..., 0]


class MeanLyapunovExponent(ScalarMetric):
    """The mean of the exponents; for a full spectrum, the mean log-volume change per step and direction.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = MeanLyapunovExponent(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.5]]))
        >>> metric.compute()
        tensor(-0.5000, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.spectrum.mean(-1)


class KaplanYorkeDimension(ScalarMetric):
    """:func:`~lightning_lyapunov.kaplan_yorke_dimension` of the mean spectrum.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = KaplanYorkeDimension(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.0]]))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return kaplan_yorke_dimension(estimates.spectrum)


class KolmogorovSinaiEntropy(ScalarMetric):
    """:func:`~lightning_lyapunov.kolmogorov_sinai_entropy` of the mean spectrum, in nats per step.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = KolmogorovSinaiEntropy(num_exponents=3)
        >>> metric.update(tensor([[0.5, 0.25, -1.0]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return kolmogorov_sinai_entropy(estimates.spectrum)


class NumPositiveExponents(ScalarMetric):
    """How many directions grow.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = NumPositiveExponents(num_exponents=3)
        >>> metric.update(tensor([[0.5, 0.25, -1.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return num_positive(estimates.spectrum)


class NumFlooredExponents(ScalarMetric):
    """How many directions are wiped out: their exponents are at the floor.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = NumFlooredExponents(num_exponents=2)
        >>> metric.update(tensor([[0.5, -float("inf")]]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        spectrum = estimates.spectrum
        return (spectrum <= EXPONENT_FLOOR).float().sum(-1).masked_fill(spectrum.isnan().any(-1), math.nan)


class NumSequences(ScalarMetric):
    """How many sequences, or stretches of one, the others are from; NaN if the steps of one are: it was not measured.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = NumSequences(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.samples


class NumSteps(ScalarMetric):
    """How many steps the others are averaged over, of all sequences together.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = NumSteps(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]), steps=50)
        >>> metric.compute()
        tensor(100., dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.total_steps


class SequenceLength(ScalarMetric):
    """The steps of a sequence as the layer was called with it, whether they were averaged or not; their mean.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = SequenceLength(num_exponents=1)
        >>> metric.update(tensor([[0.1], [0.3]]), steps=50, lengths=tensor([280, 320]))
        >>> metric.compute()
        tensor(300., dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.length


class Log10GradientGain(ScalarMetric):
    r"""The decades by which a gradient grows (+) or fades (-) from the end of a sequence to its start.

    It is ``lambda_1 L / ln 10``, where ``L`` is :class:`SequenceLength`: the whole sequence, and not the steps that
    ``lambda_1`` is averaged over. Of sequences that are not equally long ``L`` is the mean.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = Log10GradientGain(num_exponents=1)
        >>> metric.update(tensor([[-0.0230259]]), steps=50, lengths=100)
        >>> metric.compute()
        tensor(-1.0000, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return estimates.spectrum[..., 0] * estimates.length / math.log(10)


class MemorySteps(ScalarMetric):
    """The steps in which the slowest direction fades to 1/e: ``1 / |lambda_1|``, at most the steps averaged.

    Where ``lambda_1`` is positive, those in which the fastest direction grows e-fold. Beyond the steps averaged nothing
    is known: an exponent that is an average over ``T`` steps is off by the order of ``1 / T`` (measured over RNN, LSTM
    and GRU networks, 80 steps after 20 of warm-up: 0.01 to 1.6 times that). A value of the steps averaged therefore
    means so many or more. Compare it with :class:`SequenceLength`: what is to be learned may lie as far back.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = MemorySteps(num_exponents=2)
        >>> metric.update(tensor([[-0.05, -1.0]]), steps=80)
        >>> metric.compute()
        tensor(20.0000, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        return torch.minimum(1 / estimates.spectrum[..., 0].abs(), estimates.steps)


class ShareNearZero(ScalarMetric):
    """The share of the exponents within one over the steps averaged of zero: directions that neither grow nor fade.

    Over those steps they change by less than a factor e, which is what so many steps can tell from no change; see
    :class:`MemorySteps`.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = ShareNearZero(num_exponents=4)
        >>> metric.update(tensor([[0.5, 0.01, -0.01, -1.0]]), steps=80)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> Tensor:
        folds = estimates.spectrum.abs() * estimates.steps.unsqueeze(-1)
        return (folds < 1).to(folds).mean(-1).masked_fill(folds.isnan().any(-1), math.nan)


_SUMMARY: dict[str, type[SpectrumMetric]] = {
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
    "num_steps": NumSteps,
    "sequence_length": SequenceLength,
}


class LyapunovSummary(SpectrumMetric):
    """The values of :func:`lyapunov_metrics` as a dictionary, without a collection's cost.

    A collection shares the state and yet gathers it over the processes once for each of its metrics.

    Args:
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.

    Example::

        >>> from torch import tensor
        >>> metric = LyapunovSummary(num_exponents=2)
        >>> metric.update(tensor([[0.5, -1.5]]))
        >>> metric.compute()["mean"]
        tensor(-0.5000, dtype=torch.float64)
    """

    @staticmethod
    def read(estimates: Estimates) -> dict[str, Tensor]:
        return {name: metric.read(estimates) for name, metric in _SUMMARY.items()}


def lyapunov_metrics(num_exponents: int, prefix: str | None = None) -> MetricCollection:
    """Return the metrics that :class:`~lightning_lyapunov.LyapunovMonitor` logs for a cell, sharing one state.

    Args:
        num_exponents: number of exponents of each spectrum.
        prefix: what to put before the names, such as ``"lyapunov/lstm/"``.
    """
    metrics: dict[str, Metric] = {name: metric(num_exponents) for name, metric in _SUMMARY.items()}
    # Said rather than found out: torchmetrics would compare the first values, and NaN never equals NaN.
    return MetricCollection(metrics, prefix=prefix, compute_groups=[list(metrics)])  # type: ignore[arg-type]
