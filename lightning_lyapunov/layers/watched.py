"""A module that is stepped by calling it, with its state where it was seen to come back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.layers.base import DrivenCell, RecurrentLayer, Sequences
from lightning_lyapunov.layers.copies import assign, cast, stepping_copy
from lightning_lyapunov.layers.custom import drive_step
from lightning_lyapunov.layers.trees import Structure, flatten, unflatten

__all__ = ["Place", "StepCall", "WatchedCell"]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a call.

    Attributes:
        index: its leaf among the arguments or results, or the name of the attribute and its leaf there.
        shape: its shape.
        dtype: its dtype.
        batch_axis: the axis of the members of the batch; None if it has none.
    """

    index: int | tuple[str, int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_axis: int | None = None

    @property
    def member_shape(self) -> tuple[int, ...]:
        """The shape without the batch."""
        return tuple(size for axis, size in enumerate(self.shape) if axis != self.batch_axis)

    @property
    def size(self) -> int:
        """The real numbers of one member."""
        return int(torch.Size(self.member_shape).numel()) * (1 + self.dtype.is_complex)

    def flatten(self, tensor: Tensor, batch: int) -> Tensor:
        """Return a tensor as real numbers, ``(batch, size)``; one without a batch is the same for every member."""
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if self.batch_axis is None:
            return tensor.reshape(1, -1).expand(batch, -1)
        return tensor.movedim(self.batch_axis, 0).reshape(batch, -1)

    def unflatten(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor of real numbers ``(batch, size)``, floating point ones in ``dtype``."""
        rows = flat if self.batch_axis is not None else flat[:1]
        if self.dtype.is_complex:
            # A copy, because a complex number must not begin at an odd place.
            tensor = torch.view_as_complex(rows.reshape(len(rows), *self.member_shape, 2).to(dtype).clone())
        else:
            tensor = rows.reshape(len(rows), *self.member_shape)
            tensor = tensor.to(dtype if self.dtype.is_floating_point else self.dtype)
        return tensor.movedim(0, self.batch_axis) if self.batch_axis is not None else tensor.squeeze(0)


@dataclass(frozen=True)
class StepCall:
    """How a module is called for one step.

    Attributes:
        arguments: the leaves of the arguments of one call; what is neither state nor input is the same in all steps.
        structure: their structure, ``(args, kwargs)``.
        kept: attributes that are set before a call, by dotted name.
        states: where the state stands before a step.
        results: where it stands after it, in the same order: among the results, or kept.
        inputs: the arguments that follow the steps.
    """

    arguments: list[Any]
    structure: Structure
    kept: dict[str, Any] = field(default_factory=dict)
    states: tuple[Place, ...] = ()
    results: tuple[Place, ...] = ()
    inputs: tuple[Place, ...] = ()

    def run(
        self, module: nn.Module, values: dict[int | tuple[str, int], Tensor], dtype: torch.dtype
    ) -> tuple[list[Any], list[Tensor]]:
        """Call the module in a dtype with some leaves replaced; return the leaves of its results, and the state."""

        def leaf(key: int | tuple[str, int], constant: Any) -> Any:
            value = values.get(key, constant)
            return cast(value, dtype).clone() if isinstance(value, Tensor) else value  # a step may write over it

        for name, value in self.kept.items():
            leaves, structure = flatten(value)
            assign(module, name, unflatten(structure, [leaf((name, i), constant) for i, constant in enumerate(leaves)]))
        arguments = [leaf(i, constant) for i, constant in enumerate(self.arguments)]
        args, kwargs = unflatten(self.structure, arguments)
        results = flatten(module(*args, **kwargs))[0]
        return results, [self._found(module, results, place) for place in self.results]

    def _found(self, module: nn.Module, results: list[Any], place: Place) -> Tensor:
        if isinstance(place.index, int):
            return results[place.index]
        name, index = place.index
        path, _, attribute = name.rpartition(".")
        return flatten(getattr(module.get_submodule(path), attribute))[0][index]

    def with_batch_axes(self, axes: dict[int | tuple[str, int], int | None]) -> "StepCall":
        """Return the same call with the axes of the batch of its places."""

        def placed(place: Place, key: Any) -> Place:
            return replace(place, batch_axis=axes.get(key))

        results = tuple(placed(r, s.index) for r, s in zip(self.results, self.states, strict=True))
        states, inputs = (tuple(placed(p, p.index) for p in places) for places in (self.states, self.inputs))
        return replace(self, states=states, inputs=inputs, results=results)


class WatchedCell(RecurrentLayer):
    """A module whose step is a call of it.

    Args:
        module: the module.
        step_call: how it is called for one step.
    """

    cell_names = ("",)

    def __init__(self, module: nn.Module, step_call: StepCall) -> None:
        self.module, self.step_call = module, step_call

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (sum(place.size for place in self.step_call.states),)

    @property
    def dtype(self) -> torch.dtype | None:
        return next((p.dtype.to_real() for p in self.module.parameters() if p.dtype.to_real().is_floating_point), None)

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        raise NotImplementedError("It is read from recorded calls.")

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raise NotImplementedError("It is read from recorded calls.")

    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        # Tensors that are no parameters or buffers may need the module's own dtype.
        dtypes = dict.fromkeys((widest_dtype(sequences.inputs.device), self.dtype or torch.float32))
        yield drive_step(self.plain_step, sequences, dtypes, type(self.module).__name__, cast_inputs=False)

    def plain_step(self, dtype: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the step as a function of flat real states and inputs; its weights are a copy, or have a graph."""
        dtype = dtype or torch.float64
        module, call = stepping_copy(self.module, dtype), self.step_call

        def step(state: Tensor, inputs: Tensor) -> Tensor:
            values = unflatten_places(call.states, state, dtype) | unflatten_places(call.inputs, inputs, dtype)
            _, after = call.run(module, values, dtype)
            return flatten_places(call.results, after, len(state)).to(state.dtype)

        return step


def flatten_places(places: tuple[Place, ...], tensors: list[Tensor], batch: int) -> Tensor:
    """Return tensors side by side as real numbers, ``(batch, size)``."""
    parts = [place.flatten(tensor, batch) for place, tensor in zip(places, tensors, strict=True)]
    return torch.cat(parts, 1)


def unflatten_places(places: tuple[Place, ...], flat: Tensor, dtype: torch.dtype) -> dict[Any, Tensor]:
    """Return the tensors of real numbers ``(batch, size)`` by their places."""
    sizes = [place.size for place in places]
    ends = accumulate(sizes)
    return {
        place.index: place.unflatten(flat[:, end - size : end], dtype)
        for place, size, end in zip(places, sizes, ends, strict=True)
    }
