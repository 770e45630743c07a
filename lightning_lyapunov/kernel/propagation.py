"""Tangent dynamics: carry a frame along a trajectory, re-orthonormalise it, and sum its growth rates.

The method is that of Benettin, Galgani, Giorgilli & Strelcyn (Meccanica 15, 1980) and Shimada & Nagashima (Prog. Theor.
Phys. 61, 1979), as used for networks by Vogt, Puelma Touzel, Shlizerman & Lajoie (arXiv 2006.14123): with
``J_t Q_{t-1} = Q_t R_t``, the exponents are the averages of ``log R_t[j, j]``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_lyapunov.kernel.interval import IntervalController
from lightning_lyapunov.kernel.orthonormalise import orthonormalise_householder
from lightning_lyapunov.kernel.precision import widest_dtype

__all__ = ["EXPONENT_FLOOR", "FramePropagator", "Growth", "TangentMap", "generic_frame", "log_growth"]

EXPONENT_FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""The exponent reported for a direction that is wiped out (its true exponent is minus infinity): -87.3 nats per step.

A step that multiplies by less than this leaves nothing of a float32 number.
"""

# Steps, and elements of a state, that are linearised at once.
_BLOCK_STEPS, _MAX_BLOCK_ELEMENTS = 64, 2**20


class TangentMap(Protocol):
    """What can step and push a frame: see :class:`lightning_lyapunov.kernel.recurrence.Recurrence`."""

    state_size: int

    def linearised_trajectory(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the states after each step, and what the push forward reads of the steps."""

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        """Return the tangent vectors after all steps."""


class Growth(NamedTuple):
    """The growth of the directions of a frame along each sequence.

    Attributes:
        total: sum of ``log R[j, j]`` over the averaged steps, ``(segments, batch, num_exponents)``, in nats; minus
            infinity for a direction that was wiped out, NaN for a network that is not finite.
        steps: number of steps averaged, ``(segments, batch)``.
    """

    total: Tensor
    steps: Tensor


def generic_frame(state_size: int, num_exponents: int) -> Tensor:
    """Return orthonormal tangent vectors in general position, ``(state_size, num_exponents)``, float64 on the CPU.

    A frame along the axes can miss the fastest direction for ever: from the identity, ``diag(0.5, 0.9, 2)`` and one
    exponent give ln 0.5. The vectors come from a private generator, one by one, so that neither the precision nor the
    number of exponents changes them and the global random state is left alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    columns = [torch.randn(state_size, **options) for _ in range(num_exponents)]
    return torch.linalg.qr(torch.stack(columns, -1)).Q


def log_growth(
    tangent_map: TangentMap,
    inputs: Tensor,
    state: Tensor,
    lengths: Tensor,
    *,
    num_exponents: int,
    warmup: int | Tensor = 0,
    qr_interval: int | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float64,
    segments: int = 1,
) -> Growth:
    """Sum the growth rates of a frame along each sequence.

    The frame is re-orthonormalised every ``qr_interval`` steps. Whatever the interval, a stretch after which a vector
    cannot be told from the faster ones is done again in shorter ones, then in float64, at last by Householder's method.

    Args:
        tangent_map: the recurrence to follow.
        inputs: ``(time, batch, input)``.
        state: the state before the first step, ``(batch, state_size)``.
        lengths: the steps of each sequence, ``(batch,)``, on the CPU; what follows them is not read.
        num_exponents: the number of tangent vectors carried.
        warmup: steps that move the state and the frame and are not averaged, of all sequences or of each, ``(batch,)``
            on the CPU.
        qr_interval: steps between two re-orthonormalisations; ``"auto"`` takes as many as conditioning allows.
        dtype: the least precise dtype for products with the frame, float32 or float64.
        segments: equal parts of each sequence to sum separately, for an error over time.
    """
    lengths, order = lengths.sort(descending=True, stable=True)
    warmups = torch.as_tensor(warmup, device="cpu").expand(len(lengths))[order].clamp(max=lengths)
    # The steps at which the segments of each sequence start and end, (segments + 1, batch).
    parts = torch.arange(segments + 1, device="cpu").unsqueeze(-1)
    edges = warmups + parts * (lengths - warmups) // segments
    controller = IntervalController(qr_interval, dtype, state.device, tangent_map.state_size)
    propagator = FramePropagator(tangent_map, state[order], num_exponents, controller)
    total = propagator.frame.new_zeros(segments, len(lengths), num_exponents, dtype=widest_dtype(state.device))
    inputs = inputs[:, order]
    for start, stop in pairwise(sorted({0, *edges.flatten().tolist(), *lengths.tolist()})):
        running = int((lengths > start).sum())
        propagator.keep(running)
        grown = propagator.advance(inputs[start:stop, :running])
        for segment in range(segments):
            averaged = (edges[segment, :running] <= start) & (start < edges[segment + 1, :running])
            if averaged.any():
                total[segment, :running] += grown.where(averaged.to(grown.device).unsqueeze(-1), 0)
    original = order.argsort()
    return Growth(total[:, original], edges.diff(dim=0)[:, original].to(total.device))


class FramePropagator:
    """A state and a frame of tangent vectors, carried along sequences of equal length.

    Args:
        tangent_map: the recurrence to follow.
        state: the state before the first step, ``(batch, state_size)``.
        num_exponents: the number of tangent vectors.
        controller: decides interval, precision and factorisation.

    Attributes:
        frame: the tangent vectors, ``(batch, state_size, num_exponents)``.
        oblique: whether they are independent only, and not orthogonal.
        alive: the directions that have not been wiped out, ``(batch, num_exponents)``.
        finite: the sequences whose state and frame are finite, ``(batch,)``.
    """

    def __init__(
        self, tangent_map: TangentMap, state: Tensor, num_exponents: int, controller: IntervalController
    ) -> None:
        self.tangent_map, self.state, self.controller = tangent_map, state, controller
        frame = generic_frame(tangent_map.state_size, num_exponents)
        self.frame = frame.to(state.device, controller.current.dtype).expand(len(state), -1, -1)
        self.oblique = False
        self.alive = torch.ones(len(state), num_exponents, dtype=torch.bool, device=state.device)
        self.finite = torch.ones(len(state), dtype=torch.bool, device=state.device)

    def keep(self, running: int) -> None:
        """Go on with the first ``running`` sequences only: the others have ended."""
        self.state, self.frame = self.state[:running], self.frame[:running]
        self.alive, self.finite = self.alive[:running], self.finite[:running]

    def advance(self, inputs: Tensor) -> Tensor:
        """Take the steps of ``inputs`` and return the growth of each direction, ``(batch, num_exponents)``."""
        growth = torch.zeros_like(self.alive, dtype=widest_dtype(self.state.device))
        while len(inputs):
            block, inputs = inputs[: (size := self._block_size())], inputs[size:]
            states, linearised = self.tangent_map.linearised_trajectory(block, self.state)
            while len(states):
                steps, stretch_growth = self._push(linearised)
                self.state = states[steps - 1]
                self.finite = self.finite & self.state.isfinite().all(-1)
                growth += stretch_growth
                states, linearised = states[steps:], tuple(part[steps:] for part in linearised)
                more = len(states) + len(inputs)
                if self.oblique and not (self.controller.current.is_oblique and more):
                    growth += self._orthonormalise(self.frame)[0]
        return growth.masked_fill(~self.alive, -math.inf).masked_fill(~self.finite.unsqueeze(-1), math.nan)

    def _block_size(self) -> int:
        """Return how many steps to linearise at once: as many whole stretches as are small."""
        steps, interval = min(_BLOCK_STEPS, _MAX_BLOCK_ELEMENTS // self.state.numel()), self.controller.interval
        return max(1, steps // interval) * interval

    def _push(self, linearised: Sequence[Tensor]) -> tuple[int, Tensor]:
        """Advance as many steps as conditioning allows; return their number and the growth of each direction."""
        controller = self.controller
        steps = controller.first_try(len(linearised[0]))
        while True:
            current = controller.current
            pushed = self.tangent_map.push_forward([part[:steps] for part in linearised], self.frame.to(current.dtype))
            if pushed.dtype != current.dtype:
                controller.restrict_to(pushed.dtype)
                current = controller.current
            if controller.use_householder:
                growth, log_condition = self._orthonormalise(pushed)
                break
            frame, growth, log_condition = current.factorise(pushed, self._living(), current.accepted(steps))
            if log_condition < math.inf:
                self.frame, self.oblique = frame, current.is_oblique
                break
            steps = controller.retry(steps)
        controller.accept(steps, log_condition, oblique=self.oblique)
        return steps, growth

    def _orthonormalise(self, vectors: Tensor) -> tuple[Tensor, float]:
        """Make the frame by Householder's method, and find what has died; return growth and log-condition."""
        self.frame, growth, log_condition, self.alive, finite = orthonormalise_householder(vectors, self._living())
        self.finite, self.oblique = self.finite & finite, False
        return growth, log_condition

    def _living(self) -> Tensor:
        return self.alive & self.finite.unsqueeze(-1)
