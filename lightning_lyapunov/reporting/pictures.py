"""Spectra as RGB pictures, drawn with Pillow."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lyapunov.reporting.canvas import (
    INK,
    THIN,
    Plot,
    colour_limit,
    colours,
    draw_scale,
    limits_around,
    resolved,
    round_numbers,
    ticks,
)

__all__ = ["current_spectrum_picture", "draw_map", "spectrum_picture", "units_picture"]

_MAP_LEFT, _MAP_RIGHT = 118, 610
_LINE_LEFT, _LINE_RIGHT = 170, 760


def spectrum_picture(
    steps: NDArray[Any], spectra: NDArray[Any], title: str, length: float = math.nan
) -> NDArray[np.uint8]:
    """Draw exponents over training: one column for each measurement, the largest exponent on top.

    Red directions grow, blue ones shrink, white ones do neither, grey ones are wiped out or not finite. The colour
    follows the square root of the exponent, so that a weak instability shows beside strong contraction; what is an
    e-fold over the sequences or less is pale.

    Args:
        steps: the step of each measurement, ``(m,)``.
        spectra: nats per step, largest first, ``(m, num_exponents)``.
        title: what to write above.
        length: the steps of the sequences; NaN if they are not known.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    plot = Plot(_MAP_LEFT, _MAP_RIGHT)
    plot.label(title, "training step", "exponent", width=plot.right + 22 - plot.left)
    draw_map(plot, steps, spectra, length)
    return np.asarray(plot.image)


def draw_map(plot: Plot, steps: NDArray[Any], spectra: NDArray[Any], length: float) -> None:
    """Draw what :func:`spectrum_picture` shows into a plot, without its labels."""
    limit, (measurements, exponents) = colour_limit(spectra, length), spectra.shape
    plot.paint(colours(spectra.T, limit), plot.left, plot.right)
    for column in ticks(measurements, 4):
        plot.mark_x((column + 0.5) / measurements, str(int(steps[column])))
    for row in ticks(exponents, 5):
        plot.mark_y((row + 0.5) / exponents, str(row + 1))
    draw_scale(plot, limit)


def units_picture(steps: NDArray[Any], shares: NDArray[Any], title: str) -> NDArray[np.uint8]:
    """Draw which units carry the leading direction, over training: one column for each measurement.

    The darker a unit, the larger its share. White is no more than an even share.

    Args:
        steps: the step of each measurement, ``(m,)``.
        shares: of each unit, which sum to one, ``(m, units)``.
        title: what to write above.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    measurements, units = shares.shape
    beyond = np.nan_to_num(np.clip(shares.T * units - 1, 0, None))
    strength = np.sqrt(beyond / max(float(beyond.max()), 1e-9))[..., None]
    plot = Plot(_MAP_LEFT, _LINE_RIGHT)
    plot.paint((255 + strength * (np.array(INK) - 255)).round().astype(np.uint8), plot.left, plot.right)
    largest = float(np.nanmax(shares)) if np.isfinite(shares).any() else math.nan
    plot.label(f"{title}: black is {largest:.0%} of the growth", "training step", "unit")
    for column in ticks(measurements, 4):
        plot.mark_x((column + 0.5) / measurements, str(int(steps[column])))
    for row in ticks(units, 5):
        plot.mark_y((row + 0.5) / units, str(row))
    return np.asarray(plot.image)


def current_spectrum_picture(spectrum: NDArray[Any], half_width: NDArray[Any], title: str) -> NDArray[np.uint8]:
    """Draw exponents over their index, with an error band and the line of zero.

    Red ones grow, blue ones shrink. What is wiped out or not finite is left out, and counted below.

    Args:
        spectrum: nats per step, largest first, ``(num_exponents,)``.
        half_width: how far the error band reaches to either side, nats per step, ``(num_exponents,)``; none is drawn
            where it is not finite.
        title: what to write above.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    shown = resolved(spectrum)
    values, errors = spectrum[shown].astype(float), half_width[shown].astype(float)
    known = np.isfinite(errors)
    low, high = limits_around(np.concatenate((values, (values - errors)[known], (values + errors)[known])))
    plot = Plot(_LINE_LEFT, _LINE_RIGHT)

    def y(value: Any) -> Any:
        return plot.y((high - value) / (high - low))

    x = plot.x((np.flatnonzero(shown) + 0.5) / len(spectrum))
    plot.fill_between(x[known], y(values - errors)[known], y(values + errors)[known])
    plot.frame(_LINE_LEFT, _LINE_RIGHT)
    plot.draw.line((_LINE_LEFT, y(0), _LINE_RIGHT - 1, y(0)), INK, THIN)
    radius = min(6.0, max(1.5, (_LINE_RIGHT - _LINE_LEFT) / len(spectrum) / 3))
    plot.join(x, y(values), values, radius)
    visible = radius * (high - low) / (plot.bottom - plot.top)
    plot.label(title, "exponent" + _note(len(spectrum), len(values), errors[known], visible), "nats per step")
    for index in ticks(len(spectrum), 5):
        plot.mark_x((index + 0.5) / len(spectrum), str(index + 1))
    for value in round_numbers(low, high):
        plot.mark_y((high - value) / (high - low), f"{value:+.6g}" if value else "0")
    return np.asarray(plot.image)


def _note(count: int, shown: int, errors: NDArray[Any], visible: float) -> str:
    """Explain what cannot be seen: exponents left out, or an error band narrower than the dots."""
    notes = [f"{count - shown} of {count} left out: wiped out or not finite"] * (shown < count)
    if shown and not len(errors):
        notes.append("error unknown")
    elif shown and errors.max() < visible:
        notes.append("band within the dots")
    return f" ({'; '.join(notes)})" if notes else ""
