"""One picture of a measurement: the largest exponents of all cells over training, and the spectrum of the worst."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lyapunov.reporting.canvas import (
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
_UNSTABLE, _OTHER = (250, 221, 217), (150, 150, 150)
_TONES = {"grows": GROWS, "forgets": SHRINKS}


def overview_picture(
    history: Mapping[str, Mapping[str, Any]],
    worst: str,
    sentence: str,
    *,
    tone: str = "",
    quantile: float = 1.96,
    length: float = math.nan,
) -> NDArray[np.uint8]:
    """Draw the largest exponent of every cell over training, and below it the spectrum of the worst cell.

    The upper part shows the worst cell in strong colour with its 95 % band, the others in grey, the line of zero, and
    shaded what makes a gradient grow by more than two decades over the sequences. Both parts share the axis of steps:
    one column for each measurement.

    Args:
        history: for each cell ``"step"``, ``(m,)``, ``"spectrum"`` and ``"stderr"``, ``(m, num_exponents)``, nats per
            step, largest first.
        worst: the cell to name.
        sentence: what it means, in a few words.
        tone: ``"grows"`` or ``"forgets"``: the colour of the sentence and the curve; "" for neither.
        quantile: how many standard errors the band reaches to either side.
        length: the steps of the sequences of the worst cell; NaN if they are not known.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    upper = Plot(_LEFT, _RIGHT, _TOPS[0], _BOTTOMS[0])
    colour = _TONES.get(tone, INK)
    upper.write(20, 24, sentence, "lm", WIDTH - 40, colour)
    series = {cell: np.asarray(values["spectrum"])[:, 0].astype(float) for cell, values in history.items()}
    steps = np.asarray(history[worst]["step"])
    half_width = quantile * np.asarray(history[worst]["stderr"])[:, 0]
    limit = UNSTABLE_DECADES * math.log(10) / length
    low, high = _limits(series, half_width, worst, limit)

    def y(value: Any) -> Any:
        return np.clip(upper.y((high - value) / (high - low)), upper.top, upper.bottom - 1)

    if limit < high:
        upper.draw.rectangle((upper.left, upper.top, upper.right - 1, float(y(limit))), _UNSTABLE)
        if y(limit) - upper.top > 30:
            upper.write(upper.right - 12, float(y(limit)) - 18, "unstable", "rm", colour=_UNSTABLE_INK)
    columns = {int(step): index for index, step in enumerate(steps)}
    for cell, values in series.items():
        if cell != worst:
            places = [columns.get(int(step), -1) for step in np.asarray(history[cell]["step"])]
            _join(upper, _x(upper, places, len(steps)), y(values), resolved(values) & (np.array(places) >= 0), _OTHER)
    x, known = _x(upper, range(len(steps)), len(steps)), resolved(series[worst])
    band = known & np.isfinite(half_width)
    upper.fill_between(x[band], y(series[worst] - half_width)[band], y(series[worst] + half_width)[band])
    upper.frame(upper.left, upper.right)
    upper.draw.line((upper.left, float(y(0)), upper.right - 1, float(y(0))), INK, THIN)
    _join(upper, x, y(series[worst]), known, colour, width=2 * THIN, dots=True)
    _name(upper, worst, y(series[worst]), known, colour, len(series))
    upper.label_y("largest exponent")
    for value in round_numbers(low, high):
        upper.mark_y((high - value) / (high - low), f"{value:+.6g}" if value else "0")
    lower = Plot(_LEFT, _RIGHT, _TOPS[1], _BOTTOMS[1], image=upper.image)
    draw_map(lower, steps, np.asarray(history[worst]["spectrum"]), length)
    lower.label_y("all exponents")
    lower.write((_LEFT + _RIGHT) / 2, _BOTTOMS[1] + 56, "training step", "mm")
    return np.asarray(upper.image)


def _x(plot: Plot, columns: Any, count: int) -> NDArray[Any]:
    return np.asarray(plot.x((np.asarray(columns) + 0.5) / count))


def _limits(
    series: Mapping[str, NDArray[Any]], half_width: NDArray[Any], worst: str, limit: float
) -> tuple[float, float]:
    """Return the range of the upper plot: nearly all values, and where it is close the limit of what is unstable."""
    values = np.concatenate([one[resolved(one)] for one in series.values()])
    bounds = np.concatenate((series[worst] - half_width, series[worst] + half_width))
    shown = np.concatenate((values, bounds[resolved(bounds)]))
    if not len(shown):
        return limits_around(np.array([-1.0, 1.0]))
    low, high = np.quantile(shown, (0.02, 0.98)) if len(shown) > 100 else (shown.min(), shown.max())
    above = [1.5 * limit] if 1.5 * limit < max(high, -low, 0.1) else []
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
