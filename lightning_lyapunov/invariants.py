"""Numbers read off a Lyapunov spectrum."""

import torch
from torch import Tensor

__all__ = ["kaplan_yorke_dimension", "kolmogorov_sinai_entropy", "num_positive"]


def kaplan_yorke_dimension(spectrum: Tensor) -> Tensor:
    r"""Return the Kaplan-Yorke (Lyapunov) dimension of a spectrum.

    .. math:: D = j + \frac{\lambda_1 + \dots + \lambda_j}{|\lambda_{j+1}|}

    with the largest ``j`` for which the sum of the first ``j`` exponents is not negative.

    Edge cases:

    - every exponent negative: 0, the state forgets where it started and follows its input;
    - no partial sum negative: the number of exponents given. For a full spectrum this means that volumes do not shrink;
      for a truncated one it is a lower bound, and more exponents are needed to know the dimension;
    - an exponent at the floor, or minus infinity: counts as what it is, a direction in which the set has no extent;
    - NaN anywhere: NaN.

    Args:
        spectrum: exponents in any order, ``(..., num_exponents)``.

    Returns:
        The dimension, between 0 and ``num_exponents``, ``(...)``.

    Raises:
        ValueError: if ``spectrum`` holds no exponents or is not floating point.

    Source: Kaplan & Yorke, Chaotic behavior of multidimensional difference equations (1979).

    Example::

        >>> from torch import tensor
        >>> kaplan_yorke_dimension(tensor([0.9056, 0.0, -14.5722]))
        tensor(2.0621)
    """
    spectrum = _checked(spectrum)
    exponents = spectrum.sort(dim=-1, descending=True).values
    sums = exponents.cumsum(-1)
    whole = (sums >= 0).sum(-1, keepdim=True)
    last = exponents.shape[-1] - 1
    carried = sums.gather(-1, (whole - 1).clamp(min=0)).where(whole > 0, 0)
    fraction = carried / exponents.gather(-1, whole.clamp(max=last)).abs()
    dimension = whole + fraction.where((whole > 0) & (whole <= last), 0)
    return dimension.squeeze(-1).masked_fill(spectrum.isnan().any(-1), torch.nan)


def kolmogorov_sinai_entropy(spectrum: Tensor) -> Tensor:
    r"""Return the sum of the positive exponents, an upper bound of the Kolmogorov-Sinai entropy (Ruelle).

    .. math:: h \le \sum_{\lambda_i > 0} \lambda_i

    Equality is Pesin's identity, for a measure that is smooth along the unstable directions. For a truncated spectrum
    whose exponents are all positive the sum is a lower bound of that over the full one. NaN anywhere gives NaN.

    Args:
        spectrum: exponents in any order, nats per step, ``(..., num_exponents)``.

    Returns:
        The entropy in nats per step, ``(...)``.

    Raises:
        ValueError: if ``spectrum`` holds no exponents or is not floating point.

    Example::

        >>> from torch import tensor
        >>> kolmogorov_sinai_entropy(tensor([0.9, 0.1, -2.0]))
        tensor(1.)
    """
    return _checked(spectrum).clamp(min=0).sum(-1)


def num_positive(spectrum: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Return how many exponents are positive.

    Args:
        spectrum: exponents in any order, nats per step, ``(..., num_exponents)``.
        tolerance: what counts as zero: the rounding error of float32 products, over some hundred steps, stays below the
            default.

    Returns:
        The number, in the dtype of ``spectrum``; NaN if an exponent is NaN; ``(...)``.

    Raises:
        ValueError: if ``spectrum`` holds no exponents or is not floating point.
    """
    spectrum = _checked(spectrum)
    return (spectrum > tolerance).sum(-1).to(spectrum.dtype).masked_fill(spectrum.isnan().any(-1), torch.nan)


def _checked(spectrum: Tensor) -> Tensor:
    if not isinstance(spectrum, Tensor) or not spectrum.is_floating_point():
        given = spectrum.dtype if isinstance(spectrum, Tensor) else type(spectrum).__name__
        raise ValueError(f"`spectrum` must be a tensor of real numbers, not {given}. Write `spectrum.double()`.")
    if spectrum.ndim == 0 or spectrum.shape[-1] == 0:
        raise ValueError(
            f"`spectrum` of shape {tuple(spectrum.shape)} holds no exponents. Its shape must be (..., num_exponents)."
        )
    return spectrum
