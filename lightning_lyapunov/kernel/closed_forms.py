"""The recurrent cells of PyTorch and their Jacobians in closed form.

The closed forms are the derivatives of the cells as PyTorch defines them (see the formulas in the documentation of
:class:`torch.nn.RNN`, :class:`torch.nn.GRU` and :class:`torch.nn.LSTM`). They read plain weight tensors, so they work
on every device, under parametrisations and pruning, and where a fused kernel has no forward derivative.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lyapunov.kernel.recurrence import MAX_JACOBIAN_ELEMENTS, Recurrence

__all__ = ["GRURecurrence", "LSTMRecurrence", "RNNRecurrence"]

# Elements of the Jacobians of a step, for each tangent vector, from which on they are not formed for a few vectors.
_LARGE_JACOBIANS = 2**17


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
        self._casts: dict[torch.dtype, Tensor] = {}

    @abstractmethod
    def _advance(self, state: Tensor, drive: Tensor) -> Tensor:
        """Return the next state, given the state and what the input adds to the gates."""

    def _drive(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight_ih, self.bias_ih)

    def _recur(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight_hh, self.bias_hh)

    def _applied(self, vectors: Tensor) -> Tensor:
        """Return the product of the recurrent weight with each of the vectors, ``(batch, num_exponents, hidden)``.

        As one matrix: torch may copy the weight for each sequence of vectors that do not lie side by side.
        """
        if (dtype := vectors.dtype) not in self._casts:
            self._casts[dtype] = self.weight_hh.to(dtype)
        return F.linear(vectors.reshape(-1, vectors.shape[-1]), self._casts[dtype]).unflatten(0, vectors.shape[:-1])

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
    return x.sigmoid() * (-x).sigmoid()


def _tanh_slope(x: Tensor) -> Tensor:
    """Return ``tanh'(x) = sech^2(x)``; ``1 - tanh(x)^2`` would lose every digit of it from ``|x| = 19`` on."""
    return 4 * _sigmoid_slope(2 * x)


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
        vectors = frame.mT
        for slope in linearised[0].to(frame.dtype).unsqueeze(-2):
            vectors = self._applied(vectors).mul_(slope)
        return vectors.mT

    def push_with_graph(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        (slope,) = linearised
        return (F.linear(frame.mT, self.weight_hh) * slope.unsqueeze(-2)).mT


class _GatedRecurrence(_ClosedForm):
    """A cell with gates: the dense part of its Jacobian is a sum of blocks of the weight with their rows scaled.

    Forming that sum is cheaper than applying each block to the frame, as long as it is made where the last one was. It
    is not for a few vectors and Jacobians that are too large for the cache: to form them takes as long as to use them.
    """

    dense_rows: int
    few_vectors: int
    _workspace: Tensor | None = None

    @abstractmethod
    def _form(self, dense: Tensor, weight: Tensor, *factors: Tensor) -> None:
        """Write the dense part of the Jacobians into ``dense``, ``(time, batch, dense_rows, hidden)``."""

    @abstractmethod
    def _apply(self, vectors: Tensor, buffers: Iterator[Tensor], dense: Tensor, *factors: Tensor) -> Tensor:
        """Return the tangent vectors in the rows of ``vectors`` after all steps of ``dense``.

        Each next one of ``buffers``, ``(batch, num_exponents, dense_rows)``, can take the product of a step.
        """

    @abstractmethod
    def _push(self, vectors: Tensor, *factors: Tensor) -> Tensor:
        """Return the tangent vectors in the rows of ``vectors`` after one step, without its Jacobian."""

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        factors = [factor.to(frame.dtype) for factor in linearised]
        shape = frame.shape[0], self.dense_rows, self.weight_hh.shape[1]
        count = frame.shape[-1]
        if count <= self.few_vectors and math.prod(shape) >= _LARGE_JACOBIANS * count:
            vectors = frame.mT
            for step_factors in zip(*(factor.unsqueeze(-2) for factor in factors), strict=True):
                vectors = self._push(vectors, *step_factors)
            return vectors.mT
        return self._push_formed(factors, frame, shape)

    def _push_formed(self, factors: list[Tensor], frame: Tensor, shape: tuple[int, int, int]) -> Tensor:
        weight = self.weight_hh.to(frame.dtype)
        steps = min(len(factors[0]), max(1, MAX_JACOBIAN_ELEMENTS // math.prod(shape)))
        workspace = self._memory(steps, *shape, like=frame)
        # As rows, so that each vector lies side by side in memory.
        vectors, buffers = frame.mT, cycle(frame.new_empty(2, len(frame), frame.shape[-1], self.dense_rows))
        for some_factors in zip(*(factor.split(steps) for factor in factors), strict=True):
            dense = workspace[: len(some_factors[0])]
            self._form(dense, weight, *some_factors)
            vectors = self._apply(vectors, buffers, dense, *some_factors)
        return vectors.mT

    def _memory(self, *shape: int, like: Tensor) -> Tensor:
        """Return memory for Jacobians: what was used last, because the first touch of a page takes the longest."""
        size = math.prod(shape)
        if self._workspace is None or self._workspace.dtype != like.dtype or len(self._workspace) < size:
            self._workspace = like.new_empty(size)
        return self._workspace[:size].view(shape)


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
    few_vectors = 16

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
        shut = (-rz).sigmoid()
        (r, z), (r_slope, z_slope) = gates.chunk(2, -1), (gates * shut).chunk(2, -1)
        through_n = _tanh_slope(n) * shut.chunk(2, -1)[1]
        return through_n * q * r_slope, (states - n.tanh()) * z_slope, through_n * r, z

    def push_with_graph(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        through_r, through_z, through_n, keep = (factor.unsqueeze(-2) for factor in linearised)
        vectors = frame.mT
        r, z, n = F.linear(vectors, self.weight_hh).chunk(3, -1)
        return (through_r * r + through_z * z + through_n * n + keep * vectors).mT

    def _push(self, vectors: Tensor, *factors: Tensor) -> Tensor:
        *through, keep = factors
        pushed = vectors * keep
        for factor, part in zip(through, self._applied(vectors).chunk(3, -1), strict=True):
            pushed.addcmul_(factor, part)
        return pushed

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

    few_vectors = 32

    def __init__(self, *weights: Tensor | None, weight_hr: Tensor | None = None) -> None:
        super().__init__(*weights)
        self.weight_hr = weight_hr
        self.output_size, self.cell_size = self.weight_hh.shape[1], self.weight_hh.shape[0] // 4
        self.state_size = self.output_size + self.cell_size
        self.dense_rows = 2 * self.cell_size

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = states.split((self.output_size, self.cell_size), -1)
        return hidden, cell

    def _project(self, u: Tensor) -> Tensor:
        return u if self.weight_hr is None else F.linear(u, self.weight_hr.to(u.dtype))

    def _advance(self, state: Tensor, drive: Tensor) -> Tensor:
        hidden, cell = self._parts(state)
        return self._next_state(drive + self._recur(hidden), cell)

    def _next_state(self, arguments: Tensor, cell: Tensor) -> Tensor:
        """Return the next state, given the arguments of ``i``, ``f``, ``g`` and ``o`` side by side, and ``c``."""
        next_cell = self._next_cell(arguments, cell)
        return torch.cat((self._project(arguments.chunk(4, -1)[3].sigmoid() * next_cell.tanh()), next_cell), -1)

    @staticmethod
    def _next_cell(arguments: Tensor, cell: Tensor) -> Tensor:
        i, f, g, _ = arguments.chunk(4, -1)
        return f.sigmoid() * cell + i.sigmoid() * g.tanh()

    def linearised_trajectory(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # The products of a trajectory, one step after the other, take a sixth of a measurement: they are kept.
        path, arguments = [state], []
        for drive in self._drive(inputs):
            hidden, cell = self._parts(path[-1])
            arguments.append(drive + self._recur(hidden))
            path.append(self._next_state(arguments[-1], cell))
        states = torch.stack(path)
        _, cells = self._parts(states)
        return states[1:], self._factors(torch.stack(arguments), cells[:-1], cells[1:])

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        hidden, cell = self._parts(states)
        arguments = self._drive(inputs) + self._recur(hidden)
        return self._factors(arguments, cell, self._next_cell(arguments, cell))

    @staticmethod
    def _factors(arguments: Tensor, cell: Tensor, next_cell: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = arguments.chunk(4, -1)
        i_gate, f_gate, o_gate = i.sigmoid(), f.sigmoid(), o.sigmoid()
        # As in `_sigmoid_slope`, with the gates at hand.
        i_slope, f_slope, o_slope = i_gate * (-i).sigmoid(), f_gate * (-f).sigmoid(), o_gate * (-o).sigmoid()
        through_cell = g.tanh() * i_slope, cell * f_slope, i_gate * _tanh_slope(g)
        return *through_cell, next_cell.tanh() * o_slope, f_gate, o_gate * _tanh_slope(next_cell)

    def _push(self, vectors: Tensor, *factors: Tensor) -> Tensor:
        *through_cell, through_output, forget, expose = factors
        hidden, cell = self._parts(vectors)
        *to_cell, to_output = self._applied(hidden).chunk(4, -1)
        pushed = vectors.new_empty(*vectors.shape[:-1], self.dense_rows)
        u, next_cell = pushed.chunk(2, -1)
        torch.mul(forget, cell, out=next_cell)
        for factor, part in zip(through_cell, to_cell, strict=True):
            next_cell.addcmul_(factor, part)
        torch.mul(expose, next_cell, out=u).addcmul_(through_output, to_output)
        return pushed if self.weight_hr is None else torch.cat((self._project(u), next_cell), -1)

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

    def push_with_graph(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        *through_cell, through_output, forget, expose = (factor.unsqueeze(-2) for factor in linearised)
        hidden, cell = self._parts(frame.mT)
        *to_cell, to_output = F.linear(hidden, self.weight_hh).chunk(4, -1)
        next_cell = forget * cell
        for factor, part in zip(through_cell, to_cell, strict=True):
            next_cell = next_cell + factor * part
        u = expose * next_cell + through_output * to_output
        return torch.cat((self._project(u), next_cell), -1).mT

    def output(self, states: Tensor) -> Tensor:
        return states[..., : self.output_size]
