"""One picture of a measurement: the largest exponents of all cells over training, and the spectrum of the worst."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lyapunov.confidence import NORMAL_QUANTILE
from lightning_lyapunov.reporting.canvas import (
    BAND,
    FLOOR_GREY,
    GROWS,
    INK,
    SHRINKS,
    THIN,
    WIDTH,
    Plot,
    limits_around,
    resolved,
    round_numbers,
)
from lightning_lyapunov.reporting.pictures import draw_map

__all__ = ["UNSTABLE_DECADES", "overview_picture"]

UNSTABLE_DECADES = 2.0
"""The growth of a gradient over a sequence above which a network counts as unstable."""

# Both plots in a picture of the usual size: TensorBoard fits a picture into the height of a card.
_LEFT, _RIGHT, _TOPS, _BOTTOMS = 150, 610, (52, 296), (254, 486)
_UNSTABLE_INK = (205, 120, 115)
_UNSTABLE, _OTHER, _OTHER_BAND = (250, 221, 217), (150, 150, 150), (226, 226, 226)
_TONES = {"grows": GROWS, "forgets": SHRINKS}


class _Curve(NamedTuple):
    """The largest exponent of a cell, at the places of those measurements of the worst cell that have it."""

    x: NDArray[Any]
    values: NDArray[Any]
    half_width: NDArray[Any]

    @property
    def bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.values - self.half_width, self.values + self.half_width


def overview_picture(
    history: Mapping[str, Mapping[str, Any]],
    worst: str,
    sentence: str,
    *,
    tone: str = "",
    quantiles: Mapping[str, float] | None = None,
    length: float = math.nan,
) -> NDArray[np.uint8]:
    """Draw the largest exponent of every cell over training, and below it the spectrum of the worst cell.

    The upper part shows the worst cell in strong colour and the others in grey, each with its 95 % band, the line of
    zero, and shaded what makes a gradient grow by more than two decades over the sequences. Both parts share the axis
    of steps: one column for each measurement.

    Args:
        history: for each cell ``"step"``, ``(m,)``, ``"spectrum"`` and ``"stderr"``, ``(m, num_exponents)``, nats per
            step, largest first.
        worst: the cell to name.
        sentence: what it means, in a few words.
        tone: ``"grows"`` or ``"forgets"``: the colour of the sentence and the curve; "" for neither.
        quantiles: for each cell how many standard errors its band reaches to either side; 1.96 for those not named.
        length: the steps of the sequences of the worst cell; NaN if they are not known.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    upper = Plot(_LEFT, _RIGHT, _TOPS[0], _BOTTOMS[0])
    upper.write(20, 24, sentence, "lm", WIDTH - 40, _TONES.get(tone, INK))
    steps = np.asarray(history[worst]["step"])
    x = {int(step): upper.x((column + 0.5) / len(steps)) for column, step in enumerate(steps)}
    curves = {cell: _curve(one, x, (quantiles or {}).get(cell, NORMAL_QUANTILE)) for cell, one in history.items()}
    _draw_curves(upper, curves, worst, _TONES.get(tone, INK), UNSTABLE_DECADES * math.log(10) / length)
    lower = Plot(_LEFT, _RIGHT, _TOPS[1], _BOTTOMS[1], image=upper.image)
    draw_map(lower, steps, np.asarray(history[worst]["spectrum"]), length)
    lower.label_y("all exponents")
    lower.write((_LEFT + _RIGHT) / 2, _BOTTOMS[1] + 56, "training step", "mm")
    return np.asarray(upper.image)


def _curve(measurements: Mapping[str, Any], x: Mapping[int, float], quantile: float) -> _Curve:
    steps = [int(step) for step in measurements["step"]]
    shown = [step in x for step in steps]
    values, errors = (np.asarray(measurements[key])[shown, 0].astype(float) for key in ("spectrum", "stderr"))
    return _Curve(np.array([x[step] for step in steps if step in x]), values, quantile * errors)


