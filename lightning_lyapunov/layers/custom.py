"""Recurrent layers of the user: any module, or plain callable, that maps a state to the next."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lyapunov.kernel.autodiff import AutodiffRecurrence
from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.layers.base import Call, DrivenCell, RecurrentLayer, Sequences, check_tensor
from lightning_lyapunov.layers.copies import stepping_copy
from lightning_lyapunov.layers.sharding import full_tensor

__all__ = ["CallableLayer", "CustomLayer", "Step", "drive_step"]

Step = Callable[[nn.Module, Any, Any], Any]
"""``step(module, input, state)``, which returns the next state, or a pair of an output and it."""


class CallableLayer(RecurrentLayer):
    """A plain callable ``step(state, input) -> state`` on tensors ``(batch, state)`` and ``(batch, input)``."""

    cell_names = ("",)
    dtype = None

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step = step
        self._size = 0

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self._size,)

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        if state is None:
            raise ValueError("`state` is required for a callable: pass the first state, (batch, state).")
        check_tensor("inputs", inputs)
        check_tensor("state", state)
        if inputs.ndim != 3 or state.ndim != 2 or inputs.shape[1] != state.shape[0]:
            raise ValueError(
                "`inputs` must be (time, batch, input) and `state` (batch, state) for a callable, but their shapes are "
                f"{tuple(inputs.shape)} and {tuple(state.shape)}. A map without input takes "
                f"`inputs=torch.zeros(time, {state.shape[0] if state.ndim else 1}, 0)`."
            )
        if state.shape[1] == 0:
            raise ValueError(f"`state` must hold at least one number, but its shape is {tuple(state.shape)}.")
        self._size = state.shape[1]
        return Sequences(inputs, state.unsqueeze(0), torch.full((inputs.shape[1],), inputs.shape[0], device="cpu"))

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        raise NotImplementedError("A plain callable is not a module of a model.")

    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        state = sequences.states[0]
        try:
            returned = self._step(state.clone(), sequences.inputs[0].clone())
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"`dynamics` fails on a state {tuple(state.shape)} and an input "
                f"{tuple(sequences.inputs[0].shape)} of {state.dtype}: {error}"
            ) from error
        if not isinstance(returned, Tensor) or returned.shape != state.shape or not returned.is_floating_point():
            what = type(returned).__name__
            if isinstance(returned, Tensor):
                what = str(tuple(returned.shape)) + ("" if returned.is_floating_point() else f" of {returned.dtype}")
            raise ValueError(f"`dynamics` must return a state of shape {tuple(state.shape)}, but it returned {what}.")
        yield _driven(self._step, sequences.inputs, state, returned)


class CustomLayer(RecurrentLayer):
    """A module that maps an input and a state, any pytree of tensors, to the next state.

    Args:
        module: the module.
        step: one step of it; by default the module is called as ``(input, state)``.
        read_call: from the arguments of the module's ``forward``, the inputs ``(time, batch, ...)`` of that call, the
            state before them and, if it can be known, the one after them; None for a module that is not registered.
    """

    cell_names = ("",)

    def __init__(
        self,
        module: nn.Module,
        step: Step | None = None,
        read_call: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.module = module
        self._step, self._read_call = step or _call, read_call
        self._layout: _StateLayout | None = None

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (0 if self._layout is None else self._layout.size,)

    @property
    def dtype(self) -> torch.dtype | None:
        dtypes = [parameter.dtype.to_real() for parameter in self.module.parameters()]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), None)

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        if self._read_call is not None:
            inputs, state, *_ = self._read_call(self.module, inputs, *([] if state is None else [state]))
        if state is None:
            raise ValueError(
                f"`state` is required for {type(self.module).__name__}: pass the state before the first step."
            )
        return self._sequences(inputs, state)

    def _sequences(self, inputs: Any, state: Any) -> Sequences:
        if not isinstance(inputs, Tensor) or inputs.ndim < 2:
            raise ValueError(f"`inputs` must be a tensor (time, batch, ...) for {type(self.module).__name__}.")
        layout = _StateLayout(state)
        if self._layout is None:
            self._layout = layout
        if layout != self._layout:
            raise ValueError(
                f"The state of {type(self.module).__name__} changes its size or structure: {layout} after "
                f"{self._layout}. Its Lyapunov spectrum is not defined."
            )
        states = layout.flatten(state)
        if states.shape[0] != inputs.shape[1]:
            raise ValueError(
                f"`state` must have the batch, {inputs.shape[1]}, as the first dimension of each tensor for "
                f"{type(self.module).__name__}, but has {states.shape[0]}. A `step` may move it: `register_layer`."
            )
        return Sequences(inputs, states.unsqueeze(0), torch.full((inputs.shape[1],), inputs.shape[0], device="cpu"))

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        args, kwargs = pytree.tree_map(full_tensor, (args, kwargs))
        assert self._read_call is not None  # a module that is not registered is read by watching its calls
        inputs, state, *after = self._read_call(self.module, *args, **kwargs)
        sequences = self._sequences(inputs, state)
        return Call(sequences, self._layout_of(after[0]).flatten(after[0]).unsqueeze(0) if after else None)

    def _layout_of(self, state: Any) -> "_StateLayout":
        layout = _StateLayout(state)
        if layout != self._layout:
            raise ValueError(
                f"`read_call` returned a state after the call, {layout}, unlike that before: {self._layout}."
            )
        return layout

    def leaves(self, states: Tensor) -> list[Tensor]:
        """Return the tensors of flat states, ``(batch, state)``."""
        assert self._layout is not None
        return pytree.tree_leaves(self._layout.unflatten(states))

    def join_leaves(self, leaves: list[Tensor]) -> Tensor:
        """Return flat states, ``(batch, state)``, of tensors with the numbers of :meth:`leaves`, in other shapes."""
        assert self._layout is not None
        shaped = [leaf.reshape(-1, *shape) for leaf, (shape, _) in zip(leaves, self._layout.shapes, strict=True)]
        return self._layout.flatten(pytree.tree_unflatten(shaped, self._layout.structure))

    def after(self, module: nn.Module, sequences: Sequences) -> Tensor:
        """Return the states after all steps, ``(batch, state)``, by the step of a copy of the module."""
        layout, state = self._layout, sequences.states[0]
        assert layout is not None
        for inputs in sequences.inputs:
            state = layout.flatten(layout.find(self._step(module, inputs, layout.unflatten(state))))
        return state

    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        dtypes = dict.fromkeys((widest_dtype(sequences.inputs.device), self.dtype))
        yield drive_step(self._plain_step, sequences, dtypes, f"{type(self.module).__name__} on a state {self._layout}")

    def _plain_step(self, dtype: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the step as a function of flat real states, with weights that are a copy, or have a graph."""
        module, layout = stepping_copy(self.module, dtype or torch.float64), self._layout
        assert layout is not None

        def step(state: Tensor, inputs: Tensor) -> Tensor:
            before = layout.unflatten(state)
            return layout.flatten(layout.find(self._step(module, inputs, before)))

        return step


