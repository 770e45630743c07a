"""Spectra as RGB pictures, drawn with Pillow."""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR

__all__ = ["current_spectrum_picture", "resolved", "spectrum_picture"]

# TensorBoard shows a card of about 340 x 240 points: twice that, with letters that can still be read there. It leaves
# out the pixels between: what is thinner than three, a zero line or the sign of a number, may not be seen.
_WIDTH, _HEIGHT, _FONT_SIZE, _THIN = 800, 560, 30, 3
_TOP, _BOTTOM = 58, 462  # the edges of each plot
_MAP_LEFT, _MAP_RIGHT = 118, 610
_LINE_LEFT, _LINE_RIGHT = 170, 760
_BACKGROUND, _INK, _BAND, _FLOOR_GREY = (255, 255, 255), (40, 40, 40), (200, 200, 200), (110, 110, 110)
# Blue, white, red: the strength of the colour grows evenly from white to either end.
_SHRINKS, _ZERO, _GROWS = np.array([[33, 84, 163], [255, 255, 255], [178, 24, 43]], dtype=float)


def spectrum_picture(steps: NDArray[Any], spectra: NDArray[Any], title: str) -> NDArray[np.uint8]:
    """Draw exponents over training: one column for each measurement, the largest exponent on top.

    Red directions grow, blue ones shrink, white ones do neither, grey ones are wiped out or not finite. The colour
    follows the square root of the exponent, so that a weak instability shows beside strong contraction.

    Args:
        steps: the step of each measurement, ``(m,)``.
        spectra: nats per step, largest first, ``(m, num_exponents)``.
        title: what to write above.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    sizes = np.abs(spectra[resolved(spectra)])
    limit = max(float(np.quantile(sizes, 0.98)) if sizes.size else 1.0, 1e-3)
    measurements, exponents = spectra.shape
    plot = _Plot(_MAP_LEFT, _MAP_RIGHT)
    plot.paint(_colours(spectra.T, limit), _MAP_LEFT, _MAP_RIGHT)
    plot.label(title, "training step", "exponent", width=_MAP_RIGHT + 22 - _MAP_LEFT)
    for column in _ticks(measurements, 4):
        plot.mark_x((column + 0.5) / measurements, str(int(steps[column])))
    for row in _ticks(exponents, 5):
        plot.mark_y((row + 0.5) / exponents, str(row + 1))
    _draw_scale(plot, limit)
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
    low, high = _range(np.concatenate((values, (values - errors)[known], (values + errors)[known])))
    plot = _Plot(_LINE_LEFT, _LINE_RIGHT)

    def y(value: Any) -> Any:
        return plot.y((high - value) / (high - low))

    x = plot.x((np.flatnonzero(shown) + 0.5) / len(spectrum))
    plot.fill_between(x[known], y(values - errors)[known], y(values + errors)[known])
    plot.frame(_LINE_LEFT, _LINE_RIGHT)
    plot.draw.line((_LINE_LEFT, y(0), _LINE_RIGHT - 1, y(0)), _INK, _THIN)
    radius = min(6.0, max(1.5, (_LINE_RIGHT - _LINE_LEFT) / len(spectrum) / 3))
    plot.join(x, y(values), values, radius)
    visible = radius * (high - low) / (_BOTTOM - _TOP)
    plot.label(title, "exponent" + _note(len(spectrum), len(values), errors[known], visible), "nats per step")
    for index in _ticks(len(spectrum), 5):
        plot.mark_x((index + 0.5) / len(spectrum), str(index + 1))
    for value in _round_numbers(low, high):
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


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


class _Plot:
    """A picture with a plot; places in it are shares of the plot's width and height, from the left and the top."""

    def __init__(self, left: int, right: int) -> None:
        # Comes with tensorboard.
        from PIL import Image, ImageDraw

        self.left, self.right = left, right
        self.image = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def x(self, share: Any) -> Any:
        return self.left + share * (self.right - self.left)

    def y(self, share: Any) -> Any:
        return _TOP + share * (_BOTTOM - _TOP)

    def write(self, x: float, y: float, text: str, anchor: str, width: float = math.inf) -> None:
        """Write, in smaller letters if it would be wider than ``width``."""
        font = _font(_FONT_SIZE)
        share = width / max(self.draw.textlength(text, font), 1)
        if share < 1:  # Small letters are a little wider than in proportion.
            font = _font(int(0.96 * share * _FONT_SIZE))
        # Twice, because the strokes are thinner than `_THIN`: half a plus would be a minus.
        for shift in (0, 1):
            self.draw.text((x + shift, y + shift), text, _INK, font, anchor=anchor)

    def label(self, title: str, below: str, beside: str, width: float = math.inf) -> None:
        """Write a title, at most ``width`` wide, and what is on the two axes."""
        self.write(self.left, 26, title, "lm", min(width, _WIDTH - 10 - self.left))
        middle = (self.left + self.right) / 2
        self.write(middle, _HEIGHT - 28, below, "mm", 2 * (_WIDTH - 10 - middle))
        upright = _Plot(0, _BOTTOM - _TOP)
        upright.write((_BOTTOM - _TOP) / 2, 18, beside, "mm")
        self.image.paste(upright.image.crop((0, 0, _BOTTOM - _TOP, 36)).rotate(90, expand=True), (0, _TOP))

    def mark_x(self, share: float, text: str) -> None:
        x = self.x(share)
        self.draw.line((x, _BOTTOM, x, _BOTTOM + 6), _INK, _THIN)
        self.write(x, _BOTTOM + 24, text, "mm")

    def mark_y(self, share: float, text: str) -> None:
        y = self.y(share)
        self.draw.line((self.left - 7, y, self.left - 1, y), _INK, _THIN)
        self.write(self.left - 12, y, text, "rm")

    def frame(self, left: int, right: int) -> None:
        self.draw.rectangle((left - _THIN, _TOP - _THIN, right + _THIN - 1, _BOTTOM + _THIN - 1), None, _INK, _THIN)

    def paint(self, colours: NDArray[np.uint8], left: int, right: int) -> None:
        """Fill a frame with cells of ``colours``, ``(rows, columns, 3)``."""
        from PIL import Image

        size = (right - left, _BOTTOM - _TOP)
        self.image.paste(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), (left, _TOP))
        self.frame(left, right)

    def fill_between(self, x: NDArray[Any], lower: NDArray[Any], upper: NDArray[Any]) -> None:
        if len(x):
            outline = [*zip(x, upper, strict=True), *zip(x[::-1], lower[::-1], strict=True)]
            self.draw.polygon(outline, _BAND, _BAND)
        # A band of one exponent is a bar.
        for column, bottom, top in zip(x, lower, upper, strict=True):
            self.draw.line((column, bottom, column, top), _BAND, 5)

    def join(self, x: NDArray[Any], y: NDArray[Any], values: NDArray[Any], radius: float) -> None:
        """Draw a line with dots in the colours of what grows and what shrinks."""
        points = list(zip(x, y, strict=True))
        if len(points) > 1:
            self.draw.line(points, _FLOOR_GREY, _THIN)
        for (column, row), value in zip(points, values, strict=True):
            colour = tuple((_GROWS if value > 0 else _SHRINKS).astype(int).tolist())
            self.draw.ellipse((column - radius, row - radius, column + radius, row + radius), colour)


