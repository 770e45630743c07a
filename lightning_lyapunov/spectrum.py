"""Tangent dynamics: carry a frame along a trajectory, re-orthonormalise it, and sum what it grew by.

The method is that of Benettin, Galgani, Giorgilli & Strelcyn (Meccanica 15, 1980) and Shimada & Nagashima (Prog. Theor.
Phys. 61, 1979), as used for networks by Vogt, Puelma Touzel, Shlizerman & Lajoie (arXiv 2006.14123): with
``J_t Q_{t-1} = Q_t R_t``, the exponents are the averages of ``log R_t[j, j]``.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["FLOOR", "Growth", "generic_frame", "log_growth"]

FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""The exponent reported for a direction that is wiped out (its true exponent is minus infinity): -87.3 nats per step.

A step that multiplies by less than this leaves nothing of a float32 number.
"""

# The longest stretch between two re-orthonormalisations that "auto" tries. Beyond it the cost hardly falls further.
_MAX_INTERVAL = 32
# Steps that float32 must be able to take at once: below, float64 is faster where it costs only twice as much.
_WORTHWHILE_INTERVAL = {"cpu": 4}
# Components of a state up to which elimination in float64 is as fast as float32.
_SMALL_STATE = {"cpu": 64}
# Steps, and elements of a state, that are linearised at once.
_BLOCK_STEPS, _MAX_BLOCK_ELEMENTS = 64, 2**20
# Columns that one Cholesky factorisation takes; more are split, so that most of the work is in large products.
_PANEL = 32
# What is left of a direction is doubted up to so many times the rounding error of the rows that it lies in.
_DOUBT = {torch.float32: 1e1, torch.float64: 1e4}
# Lengths of tangent vectors whose squares float32 holds without loss.
_SAFE_LENGTHS = 1e-15, 1e15


class TangentMap(Protocol):
    """What can step and push a tangent frame: see :class:`lightning_lyapunov.recurrence.Recurrence`."""

    state_size: int

    def trajectory(self, inputs: Tensor, state: Tensor) -> Tensor: ...

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]: ...

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor: ...


