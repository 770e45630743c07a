"""The tangent map of a function without a closed form, by PyTorch's differentiation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_lyapunov.kernel.recurrence import MAX_JACOBIAN_ELEMENTS, Recurrence

__all__ = ["AutodiffRecurrence"]

# Rows of a Jacobian that are made at once, for the same reason as `MAX_JACOBIAN_ELEMENTS`.
_MAX_ROWS = 64


class AutodiffRecurrence(Recurrence):
    """A function ``step(state, input) -> state`` without a closed form, differentiated by PyTorch.

    Three strategies push tangent vectors forward: Jacobians in reverse mode, several steps at once, for many vectors;
    forward mode, one product for each vector, for few; one backward pass for each component of the state, where a part
    of the step has neither a batching rule nor a forward derivative. The first strategy that works is kept.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], state_size: int) -> None:
        self._step = step
        self.state_size = state_size
        self._strategies: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []
        self._has_forward_mode = self._has_reverse_mode = True

    def step(self, state: Tensor, inputs: Tensor) -> Tensor:
        return self._step(state.clone(), inputs.clone())  # a step may write over both

    def check_differentiable(self, state: Tensor, inputs: Tensor) -> None:
        """Raise if a step has lost its graph: to PyTorch its derivative is zero.

        Args:
            state: ``(batch, state_size)``.
            inputs: ``(batch, input)``.

        Raises:
            ValueError: if what it returns changes with the state, and its graph does not reach the state.
        """
        with suppress(RuntimeError), torch.inference_mode(False), torch.enable_grad():
            before = state.clone().requires_grad_()
            after = self.step(before, inputs)
            if after.requires_grad and torch.autograd.grad(after.sum(), before, allow_unused=True)[0] is not None:
                return
            # Twice, because a threshold without a graph may lie at the state itself, and is flat on either side.
            nudge = torch.finfo(state.dtype).eps ** 0.5
            once, twice = (self.step(state * (1 + size) + size, inputs).clone() for size in (nudge, 2 * nudge))
            if not torch.allclose(once, twice, 0, 0, equal_nan=True):
                raise ValueError(
                    "`dynamics` must be differentiable, but the graph of what it returns does not reach its state. "
                    "Write it without `detach`, `no_grad` and numpy."
                )

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        states, inputs = linearised
        frame = frame.to(states.dtype)
        if not self._strategies:
            self._strategies = [self._push_by_forward_mode, self._push_by_reverse_mode]
            if 2 * frame.shape[-1] >= self.state_size:
                self._strategies.reverse()
            self._strategies.append(self._push_by_backward_passes)
        rows = min(self.state_size, _MAX_ROWS)
        steps = max(1, MAX_JACOBIAN_ELEMENTS // (frame.shape[0] * self.state_size * rows))
        for some_states, some_inputs in zip(states.split(steps), inputs.split(steps), strict=True):
            frame = self._push(some_states, some_inputs, frame)
        return frame

    def _push(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        """Push by the first strategy that works. One that has failed is not tried again."""
        while True:
            try:
                return self._strategies[0](states, inputs, frame)
            except Exception:
                if len(self._strategies) == 1:
                    raise
                del self._strategies[0]

    def _push_by_forward_mode(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        for state, step_inputs in zip(states, inputs, strict=True):

            def derivative_along(tangent: Tensor, state: Tensor = state, x: Tensor = step_inputs) -> Tensor:
                return torch.func.jvp(lambda s: self.step(s, x), (state,), (tangent,))[1]

            # Not `out_dims=-1`, which gives a wrong shape where the derivative is identically zero (pytorch #178425).
            frame = torch.func.vmap(derivative_along, in_dims=-1)(frame).movedim(0, -1)
        return frame.clone()  # a step that returns its state returns the frame itself

    def _push_by_reverse_mode(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        for matrices in self._jacobians(states, inputs):
            frame = matrices @ frame
        return frame

    def _jacobians(self, states: Tensor, inputs: Tensor) -> Tensor:
        """Return the Jacobians of some steps at once, ``(time, batch, state, state)``."""
        # The members of the batch are independent: a cotangent of all of them is a row of each Jacobian.
        rows = (
            torch.eye(self.state_size, dtype=states.dtype, device=states.device)
            .unsqueeze(1)
            .expand(-1, states.shape[1], -1)
        )

        def jacobian(state: Tensor, step_inputs: Tensor) -> Tensor:
            pull_back = torch.func.vjp(lambda s: self.step(s, step_inputs), state)[1]
            return torch.func.vmap(pull_back, chunk_size=_MAX_ROWS)(rows)[0].movedim(0, -2)

        return torch.func.vmap(jacobian)(states, inputs)

    def step_maps(self, linearised: Sequence[Tensor], num_vectors: int) -> Iterator[Callable[[Tensor], Tensor]]:
        steps = max(1, MAX_JACOBIAN_ELEMENTS // (linearised[0][0].numel() * self.state_size))
        for some in zip(*(part.split(steps) for part in linearised), strict=True):
            maps = super().step_maps(some, num_vectors)
            if self._has_reverse_mode and 2 * num_vectors >= self.state_size:
                try:
                    maps = iter([matrices.matmul for matrices in self._jacobians(*some)])
                except Exception:
                    self._has_reverse_mode = False
            yield from maps

    def _push_by_backward_passes(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        for state, step_inputs in zip(states, inputs, strict=True):
            with torch.inference_mode(False), torch.enable_grad():
                # A copy, as `step` makes of the inputs: tensors of inference mode are not saved for a backward pass.
                before = state.clone().requires_grad_()
                after = self.step(before, step_inputs)
                if not after.requires_grad:  # this step forgets its state
                    return torch.zeros_like(frame)
                # As above: the gradient of a sum over the members holds a row for each.
                rows = [
                    torch.autograd.grad(component.sum(), before, retain_graph=True, materialize_grads=True)[0]
                    for component in after.unbind(-1)
                ]
            frame = torch.stack(rows, -2) @ frame
        return frame

    def push_with_graph(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        state, inputs = linearised
        frame = frame.to(state.dtype)
        if self._has_forward_mode:
            try:
                return self._push_by_forward_mode(state.unsqueeze(0), inputs.unsqueeze(0), frame)
            except Exception:
                self._has_forward_mode = False
        with torch.inference_mode(False), torch.enable_grad():
            before = state.clone() if state.requires_grad else state.clone().requires_grad_()
            after = self.step(before, inputs)
            if not after.requires_grad:  # this step forgets its state
                return torch.zeros_like(frame)
            options: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
            # The gradient of a sum over the members holds a row for each.
            rows = [torch.autograd.grad(component.sum(), before, **options)[0] for component in after.unbind(-1)]
        return torch.stack(rows, -2) @ frame
