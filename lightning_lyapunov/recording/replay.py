"""Compare what a map gives with what a layer returned."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["difference", "tolerance"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 4e-2}


def tolerance(*dtypes: torch.dtype) -> float:
    """Return the largest relative difference that rounding explains, in the coarsest of some dtypes."""
    return max(_TOLERANCES.get(dtype.to_real() if dtype.is_complex else dtype, 0.0) for dtype in dtypes)


def difference(again: list[Any], returned: list[Any], sensitivity: list[Any] | None = None) -> str | None:
    """Return how the leaves of a second run differ from those of the first; None if rounding explains it.

    Args:
        again: the leaves of the second run.
        returned: the leaves of the first run.
        sensitivity: the leaves of a third run from slightly other arguments. Where these differ, rounding errors have
            grown as well: a chaotic network forgets its digits.
    """
    for index, (new, old) in enumerate(zip(again, returned, strict=True)):
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            continue
        if new.shape != old.shape:
            return f"result {index} has shape {tuple(new.shape)}, and {tuple(old.shape)} was returned"
        if old.numel() == 0 or not (old.is_floating_point() or old.is_complex()):
            continue
        known = old.isfinite() & new.isfinite()
        if not torch.equal(old.isfinite(), new.isfinite()):
            return f"result {index} is finite in other places than what was returned"
        if not known.any():
            continue
        error, scale = (new[known] - old[known]).abs(), old[known].abs().max()
        allowed = tolerance(old.dtype, new.dtype) * (1 + scale)
        if sensitivity is not None:
            allowed = allowed + 10 * (sensitivity[index][known] - new[known]).abs().nan_to_num(torch.inf)
        if (error > allowed).any():
            return f"result {index} is off by up to {float(error.max()):.2g}, and up to {float(scale):.2g} large"
    return None
