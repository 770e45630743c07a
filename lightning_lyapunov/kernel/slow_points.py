r"""Minimise the speed of a step, from many states at once, by Levenberg and Marquardt's method.

``q(h) = |F(h) - h|^2 / 2`` is a sum of squares: with ``A = dF/dh - 1`` and ``r = F(h) - h``, a step is the ``d`` of
``(A^T A + mu 1) d = -A^T r``. Near a regular fixed point it is Newton's; where ``A`` is singular, as along a line of
fixed points, the damping ``mu`` keeps it short. The matrix is positive definite, so that Cholesky's method solves it.
Damping as in Nielsen, Damping Parameter in Marquardt's Method (IMM-REP-1999-05).
"""

import math

import torch
from torch import Tensor

from lightning_lyapunov.kernel.recurrence import Recurrence

__all__ = ["slow_points", "state_jacobians"]

_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-15, 1e15


def slow_points(recurrence: Recurrence, inputs: Tensor, states: Tensor, *, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return a minimum of the speed near each state, ``(batch, state_size)``, and the speed there, ``(batch,)``.

    No step makes a point faster. Those that are not finite stay as they are, with an infinite speed.

    Args:
        recurrence: the step.
        inputs: its constant input, ``(batch, ...)``.
        states: where to start, ``(batch, state_size)``.
        num_steps: the most steps of a point.
    """
    states = states.clone()
    speeds = _velocity(recurrence, inputs, states).norm(dim=-1).nan_to_num(nan=math.inf)
    active = (speeds.isfinite() & (speeds > 0)).nonzero().squeeze(-1)
    damping, factor = torch.full_like(speeds, _FIRST_DAMPING), torch.full_like(speeds, 2.0)
    for _ in range(num_steps):
        if not len(active):
            break
        some, here = inputs[active], states[active]
        move, expected = _step(recurrence, some, here, damping[active])
        tried = here + move
        tried_speeds = _velocity(recurrence, some, tried).norm(dim=-1).nan_to_num(nan=math.inf)
        gain = (speeds[active].square() - tried_speeds.square()) / expected
        better = tried_speeds < speeds[active]
        states[active[better]], speeds[active[better]] = tried[better], tried_speeds[better]
        lower = (1 - (2 * gain - 1) ** 3).clamp(1 / 3, 1)
        damping[active] *= lower.where(better, factor[active])
        factor[active] = torch.where(better, 2.0, 2 * factor[active])
        damping.clamp_(min=_LEAST_DAMPING)
        still = move.norm(dim=-1) <= 1e-15 * (1 + here.norm(dim=-1))
        active = active[(speeds[active] > 0) & (damping[active] < _MOST_DAMPING) & ~still]
    return states, speeds


def state_jacobians(recurrence: Recurrence, inputs: Tensor, states: Tensor) -> Tensor:
    """Return the Jacobian of the step at each state, ``(batch, state_size, state_size)``."""
    if not len(states):
        return states.new_zeros(0, states.shape[-1], states.shape[-1])
    identity = torch.eye(states.shape[-1], dtype=states.dtype, device=states.device).expand(len(states), -1, -1)
    return recurrence.push_forward(recurrence.linearise(states.unsqueeze(0), inputs.unsqueeze(0)), identity)


def _velocity(recurrence: Recurrence, inputs: Tensor, states: Tensor) -> Tensor:
    return recurrence.step(states, inputs) - states


def _step(recurrence: Recurrence, inputs: Tensor, states: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return the damped step from each state, and by how much it should lower the squared speed."""
    velocity = _velocity(recurrence, inputs, states)
    matrices = state_jacobians(recurrence, inputs, states)
    matrices.diagonal(dim1=-2, dim2=-1).sub_(1)
    gradient = (matrices.mT @ velocity.unsqueeze(-1)).squeeze(-1)
    normal = matrices.mT @ matrices
    scale = damping * normal.diagonal(dim1=-2, dim2=-1).amax(-1)
    normal.diagonal(dim1=-2, dim2=-1).add_(scale.unsqueeze(-1))
    factor, failures = torch.linalg.cholesky_ex(normal)
    move = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    move = move.where((failures == 0).unsqueeze(-1) & move.isfinite(), 0)
    expected = (move * (scale.unsqueeze(-1) * move - gradient)).sum(-1)
    return move, expected.clamp(min=torch.finfo(expected.dtype).tiny)