def _draw_scale(plot: _Plot, limit: float) -> None:
    """Draw the scale of colours, to the right of the plot."""
    roots = np.linspace(1, -1, _BOTTOM - _TOP)
    left = plot.right + 32
    plot.paint(_colours((np.sign(roots) * roots**2 * limit)[:, None], limit), left, left + 28)
    plot.write(left, 26, "nats/step", "lm")
    for root in (1, 0.5, 0, -0.5, -1):
        y = _TOP + (1 - root) / 2 * (_BOTTOM - _TOP - 1)
        plot.write(left + 38, y, f"{np.sign(root) * root**2 * limit:+.2g}" if root else "0", "lm")


def resolved(spectrum: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which exponents are finite and above the floor."""
    return np.isfinite(spectrum) & (spectrum > EXPONENT_FLOOR)


def _colours(values: NDArray[Any], limit: float) -> NDArray[np.uint8]:
    """Return RGB colours, ``(rows, columns, 3)``; grey for what is at the floor or not finite."""
    known = resolved(values)
    strength = np.clip(np.sqrt(np.abs(np.where(known, values, 0)) / limit), 0, 1)[..., None]
    ends = np.where(values[..., None] > 0, _GROWS, _SHRINKS)
    colours = _ZERO + strength * (ends - _ZERO)
    return np.where(known[..., None], colours, _FLOOR_GREY).round().astype(np.uint8)


def _ticks(count: int, most: int) -> list[int]:
    """Return up to ``most`` indices spread from the first to the last of ``count``."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """Return limits around ``values`` and zero, with a margin."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    margin = 0.06 * (high - low) if high - low > 1e-3 else 1e-3
    return low - margin, high + margin


def _round_numbers(low: float, high: float) -> list[float]:
    """Return the multiples between two limits of a step that is 1, 2 or 5 times a power of ten: three to seven."""
    power = 10.0 ** math.floor(math.log10((high - low) / 7))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 7)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