def drive_step(
    make_step: Callable[[torch.dtype | None], Callable[[Tensor, Tensor], Tensor]],
    sequences: Sequences,
    dtypes: Iterable[torch.dtype | None],
    what: str,
    *,
    cast_inputs: bool = True,
) -> DrivenCell:
    """Return the one cell of a layer, in the first dtype in which a step works.

    Tensors that are no parameters or buffers keep their dtype: then only the module's own dtype works.

    Args:
        make_step: returns the step in a dtype.
        sequences: the sequences that drive it.
        dtypes: the dtypes to try; None for that of the sequences.
        what: the step, for an error message.
        cast_inputs: cast floating point inputs to the dtype.
    """
    errors = []
    for dtype in dtypes:
        inputs, state = sequences.inputs, sequences.states[0]
        try:
            step = make_step(dtype)
            if dtype is not None:
                inputs = inputs.to(dtype) if cast_inputs and inputs.is_floating_point() else inputs
                state = state.to(dtype)
            after = step(state.clone(), inputs[0].clone())
        except Exception as error:
            errors.append(error)
            continue
        if after.shape != state.shape:
            raise ValueError(f"The state of {what} changes its size: {tuple(after.shape)}.")
        return _driven(step, inputs, state, after)
    raise ValueError(f"`dynamics`, a step of {what}, fails: {errors[-1]}") from errors[-1]


