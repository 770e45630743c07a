"""Measure the layers of a model along recorded sequences, together with all ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.functional import layer_growth, working_dtype
from lightning_lyapunov.kernel.propagation import Growth
from lightning_lyapunov.layers.base import RecurrentLayer, Sequences
from lightning_lyapunov.layers.custom import CustomLayer
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.layers.sharding import gathered
from lightning_lyapunov.metrics import LyapunovSummary

__all__ = ["CellMetrics", "Measurement", "Options"]

CellMetrics: TypeAlias = dict[str, dict[str, Tensor]]
"""For each cell its metrics, as :class:`~lightning_lyapunov.metrics.LyapunovSummary` computes them."""

# What a window from a state of zeros needs before its largest exponent is that of the long run: see the benchmarks.
_WARMUP = 50
# A single sequence is cut into so many segments: its error then comes from them.
_SEGMENTS = 8


@dataclass(frozen=True)
class Options:
    """How to measure: see the arguments of :class:`~lightning_lyapunov.LyapunovMonitor`."""

    num_exponents: int | None = 16
    warmup: int | None = None
    qr_interval: int | Literal["auto"] = "auto"
    dtype: torch.dtype | None = None
    strict: bool = False


@dataclass(frozen=True)
class _Measured:
    """This rank has measured the layer: the growth of each of its cells."""

    growths: list[Growth]


class _NotCalled:
    """This rank has nothing to add: the layer was not called here, or another process counts the same batch."""


class _Failed:
    """The layer was called on this rank and could not be measured."""


class Measurement:
    """The metrics of recurrent layers, over the sequences of all ranks.

    Args:
        layers: the layers by name.
        options: how to measure.
        warn: gives the warnings.
        growth_of: computes the growth of the cells of a layer, as :func:`~lightning_lyapunov.functional.layer_growth`.
    """

    def __init__(
        self,
        layers: Mapping[str, FoundLayer],
        options: Options,
        warn: WarnOnce,
        growth_of: Callable[..., list[tuple[str, Growth]]] = layer_growth,
    ) -> None:
        self._layers, self._options, self._warn, self._growth_of = layers, options, warn, growth_of

    def metrics(
        self, sequences: Mapping[str, Sequences], errors: Mapping[str, Exception], strategy: Any, overhead: Overhead
    ) -> CellMetrics:
        """Return the metrics of every cell. Every rank must make this call.

        Args:
            sequences: what each layer was called with on this rank.
            errors: what went wrong in recording, by the name of the layer.
            strategy: the trainer's strategy, which reduces over the ranks.
            overhead: times each layer.
        """
        cells: CellMetrics = {}
        for name, (layer, _) in self._layers.items():
            with overhead.layer(name):
                outcome = self._outcome(name, layer, sequences.get(name), errors.get(name))
                cells.update(self._reduce(name, layer, outcome, strategy))
        return cells

    def _reduce(
        self, name: str, layer: RecurrentLayer, outcome: "_Measured | _NotCalled | _Failed", strategy: Any
    ) -> CellMetrics:
        """Return the metrics of each cell of a layer. Every rank joins the reduction, even without samples."""
        measured, device = {}, strategy.root_device
        if isinstance(outcome, _Measured) and _is_replica(strategy):
            outcome = _NotCalled()
        for index, cell in enumerate(layer.cell_names):
            count = self._num_exponents_of(layer, index, strategy)
            metrics = LyapunovSummary(count).to("cpu" if device.type == "mps" else device)
            metrics.update(*_samples(outcome, index, count))
            measured[f"{name}.{cell}" if len(layer.cell_names) > 1 else name] = metrics.compute()
        return measured

    def _outcome(
        self, name: str, layer: RecurrentLayer, sequences: Sequences | None, error: Exception | None
    ) -> "_Measured | _NotCalled | _Failed":
        """Measure a layer on this rank."""
        try:
            # On every rank, whatever its batch held: gathering is collective.
            with gathered(layer.module):
                if error is not None:
                    raise error
                if sequences is not None:
                    return _Measured(self._local_growth(layer, sequences))
        except Exception as error:
            if self._options.strict:
                raise
            self._warn(
                f"{name} could not be measured",
                f"The Lyapunov spectrum of `{name}` could not be measured; its values are NaN and training goes on. "
                f"{type(error).__name__}: {error} To raise this error, write `LyapunovMonitor(strict=True)`; for an "
                "`EarlyStopping` to wait for a first value, `check_finite=False`.",
            )
            return _Failed()
        self._warn(
            f"{name} was not called",
            f"The recurrent layer `{name}` was not called in a training step (or it is compiled with others as one "
            "graph). Its last values are repeated.",
        )
        return _NotCalled()

    def _local_growth(self, layer: RecurrentLayer, sequences: Sequences) -> list[Growth]:
        longest = int(sequences.lengths.max())
        warmup = min(_WARMUP if self._options.warmup is None else self._options.warmup, longest // 2)
        growths = self._growth_of(
            layer,
            sequences,
            num_exponents=self._options.num_exponents,
            warmup=warmup,
            qr_interval=self._options.qr_interval,
            dtype=working_dtype(layer, sequences, self._options.dtype),
            segments=min(_SEGMENTS, longest - warmup) if len(sequences.lengths) == 1 else 1,
        )
        return [growth for _, growth in growths]

    def _num_exponents_of(self, layer: RecurrentLayer, index: int, strategy: Any) -> int:
        """Return how many exponents of a cell to compute, the same on every rank."""
        size = layer.state_sizes[index]
        if isinstance(layer, CustomLayer):
            # Its size is known from its first call, and another rank may have seen that.
            known = torch.tensor(float(size), device=strategy.root_device)
            size = int(strategy.reduce(known, reduce_op="max")) or (self._options.num_exponents or 1)
        return size if self._options.num_exponents is None else min(self._options.num_exponents, size)


def _samples(outcome: _Measured | _NotCalled | _Failed, index: int, count: int) -> tuple[Tensor, Tensor, int]:
    """Return exponents ``(samples, num_exponents)``, steps ``(samples,)`` and samples per sequence of one cell."""
    if isinstance(outcome, _Failed):
        return torch.full((1, count), math.nan), torch.full((1,), math.nan), 1
    if isinstance(outcome, _NotCalled):
        return torch.empty(0, count), torch.empty(0), 1
    total, steps = outcome.growths[index]
    return (total / steps.unsqueeze(-1)).flatten(0, 1), steps.flatten(), len(steps)


def _is_replica(strategy: Any) -> bool:
    """Return whether another process counts the same batch: the first of those that share a layer between them."""
    mesh: Any = getattr(strategy, "device_mesh", None)
    shared = "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
    return shared and mesh["tensor_parallel"].get_local_rank() > 0
