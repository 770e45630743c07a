"""A recurrent cell as a driven map ``s_t = f(s_{t-1}, x_t)``, with its tangent map.

The closed forms below are the derivatives of the cells as PyTorch defines them (see the formulas in the documentation
of :class:`torch.nn.RNN`, :class:`torch.nn.GRU` and :class:`torch.nn.LSTM`). They read plain weight tensors, so they
work on every device, under parametrisations and pruning, and where a fused kernel has no forward derivative.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AutodiffRecurrence", "GRURecurrence", "LSTMRecurrence", "RNNRecurrence", "Recurrence"]

# Jacobians are formed a few steps at a time: enough to fill a vector unit, few enough to stay in the cache.
_MAX_JACOBIAN_ELEMENTS = 2**19
# Rows of a callable's Jacobian that are made at once, for the same reason.
_MAX_ROWS = 64


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

    def trajectory(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Return the states after each step, ``(time, batch, state_size)``."""
        states = []
        for step_inputs in inputs:
            state = self.step(state, step_inputs).clone()  # a callable may write each into the same memory
            states.append(state)
        return torch.stack(states)

    def output(self, states: Tensor) -> Tensor:
        """Return what the layer above sees of ``states``, ``(..., output)``."""
        return states


class AutodiffRecurrence(Recurrence):
    """A function ``step(state, input) -> state`` without a closed form, differentiated by PyTorch.

    Many tangents are pushed forward by Jacobians, of several steps at once, in reverse mode; few by forward mode, one
    product for each vector and the batch as it is. Where a part of the step has no batching rule or forward derivative,
    by the other of the two, and where it has neither, by one backward pass for each component of the state. The first
    that works is kept.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], state_size: int) -> None:
        self._step = step
        self.state_size = state_size
        self._ways: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []

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
        if not self._ways:
            self._ways = [self._push_by_forward_mode, self._push_by_reverse_mode]
            if 2 * frame.shape[-1] >= self.state_size:
                self._ways.reverse()
            self._ways.append(self._push_by_backward_passes)
        rows = min(self.state_size, _MAX_ROWS)
        steps = max(1, _MAX_JACOBIAN_ELEMENTS // (frame.shape[0] * self.state_size * rows))
        for some_states, some_inputs in zip(states.split(steps), inputs.split(steps), strict=True):
            frame = self._push(some_states, some_inputs, frame)
        return frame

    def _push(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        """Push in the first way that works: one that failed once is not tried again, in whatever step it was."""
        while True:
            try:
                return self._ways[0](states, inputs, frame)
            except Exception:
                if len(self._ways) == 1:
                    raise
                del self._ways[0]

    def _push_by_forward_mode(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        for state, step_inputs in zip(states, inputs, strict=True):

            def derivative_along(tangent: Tensor, state: Tensor = state, x: Tensor = step_inputs) -> Tensor:
                return torch.func.jvp(lambda s: self.step(s, x), (state,), (tangent,))[1]

            # Not `out_dims=-1`, which gives a wrong shape where the derivative is identically zero (pytorch #178425).
            frame = torch.func.vmap(derivative_along, in_dims=-1)(frame).movedim(0, -1)
        return frame.clone()  # a step that returns its state returns the frame itself

    def _push_by_reverse_mode(self, states: Tensor, inputs: Tensor, frame: Tensor) -> Tensor:
        # The members of the batch are independent: a cotangent of all of them is a row of each Jacobian.
        rows = torch.eye(self.state_size).to(states).unsqueeze(1).expand(-1, states.shape[1], -1)

        def jacobian(state: Tensor, step_inputs: Tensor) -> Tensor:
            pull_back = torch.func.vjp(lambda s: self.step(s, step_inputs), state)[1]
            return torch.func.vmap(pull_back, chunk_size=_MAX_ROWS)(rows)[0].movedim(0, -2)

        for matrices in torch.func.vmap(jacobian)(states, inputs):
            frame = matrices @ frame
        return frame

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


class _ClosedForm(Recurrence):
    """A cell of PyTorch, written out: one step, and what its Jacobian is made of."""

    fused: Callable[..., tuple[Tensor, ...]] | None = None
    """PyTorch's own loop over time, where it returns whole states."""

    def __init__(
        self,
        weight_ih: Tensor | None,
        weight_hh: Tensor | None,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
    ) -> None:
        assert weight_ih is not None
        assert weight_hh is not None
        self.weight_ih, self.weight_hh = weight_ih, weight_hh
        self.bias_ih, self.bias_hh = bias_ih, bias_hh
        self.state_size = weight_hh.shape[1]

    @abstractmethod
    def _advance(self, state: Tensor, drive: Tensor) -> Tensor:
        """Return the next state, given the state and what the input adds to the gates."""

    def _drive(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight_ih, self.bias_ih)

    def _recur(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight_hh, self.bias_hh)

    def step(self, state: Tensor, inputs: Tensor) -> Tensor:
        return self._advance(state, self._drive(inputs))

    def trajectory(self, inputs: Tensor, state: Tensor) -> Tensor:
        # Not cuDNN's, which warns of weights that do not lie side by side.
        if self.fused is not None and inputs.device.type == "cpu":
            weights = [self.weight_ih, self.weight_hh]
            biases = [] if self.bias_ih is None else [self.bias_ih, self.bias_hh]
            options = bool(biases), 1, 0.0, False, False, False
            return self.fused(inputs, state.unsqueeze(0), weights + biases, *options)[0]
        states = []
        for drive in self._drive(inputs):
            state = self._advance(state, drive)
            states.append(state)
        return torch.stack(states)