class Growth(NamedTuple):
    """What the directions of a frame grew by along each sequence.

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
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(state_size, generator=generator, dtype=torch.float64) for _ in range(num_exponents)]
    return torch.linalg.qr(torch.stack(columns, -1)).Q


def log_growth(
    tangent_map: TangentMap,
    inputs: Tensor,
    state: Tensor,
    lengths: Tensor,
    *,
    num_exponents: int,
    warmup: int = 0,
    qr_interval: int | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float64,
    segments: int = 1,
) -> Growth:
    """Sum the growth of a frame along each sequence.

    The frame is re-orthonormalised every ``qr_interval`` steps. Whatever the interval, a stretch after which a vector
    cannot be told from the faster ones is done again in shorter ones, then in float64, at last by Householder's method.

    Args:
        tangent_map: the recurrence to follow.
        inputs: ``(time, batch, input)``.
        state: the state before the first step, ``(batch, state_size)``.
        lengths: the steps of each sequence, ``(batch,)``, on the CPU; what follows them is not read.
        num_exponents: the number of tangent vectors carried.
        warmup: steps that move the state and the frame and are not averaged.
        qr_interval: steps between two re-orthonormalisations; ``"auto"`` keeps the vectors well apart.
        dtype: the least precise dtype for products with the frame, float32 or float64.
        segments: stretches of time to sum separately, for an error over time.
    """
    lengths, order = lengths.sort(descending=True, stable=True)
    longest = int(lengths[0])
    edges = [warmup + i * (longest - warmup) // segments for i in range(segments + 1)]
    walk = _Walk(tangent_map, state[order], num_exponents, qr_interval, dtype)
    total = walk.frame.new_zeros(segments, len(lengths), num_exponents, dtype=_precise_dtype(state.device))
    inputs = inputs[:, order]
    for start, stop in pairwise(sorted({0, *edges, *lengths.tolist()})):
        running = int((lengths > start).sum())
        walk.keep(running)
        grown = walk.advance(inputs[start:stop, :running])
        if start >= warmup:
            total[bisect_right(edges, start) - 1, :running] += grown
    steps = torch.stack([lengths.clamp(start, stop) - start for start, stop in pairwise(edges)])
    original = order.argsort()
    return Growth(total[:, original], steps[:, original].to(total.device))


class _Walk:
    """A state and a frame on their way along sequences of equal length."""

    def __init__(
        self,
        tangent_map: TangentMap,
        state: Tensor,
        num_exponents: int,
        qr_interval: int | Literal["auto"],
        dtype: torch.dtype,
    ) -> None:
        self.tangent_map, self.state = tangent_map, state
        self.adaptive = qr_interval == "auto"
        self.longest = _MAX_INTERVAL if qr_interval == "auto" else qr_interval
        self.interval = 1 if self.adaptive else self.longest
        self.methods = _methods(dtype, state.device, tangent_map.state_size)
        # How far one step leans decides between two methods, so that is measured first.
        self.method = _MEASURE if len(self.methods) > 1 else self.methods[0]
        # Whether the next frame needs Householder's method whatever the products; and whether this one is oblique.
        self.careful, self.oblique = False, False
        frame = generic_frame(tangent_map.state_size, num_exponents)
        self.frame = frame.to(state.device, self.method.dtype).expand(len(state), -1, -1)
        # What a direction adds to its growth from now on: 0, -inf once it is wiped out, NaN once it is not finite.
        self.fate = self.frame.new_zeros(len(state), num_exponents, dtype=_precise_dtype(state.device))

    def keep(self, running: int) -> None:
        """Go on with the first ``running`` sequences only: the others have ended."""
        self.state, self.frame, self.fate = self.state[:running], self.frame[:running], self.fate[:running]

    def advance(self, inputs: Tensor) -> Tensor:
        """Take the steps of ``inputs`` and return what each direction grew by, ``(batch, num_exponents)``."""
        grown = torch.zeros_like(self.fate)
        while len(inputs):
            block, inputs = inputs[: (size := self._block())], inputs[size:]
            states = self.tangent_map.trajectory(block, self.state)
            before = torch.cat((self.state.unsqueeze(0), states[:-1]))
            ahead = list(self.tangent_map.linearise(before, block))
            while len(states):
                steps, growth = self._push(ahead)
                self.state = states[steps - 1]
                self.fate = self.fate.masked_fill(~self.state.isfinite().all(-1, keepdim=True), math.nan)
                grown += growth + self.fate
                states, ahead = states[steps:], [part[steps:] for part in ahead]
                if self.oblique and not (self.method.factorise is _eliminate and len(states) + len(inputs)):
                    grown += self._straighten(self.frame)[0] + self.fate
        return grown

    def _block(self) -> int:
        """Return how many steps to linearise at once: as many whole stretches as are small."""
        steps = min(_BLOCK_STEPS, _MAX_BLOCK_ELEMENTS // self.state.numel())
        return max(1, steps // self.interval) * self.interval

    def _push(self, ahead: list[Tensor]) -> tuple[int, Tensor]:
        """Take as many steps as the frame can stand; return their number and the growth of each direction."""
        stretches = math.ceil(len(ahead[0]) / self.interval)
        steps = math.ceil(len(ahead[0]) / stretches)
        while True:
            pushed = self.tangent_map.push_forward([part[:steps] for part in ahead], self.frame.to(self.method.dtype))
            if pushed.dtype != self.method.dtype:
                # A callable may stay in its own dtype: then that is the best there is.
                self.methods = (_ALONE if pushed.dtype == torch.float32 else _EXACT,)
                self.method = self.methods[0]
            if self.careful:
                growth, lean = self._straighten(pushed)
                break
            frame, growth, lean = self.method.factorise(pushed, self.fate == 0, self.method.accepted(steps))
            if lean < math.inf:
                self.frame, self.oblique = frame, self.method.factorise is _eliminate
                break
            # Not resolved: again in half as many steps, at last in one in float64, at the very last with care.
            if steps > 1:
                steps //= 2
                self.interval = steps
            elif self.method is not self.methods[-1]:
                self.method = self.methods[-1]
            else:
                self.careful = True
        self._plan(steps, lean)
        return steps, growth

    def _straighten(self, pushed: Tensor) -> tuple[Tensor, float]:
        """Make the frame of the pushed vectors with care, and decide their fate; return their growth and lean."""
        self.frame, growth, lean, fate = _orthonormalise_carefully(pushed, self.fate == 0)
        self.fate, self.oblique = self.fate + fate, False
        return growth, lean

    def _plan(self, steps: int, lean: float) -> None:
        """Choose method and interval of the next products from how far the frame leant in these."""
        per_step = max(lean / steps, 1e-3)
        quick, *others = self.methods
        if others:
            worthwhile = _WORTHWHILE_INTERVAL.get(self.frame.device.type, 1) if self.adaptive else 1
            if self.oblique:  # it leans by itself: only a long stretch tells what a step adds
                enough = 2 * steps >= self.longest and lean <= quick.aim
            else:
                enough = worthwhile * per_step <= quick.aim
            self.method = quick if enough else others[0]
        room = max(int(self.method.aim / per_step), int(self.method.accepted(1) >= per_step))
        self.careful = room == 0
        longest = min(room, self.longest) if self.adaptive else self.longest
        self.interval = 1 if self.careful else max(1, min(2 * self.interval, longest))


def _orthonormalise(pushed: Tensor, alive: Tensor, accepted: float) -> tuple[Tensor, Tensor, float]:
    """Return an orthonormal frame for ``pushed``, each direction's growth, and the largest lean: inf if not accepted.

    The growth telescopes exactly whether or not the frame is orthonormal to the last bit, so one pass is enough. Dead
    directions are carried as zeros.
    """
    if not alive.all():
        pushed = pushed.masked_fill(~alive.unsqueeze(-2), 0)
    vectors = pushed.mT.contiguous()
    lengths = torch.linalg.vecdot(vectors, vectors).sqrt()  # `vector_norm` takes ten times as long
    frame, stretches = vectors.mT, _gram_schmidt(vectors, alive)
    shortest, longest = _SAFE_LENGTHS
    resolved = (lengths.where(alive, 1) >= shortest).all() & (lengths <= longest).all()
    lean = float(_lean(lengths.amax(-1), stretches, alive).where(resolved, math.inf))
    return frame, stretches.log(), lean if lean <= accepted else math.inf


def _lean(longest: Tensor, stretches: Tensor, alive: Tensor) -> Tensor:
    """Return the largest lean, log(longest length / what is left): inf if the vectors are too short to have all digits.

    A rounding error of the pushed vectors is relative to the longest, because what a step enlarges it enlarges in all.
    """
    limits = torch.finfo(longest.dtype)
    longest = longest.where(longest >= limits.tiny / limits.eps, math.inf).unsqueeze(-1)
    return (longest / stretches).log().masked_fill(~alive, 0).amax()


def _gram_schmidt(vectors: Tensor, alive: Tensor) -> Tensor:
    """Orthonormalise the rows of ``vectors`` where they are; return how much of each is left beside the ones before it.

    Half by half, so that nearly all of the work is in products; a few rows by Cholesky's method: with
    ``V V^T = L L^T``, ``Q = L^{-1} V``. What is unknown is 0.
    """
    if (count := vectors.shape[-2]) > _PANEL:
        halves = count // 2, count - count // 2
        (first, second), (first_alive, second_alive) = vectors.split(halves, -2), alive.split(halves, -1)
        first_left = _gram_schmidt(first, first_alive)
        second -= second @ first.mT @ first
        return torch.cat((first_left, _gram_schmidt(second, second_alive)), -1)
    precise = vectors.to(_precise_dtype(vectors.device))
    gram = precise @ precise.mT
    gram.diagonal(dim1=-2, dim2=-1).masked_fill_(~alive, 1)
    factor, failures = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(count, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    vectors.copy_(inverse.to(vectors.dtype) @ vectors)
    return factor.diagonal(dim1=-2, dim2=-1).where(failures.unsqueeze(-1) == 0, 0)


def _eliminate(pushed: Tensor, alive: Tensor, accepted: float) -> tuple[Tensor, Tensor, float]:
    """Return as :func:`_orthonormalise`, but an oblique frame, by Gaussian elimination with partial pivoting.

    With ``V = P L U`` the frame goes on as ``P L``, and the logarithms of ``U[j, j]`` are what it grew by, up to how
    oblique it is in the end. It takes a quarter of the time of Householder's method. The rounding error of a column is
    that of its own size in both, but multiplied by the condition of ``L``: too much in float32.
    """
    pushed, alive, back = _living_first(pushed, alive)
    factors, pivots, _ = torch.linalg.lu_factor_ex(pushed)
    stretches = factors.diagonal(dim1=-2, dim2=-1).abs().where(alive, 1)
    lean = float(_lean(pushed.abs().amax((-2, -1)), stretches, alive))
    if not lean <= accepted:
        return pushed, stretches, math.inf
    # LAPACK stores columns: what is done to the vectors side by side in memory is quick.
    vectors = factors.mT.triu_(1)
    vectors.diagonal(dim1=-2, dim2=-1).copy_(alive)
    rows = _rows_after_pivoting(pivots, vectors.shape[-1]).unsqueeze(-2).expand_as(vectors)
    frame = torch.empty_like(vectors).scatter_(-1, rows, vectors).mT
    return _columns(frame, back), _columns(stretches, back).log(), lean


def _rows_after_pivoting(pivots: Tensor, count: int) -> Tensor:
    """Return which of ``count`` rows each row comes from. `torch.lu_unpack` makes matrices: ten times as long."""
    orders = []
    for sequence in pivots.tolist():
        order = list(range(count))
        for here, there in enumerate(sequence):
            order[here], order[there - 1] = order[there - 1], order[here]
        orders.append(order)
    return torch.tensor(orders, device=pivots.device)


def _living_first(pushed: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the vectors with the dead behind the others, as zeros; which of them live; and the columns to undo it by.

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


def _orthonormalise_carefully(pushed: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
    """Return frame, growth and lean by Householder's method, and the fate of each direction.

    A direction that dies in front of one that lives is taken out, and the others are decomposed again without it.
    """
    finite = pushed.isfinite().all(-1).all(-1)
    living = alive & finite.unsqueeze(-1)
    while True:
        vectors, lives, back = _living_first(pushed, living)
        frame, stretches, dead = _decompose(vectors)
        dead &= lives
        # The first that is dead, if one behind it is not: what was left of those behind it may be too little.
        before = dead.cumsum(-1)
        first = dead & (before == 1) & (lives & ~dead & (before > 0)).any(-1, keepdim=True)
        if not first.any():
            break
        living = living & ~_columns(first, back)
    living = living & ~_columns(dead, back)
    stretches = _columns(stretches, back).where(living, 1)
    fate = torch.zeros_like(stretches).masked_fill(~living, -math.inf).masked_fill(~finite.unsqueeze(-1), math.nan)
    lean = float(_lean(vectors.to(stretches.dtype).norm(dim=-2).amax(-1), stretches, living))
    return _columns(frame, back), stretches.log(), lean, fate


def _decompose(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an orthonormal frame, how much of each vector is left beside the ones before it, and which are dead.

    The rows are sorted by their size first: the error in a row is then that of its own size (Cox & Higham, Stability of
    Householder QR for weighted least squares problems, 1998), so directions that one step shrinks to e^-40 of the
    others are still resolved, and units that are exactly dead give exact zeros. What is left of a direction is dead if
    the rounding error of the rows it can lie in explains it.
    """
    precise = vectors.to(_precise_dtype(vectors.device))
    sizes, order = precise.norm(dim=-1).sort(dim=-1, descending=True)
    order = order.unsqueeze(-1).expand_as(precise)
    sorted_frame, factor = torch.linalg.qr(precise.gather(-2, order))
    frame = torch.empty_like(precise).scatter_(-2, order, sorted_frame)

    stretches = factor.diagonal(dim1=-2, dim2=-1).abs()
    tails = sizes.square().flip(-1).cumsum(-1).flip(-1).sqrt()[..., : stretches.shape[-1]]
    rounding = vectors.shape[-2] * torch.finfo(vectors.dtype).eps
    dead = stretches <= rounding * tails
    if (stretches <= _DOUBT[vectors.dtype] * rounding * tails).any():
        # Ill-conditioned vectors before a dead one add to its rounding error. Then the rank decides, with each row in
        # its own scale: so many directions live, those with the most left of them.
        scaled = precise.gather(-2, order) / sizes.where(sizes > 0, 1).unsqueeze(-1)
        values = torch.linalg.svdvals(scaled)
        rank = (values > rounding * values[..., :1]).sum(-1, keepdim=True)
        left = stretches / tails.clamp(min=torch.finfo(tails.dtype).tiny)
        dead |= left.argsort(-1, descending=True).argsort(-1) >= rank
    return frame, stretches, dead