def _driven(step: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, state: Tensor, after: Tensor) -> DrivenCell:
    """Return the one cell of a layer, if the state after its first step has the precision and the graph for it."""
    if after.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"`dynamics` must return a state in float32 or float64, but it returned {after.dtype}. Let it return "
            "`after.to(state.dtype)`."
        )
    recurrence = AutodiffRecurrence(step, state.shape[1])
    recurrence.check_differentiable(state, inputs[0])
    return DrivenCell("", recurrence, inputs, state)


def _call(module: nn.Module, inputs: Any, state: Any) -> Any:
    return module(inputs, state)


class _StateLayout:
    """How a pytree of tensors ``(batch, ...)``, real or complex, lies in a flat real vector ``(batch, size)``."""

    def __init__(self, state: Any) -> None:
        leaves, self.structure = pytree.tree_flatten(state)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
            raise TypeError(f"`state` must hold tensors (batch, ...) and nothing else, not {state!r:.100}.")
        if not all(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves):
            raise TypeError(f"`state` must be real or complex, not {[str(leaf.dtype) for leaf in leaves]}.")
        if len({len(leaf) for leaf in leaves}) > 1:
            raise ValueError(f"`state` must hold tensors of one batch, not of {[len(leaf) for leaf in leaves]}.")
        self.shapes = [(tuple(leaf.shape[1:]), leaf.is_complex()) for leaf in leaves]
        self.sizes = [leaf[:1].numel() // max(1, len(leaf[:1])) * (1 + leaf.is_complex()) for leaf in leaves]
        self.size = sum(self.sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StateLayout) and (self.structure, self.shapes) == (other.structure, other.shapes)

    def __hash__(self) -> int:
        return hash(tuple(self.shapes))

    def __repr__(self) -> str:
        return ", ".join(
            f"{'complex ' * complex_}(batch, {', '.join(map(str, shape))})" for shape, complex_ in self.shapes
        )

    def flatten(self, state: Any) -> Tensor:
        leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in pytree.tree_leaves(state)]
        return torch.cat([leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1) for leaf in leaves], 1)

    def unflatten(self, flat: Tensor) -> Any:
        leaves, ends = [], accumulate(self.sizes)
        for end, size, (shape, is_complex) in zip(ends, self.sizes, self.shapes, strict=True):
            part = flat[:, end - size : end]  # not of `split`, whose views a step must not write over
            if is_complex:
                # A copy, because a complex number must not begin at an odd place.
                leaves.append(torch.view_as_complex(part.reshape(len(flat), *shape, 2).clone()))
            else:
                leaves.append(part.reshape(len(flat), *shape))
        return pytree.tree_unflatten(leaves, self.structure)

    def find(self, returned: Any) -> Any:
        """Return the state in what a step returned: all of it, or the second of two.

        Raises:
            ValueError: if neither is laid out like the state before.
        """
        candidates = [returned, *(returned[1:] if isinstance(returned, tuple) and len(returned) == 2 else ())]
        for candidate in candidates:
            if pytree.tree_structure(candidate) == self.structure and _StateLayout(candidate) == self:
                return candidate
        raise ValueError(
            f"A step must return the next state, or a pair (output, state), with a state like the one before: {self}. "
            f"It returned {pytree.tree_map(lambda leaf: tuple(getattr(leaf, 'shape', ())), returned)!r:.200}."
        )
