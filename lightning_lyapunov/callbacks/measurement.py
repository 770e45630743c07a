"""Measure the layers of a model along recorded sequences, together with all ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.callbacks.summaries import CellMetrics, CellSamples, summarised
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.functional import layer_growth, working_dtype
from lightning_lyapunov.kernel.propagation import Growth
from lightning_lyapunov.layers.base import Sequences
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.layers.outer_state import undisturbed
from lightning_lyapunov.layers.sharding import gathered
from lightning_lyapunov.recording.cells import NotFollowedError
from lightning_lyapunov.recording.reading import Followed, follow
from lightning_lyapunov.recording.recorder import RecordedCalls

__all__ = ["MAX_REPEATS", "Measurement", "Options"]

# What a window from a state of zeros needs before its largest exponent is that of the long run: see the benchmarks.
_WARMUP = 50
MAX_REPEATS = 3
"""How many measurements of a layer that no rank calls any more repeat its last values, before these are NaN."""

_REPEATED = f"Its last values are repeated in up to {MAX_REPEATS} measurements; after these they are NaN."
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


@dataclass(frozen=True)
class _Measured:
    """This rank has measured the layer.

    Attributes:
        growths: the growth of each of its cells, of each member of the batch.
        state_sizes: the sizes of their states.
        lengths: the length of the sequences of each member.
    """

    growths: list[Growth]
    state_sizes: tuple[int, ...]
    lengths: Tensor


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
        # Those of the start, so that the keys stay the same, also where a layer changes.
        self._cell_names = {name: found.cell_names for name, found in layers.items()}
        self._state_sizes = {name: found.state_sizes for name, found in layers.items()}
        self._followed: dict[str, Followed] = {}
        self._error: Exception | None = None

    @property
    def cell_names(self) -> list[str]:
        """The names of all cells, in model order."""
        return [self._full_name(name, cell) for name, cells in self._cell_names.items() for cell in cells]

    def _full_name(self, name: str, cell: str) -> str:
        return f"{name}.{cell}" if len(self._cell_names[name]) > 1 else name

    def metrics(
        self,
        calls: Mapping[str, RecordedCalls] | None,
        errors: Mapping[str, Exception],
        strategy: Any,
        overhead: Overhead,
    ) -> CellMetrics:
        """Return the metrics of every cell. Every rank must make this call.

        Args:
            calls: the recorded calls of each layer on this rank; None for the sequences of the last measurement.
            errors: what went wrong in recording, by the name of the layer.
            strategy: the trainer's strategy, which reduces over the ranks.
            overhead: times each layer.
        """
        samples: dict[str, CellSamples] = {}
        for name, found in self._layers.items():
            with overhead.layer(name):
                outcome = self._outcome(
                    name, found.module, None if calls is None else calls.get(name), errors.get(name), calls is None
                )
                if isinstance(outcome, _NotCalled):
                    self._followed.pop(name, None)
                samples.update(self._samples(name, outcome, strategy))
        cells = summarised(samples, strategy)
        if self._error is not None:
            raise self._error
        return cells

    def forget_all_but(self, model: nn.Module) -> None:
        """Forget the sequences of the layers that are not in a model any more."""
        modules = set(model.modules())
        for name, found in self._layers.items():
            if found.module not in modules:
                self._followed.pop(name, None)

    def _samples(self, name: str, outcome: "_Measured | _NotCalled | _Failed", strategy: Any) -> dict[str, CellSamples]:
        """Return what this rank adds to each cell of a layer, nothing where it has nothing."""
        samples = {}
        if isinstance(outcome, _Measured) and _is_replica(strategy):
            outcome = _NotCalled()
        for index, cell in enumerate(self._cell_names[name]):
            count = self._num_exponents_of(name, index, outcome, strategy)
            samples[self._full_name(name, cell)] = _samples(outcome, index, count)
        return samples

    def _outcome(
        self, name: str, module: nn.Module, calls: RecordedCalls | None, error: Exception | None, again: bool
    ) -> "_Measured | _NotCalled | _Failed":
        """Measure a layer on this rank."""
        try:
            # On every rank, whatever its batch held: gathering is collective.
            wrapper = self._layers[name].wrapper
            with gathered(module), undisturbed(module, wrapper and wrapper[0]):
                if error is not None:
                    raise error
                if again and name in self._followed:
                    self._followed[name] = self._followed[name].again(module)
                elif calls is not None:
                    options = self._options
                    followed = follow(module, calls, options.num_sequences, options.max_steps)
                    if followed is None:
                        return _NotCalled()
                    self._followed[name] = followed
                if again or calls is not None:
                    return self._measured(name) if name in self._followed else _NotCalled()
        except Exception as error:
            if self._options.strict:  # raised when the other ranks, which may have no error, do not wait any more
                self._error = self._error or error
                return _Failed()
            what = str(error) if isinstance(error, NotFollowedError) else f"{type(error).__name__}: {error}"
            self._warn(
                f"{name} could not be measured",
                f"The Lyapunov spectrum of `{name}` could not be measured; its values are NaN and training goes on. "
                f"{what} To raise this error, write `LyapunovMonitor(strict=True)`.",
            )
            return _Failed()
        if any(parameter.grad is not None for parameter in module.parameters()):
            message = (
                f"The recurrent layer `{name}` was not called as a module in a training step, but its weights have "
                "gradients: something calls its `forward`, or uses its weights, or it is compiled with others as one "
                f"graph. Call the module itself. {_REPEATED}"
            )
        else:
            message = f"The recurrent layer `{name}` was not called in a training step. {_REPEATED}"
        self._warn(f"{name} was not called", message)
        return _NotCalled()

    def _measured(self, name: str) -> _Measured:
        followed = self._followed[name]
        layer, sequences = followed.layer, followed.sequences
        if not followed.holds_copies_only:
            del self._followed[name]
        warmup = sequences.lengths.div(2, rounding_mode="floor")
        warmup = warmup.clamp(max=_WARMUP if self._options.warmup is None else self._options.warmup)
        averaged = int((sequences.lengths - warmup).max())
        growths = self._growth_of(
            layer,
            sequences,
            num_exponents=self._options.num_exponents,
            warmup=warmup,
            qr_interval=self._options.qr_interval,
            dtype=working_dtype(layer, sequences, self._options.dtype),
            segments=min(_SEGMENTS, averaged) if len(sequences.lengths) == 1 else 1,
        )
        self._check_sizes(name, layer.state_sizes)
        lengths = sequences.lengths if sequences.full_lengths is None else sequences.full_lengths
        index = _member_of_each(sequences) if len(growths[0][1].steps) == 1 else None
        if index is None:
            return _Measured([growth for _, growth in growths], layer.state_sizes, lengths)
        mean = _summed(lengths, index) / _summed(torch.ones_like(lengths), index)
        summed = [Growth(_summed(g.total, index, 1), _summed(g.steps, index, 1)) for _, g in growths]
        return _Measured(summed, layer.state_sizes, mean)

    def _check_sizes(self, name: str, sizes: tuple[int, ...]) -> None:
        """Raise unless a layer has the cells that it had at the start, and states as large as the model says."""
        expected = self._sizes_of(name)
        if len(sizes) != len(expected) or any(
            size not in (0, found) for size, found in zip(expected, sizes, strict=True)
        ):
            raise NotFollowedError(
                f"The states of its cells have {sizes} components, where {expected} were expected. If the layer has "
                "changed, start a new run."
            )

    def _sizes_of(self, name: str) -> tuple[int, ...]:
        """Return the sizes of the states of a layer now, or those of the start if it has other cells than then."""
        now, start = self._layers[name].state_sizes, self._state_sizes[name]
        return now if len(now) == len(start) else start

    def _num_exponents_of(self, name: str, index: int, outcome: Any, strategy: Any) -> int:
        """Return how many exponents of a cell to compute, the same on every rank."""
        size = self._sizes_of(name)[index]
        if size == 0:
            # It is known from its first call, and another rank may have seen that.
            known = torch.tensor(
                float(outcome.state_sizes[index] if isinstance(outcome, _Measured) else 0), device=strategy.root_device
            )
            size = int(strategy.reduce(known, reduce_op="max")) or (self._options.num_exponents or 1)
        return size if self._options.num_exponents is None else min(self._options.num_exponents, size)


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


def _samples(outcome: _Measured | _NotCalled | _Failed, index: int, count: int) -> CellSamples:
    """Return what a layer adds to one of its cells."""
    if isinstance(outcome, _Failed):
        return CellSamples(torch.full((1, count), math.nan, device="cpu"), torch.full((1,), math.nan, device="cpu"))
    if isinstance(outcome, _NotCalled):
        return CellSamples(torch.empty(0, count, device="cpu"), torch.empty(0, device="cpu"))
    total, steps = outcome.growths[index]
    segments, lengths = len(steps), outcome.lengths.repeat(len(steps))
    return CellSamples((total / steps.unsqueeze(-1)).flatten(0, 1), steps.flatten(), segments, lengths)


def _is_replica(strategy: Any) -> bool:
    """Return whether another process counts the same batch: the first of those that share a layer between them."""
    mesh: Any = getattr(strategy, "device_mesh", None)
    shared = "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
    return shared and mesh["tensor_parallel"].get_local_rank() > 0
