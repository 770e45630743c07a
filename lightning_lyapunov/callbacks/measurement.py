"""Measure the layers of a model along recorded sequences, together with all ranks."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.functional import layer_growth
from lightning_lyapunov.kernel.propagation import Growth
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.layers.outer_state import undisturbed
from lightning_lyapunov.layers.sharding import gathered
from lightning_lyapunov.measuring.layers import MeasuredLayer, Options, full_name, measure_layer, no_samples
from lightning_lyapunov.measuring.summaries import CellMetrics, CellSamples, summarised
from lightning_lyapunov.recording.calls import RecordedCalls
from lightning_lyapunov.recording.cells import NotFollowedError
from lightning_lyapunov.recording.reading import Followed, follow

__all__ = ["MAX_REPEATS", "Measurement"]

MAX_REPEATS = 3
"""How many measurements of a layer that no rank calls any more repeat its last values, before these are NaN."""

_REPEATED = f"Its last values are repeated in up to {MAX_REPEATS} measurements; after these they are NaN."


class _NotCalled:
    """This rank has nothing to add: the layer was not called here, or another process counts the same batch."""


class _Failed:
    """The layer was called on this rank and could not be measured."""


_Outcome: TypeAlias = MeasuredLayer | _NotCalled | _Failed


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
        self.unit_shares: dict[str, Tensor] = {}
        self._error: Exception | None = None

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of the layer of each cell: ``"RNN"``, ``"LSTM"``, ``"GRU"``, or "" for any other."""
        return {
            full_name(name, cell, self._cell_names[name]): self._layers[name].kind
            for name in self._layers
            for cell in self._cell_names[name]
        }

    @property
    def cell_names(self) -> list[str]:
        """The names of all cells, in model order."""
        return [self._full_name(name, cell) for name, cells in self._cell_names.items() for cell in cells]

    def _full_name(self, name: str, cell: str) -> str:
        return full_name(name, cell, self._cell_names[name])

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
        self.unit_shares = {}
        for name, found in self._layers.items():
            with overhead.layer(name):
                outcome = self._outcome(
                    name, found.module, None if calls is None else calls.get(name), errors.get(name), calls is None
                )
                if isinstance(outcome, _NotCalled):
                    self._followed.pop(name, None)
                samples.update(self._samples(name, outcome, strategy))
                if isinstance(outcome, MeasuredLayer):
                    names = [self._full_name(name, cell) for cell in self._cell_names[name]]
                    self.unit_shares.update(zip(names, outcome.unit_shares, strict=False))
        # A process group may be somebody else's: with one rank there is nothing to gather.
        alone = getattr(strategy, "world_size", 1) == 1
        device = "cpu" if strategy.root_device.type == "mps" else strategy.root_device
        cells = summarised(samples, device, gather=not alone)
        if self._error is not None:
            raise self._error
        return cells

    def forget_all_but(self, model: nn.Module) -> None:
        """Forget the sequences of the layers that are not in a model any more."""
        modules = set(model.modules())
        for name, found in self._layers.items():
            if found.module not in modules:
                self._followed.pop(name, None)

    def _samples(
        self, name: str, outcome: "MeasuredLayer | _NotCalled | _Failed", strategy: Any
    ) -> dict[str, CellSamples]:
        """Return what this rank adds to each cell of a layer, nothing where it has nothing."""
        samples = {}
        if isinstance(outcome, MeasuredLayer) and _is_replica(strategy):
            outcome = _NotCalled()
        for index, cell in enumerate(self._cell_names[name]):
            count = self._num_exponents_of(name, index, outcome, strategy)
            samples[self._full_name(name, cell)] = _samples(outcome, index, count)
        return samples

    def _outcome(
        self, name: str, module: nn.Module, calls: RecordedCalls | None, error: Exception | None, again: bool
    ) -> _Outcome:
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

    def _measured(self, name: str) -> MeasuredLayer:
        followed = self._followed[name]
        layer, sequences = followed.layer, followed.sequences
        if not followed.holds_copies_only:
            del self._followed[name]
        measured = measure_layer(layer, sequences, self._options, self._growth_of)
        self._check_sizes(name, layer.state_sizes)
        return measured

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
                float(outcome.state_sizes[index] if isinstance(outcome, MeasuredLayer) else 0),
                device=strategy.root_device,
            )
            size = int(strategy.reduce(known, reduce_op="max")) or (self._options.num_exponents or 1)
        return size if self._options.num_exponents is None else min(self._options.num_exponents, size)


def _samples(outcome: _Outcome, index: int, count: int) -> CellSamples:
    """Return what a layer adds to one of its cells."""
    if isinstance(outcome, MeasuredLayer):
        return outcome.samples(index)
    return no_samples(count, failed=isinstance(outcome, _Failed))


def _is_replica(strategy: Any) -> bool:
    """Return whether another process counts the same batch: the first of those that share a layer between them."""
    mesh: Any = getattr(strategy, "device_mesh", None)
    shared = "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
    return shared and mesh["tensor_parallel"].get_local_rank() > 0
