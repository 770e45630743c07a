"""Covariant Lyapunov vectors: the directions that grow at the rates of the exponents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lyapunov.functional import as_one_cell, is_count, layer_of, read_arguments
from lightning_lyapunov.kernel.covariant import covariant_stretch
from lightning_lyapunov.kernel.precision import plain_arithmetic, widest_dtype
from lightning_lyapunov.layers.sharding import gathered

__all__ = ["CovariantVectors", "covariant_lyapunov_vectors"]


class CovariantVectors(NamedTuple):
    """The covariant Lyapunov vectors along a stretch of time.

    Attributes:
        vectors: those at the state before each step, of length one, ``(time, batch, state, num_exponents)``.
        growth_rates: how much each grows in this step, in nats, ``(time, batch, num_exponents)``.
    """

    vectors: Tensor
    growth_rates: Tensor


def covariant_lyapunov_vectors(
    dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor],
    inputs: Any,
    state: Any = None,
    *,
    num_exponents: int | None = None,
    warmup: int = 0,
    cooldown: int = 0,
) -> CovariantVectors:
    r"""Compute the covariant Lyapunov vectors of a recurrent network along input sequences.

    .. math:: J_t v_t^j = e^{g_t^j}\, v_{t+1}^j, \qquad \frac1T \sum_t g_t^j \to \lambda_j.

    Each step maps them onto one another, with their signs. They are not orthogonal: an angle near zero between a
    growing and a fading one is a near tangency. The first is the leading vector of the orthogonal frame.

    Where two exponents are equal, or the eigenvalues of a constant matrix are a complex pair, the vectors are covariant
    and span the right plane, but any two of this plane would do: they depend on the starting frame. With exponents
    that differ by ``d``, the error of a vector is of the order ``exp(-d warmup)`` and ``exp(-d cooldown)``.

    Args:
        dynamics: as in :func:`~lightning_lyapunov.lyapunov_spectrum`. A callable is called in float64.
        inputs: as in :func:`~lightning_lyapunov.lyapunov_spectrum`.
        state: as in :func:`~lightning_lyapunov.lyapunov_spectrum`. The vectors of a stack of layers are those of its
            cells' states one after the other, ``(h, c)`` for each cell of an LSTM.
        num_exponents: how many of the leading vectors to compute; None for all.
        warmup: steps before the stretch, in which the frame turns to the fastest directions.
        cooldown: steps after it, in which the vectors turn from the frame's directions to the covariant ones.

    Returns:
        The vectors and growth rates of the ``time - warmup - cooldown`` steps between, in float64, in the order of the
        exponents. The vector at index ``i`` is that before step ``warmup + i``, on which ``jacobians(...)[warmup + i]``
        acts. A direction that is wiped out in any step has vectors of zero and rates of
        :data:`~lightning_lyapunov.EXPONENT_FLOOR`, -87.3. NaN after the end of a shorter sequence of a packed batch,
        and for a network that is not finite.

        Memory beside inputs and result: frames and triangular factors of ``2 sqrt(time)`` steps, those between are
        computed twice; or of all steps, where the frames take no more than 16 MB.

    Raises:
        ValueError: as in :func:`~lightning_lyapunov.lyapunov_spectrum`, and for a bidirectional module, whose
            directions share no step.
        TypeError: as in :func:`~lightning_lyapunov.lyapunov_spectrum`.

    Source: Ginelli et al., Characterizing Dynamics with Covariant Lyapunov Vectors, PRL 99, 130601 (2007).

    Example::

        >>> import torch
        >>> matrix = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
        >>> inputs, state = torch.zeros(60, 1, 0), torch.ones(1, 2)
        >>> found = covariant_lyapunov_vectors(lambda s, x: s @ matrix.T, inputs, state, warmup=20, cooldown=20)
        >>> found.growth_rates[0, 0].exp()
        tensor([2.0000, 0.5000], dtype=torch.float64)
        >>> vectors = found.vectors[0, 0]  # the eigenvectors (1, 0) and (2, -3) / 13 ** 0.5
        >>> (vectors / vectors[0]).round(decimals=6)[1].abs()
        tensor([0.0000, 1.5000], dtype=torch.float64)
    """
    with plain_arithmetic(), gathered(layer_of(dynamics).module):
        layer, sequences, _, count = read_arguments(
            dynamics, inputs, state, num_exponents=num_exponents, warmup=warmup, qr_interval=1, dtype=torch.float64
        )
        shortest = int(sequences.lengths.min())
        if not is_count(cooldown, 0) or warmup + cooldown >= shortest:
            raise ValueError(
                f"`cooldown={cooldown}` must be a number of steps, 0 or more, that leaves some after `warmup={warmup}`:"
                f" the sequences have {shortest} steps at least. Lower it or pass longer `inputs`."
            )
        cell = as_one_cell(layer, sequences)
        vectors, rates = covariant_stretch(
            cell.recurrence,
            cell.inputs,
            cell.state.to(widest_dtype(cell.state.device)),
            sequences.lengths,
            num_exponents=count,
            warmup=warmup,
            cooldown=cooldown,
        )
        return CovariantVectors(vectors, rates)
