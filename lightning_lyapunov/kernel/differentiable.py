r"""Growth rates with a graph: what :mod:`~lightning_lyapunov.kernel.propagation` sums, plainly, to be differentiated.

The derivative goes through the trajectory, the Jacobians and the frame of every step, as in Engelken, Gradient Flossing
(NeurIPS 2023, arXiv 2312.17306). That of ``V = Q R`` is the one of :func:`torch.linalg.qr`, by triangular solves
(Seeger et al., arXiv 1710.08717). All is float64 where the device has it, and the graph keeps every frame.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lyapunov.kernel.orthonormalise import decompose, orthonormalise_householder
from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.kernel.propagation import Growth, generic_frame
from lightning_lyapunov.kernel.recurrence import Recurrence

__all__ = ["differentiable_growth"]

# Log-conditions of a stretch: what "auto" aims at, and up to where float64 resolves a derivative. Measured on LSTMs by
# finite differences: errors below 1e-6 up to 16 nats, of 1e-3 at 20, of all digits at 30.
_TARGET_LOG_CONDITION, _MAX_LOG_CONDITION = 8.0, 16.0
_MAX_INTERVAL = 64


def differentiable_growth(
    recurrence: Recurrence,
    inputs: Tensor,
    state: Tensor,
    lengths: Tensor,
    *,
    num_exponents: int,
    warmup: int = 0,
    qr_interval: int | Literal["auto"] = "auto",
) -> Growth:
    """Sum the growth rates of a frame along each sequence, with a graph.

    A direction that is wiped out is a constant, minus infinity: its gradient is zero. So is that of a direction which
    one step shrinks by more than e^16 beside the fastest, and of those behind it: float64 does not resolve it.

    Args:
        recurrence: the recurrence to follow.
        inputs: ``(time, batch, input)``.
        state: the state before the first step, ``(batch, state_size)``.
        lengths: the steps of each sequence, ``(batch,)``, on the CPU; what follows them is not read.
        num_exponents: the number of tangent vectors carried.
        warmup: steps that move the state and the frame and are not averaged.
        qr_interval: steps between two re-orthonormalisations; fewer where float64 does not resolve them.

    Raises:
        ValueError: if the network is not finite: it has no derivative.
    """
    lengths, order = lengths.sort(descending=True, stable=True)
    inputs, state = inputs[:, order], state[order]
    carried = _Carried.start(recurrence, len(state), num_exponents, state.device)
    total = carried.frame.new_zeros(len(state), num_exponents)
    interval = _Interval(qr_interval)
    for start, stop in pairwise(sorted({0, warmup, *lengths.tolist()})):
        running = int((lengths > start).sum())
        state, carried = state[:running], _Carried(*(part[:running] for part in carried))
        states = _trajectory(recurrence, inputs[start:stop, :running], state)
        linearised = recurrence.linearise(states[:-1], inputs[start:stop, :running])
        grown, carried = _advance(recurrence, linearised, carried, interval)
        state = states[-1]
        if start >= warmup:
            grown = total[:running] + grown
            total = torch.cat((grown.where(carried.resolved, grown.detach()), total[running:]))
    original = order.argsort()
    return Growth(total[original].unsqueeze(0), (lengths - warmup)[original].unsqueeze(0).to(total.device))


class _Carried(NamedTuple):
    """A frame along a trajectory.

    Attributes:
        frame: orthonormal tangent vectors, ``(batch, state_size, num_exponents)``.
        alive: the directions that have not been wiped out, ``(batch, num_exponents)``.
        resolved: those whose derivatives float64 has resolved so far, ``(batch, num_exponents)``.
    """

    frame: Tensor
    alive: Tensor
    resolved: Tensor

    @staticmethod
    def start(recurrence: Recurrence, batch: int, num_exponents: int, device: torch.device) -> "_Carried":
        frame = generic_frame(recurrence.state_size, num_exponents).to(device, widest_dtype(device))
        alive = torch.ones(batch, num_exponents, dtype=torch.bool, device=device)
        return _Carried(frame.expand(batch, -1, -1), alive, alive)


class _Interval:
    """The steps until the next factorisation: as many as asked for, or, for "auto", as conditioning allows."""

    def __init__(self, qr_interval: int | Literal["auto"]) -> None:
        self._fixed = None if qr_interval == "auto" else int(qr_interval)
        self.steps = self._fixed or 1

    def rejects(self, steps: int, condition: float) -> bool:
        """Return whether a stretch must be repeated in a shorter one; set the length of the next stretch."""
        if steps > 1 and condition > _MAX_LOG_CONDITION:
            self.steps = max(1, steps // 2)
            return True
        allowed = int(steps * _TARGET_LOG_CONDITION / max(condition, _TARGET_LOG_CONDITION / _MAX_INTERVAL))
        self.steps = self._fixed or min(max(allowed, 1), 2 * steps, _MAX_INTERVAL)
        return False


def _trajectory(recurrence: Recurrence, inputs: Tensor, state: Tensor) -> Tensor:
    """Return the first state and those after each step, ``(time + 1, batch, state_size)``."""
    states = [state]
    for step_inputs in inputs:
        states.append(recurrence.step(states[-1], step_inputs).clone())  # a callable may reuse its memory
    trajectory = torch.stack(states)
    _check_finite(trajectory, "state")
    return trajectory


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"`dynamics` has no derivative along `inputs`: its {what} is not finite. Find where it overflows with "
            "`differentiable=False`, whose spectrum is NaN there."
        )


def _advance(
    recurrence: Recurrence, linearised: Sequence[Tensor], carried: _Carried, interval: _Interval
) -> tuple[Tensor, _Carried]:
    """Push the frame along all steps; return each direction's growth, ``(batch, num_exponents)``, and the frame."""
    growth, done, total = carried.frame.new_zeros(carried.alive.shape), 0, len(linearised[0])
    while done < total:
        steps = min(interval.steps, total - done)
        vectors = carried.frame
        for step in range(done, done + steps):
            vectors = recurrence.push_with_graph([part[step] for part in linearised], vectors)
        _check_finite(vectors, "tangent")
        grown, condition, after = _orthonormalise(vectors.to(growth.dtype), carried)
        if interval.rejects(steps, condition):
            continue
        growth, carried, done = growth + grown, after, done + steps
    return growth.masked_fill(~carried.alive, -math.inf), carried