def _sigmoid_slope(x: Tensor) -> Tensor:
    """Return ``sigmoid'(x)`` to full relative accuracy, also where the gate is saturated."""
    return x.sigmoid().mul_((-x).sigmoid_())


def _tanh_slope(x: Tensor) -> Tensor:
    """Return ``tanh'(x) = sech^2(x)``; ``1 - tanh(x)^2`` would lose every digit of it from ``|x| = 19`` on."""
    return _sigmoid_slope(2 * x).mul_(4)


class RNNRecurrence(_ClosedForm):
    r"""Elman's cell: ``h' = phi(W_ih x + b_ih + W_hh h + b_hh)``, with ``J = diag(phi') W_hh``."""

    def __init__(self, *weights: Tensor | None, nonlinearity: str = "tanh") -> None:
        super().__init__(*weights)
        self._phi, self._slope, self.fused = {
            "tanh": (torch.tanh, _tanh_slope, torch.rnn_tanh),
            "relu": (torch.relu, lambda x: (x > 0).to(x.dtype), torch.rnn_relu),
        }[nonlinearity]

    def _advance(self, state: Tensor, drive: Tensor) -> Tensor:
        return self._phi(drive + self._recur(state))

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        return (self._slope(self._drive(inputs) + self._recur(states)),)

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        # All sequences share the weight: one large product is faster than one for each.
        vectors, weight = frame.mT, self.weight_hh.to(frame.dtype)
        for slope in linearised[0].to(frame.dtype).unsqueeze(-2):
            vectors = F.linear(vectors, weight).mul_(slope)
        return vectors.mT


