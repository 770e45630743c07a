r"""Three ways to make the next frame from pushed tangent vectors, and how much each direction grew.

Each of them returns the logarithms of ``|R[j, j]|`` of ``V = Q R``. They differ in cost and in how ill-conditioned
``V`` may be. The measure is the *log-condition*: log(length of the longest vector / distance of a vector to the span of
those before it), the largest over all vectors. The rounding error of a growth rate is ``exp(log_condition)`` times that
of the pushed vectors.

- :func:`orthonormalise_cholesky` is the fastest in float32 and stops at a log-condition of 16 in float64.
- :func:`eliminate` takes a quarter of the time of Householder's method in float64 and resolves 24; the frame that it
  returns is oblique.
- :func:`orthonormalise_householder` resolves everything, and decides which directions are dead.
"""

import math

import torch
from torch import Tensor

from lightning_lyapunov.kernel.precision import widest_dtype

__all__ = ["decompose", "eliminate", "orthonormalise_cholesky", "orthonormalise_householder"]

# Columns that one Cholesky factorisation takes; more are split, so that most of the work is in large products.
_PANEL = 32
# The rank is checked where what is left of a direction is within this factor of the rounding error of its rows.
RANK_CHECK_FACTOR = {torch.float32: 1e1, torch.float64: 1e4}
# Lengths of tangent vectors whose squares float32 holds without loss.
_SAFE_LENGTHS = 1e-15, 1e15


def orthonormalise_cholesky(pushed: Tensor, alive: Tensor, max_log_condition: float) -> tuple[Tensor, Tensor, float]:
    """Return an orthonormal frame, each direction's growth, and the log-condition: inf if it is above the maximum.

    The growth telescopes exactly whether or not the frame is orthonormal to the last bit, so one pass is enough. Dead
    directions are carried as zeros.
    """
    if not alive.all():
        pushed = pushed.masked_fill(~alive.unsqueeze(-2), 0)
    vectors = pushed.mT.contiguous()
    lengths = torch.linalg.vecdot(vectors, vectors).sqrt()  # `vector_norm` takes ten times as long
    frame, r_diagonal = vectors.mT, _gram_schmidt(vectors, alive)
    shortest, longest = _SAFE_LENGTHS
    resolved = (lengths.where(alive, 1) >= shortest).all() & (lengths <= longest).all()
    log_condition = float(_log_condition(lengths.amax(-1), r_diagonal, alive).where(resolved, math.inf))
    return frame, r_diagonal.log(), log_condition if log_condition <= max_log_condition else math.inf


def _log_condition(longest: Tensor, r_diagonal: Tensor, alive: Tensor) -> Tensor:
    """Return the largest log(longest length / what is left): inf if the vectors are too short to have all digits.

    A rounding error of the pushed vectors is relative to the longest one, because a step enlarges it in all of them.
    """
    limits = torch.finfo(longest.dtype)
    longest = longest.where(longest >= limits.tiny / limits.eps, math.inf).unsqueeze(-1)
    return (longest / r_diagonal).log().masked_fill(~alive, 0).amax()


