"""Sums over sequences, the state that all metrics share, and the spectrum that they give."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR

__all__ = ["Estimates", "ScalarMetric", "SpectrumMetric", "VectorMetric"]


class Estimates(NamedTuple):
    """Exponents and their standard errors.

    Attributes:
        spectrum: nats per step, ``(..., num_exponents)``, largest first; of several cells they stand in front.
        stderr: standard errors in the same order, ``(..., num_exponents)``.
        samples: the number of sequences, or segments of one.
        steps: the mean number of averaged steps of a sequence.
        length: the mean number of all steps of a sequence.
        total_steps: the number of averaged steps of all of them.
    """

    spectrum: Tensor
    stderr: Tensor
    samples: Tensor
    steps: Tensor
    length: Tensor
    total_steps: Tensor


class SpectrumMetric(Metric):
    """A number read off a Lyapunov spectrum over many sequences.

    The state is a table of sums over sequences. Exponents of sequences of different lengths weigh by their steps (a
    ratio estimate).

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
        # Rows: growth, growth^2, growth x steps, steps, steps^2, samples, sequences, lengths. In float64, because the
        # variance is a difference of large numbers.
        self.add_state(
            "moments", torch.zeros(8, num_exponents, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )

    def update(
        self,
        spectrum: Tensor,
        steps: Tensor | float = 1.0,
        segments: int = 1,
        lengths: Tensor | float | None = None,
    ) -> None:
        """Add spectra.

        Args:
            spectrum: exponents of some sequences, nats per step, ``(batch, num_exponents)``. Columns are averaged as
                they come and sorted afterwards. What is at the floor, or below, counts as minus infinity.
            steps: the steps that each was averaged over, ``(batch,)`` or one number. One of no steps is ignored.
            segments: 1 for spectra of whole sequences. Otherwise the number of segments of each sequence that the
                spectra are from: each is a sample for the error, and a sequence is as long as all of its segments.
            lengths: the steps of the whole sequence that each is from, ``(batch,)`` or one number, where not all of
                them were averaged: there is a warm-up, or a long sequence was cut. None: all were averaged.

        Raises:
            ValueError: if ``spectrum`` is not ``(batch, num_exponents)``.
        """
        if spectrum.ndim != 2 or spectrum.shape[1] != self.num_exponents:
            raise ValueError(
                f"Expected argument `spectrum` to be of shape (batch, {self.num_exponents}) "
                f"but got {tuple(spectrum.shape)}."
            )
        self.add(spectrum, steps, segments, lengths)

    def add(
        self,
        spectrum: Tensor,
        steps: Tensor | float,
        segments: Tensor | int,
        lengths: Tensor | float | None = None,
    ) -> None:
        """Add spectra as :meth:`update`, of one cell or several: ``(..., batch, num_exponents)``.

        ``steps``, ``segments`` and ``lengths`` are numbers that can be expanded to ``(..., batch)``.
        """
        spectrum = spectrum.detach().to(self.moments)
        steps, segments = (self._expanded(numbers, spectrum) for numbers in (steps, segments))
        lengths = steps * segments if lengths is None else self._expanded(lengths, spectrum)
        growth = spectrum.masked_fill(spectrum <= EXPONENT_FLOOR, -math.inf) * steps
        ones = torch.ones_like(steps)
        counts = ones, ones / segments, lengths / segments
        rows = growth, growth.square(), growth * steps, steps, steps.square(), *counts
        self.moments += torch.stack(rows, -3).masked_fill((steps <= 0).unsqueeze(-3), 0).sum(-2)

    def _expanded(self, numbers: Tensor | float, spectrum: Tensor) -> Tensor:
        numbers = torch.as_tensor(numbers, device=self.moments.device).to(self.moments)
        return numbers.expand(spectrum.shape[:-1]).unsqueeze(-1).expand_as(spectrum)

    def estimates(self) -> Estimates:
        """Return the mean spectrum and its standard errors; NaN before the first update."""
        growth, growth_sq, growth_steps, steps, steps_sq, count, sequences, lengths = self.moments.unbind(-2)
        mean = growth / steps
        deviations = (growth_sq - 2 * mean * growth_steps + mean.square() * steps_sq).clamp(min=0)
        stderr = (deviations * count / (count - 1)).sqrt() / steps
        stderr = stderr.masked_fill(count < 2, math.nan).masked_fill(mean.isneginf(), 0)
        spectrum, order = mean.clamp(min=EXPONENT_FLOOR).sort(dim=-1, descending=True)
        samples = count.masked_fill(steps.isnan(), math.nan)
        numbers = samples, steps / sequences, lengths / sequences, steps
        return Estimates(spectrum, stderr.gather(-1, order), *(number[..., 0] for number in numbers))

    def compute(self) -> Any:
        """Return the value of the metric; NaN before the first update."""
        return self.read(self.estimates())

    @staticmethod
    def read(estimates: Estimates) -> Any:
        """Return the value of the metric."""
        raise NotImplementedError


class VectorMetric(SpectrumMetric):
    """A metric with a value for each exponent."""

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


class ScalarMetric(SpectrumMetric):
    """A metric of one number."""

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or several values over their step; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