class _GatedRecurrence(_ClosedForm):
    """A cell with gates: the dense part of its Jacobian is a sum of blocks of the weight with their rows scaled.

    Forming that sum is cheaper than applying each block to the frame, as long as it is made where the last one was.
    """

    dense_rows: int
    _room: Tensor | None = None

    @abstractmethod
    def _form(self, dense: Tensor, weight: Tensor, *factors: Tensor) -> None:
        """Write the dense part of the Jacobians into ``dense``, ``(time, batch, dense_rows, hidden)``."""

    @abstractmethod
    def _apply(self, vectors: Tensor, buffers: Iterator[Tensor], dense: Tensor, *factors: Tensor) -> Tensor:
        """Return the tangent vectors in the rows of ``vectors`` after all steps of ``dense``.

        Each next one of ``buffers``, ``(batch, num_exponents, dense_rows)``, can take the product of a step.
        """

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        factors = [factor.to(frame.dtype) for factor in linearised]
        weight = self.weight_hh.to(frame.dtype)
        shape = frame.shape[0], self.dense_rows, weight.shape[1]
        steps = min(len(factors[0]), max(1, _MAX_JACOBIAN_ELEMENTS // math.prod(shape)))
        room = self._memory(steps, *shape, like=frame)
        # As rows, so that each vector lies side by side in memory.
        vectors, buffers = frame.mT, cycle(frame.new_empty(2, len(frame), frame.shape[-1], self.dense_rows))
        for some_factors in zip(*(factor.split(steps) for factor in factors), strict=True):
            dense = room[: len(some_factors[0])]
            self._form(dense, weight, *some_factors)
            vectors = self._apply(vectors, buffers, dense, *some_factors)
        return vectors.mT

    def _memory(self, *shape: int, like: Tensor) -> Tensor:
        """Return memory for Jacobians: what was used last, because the first touch of a page takes the longest."""
        size = math.prod(shape)
        if self._room is None or self._room.dtype != like.dtype or len(self._room) < size:
            self._room = like.new_empty(size)
        return self._room[:size].view(shape)


def _scale_rows(out: Tensor, weight: Tensor, *factors: Tensor) -> None:
    """Write ``sum_i diag(factors[i]) weight[i]`` into ``out``, for a weight of ``len(factors)`` blocks of rows."""
    (first, first_block), *others = zip(factors, weight.chunk(len(factors)), strict=True)
    torch.mul(first.unsqueeze(-1), first_block, out=out)
    for factor, block in others:
        out.addcmul_(factor.unsqueeze(-1), block)


class GRURecurrence(_GatedRecurrence):
    r"""The gated recurrent unit ``h' = (1 - z) n + z h``, ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``.

    ``J = diag(z) + diag((h - n) z (1 - z)) W_hz + diag((1 - z) n') (diag(r) W_hn + diag(q r (1 - r)) W_hr)``, where
    ``q = W_hn h + b_hn`` and ``n' = 1 - n^2``.
    """

    fused = staticmethod(torch.gru)

    def __init__(self, *weights: Tensor | None) -> None:
        super().__init__(*weights)
        self.dense_rows = self.state_size

    def _gates(self, states: Tensor, drive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of ``r`` and ``z`` side by side, both of them, the argument of ``n``, and ``q``."""
        parts = 2 * self.state_size, self.state_size
        (rz_x, n_x), (rz_h, q) = drive.split(parts, -1), self._recur(states).split(parts, -1)
        rz = rz_x + rz_h
        gates = rz.sigmoid()
        return rz, gates, torch.addcmul(n_x, gates.chunk(2, -1)[0], q), q

    def _advance(self, state: Tensor, drive: Tensor) -> Tensor:
        _, gates, n, _ = self._gates(state, drive)
        return torch.lerp(n.tanh(), state, gates.chunk(2, -1)[1])

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        rz, gates, n, q = self._gates(states, self._drive(inputs))
        shut = (-rz).sigmoid_()
        (r, z), (r_slope, z_slope) = gates.chunk(2, -1), (gates * shut).chunk(2, -1)
        through_n = _tanh_slope(n).mul_(shut.chunk(2, -1)[1])
        return (through_n * q).mul_(r_slope), (states - n.tanh_()).mul_(z_slope), through_n.mul_(r), z

    def _form(self, dense: Tensor, weight: Tensor, *factors: Tensor) -> None:
        *through, keep = factors
        _scale_rows(dense, weight, *through)
        dense.diagonal(dim1=-2, dim2=-1).add_(keep)

    def _apply(self, vectors: Tensor, buffers: Iterator[Tensor], dense: Tensor, *factors: Tensor) -> Tensor:
        for transposed in dense.mT:
            vectors = torch.bmm(vectors, transposed, out=next(buffers))
        return vectors


class LSTMRecurrence(_GatedRecurrence):
    r"""The long short-term memory cell on ``s = (h, c)``: ``c' = f c + i g``, ``h' = W_hr (o tanh c')``.

    With ``u = o tanh c'`` (``h' = u`` where there is no projection), a tangent ``(dh, dc)`` is carried to
    ``dc' = diag(f) dc + A dh`` and ``du = diag(o sech^2 c') dc' + diag(tanh c' o') W_ho dh``, where
    ``A = diag(g i') W_hi + diag(c f') W_hf + diag(i g') W_hg`` and a prime on a gate is its slope. Only the columns
    of ``h`` are dense, so a product costs half of what the full Jacobian would.
    """

    def __init__(self, *weights: Tensor | None, weight_hr: Tensor | None = None) -> None:
        super().__init__(*weights)
        self.weight_hr = weight_hr
        self.output_size, self.cell_size = self.weight_hh.shape[1], self.weight_hh.shape[0] // 4
        self.state_size = self.output_size + self.cell_size
        self.dense_rows = 2 * self.cell_size

    def _gates(self, states: Tensor, drive: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of ``i``, ``f``, ``g`` and ``o``, then ``c`` and ``c'``."""
        hidden, cell = self._parts(states)
        i, f, g, o = (drive + self._recur(hidden)).chunk(4, -1)
        return i, f, g, o, cell, f.sigmoid() * cell + i.sigmoid() * g.tanh()

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = states.split((self.output_size, self.cell_size), -1)
        return hidden, cell

    def _project(self, u: Tensor) -> Tensor:
        return u if self.weight_hr is None else F.linear(u, self.weight_hr.to(u.dtype))

    def _advance(self, state: Tensor, drive: Tensor) -> Tensor:
        *_, o, _, cell = self._gates(state, drive)
        return torch.cat((self._project(o.sigmoid() * cell.tanh()), cell), -1)

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o, cell, next_cell = self._gates(states, self._drive(inputs))
        through_cell = g.tanh() * _sigmoid_slope(i), cell * _sigmoid_slope(f), i.sigmoid() * _tanh_slope(g)
        through_output = next_cell.tanh() * _sigmoid_slope(o)
        return *through_cell, through_output, f.sigmoid(), o.sigmoid() * _tanh_slope(next_cell)

    def _form(self, dense: Tensor, weight: Tensor, *factors: Tensor) -> None:
        *through_cell, through_output, _, _ = factors
        rows = 3 * self.cell_size
        through_hidden, to_cell = dense.chunk(2, -2)
        _scale_rows(through_hidden, weight[rows:], through_output)
        _scale_rows(to_cell, weight[:rows], *through_cell)

    def _apply(self, vectors: Tensor, buffers: Iterator[Tensor], dense: Tensor, *factors: Tensor) -> Tensor:
        forgets, exposures = (factor.unsqueeze(-2) for factor in factors[-2:])
        for transposed, forget, expose in zip(dense.mT, forgets, exposures, strict=True):
            hidden, cell = self._parts(vectors)
            u, next_cell = (vectors := torch.bmm(hidden, transposed, out=next(buffers))).chunk(2, -1)
            next_cell.addcmul_(forget, cell)
            u.addcmul_(expose, next_cell)
            if self.weight_hr is not None:
                vectors = torch.cat((self._project(u), next_cell), -1)
        return vectors

    def output(self, states: Tensor) -> Tensor:
        return states[..., : self.output_size]