def _orthonormalise(vectors: Tensor, carried: _Carried) -> tuple[Tensor, float, _Carried]:
    """Return the growth of each direction, the log-condition of the vectors, and the next frame."""
    _, alive, resolved = carried
    if resolved.all() and alive.all():
        frame, r_diagonal, dead = decompose(vectors)
        growth, condition = r_diagonal.log(), _condition(vectors, r_diagonal.detach().log(), alive)
        if condition <= _MAX_LOG_CONDITION and not dead.any():
            return growth, condition, _Carried(frame, alive, resolved)
    with torch.no_grad():
        exact, constant_growth, _, alive, _ = orthonormalise_householder(vectors, alive)
        condition = _condition(vectors, constant_growth, alive)
        # Those behind one that is not resolved are orthogonal to it: they are no better.
        unresolved = alive & (_distances(vectors, constant_growth) > _MAX_LOG_CONDITION)
        resolved = resolved & (unresolved.cumsum(-1) == 0)
    frame, growth = _with_constants(vectors, exact, alive & resolved)
    return growth.where(alive & resolved, constant_growth), condition, _Carried(frame, alive, resolved)


def _with_constants(vectors: Tensor, exact: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next frame and the growth, differentiable in the directions that are kept, others as they are known.

    A triangular factor with zeros on its diagonal has no derivative. Behind those that are kept, constants that are
    orthogonal to them take the place of the others.
    """
    with torch.no_grad():
        # In the scale of the smallest row of those that are kept, so that it leaves the order of the rows alone.
        sizes = vectors.masked_fill(~kept.unsqueeze(-2), 0).norm(dim=-1)
        scale = sizes.where(sizes > 0, math.inf).amin(-1).nan_to_num(posinf=1.0)
        constants = exact * scale[:, None, None]
        order = (~kept).byte().argsort(dim=-1, stable=True).unsqueeze(-2)
    filled = vectors.where(kept.unsqueeze(-2), constants)
    frame, r_diagonal, _ = decompose(filled.gather(-1, order.expand_as(filled)))
    back = order.argsort(-1)
    return frame.gather(-1, back.expand_as(frame)), r_diagonal.gather(-1, back.squeeze(-2)).log()


@torch.no_grad()
def _distances(vectors: Tensor, growth: Tensor) -> Tensor:
    """Return the log-condition of each direction: how far its growth is below the length of the longest vector."""
    return vectors.norm(dim=-2).amax(-1, keepdim=True).log() - growth


def _condition(vectors: Tensor, growth: Tensor, alive: Tensor) -> float:
    return float(_distances(vectors, growth).masked_fill(~alive, 0).amax())
