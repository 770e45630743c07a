"""Compare what a map gives with what a layer returned."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["difference", "nudged", "slack", "tolerance"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 4e-2}


def tolerance(*dtypes: torch.dtype) -> float:
    """Return the largest relative difference that rounding explains, in the coarsest of some dtypes."""
    return max(_TOLERANCES.get(dtype.to_real() if dtype.is_complex else dtype, 0.0) for dtype in dtypes)


def difference(again: list[Any], returned: list[Any], slack: list[Any] | None = None) -> str | None:
    """Return how the leaves of a second run differ from those of the first; None if rounding explains it.

    Args:
        again: the leaves of the second run.
        returned: the leaves of the first run.
        slack: for each leaf how much further it may be off, see :func:`slack`.
    """
    for index, (new, old) in enumerate(zip(again, returned, strict=True)):
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            continue
        if new.shape != old.shape:
            return f"result {index} has shape {tuple(new.shape)}, and {tuple(old.shape)} was returned"
        if old.numel() == 0 or not (old.is_floating_point() or old.is_complex()):
            continue
        if _is_close(new, old):
            continue
        known = old.isfinite() & new.isfinite()
        if not torch.equal(old.isfinite(), new.isfinite()):
            return f"result {index} is finite in other places than what was returned"
        if not known.any():
            continue
        error, scale = (new[known] - old[known]).abs(), old[known].abs().max()
        allowed = tolerance(old.dtype, new.dtype) * (1 + scale)
        if slack is not None:
            allowed = allowed + slack[index].expand_as(new)[known]
        if (error > allowed).any():
            return f"result {index} is off by up to {float(error.max()):.2g}, and up to {float(scale):.2g} large"
    return None


def nudged(values: Any, size: float) -> Any:
    """Return slightly other numbers, by ``size`` times their rounding error; what holds none as it is."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        return values
    nudge = size * torch.finfo(values.dtype).eps
    return values * (1 + nudge) + nudge


def slack(other: Tensor, again: Tensor, time_axis: int | None) -> Tensor:
    """Return how far rounding errors may have grown, by a run from slightly other arguments.

    A chaotic network forgets its digits: from there on nothing can be compared.

    Args:
        other: the results from slightly other arguments, ``(..., output)``.
        again: the results.
        time_axis: the axis of time; None where there is none.
    """
    largest = (other - again).abs().nan_to_num(torch.inf).amax(-1, keepdim=True)
    return 10 * (largest if time_axis is None else largest.cummax(time_axis).values)


def _is_close(new: Tensor, old: Tensor) -> bool:
    """Return whether two finite tensors agree: what is not finite makes the largest number so, and is looked at."""
    error, scale = (new - old).abs().max(), old.abs().max()
    return bool(error <= tolerance(old.dtype, new.dtype) * (1 + scale)) and bool(scale.isfinite())
