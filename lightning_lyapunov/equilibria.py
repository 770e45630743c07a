"""Fixed and slow points of a recurrent network under a constant input, and how stable they are."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lyapunov.functional import as_one_cell, is_count, layer_of, read_arguments
from lightning_lyapunov.kernel.precision import plain_arithmetic, widest_dtype
from lightning_lyapunov.kernel.slow_points import slow_points, state_jacobians
from lightning_lyapunov.layers.base import DrivenCell
from lightning_lyapunov.layers.sharding import gathered

__all__ = ["FixedPoints", "fixed_points"]

# Elements of the Jacobians that are held at once: 128 MB.
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class FixedPoints:
    """Fixed and slow points of a step, slowest first.

    Attributes:
        points: ``(points, state)``.
        speeds: by how much a step moves each point, ``(points,)``.
        jacobians: those of the step at each point, ``(points, state, state)``.
        eigenvalues: those of the Jacobians, the largest in size first, complex, ``(points, state)``.
        num_growing: eigenvalues outside of the unit circle, by more than ``margin``, ``(points,)``.
        num_neutral: eigenvalues on the unit circle, within ``margin``, ``(points,)``.
        num_starts: for each point, from how many of the starting states it was found, ``(points,)``.
    """

    points: Tensor
    speeds: Tensor
    jacobians: Tensor
    eigenvalues: Tensor
    num_growing: Tensor
    num_neutral: Tensor
    num_starts: Tensor

    def __len__(self) -> int:
        return len(self.points)

    @property
    def kinds(self) -> list[str]:
        """What each point is: stable (no direction grows), unstable (all grow) or a saddle."""
        size = self.points.shape[-1]
        return [{0: "stable", size: "unstable"}.get(growing, "saddle") for growing in self.num_growing.tolist()]


def fixed_points(
    dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    states: Any,
    *,
    max_speed: float = 1e-6,
    unique_distance: float = 1e-3,
    outlier_distance: float = 10.0,
    margin: float = 1e-6,
    num_steps: int = 200,
) -> FixedPoints:
    r"""Find the fixed and slow points of a recurrent network under a constant input, from many starting states.

    A point is a minimum of

    .. math:: q(h) = \tfrac12 |F(h, x) - h|^2,

    near each starting state, by Levenberg and Marquardt's method in float64, all states at once. Take states that the
    network visits, and some between them: a point is found only from where ``q`` leads to it. Of a line, ring or plane
    of fixed points those next to the starting states are found.

    Args:
        dynamics: as in :func:`~lightning_lyapunov.lyapunov_spectrum`. A callable is called in float64.
        inputs: the input that is held, ``(input,)``; or one step of what ``lyapunov_spectrum`` takes, the same for all
            starting states.
        states: the starting states, as ``lyapunov_spectrum`` takes a ``state`` of so many sequences.
        max_speed: the largest speed ``|F(h, x) - h|`` to return. A larger one, such as 1e-2, returns slow points, too.
        unique_distance: points that are nearer to each other are one; the slowest is kept.
        outlier_distance: points further from the mean of the starting states than so many times their root mean square
            distance from it are dropped; ``inf`` keeps all. It does nothing if all starting states are equal.
        margin: eigenvalues within it of the unit circle are neutral.
        num_steps: the most steps of a point.

    Returns:
        The points, their speeds, eigenvalues and kinds. The state of a stack of layers is that of its cells one after
        the other, ``(h, c)`` for each cell of an LSTM. None of the points may be left.

    Raises:
        ValueError: if an argument has the wrong size or value, and for a bidirectional module.
        TypeError: if an argument is of the wrong type.

    Source: Sussillo & Barak, Neural Computation 25, 626 (2013); Golub & Sussillo, JOSS 3, 1003 (2018).

    Example::

        >>> import torch
        >>> starts = torch.linspace(-2, 2, 9).double().unsqueeze(-1)
        >>> found = fixed_points(lambda h, x: torch.tanh(2 * h + x), torch.zeros(1), starts)
        >>> found.points[:, 0].sort().values
        tensor([-0.9575,  0.0000,  0.9575], dtype=torch.float64)
        >>> sorted(found.kinds)
        ['stable', 'stable', 'unstable']
    """
    _check(max_speed=max_speed, unique_distance=unique_distance, outlier_distance=outlier_distance, margin=margin)
    if not is_count(num_steps, 0):
        raise ValueError(f"`num_steps={num_steps!r}` must be a number of steps, 0 or more.")
    with plain_arithmetic(), gathered(layer_of(dynamics).module):
        cell = _one_step(dynamics, inputs, states)
        starts, constant = cell.state.to(widest_dtype(cell.state.device)), cell.inputs[0]
        chunk = max(1, _MAX_ELEMENTS // starts.shape[-1] ** 2)
        found = [
            slow_points(cell.recurrence, some, here, num_steps=num_steps)
            for some, here in zip(constant.split(chunk), starts.split(chunk), strict=True)
        ]
        points, speeds = (torch.cat(parts) for parts in zip(*found, strict=True))
        inside = (speeds <= max_speed) & ~_outliers(points, starts, outlier_distance)
        points, speeds = points[inside], speeds[inside]
        kept, num_starts = _unique(points, speeds, unique_distance)
        points, speeds = points[kept], speeds[kept]
        some = constant[:1].expand(len(points), *constant.shape[1:])
        jacobians = torch.cat(
            [
                state_jacobians(cell.recurrence, few, here)
                for few, here in zip(some.split(chunk), points.split(chunk), strict=True)
            ]
        )
        return _classified(points, speeds, jacobians, num_starts, margin)


def _check(**limits: float) -> None:
    for name, value in limits.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise ValueError(f"`{name}={value!r}` must be a number, 0 or more.")


def _one_step(dynamics: Any, inputs: Any, states: Any) -> DrivenCell:
    """Return the cell, with one step of input."""
    if isinstance(inputs, Tensor) and inputs.ndim == 1:
        leaf = pytree.tree_leaves(states)[0]
        if not isinstance(leaf, Tensor) or leaf.ndim < 2:
            raise ValueError("`states` must hold a batch of starting states, such as (starts, state).")
        is_stack = isinstance(dynamics, nn.RNNBase)
        starts = leaf.shape[1 if is_stack else 0]
        batch_first = is_stack and dynamics.batch_first
        inputs = inputs.expand(starts, 1, -1) if batch_first else inputs.expand(1, starts, -1)
    layer, sequences, _, _ = read_arguments(
        dynamics, inputs, states, num_exponents=None, warmup=0, qr_interval=1, dtype=torch.float64
    )
    cell = as_one_cell(layer, sequences)
    first = cell.inputs[0]
    if len(cell.inputs) != 1 or not torch.equal(first, first[:1].expand_as(first)):
        raise ValueError(
            "`inputs` must be one step of input, the same for all starting states: pass it as a vector (input,). Each "
            "input has fixed points of its own."
        )
    return cell


def _outliers(points: Tensor, starts: Tensor, distance: float) -> Tensor:
    finite = starts[starts.isfinite().all(-1)]
    centre = finite.mean(0)
    spread = (finite - centre).square().sum(-1).mean().sqrt()
    far = (points - centre).norm(dim=-1) > (distance * spread if spread > 0 else math.inf)
    return far | ~points.isfinite().all(-1)


def _unique(points: Tensor, speeds: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Return the indices of points that are not near a slower one, slowest first, and how many each stands for."""
    left = speeds.argsort(stable=True)
    kept, counts = [], []
    while len(left):
        near = (points[left] - points[left[0]]).norm(dim=-1) <= distance
        near[0] = True
        kept.append(left[0])
        counts.append(int(near.sum()))
        left = left[~near]
    device = points.device
    indices = torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long, device=device)
    return indices, torch.tensor(counts, dtype=torch.long, device=device)


def _classified(points: Tensor, speeds: Tensor, jacobians: Tensor, num_starts: Tensor, margin: float) -> FixedPoints:
    eigenvalues = torch.linalg.eigvals(jacobians)
    sizes, order = eigenvalues.abs().sort(dim=-1, descending=True, stable=True)
    growing, neutral = (sizes > 1 + margin).sum(-1), ((sizes - 1).abs() <= margin).sum(-1)
    return FixedPoints(points, speeds, jacobians, eigenvalues.gather(-1, order), growing, neutral, num_starts)
