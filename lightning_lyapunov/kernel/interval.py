"""How far a frame goes before it is re-orthonormalised, in which precision, and by which factorisation.

The controller sees only numbers: how many steps were taken, and the log-condition of the vectors after them (see
:mod:`~lightning_lyapunov.kernel.orthonormalise`). It never touches the frame.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lyapunov.kernel.orthonormalise import eliminate, orthonormalise_cholesky
from lightning_lyapunov.kernel.precision import widest_dtype

__all__ = ["Factorisation", "IntervalController"]

# The longest stretch between two re-orthonormalisations that "auto" tries. Beyond it the cost hardly falls further.
_MAX_INTERVAL = 32
# The fewest steps that float32 must be able to take at once: below, float64 is faster where it costs twice as much.
_MIN_INTERVAL = {"cpu": 4}
# Components of a state up to which elimination in float64 is as fast as float32.
_SMALL_STATE = {"cpu": 64}


class Factorisation(NamedTuple):
    """The dtype of the products with a frame, and how the next frame is made of them.

    Attributes:
        dtype: the dtype of the products.
        factorise: as :func:`~lightning_lyapunov.kernel.orthonormalise.orthonormalise_cholesky`.
        target_log_condition: the log-condition that "auto" aims at.
        max_log_condition: the largest that is accepted of several steps; and of one.
    """

    dtype: torch.dtype
    factorise: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]
    target_log_condition: float
    max_log_condition: tuple[float, float]

    def accepted(self, steps: int) -> float:
        """Return the largest log-condition to accept after so many steps."""
        return self.max_log_condition[steps == 1]

    @property
    def is_oblique(self) -> bool:
        """Whether the frames that it makes are not orthogonal."""
        return self.factorise is eliminate


CHOLESKY_FLOAT32 = Factorisation(torch.float32, orthonormalise_cholesky, 6.5, (7.5, 7.5))
ELIMINATION_FLOAT64 = Factorisation(torch.float64, eliminate, 20.0, (24.0, 24.0))
# Where float64 is asked for, to more digits.
EXACT_ELIMINATION_FLOAT64 = Factorisation(torch.float64, eliminate, 10.0, (13.0, 13.0))
# Where the device, or a callable, has no float64.
ONLY_FLOAT32 = Factorisation(torch.float32, orthonormalise_cholesky, 6.5, (7.5, 11.0))
# For the first step: what Cholesky's method resolves in float64.
CHOLESKY_FLOAT64 = Factorisation(torch.float64, orthonormalise_cholesky, 10.0, (11.0, 11.0))


class IntervalController:
    """Choose the interval, the dtype and the factorisation of the next stretch from how the last one went.

    Args:
        qr_interval: steps between two re-orthonormalisations; ``"auto"`` takes as many as conditioning allows.
        dtype: the least precise dtype for the products, float32 or float64.
        device: where they are computed.
        state_size: the number of components of the state.

    Attributes:
        interval: the steps to take at once.
        current: the factorisation of the next stretch.
        use_householder: whether the next frame needs Householder's method, whatever the products.
    """

    def __init__(
        self, qr_interval: int | Literal["auto"], dtype: torch.dtype, device: torch.device, state_size: int
    ) -> None:
        self._adaptive = qr_interval == "auto"
        self._max_interval = _MAX_INTERVAL if qr_interval == "auto" else qr_interval
        self._min_interval = _MIN_INTERVAL.get(device.type, 1) if self._adaptive else 1
        self.interval = 1 if self._adaptive else self._max_interval
        self._candidates = _candidates(dtype, device, state_size)
        # How ill-conditioned one step is decides between two candidates, so that is measured first.
        self.current = CHOLESKY_FLOAT64 if len(self._candidates) > 1 else self._candidates[0]
        self.use_householder = False

    def first_try(self, remaining: int) -> int:
        """Return how many of the remaining steps to take at once: equal stretches, none above the interval."""
        num_stretches = math.ceil(remaining / self.interval)
        return math.ceil(remaining / num_stretches)

    def retry(self, steps: int) -> int:
        """Return how many steps to take instead of ``steps``, whose vectors could not be resolved.

        Half as many; from one on in the most precise dtype, and at last by Householder's method.
        """
        if steps > 1:
            self.interval = steps // 2
            return steps // 2
        if self.current is not self._candidates[-1]:
            self.current = self._candidates[-1]
        else:
            self.use_householder = True
        return steps

    def accept(self, steps: int, log_condition: float, *, oblique: bool) -> None:
        """Plan the next stretch after one of ``steps``, whose frame was oblique or not.

        The vectors of an oblique frame are ill-conditioned before the first step: only a long stretch tells what a
        step adds.
        """
        per_step = max(log_condition / steps, 1e-3)
        preferred, *others = self._candidates
        if others:
            if oblique:
                enough = 2 * steps >= self._max_interval and log_condition <= preferred.target_log_condition
            else:
                enough = self._min_interval * per_step <= preferred.target_log_condition
            self.current = preferred if enough else others[0]
        affordable = max(int(self.current.target_log_condition / per_step), int(self.current.accepted(1) >= per_step))
        self.use_householder = affordable == 0
        max_interval = min(affordable, self._max_interval) if self._adaptive else self._max_interval
        self.interval = 1 if self.use_householder else max(1, min(2 * self.interval, max_interval))

    def restrict_to(self, dtype: torch.dtype) -> None:
        """Use the one dtype that the products come in, because a callable stays in its own."""
        self._candidates = (ONLY_FLOAT32 if dtype == torch.float32 else EXACT_ELIMINATION_FLOAT64,)
        self.current = self._candidates[0]


def _candidates(dtype: torch.dtype, device: torch.device, state_size: int) -> tuple[Factorisation, ...]:
    """Return what to try, in this order, for the dtype that is asked for."""
    if widest_dtype(device) == torch.float32:
        return (ONLY_FLOAT32,)
    if dtype == torch.float64:
        return (EXACT_ELIMINATION_FLOAT64,)
    if state_size <= _SMALL_STATE.get(device.type, 0):
        return (ELIMINATION_FLOAT64,)
    return CHOLESKY_FLOAT32, ELIMINATION_FLOAT64