def _gram_schmidt(vectors: Tensor, alive: Tensor) -> Tensor:
    """Orthonormalise the rows of ``vectors`` in place; return how much of each is left beside the ones before it.

    Half by half, so that nearly all of the work is in products; a few rows by Cholesky's method: with
    ``V V^T = L L^T``, ``Q = L^{-1} V``. Zero where the factorisation failed.
    """
    if (count := vectors.shape[-2]) > _PANEL:
        halves = count // 2, count - count // 2
        (first, second), (first_alive, second_alive) = vectors.split(halves, -2), alive.split(halves, -1)
        first_left = _gram_schmidt(first, first_alive)
        second -= second @ first.mT @ first
        return torch.cat((first_left, _gram_schmidt(second, second_alive)), -1)
    precise = vectors.to(widest_dtype(vectors.device))
    gram = precise @ precise.mT
    gram.diagonal(dim1=-2, dim2=-1).masked_fill_(~alive, 1)
    factor, failures = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(count, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    vectors.copy_(inverse.to(vectors.dtype) @ vectors)
    return factor.diagonal(dim1=-2, dim2=-1).where(failures.unsqueeze(-1) == 0, 0)


def eliminate(pushed: Tensor, alive: Tensor, max_log_condition: float) -> tuple[Tensor, Tensor, float]:
    """Return as :func:`orthonormalise_cholesky`, but an oblique frame, by Gaussian elimination with partial pivoting.

    With ``V = P L U`` the frame goes on as ``P L``. The logarithms of ``U[j, j]`` are its growth, up to how oblique the
    last frame is. The rounding error of a column is that of its own size, as in Householder's method, but multiplied by
    the condition of ``L``: too much in float32.
    """
    pushed, alive, back = _living_first(pushed, alive)
    factors, pivots = _factorise(pushed)
    r_diagonal = factors.diagonal(dim1=-2, dim2=-1).abs().where(alive, 1)
    log_condition = float(_log_condition(pushed.abs().amax((-2, -1)), r_diagonal, alive))
    if not log_condition <= max_log_condition:
        return pushed, r_diagonal, math.inf
    # LAPACK stores columns: what is done to the vectors side by side in memory is quick.
    vectors = factors.mT.triu_(1)
    vectors.diagonal(dim1=-2, dim2=-1).copy_(alive)
    rows = _rows_after_pivoting(pivots, vectors.shape[-1]).unsqueeze(-2).expand_as(vectors)
    frame = torch.empty_like(vectors).scatter_(-1, rows, vectors).mT
    return _columns(frame, back), _columns(r_diagonal, back).log(), log_condition


def _factorise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors and pivots of each matrix of a batch.

    On a CPU one matrix at a time: with more than one thread, MKL's batched factorisation is wrong from about 150 rows
    on (pytorch issues 141358 and 142815).
    """
    if vectors.device.type != "cpu" or torch.get_num_threads() == 1:
        factors, pivots, _ = torch.linalg.lu_factor_ex(vectors)
        return factors, pivots
    one_by_one = [torch.linalg.lu_factor_ex(matrix) for matrix in vectors]
    return torch.stack([lu.LU.mT for lu in one_by_one]).mT, torch.stack([lu.pivots for lu in one_by_one])


def _rows_after_pivoting(pivots: Tensor, count: int) -> Tensor:
    """Return which of ``count`` rows each row comes from, ``(batch, count)``.

    On a GPU without waiting for it. On a CPU in a loop: matrices take ten times as long.
    """
    if pivots.device.type == "cuda":
        return _rows_by_matrices(pivots, count)
    orders = []
    for sequence in pivots.tolist():
        order = list(range(count))
        for here, there in enumerate(sequence):
            order[here], order[there - 1] = order[there - 1], order[here]
        orders.append(order)
    return torch.tensor(orders, device=pivots.device)


def _rows_by_matrices(pivots: Tensor, count: int) -> Tensor:
    """Return which of ``count`` rows each row comes from, by permutation matrices, without a value on the host."""
    shape = (*pivots.shape[:-1], count, pivots.shape[-1])
    placeholder = torch.empty(shape, dtype=torch.float32, device=pivots.device)
    permutation: Tensor = torch.lu_unpack(placeholder, pivots, unpack_data=False)[0]
    return permutation.argmax(-2)


def _living_first(pushed: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the vectors with the dead ones last, as zeros; which are alive; and the columns that undo the order.

    In front, a dead vector would take a row from those behind it, which may have nothing else.
    """
    if alive.all():
        return pushed, alive, None
    order = (~alive).byte().argsort(dim=-1, stable=True)
    return _columns(pushed.masked_fill(~alive.unsqueeze(-2), 0), order), _columns(alive, order), order.argsort(-1)


def _columns(values: Tensor, order: Tensor | None) -> Tensor:
    """Return the last dimension of 2 or 3 in an order for each member of the batch; None: as it is."""
    if order is None:
        return values
    return values.gather(-1, order if values.ndim == 2 else order.unsqueeze(-2).expand_as(values))


def orthonormalise_householder(pushed: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """Return frame, growth and log-condition by Householder's method, and which directions are alive after it.

    Returns:
        The frame ``(batch, state, num_exponents)``, growth ``(batch, num_exponents)``, log-condition, the mask of
        living directions ``(batch, num_exponents)``, and that of sequences with finite vectors ``(batch,)``.

    A direction that dies in front of one that lives is taken out, and the others are decomposed again without it. So is
    one whose rounding error, as a direction of the frame, has taken all that was left of the others.
    """
    finite = pushed.isfinite().all(-1).all(-1)
    living = alive & finite.unsqueeze(-1)
    while True:
        vectors, lives, back = _living_first(pushed, living)
        frame, r_diagonal, dead = decompose(vectors)
        dead &= lives
        # The first that is dead, if one behind it is not: what was left of those behind it may be too little.
        before = dead.cumsum(-1)
        front = dead & (before == 1)
        behind = lives & (before > 0) & ~front
        first = front & (behind & (~dead | _is_left(vectors, frame, lives & ~dead))).any(-1, keepdim=True)
        if not first.any():
            break
        living = living & ~_columns(first, back)
    living = living & ~_columns(dead, back)
    r_diagonal = _columns(r_diagonal, back).where(living, 1)
    log_condition = float(_log_condition(vectors.to(r_diagonal.dtype).norm(dim=-2).amax(-1), r_diagonal, living))
    return _columns(frame, back), r_diagonal.log(), log_condition, living, finite


def _is_left(vectors: Tensor, frame: Tensor, living: Tensor) -> Tensor:
    """Return for each vector whether it is clearly more than what lies in the living directions of a frame."""
    known = frame * living.unsqueeze(-2)
    precise = vectors.to(frame.dtype)
    left = (precise - known @ (known.mT @ precise)).norm(dim=-2)
    rounding = RANK_CHECK_FACTOR[vectors.dtype] * vectors.shape[-2] * torch.finfo(vectors.dtype).eps
    return left > rounding * precise.norm(dim=-2).amax(-1, keepdim=True)


def decompose(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an orthonormal frame, how much of each vector is left beside the ones before it, and which are dead.

    The rows are sorted by their size first: the error in a row is then that of its own size (Cox & Higham, Stability of
    Householder QR for weighted least squares problems, 1998), so directions that one step shrinks to e^-40 of the
    others are still resolved, and units that are exactly dead give exact zeros. A direction is dead if the rounding
    error of the rows it can lie in explains what is left of it.
    """
    precise = vectors.to(widest_dtype(vectors.device))
    sizes, order = precise.norm(dim=-1).sort(dim=-1, descending=True)
    order = order.unsqueeze(-1).expand_as(precise)
    sorted_frame, factor = torch.linalg.qr(precise.gather(-2, order))
    frame = torch.empty_like(precise).scatter_(-2, order, sorted_frame)

    r_diagonal = factor.diagonal(dim1=-2, dim2=-1).abs()
    tails = sizes.square().flip(-1).cumsum(-1).flip(-1).sqrt()[..., : r_diagonal.shape[-1]]
    rounding = vectors.shape[-2] * torch.finfo(vectors.dtype).eps
    dead = r_diagonal <= rounding * tails
    if (r_diagonal <= RANK_CHECK_FACTOR[vectors.dtype] * rounding * tails).any():
        # Ill-conditioned vectors before a dead one add to its rounding error. Then the rank decides, with each row in
        # its own scale: as many directions as the rank are alive, those with the most left of them.
        scaled = precise.gather(-2, order) / sizes.where(sizes > 0, 1).unsqueeze(-1)
        values = torch.linalg.svdvals(scaled)
        rank = (values > rounding * values[..., :1]).sum(-1, keepdim=True)
        left = r_diagonal / tails.clamp(min=torch.finfo(tails.dtype).tiny)
        dead |= left.argsort(-1, descending=True).argsort(-1) >= rank
    return frame, r_diagonal, dead