def _precise_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for factorisations and sums: float64, or float32 on a device that has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Method(NamedTuple):
    """A way to take a frame over a stretch: the dtype of the products, and how the next frame is made of them.

    How far a tangent vector leans towards the faster ones is log(longest length / distance to their span); the rounding
    error of its growth is exp(lean) times that of the products.

    Attributes:
        aim: the lean that "auto" aims at.
        most: the most that is accepted of several steps; and of one.
    """

    dtype: torch.dtype
    factorise: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]
    aim: float
    most: tuple[float, float]

    def accepted(self, steps: int) -> float:
        """Return the lean to accept from so many steps."""
        return self.most[steps == 1]


_QUICK = _Method(torch.float32, _orthonormalise, 6.5, (7.5, 7.5))
_THOROUGH = _Method(torch.float64, _eliminate, 20.0, (24.0, 24.0))
# Where float64 is asked for, to more digits.
_EXACT = _Method(torch.float64, _eliminate, 10.0, (13.0, 13.0))
# Where there is no better product, and for the first step: what Cholesky's method resolves in float64.
_ALONE = _Method(torch.float32, _orthonormalise, 6.5, (7.5, 11.0))
_MEASURE = _Method(torch.float64, _orthonormalise, 10.0, (11.0, 11.0))


def _methods(dtype: torch.dtype, device: torch.device, state_size: int) -> tuple[_Method, ...]:
    """Return what to try, in this order, for the dtype that is asked for."""
    if _precise_dtype(device) == torch.float32:
        return (_ALONE,)
    if dtype == torch.float64:
        return (_EXACT,)
    return (_THOROUGH,) if state_size <= _SMALL_STATE.get(device.type, 0) else (_QUICK, _THOROUGH)