def _draw_curves(plot: Plot, curves: Mapping[str, _Curve], worst: str, colour: tuple[int, ...], limit: float) -> None:
    """Draw all curves, the worst last, with the axes and what is unstable."""
    low, high = _limits(curves, worst, limit)

    def y(value: Any) -> Any:
        return np.clip(plot.y((high - value) / (high - low)), plot.top, plot.bottom - 1)

    if limit < high:
        plot.draw.rectangle((plot.left, plot.top, plot.right - 1, float(y(limit))), _UNSTABLE)
    main, others = curves[worst], [curve for cell, curve in curves.items() if cell != worst]
    for curve in (*others, main):
        banded = resolved(curve.values) & np.isfinite(curve.half_width)
        lower, upper = (y(bound)[banded] for bound in curve.bounds)
        plot.fill_between(curve.x[banded], lower, upper, BAND if curve is main else _OTHER_BAND)
    if limit < high and y(limit) - plot.top > 30:
        plot.write(plot.right - 12, float(y(limit)) - 18, "unstable", "rm", colour=_UNSTABLE_INK)
    plot.frame(plot.left, plot.right)
    plot.draw.line((plot.left, float(y(0)), plot.right - 1, float(y(0))), INK, THIN)
    for curve in others:
        _join(plot, curve.x, y(curve.values), resolved(curve.values), _OTHER)
    heights, known = y(main.values), resolved(main.values)
    _join(plot, main.x, heights, known, colour, width=2 * THIN, dots=True)
    _name(plot, worst, heights, known, colour, len(curves))
    plot.label_y("largest exponent")
    for value in round_numbers(low, high):
        plot.mark_y((high - value) / (high - low), f"{value:+.6g}" if value else "0")


def _limits(curves: Mapping[str, _Curve], worst: str, limit: float) -> tuple[float, float]:
    """Return the range of the upper plot: nearly all values, and where it is close the limit of what is unstable."""
    values = np.concatenate([curve.values for curve in curves.values()] + [*curves[worst].bounds])
    shown = values[resolved(values)]
    if not len(shown):
        return limits_around(np.array([-1.0, 1.0]))
    low, high = np.quantile(shown, (0.02, 0.98)) if len(shown) > 100 else (shown.min(), shown.max())
    # So much of it that its name can be written there.
    above = [limit + max(0.5 * limit, 0.2 * (limit - low))] if 1.5 * limit < max(high, -low, 0.1) else []
    return limits_around(np.array([low, high, *above]))


def _join(
    plot: Plot,
    x: NDArray[Any],
    y: NDArray[Any],
    known: NDArray[np.bool_],
    colour: tuple[int, ...],
    *,
    width: int = THIN,
    dots: bool = False,
) -> None:
    """Draw a line through what is known; it breaks where something is not."""
    points = list(zip(x.tolist(), y.tolist(), known.tolist(), strict=True))
    for (left, upper, first), (right, lower, second) in itertools.pairwise(points):
        if first and second:
            plot.draw.line((left, upper, right, lower), colour, width)
    if dots and len(points) <= 40:
        for column, row, shown in points:
            if shown:
                plot.draw.ellipse((column - 6, row - 6, column + 6, row + 6), colour)


def _name(
    plot: Plot, worst: str, y: NDArray[Any], known: NDArray[np.bool_], colour: tuple[int, ...], num_cells: int
) -> None:
    """Write the name of the worst cell beside the end of its line, and what the other lines are."""
    left, width = plot.right + 14, WIDTH - plot.right - 20
    row = float(y[known][-1]) if known.any() else plot.top + 20.0
    row = min(max(row, plot.top + 16.0), plot.bottom - 16.0)
    plot.write(left, row, worst, "lm", width, colour)
    if num_cells > 1:
        beside = row + 40 if row + 56 < plot.bottom else row - 40
        plot.write(left, beside, f"{num_cells - 1} other{'s' * (num_cells > 2)}", "lm", width, FLOOR_GREY)
