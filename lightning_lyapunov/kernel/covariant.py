r"""Covariant Lyapunov vectors: forwards with a frame, backwards with its triangular factors.

Ginelli, Poggi, Turchi, Chate, Livi & Politi, Characterizing Dynamics with Covariant Lyapunov Vectors (PRL 99, 130601,
2007): with ``J_t Q_{t-1} = Q_t R_t``, the vectors are ``V_t = Q_t C_t``, where ``C_{t-1}`` is ``R_t^{-1} C_t`` with
columns of length one. Backwards in time, any upper triangular ``C`` approaches the one of the covariant vectors.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lyapunov.kernel.orthonormalise import orthonormalise_householder
from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR, generic_frame
from lightning_lyapunov.kernel.recurrence import Recurrence

__all__ = ["covariant_stretch"]

# Elements of the frames of a block that are small enough not to be computed twice.
_SMALL_ELEMENTS = 2**21
# The smallest over the largest entry of a factor, up to where plain QR has all digits but three.
_WELL_CONDITIONED = 1e-3


def covariant_stretch(
    recurrence: Recurrence,
    inputs: Tensor,
    state: Tensor,
    lengths: Tensor,
    *,
    num_exponents: int,
    warmup: int,
    cooldown: int,
) -> tuple[Tensor, Tensor]:
    """Return the covariant vectors before each step of the middle stretch, and their growth in it.

    What is carried is kept at the start of each block, and the frames of a block are computed again on the way back.

    Args:
        recurrence: the recurrence to follow.
        inputs: ``(time, batch, input)``.
        state: the state before the first step, ``(batch, state_size)``.
        lengths: the steps of each sequence, ``(batch,)``, on the CPU; what follows them is not read.
        num_exponents: the number of vectors.
        warmup: steps before the middle stretch.
        cooldown: steps after it.

    Returns:
        Vectors, ``(time, batch, state_size, num_exponents)``, and growth rates, ``(time, batch, num_exponents)``. NaN
        after the end of a shorter sequence, and for one that is not finite.
    """
    total = int(lengths.max())
    running = (torch.arange(total, device="cpu").unsqueeze(-1) < lengths).to(state.device)
    carried = _Carried.start(recurrence, state, num_exponents)
    steps = _block_steps(total, carried.frame.numel())
    blocks, kept = list(zip(inputs[:total].split(steps), running.split(steps), strict=True)), []
    for block in blocks:
        kept.append(carried)
        *factorised, carried = _factorise(recurrence, *block, carried)
    vectors = carried.frame.new_full((total - warmup - cooldown, *carried.frame.shape), math.nan)
    rates = vectors.new_full(vectors.shape[:2] + vectors.shape[3:], math.nan)
    coefficients = torch.eye(num_exponents, dtype=rates.dtype, device=rates.device).expand(len(state), -1, -1)
    for number in reversed(range(warmup // steps, len(blocks))):
        if number < len(blocks) - 1:
            *factorised, _ = _factorise(recurrence, *blocks[number], kept[number])
        for step, (frame, factor) in reversed(list(enumerate(zip(*factorised, strict=True), number * steps - warmup))):
            coefficients, grown = _pull_back(factor, coefficients)
            if 0 <= step < len(rates):
                vectors[step], rates[step] = frame @ coefficients, grown
    inside = running[warmup + cooldown :].unsqueeze(-1) & carried.finite.unsqueeze(-1)
    vectors.masked_fill_(~carried.alive.unsqueeze(-2), 0).masked_fill_(~inside.unsqueeze(-1), math.nan)
    return vectors, rates.masked_fill_(~carried.alive, EXPONENT_FLOOR).masked_fill_(~inside, math.nan)


def _block_steps(total: int, frame_elements: int) -> int:
    """Return the steps of a block: as many as there are blocks, to keep least of both; or as many as are small."""
    return max(math.isqrt(total - 1) + 1, min(total, _SMALL_ELEMENTS // frame_elements))


class _Carried(NamedTuple):
    """A state and a frame along sequences.

    Attributes:
        state: ``(batch, state_size)``.
        frame: orthonormal tangent vectors, ``(batch, state_size, num_exponents)``.
        alive: the directions that have not been wiped out, ``(batch, num_exponents)``.
        finite: the sequences whose state and frame are finite, ``(batch,)``.
    """

    state: Tensor
    frame: Tensor
    alive: Tensor
    finite: Tensor

    @staticmethod
    def start(recurrence: Recurrence, state: Tensor, num_exponents: int) -> "_Carried":
        frame = generic_frame(recurrence.state_size, num_exponents).to(state.device, widest_dtype(state.device))
        alive = torch.ones(len(state), num_exponents, dtype=torch.bool, device=state.device)
        return _Carried(state, frame.expand(len(state), -1, -1), alive, alive[:, 0])


def _factorise(
    recurrence: Recurrence, inputs: Tensor, running: Tensor, carried: _Carried
) -> tuple[list[Tensor], list[Tensor], _Carried]:
    """Return the frame before each step and its triangular factor, and what is carried on after them."""
    states, linearised = recurrence.linearised_trajectory(inputs, carried.state)
    maps = recurrence.step_maps(linearised, carried.frame.shape[-1])
    frames, factors = [], []
    for push, state, goes_on in zip(maps, states, running, strict=True):
        frames.append(carried.frame)
        pushed = push(carried.frame)
        pushed = pushed.where(goes_on[:, None, None], carried.frame.to(pushed.dtype))
        factor, carried = _next(pushed, state, goes_on, carried)
        factors.append(factor)
    return frames, factors, carried


def _next(pushed: Tensor, state: Tensor, goes_on: Tensor, carried: _Carried) -> tuple[Tensor, _Carried]:
    """Return the triangular factor of a step, with a positive diagonal, and the next frame.

    The rows and columns of what is dead, and the factor of a sequence that has ended, are those of the identity.
    """
    finite = carried.finite & (state.isfinite().all(-1) | ~goes_on)
    if finite.all() and carried.alive.all() and pushed.dtype == carried.frame.dtype:
        frame, factor = torch.linalg.qr(pushed)
        sizes = factor.diagonal(dim1=-2, dim2=-1).abs()
        if (sizes.amin(-1) > _WELL_CONDITIONED * factor.abs().amax((-2, -1))).all():
            signs = factor.diagonal(dim1=-2, dim2=-1).sign()
            return factor * signs.unsqueeze(-1), _Carried(state, frame * signs.unsqueeze(-2), carried.alive, finite)
    living = carried.alive & finite.unsqueeze(-1)
    frame, growth, _, alive, finite_vectors = orthonormalise_householder(pushed, living)
    finite = finite & (finite_vectors | ~goes_on)
    factor = (frame.mT @ pushed.to(frame.dtype)).triu()
    signs = factor.diagonal(dim1=-2, dim2=-1).sign().masked_fill(~alive, 1)
    kept = alive & goes_on.unsqueeze(-1)
    factor = (factor * signs.unsqueeze(-1)).where(kept.unsqueeze(-1) & kept.unsqueeze(-2), 0)
    factor.diagonal(dim1=-2, dim2=-1).copy_(growth.exp().where(kept, 1))
    alive = alive.where(goes_on.unsqueeze(-1), carried.alive)
    return factor, _Carried(state, frame * signs.unsqueeze(-2), alive, finite)


def _pull_back(factor: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients before a step, ``(batch, k, k)``, and the growth of each vector in it, ``(batch, k)``."""
    scale = factor.abs().amax((-2, -1), keepdim=True)  # keeps the squares of the lengths finite
    solved = torch.linalg.solve_triangular(factor / scale, coefficients, upper=True)
    lengths = solved.norm(dim=-2)
    return solved / lengths.unsqueeze(-2), scale.squeeze(-1).log() - lengths.log()
