"""A recurrent cell as a driven map ``s_t = f(s_{t-1}, x_t)``, with its tangent map."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

__all__ = ["MAX_JACOBIAN_ELEMENTS", "NoGraphError", "Recurrence"]

MAX_JACOBIAN_ELEMENTS = 2**19
"""Jacobians are formed for a few steps at a time: enough to fill a vector unit, few enough to stay in the cache."""


class NoGraphError(ValueError):
    """No graph leads from the state to the parameters; the message says what to write."""


class Recurrence(ABC):
    """A driven map ``s_t = f(s_{t-1}, x_t)`` on states of shape ``(batch, state_size)``, and its tangent map.

    States of several tensors are flattened into one vector: for an LSTM ``(h, c)``, in this order.
    """

    state_size: int

    @abstractmethod
    def step(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Return the next state, ``(batch, state_size)``, from a state and one step's input, ``(batch, input)``."""

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what :meth:`push_forward` reads of some steps: tensors whose first dimension is time.

        Args:
            states: the state *before* each step, ``(time, batch, state_size)``.
            inputs: the input of each step, ``(time, batch, input)``.
        """
        return states, inputs

    @abstractmethod
    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        """Return ``J_T ... J_1 frame``, the tangent vectors in the columns of ``frame`` after all steps.

        Args:
            linearised: what :meth:`linearise` returned for the steps, or the same stretch of time of each part of it.
            frame: tangent vectors, ``(batch, state_size, num_exponents)``. Its dtype is the one to compute in.

        Returns:
            ``(batch, state_size, num_exponents)``, in the dtype that was used.
        """

    def step_maps(self, linearised: Sequence[Tensor], num_vectors: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield the tangent map of each step: what :meth:`push_forward` does to a frame of so many vectors in it."""
        for step in range(len(linearised[0])):
            yield partial(self.push_forward, [part[step : step + 1] for part in linearised])

    @abstractmethod
    def push_with_graph(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        """Return the tangent vectors after one step, ``J frame``, with a graph that can be differentiated twice.

        Args:
            linearised: the parts of one step of what :meth:`linearise` returned, each ``(batch, ...)``.
            frame: tangent vectors, ``(batch, state_size, num_exponents)``.
        """

    def trajectory(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Return the states after each step, ``(time, batch, state_size)``."""
        states = []
        for step_inputs in inputs:
            state = self.step(state, step_inputs).clone()  # a callable may write each into the same memory
            states.append(state)
        return torch.stack(states)

    def linearised_trajectory(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the states after each step, and what :meth:`linearise` returns for the steps."""
        states = self.trajectory(inputs, state)
        return states, self.linearise(torch.cat((state.unsqueeze(0), states[:-1])), inputs)

    def output(self, states: Tensor) -> Tensor:
        """Return what the layer above sees of ``states``, ``(..., output)``."""
        return states
