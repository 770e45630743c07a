"""The metrics of many cells at once: one state, one gathering over the processes and one computation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lyapunov.metrics import LyapunovSummary

__all__ = ["CellMetrics", "CellSamples", "CellSummaries", "summarised"]

CellMetrics: TypeAlias = dict[str, dict[str, Tensor]]
"""For each cell its metrics, as :class:`~lightning_lyapunov.metrics.LyapunovSummary` computes them, on the CPU."""


class CellSamples(NamedTuple):
    """What a metric's update takes of one cell.

    Attributes:
        spectrum: exponents, nats per step, ``(samples, num_exponents)``.
        steps: the steps that each was averaged over, ``(samples,)``.
        segments: how many samples are of one sequence.
        lengths: the steps of the whole sequence that each is from, ``(samples,)``; None if all were averaged.
    """

    spectrum: Tensor
    steps: Tensor
    segments: int = 1
    lengths: Tensor | None = None


class CellSummaries(LyapunovSummary):
    """The values of :class:`~lightning_lyapunov.metrics.LyapunovSummary` of many cells, which come first in each.

    Args:
        num_cells: how many cells.
        num_exponents: number of exponents of each spectrum.
        kwargs: see :class:`torchmetrics.Metric`.
    """

    def __init__(self, num_cells: int, num_exponents: int, **kwargs: Any) -> None:
        super().__init__(num_exponents, **kwargs)
        self.add_state("moments", self.moments.expand(num_cells, -1, -1).clone(), dist_reduce_fx="sum")

    def update(self, samples: Sequence[CellSamples]) -> None:  # type: ignore[override]
        """Add the samples of each cell, in order."""
        whole = [cell.steps * cell.segments if cell.lengths is None else cell.lengths for cell in samples]
        spectra, steps, lengths = (
            pad_sequence([numbers.to(self.moments) for numbers in column], batch_first=True)
            for column in ([cell.spectrum for cell in samples], [cell.steps for cell in samples], whole)
        )
        # The padding has no steps, so it is ignored.
        self.add(spectra, steps, torch.tensor([[cell.segments] for cell in samples], device="cpu"), lengths)


def summarised(
    samples: Mapping[str, CellSamples], device: torch.device | str = "cpu", *, gather: bool = False
) -> CellMetrics:
    """Return the metrics of each cell.

    Cells with as many exponents share one metric: it is gathered once, however many they are.

    Args:
        samples: what this process adds to each cell.
        device: where to sum.
        gather: sum over all processes. Each must then make this call, with the same cells.
    """
    groups: dict[int, list[str]] = {}
    for cell, (spectrum, *_) in samples.items():
        groups.setdefault(spectrum.shape[-1], []).append(cell)
    computed: CellMetrics = {}
    with torch.device(device):  # torchmetrics makes its states on the default device, which may be another one
        for count, cells in groups.items():
            metrics = CellSummaries(len(cells), count, sync_on_compute=gather).to(device)
            metrics.update([samples[cell] for cell in cells])
            values = {name: _rows(value.cpu(), len(cells)) for name, value in metrics.compute().items()}
            computed.update({cell: {name: value[i] for name, value in values.items()} for i, cell in enumerate(cells)})
    return {cell: computed[cell] for cell in samples}


def _rows(value: Tensor, num_cells: int) -> tuple[Tensor, ...]:
    """Return the value of each cell. A value of one number has lost its dimensions in torchmetrics."""
    table = value.reshape(num_cells, -1)
    return (table.squeeze(1) if table.shape[1] == 1 else table).unbind()
