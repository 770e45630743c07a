"""Measure a layer along its sequences."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_lyapunov.functional import layer_growth, working_dtype
from lightning_lyapunov.kernel.covariant import covariant_stretch
from lightning_lyapunov.kernel.precision import plain_arithmetic, widest_dtype
from lightning_lyapunov.kernel.propagation import Growth
from lightning_lyapunov.layers.base import RecurrentLayer, Sequences
from lightning_lyapunov.measuring.summaries import CellSamples
from lightning_lyapunov.units import unit_shares

__all__ = ["MeasuredLayer", "Options", "full_name", "measure_layer", "no_samples"]

# What a window from a state of zeros needs before its largest exponent is that of the long run: see the benchmarks.
_WARMUP = 50
# A single sequence is cut into so many segments: its error then comes from them.
_SEGMENTS = 8


@dataclass(frozen=True)
class Options:
    """How to measure: see the arguments of :class:`~lightning_lyapunov.LyapunovMonitor`."""

    num_sequences: int = 16
    max_steps: int = 100
    num_exponents: int | None = 16
    warmup: int | None = None
    qr_interval: int | Literal["auto"] = "auto"
    dtype: torch.dtype | None = None
    strict: bool = False
    log_units: bool = False


@dataclass(frozen=True)
class MeasuredLayer:
    """What was measured of a layer.

    Attributes:
        growths: the growth of each of its cells, of each member of the batch.
        state_sizes: the sizes of their states.
        lengths: the length of the sequences of each member.
        unit_shares: for each cell the shares of its units in the leading direction, ``(units,)``, on the CPU, if asked.
    """

    growths: list[Growth]
    state_sizes: tuple[int, ...]
    lengths: Tensor
    unit_shares: tuple[Tensor, ...] = ()

    def samples(self, index: int) -> CellSamples:
        """Return what the layer adds to the metrics of one of its cells."""
        total, steps = self.growths[index]
        segments, lengths = len(steps), self.lengths.repeat(len(steps))
        return CellSamples((total / steps.unsqueeze(-1)).flatten(0, 1), steps.flatten(), segments, lengths)


def measure_layer(
    layer: RecurrentLayer,
    sequences: Sequences,
    options: Options,
    growth_of: Callable[..., list[tuple[str, Growth]]] = layer_growth,
) -> MeasuredLayer:
    """Follow a layer along its sequences.

    Args:
        layer: the layer.
        sequences: its sequences.
        options: how to measure.
        growth_of: computes the growth of its cells, as :func:`~lightning_lyapunov.functional.layer_growth`.
    """
    warmup = sequences.lengths.div(2, rounding_mode="floor")
    warmup = warmup.clamp(max=_WARMUP if options.warmup is None else options.warmup)
    averaged = int((sequences.lengths - warmup).max())
    growths = growth_of(
        layer,
        sequences,
        num_exponents=options.num_exponents,
        warmup=warmup,
        qr_interval=options.qr_interval,
        dtype=working_dtype(layer, sequences, options.dtype),
        segments=min(_SEGMENTS, averaged) if len(sequences.lengths) == 1 else 1,
    )
    shares = tuple(_unit_shares(layer, sequences, int(warmup.min()))) if options.log_units else ()
    lengths = sequences.lengths if sequences.full_lengths is None else sequences.full_lengths
    index = _member_of_each(sequences) if len(growths[0][1].steps) == 1 else None
    if index is None:
        return MeasuredLayer([growth for _, growth in growths], layer.state_sizes, lengths, shares)
    mean = _summed(lengths, index) / _summed(torch.ones_like(lengths), index)
    summed = [Growth(_summed(g.total, index, 1), _summed(g.steps, index, 1)) for _, g in growths]
    return MeasuredLayer(summed, layer.state_sizes, mean, shares)


def _unit_shares(layer: RecurrentLayer, sequences: Sequences, warmup: int) -> Iterator[Tensor]:
    """Yield the shares of the units of each cell in the leading direction, which is covariant."""
    # An LSTM's state is (h, c), of the same units unless h is projected.
    pairs = isinstance(layer.module, nn.LSTM | nn.LSTMCell) and not getattr(layer.module, "proj_size", 0)
    with plain_arithmetic():
        for cell in layer.drive(sequences):
            state = cell.state.to(widest_dtype(cell.state.device))
            options = {"num_exponents": 1, "warmup": warmup, "cooldown": 0}
            vectors, _ = covariant_stretch(cell.recurrence, cell.inputs, state, sequences.lengths, **options)
            yield unit_shares(vectors, num_tensors=1 + pairs).cpu()


def no_samples(count: int, *, failed: bool) -> CellSamples:
    """Return what a layer adds that was not called, nothing, or that could not be measured, NaN."""
    if failed:
        return CellSamples(torch.full((1, count), math.nan, device="cpu"), torch.full((1,), math.nan, device="cpu"))
    return CellSamples(torch.empty(0, count, device="cpu"), torch.empty(0, device="cpu"))


def full_name(layer: str, cell: str, cells: tuple[str, ...]) -> str:
    """Return the name of a cell in a model: that of its layer, with a suffix if the layer has several."""
    return f"{layer}.{cell}" if len(cells) > 1 else layer


def _member_of_each(sequences: Sequences) -> Tensor | None:
    """Return the number of the member of the batch that each sequence is of; None if all are of one, or all differ.

    The sequences of a member are not independent: together they are one sample.
    """
    members = sequences.members
    if members is None or len(members.unique()) in (1, len(members)):
        return None
    return members.unique(return_inverse=True)[1]


def _summed(values: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """Return the sums over the sequences of each member along an axis."""
    shape = (*values.shape[:axis], int(index.max()) + 1, *values.shape[axis + 1 :])
    return values.new_zeros(shape).index_add(axis, index.to(values.device), values)
