"""Which units carry the growth of perturbations, read off tangent vectors."""

import torch
from torch import Tensor

__all__ = ["participation", "unit_shares"]


def unit_shares(vectors: Tensor, growth_rates: Tensor | None = None, *, num_tensors: int = 1) -> Tensor:
    r"""Return the share of each unit in the leading growing directions.

    .. math:: s_u = \frac{\sum_{t,j} w_j\, (v_t^j)_u^2}{\sum_{t,j} w_j\, |v_t^j|^2}

    Each step maps a unit vector on ``exp(g)`` times the next one, so that the square of a component is the share of its
    unit in what has grown so far.

    Args:
        vectors: tangent vectors of length one, covariant ones or those of an orthogonal frame,
            ``(..., state, num_vectors)``; all leading dimensions are averaged. Vectors with NaN, and zeros, count for
            nothing.
        growth_rates: those of the vectors, ``(..., num_vectors)``. Then the vectors that grow on average count with
            their mean rate ``w_j``, or the first alone where none does. None: all count the same.
        num_tensors: the tensors of equal size that a state is of, whose components are those of the same units: 2 for
            ``(h, c)`` of an LSTM.

    Returns:
        The shares, ``(units,)``, which sum to one; NaN if there is no vector.

    Raises:
        ValueError: if the state is not of so many tensors of equal size, or ``growth_rates`` do not fit the vectors.

    Example::

        >>> import torch
        >>> unit_shares(torch.tensor([[0.6], [0.8]]))
        tensor([0.3600, 0.6400])
    """
    size, count = vectors.shape[-2:]
    if size % num_tensors:
        raise ValueError(f"`num_tensors={num_tensors}` must divide the size of the state, {size}.")
    squares = vectors.reshape(-1, size, count).square()
    squares = squares[squares.isfinite().all(-1).all(-1)].mean(0)
    if growth_rates is not None:
        if growth_rates.shape != vectors.shape[:-2] + vectors.shape[-1:]:
            raise ValueError(
                f"`growth_rates` must be {tuple(vectors.shape[:-2] + vectors.shape[-1:])} for `vectors` of "
                f"{tuple(vectors.shape)}, but their shape is {tuple(growth_rates.shape)}."
            )
        weights = growth_rates.reshape(-1, count).nanmean(0).clamp(min=0)
        first = torch.arange(count, device=weights.device) == 0
        squares = squares * (weights if (weights > 0).any() else first.to(weights))
    shares = squares.sum(-1)
    return (shares / shares.sum()).reshape(num_tensors, -1).sum(0)


def participation(shares: Tensor) -> Tensor:
    r"""Return the participation ratio of shares by their number: 1 if all are equal, 1 / units if one has all.

    .. math:: \frac{1}{n} \frac{(\sum_u s_u)^2}{\sum_u s_u^2}

    Args:
        shares: of each unit, ``(..., units)``.

    Returns:
        The share of the units that carry the growth, ``(...)``.

    Example::

        >>> import torch
        >>> participation(torch.tensor([0.5, 0.5, 0.0, 0.0]))
        tensor(0.5000)
    """
    return shares.sum(-1).square() / shares.square().sum(-1) / shares.shape[-1]
