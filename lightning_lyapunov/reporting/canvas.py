"""What pictures are drawn with: a plot with axes, a scale of colours, round numbers. Pillow draws."""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR

__all__ = [
    "BAND",
    "FLOOR_GREY",
    "GROWS",
    "INK",
    "SHRINKS",
    "THIN",
    "WIDTH",
    "Plot",
    "colour_limit",
    "colours",
    "draw_scale",
    "limits_around",
    "resolved",
    "round_numbers",
    "ticks",
]

# TensorBoard shows a card of about 340 x 240 points: twice that, with letters that can still be read there. It leaves
# out the pixels between: what is thinner than three, a zero line or the sign of a number, may not be seen.
WIDTH = 800
"""The width of every picture, in pixels."""
THIN = 3
"""The width of a thin line."""
BAND = (200, 200, 200)
"""The colour of an error band."""
INK = (40, 40, 40)
"""The colour of letters and axes."""
FLOOR_GREY = (110, 110, 110)
"""The colour of what is wiped out or not finite, and of what stands back."""
GROWS = (178, 24, 43)
"""The colour of what grows."""
SHRINKS = (33, 84, 163)
"""The colour of what shrinks."""

_BACKGROUND = (255, 255, 255)
_HEIGHT, _FONT_SIZE, _TOP, _BOTTOM = 560, 30, 58, 462
# The colour follows the square root: an exponent of an e-fold over the sequences has a third of the full colour.
_PALE_E_FOLDS = 10.0


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


class Plot:
    """A plot in a picture; places in it are shares of the plot's width and height, from the left and the top.

    Args:
        left: its left edge, in pixels.
        right: its right edge.
        top: its upper edge.
        bottom: its lower edge.
        image: the picture to draw on; None for a new one.
    """

    def __init__(
        self,
        left: int,
        right: int,
        top: int = _TOP,
        bottom: int = _BOTTOM,
        *,
        image: Any = None,
    ) -> None:
        # Comes with tensorboard.
        from PIL import Image, ImageDraw

        self.left, self.right, self.top, self.bottom = left, right, top, bottom
        self.image = Image.new("RGB", (WIDTH, _HEIGHT), _BACKGROUND) if image is None else image
        self.draw = ImageDraw.Draw(self.image)

    def x(self, share: Any) -> Any:
        return self.left + share * (self.right - self.left)

    def y(self, share: Any) -> Any:
        return self.top + share * (self.bottom - self.top)

    def write(
        self, x: float, y: float, text: str, anchor: str, width: float = math.inf, colour: tuple[int, ...] = INK
    ) -> None:
        """Write, in smaller letters if it would be wider than ``width``."""
        font = _font(_FONT_SIZE)
        share = width / max(self.draw.textlength(text, font), 1)
        if share < 1:  # Small letters are a little wider than in proportion.
            font = _font(int(0.96 * share * _FONT_SIZE))
        # Twice, because the strokes are thinner than `THIN`: half a plus would be a minus.
        for shift in (0, 1):
            self.draw.text((x + shift, y + shift), text, colour, font, anchor=anchor)

    def label(self, title: str, below: str, beside: str, width: float = math.inf) -> None:
        """Write a title, at most ``width`` wide, and what is on the two axes."""
        self.write(self.left, self.top - 32, title, "lm", min(width, WIDTH - 10 - self.left))
        middle = (self.left + self.right) / 2
        self.write(middle, self.bottom + 70, below, "mm", 2 * (WIDTH - 10 - middle))
        self.label_y(beside)

    def label_y(self, text: str) -> None:
        """Write what is on the vertical axis."""
        height = self.bottom - self.top
        upright = Plot(0, height)
        upright.write(height / 2, 18, text, "mm", height)
        self.image.paste(upright.image.crop((0, 0, height, 36)).rotate(90, expand=True), (0, self.top))

    def mark_x(self, share: float, text: str) -> None:
        x = self.x(share)
        self.draw.line((x, self.bottom, x, self.bottom + 6), INK, THIN)
        self.write(x, self.bottom + 24, text, "mm")

    def mark_y(self, share: float, text: str) -> None:
        y = self.y(share)
        self.draw.line((self.left - 7, y, self.left - 1, y), INK, THIN)
        self.write(self.left - 12, y, text, "rm")

    def frame(self, left: int, right: int) -> None:
        box = (left - THIN, self.top - THIN, right + THIN - 1, self.bottom + THIN - 1)
        self.draw.rectangle(box, None, INK, THIN)

    def paint(self, colours: NDArray[np.uint8], left: int, right: int) -> None:
        """Fill a frame with cells of ``colours``, ``(rows, columns, 3)``."""
        from PIL import Image

        size = (right - left, self.bottom - self.top)
        self.image.paste(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), (left, self.top))
        self.frame(left, right)

    def fill_between(
        self, x: NDArray[Any], lower: NDArray[Any], upper: NDArray[Any], colour: tuple[int, ...] = BAND
    ) -> None:
        if len(x):
            outline = [*zip(x, upper, strict=True), *zip(x[::-1], lower[::-1], strict=True)]
            self.draw.polygon(outline, colour, colour)
        # A band of one exponent is a bar.
        for column, bottom, top in zip(x, lower, upper, strict=True):
            self.draw.line((column, bottom, column, top), colour, 5)

    def join(self, x: NDArray[Any], y: NDArray[Any], values: NDArray[Any], radius: float) -> None:
        """Draw a line with dots in the colours of what grows and what shrinks."""
        points = list(zip(x, y, strict=True))
        if len(points) > 1:
            self.draw.line(points, FLOOR_GREY, THIN)
        for (column, row), value in zip(points, values, strict=True):
            colour = GROWS if value > 0 else SHRINKS
            self.draw.ellipse((column - radius, row - radius, column + radius, row + radius), colour)


def draw_scale(plot: Plot, limit: float) -> None:
    """Draw the scale of colours, to the right of the plot."""
    roots = np.linspace(1, -1, plot.bottom - plot.top)
    left = plot.right + 32
    plot.paint(colours((np.sign(roots) * roots**2 * limit)[:, None], limit), left, left + 28)
    plot.write(left, plot.top - 32, "nats/step", "lm")
    for root in (1, 0.5, 0, -0.5, -1):
        y = plot.top + (1 - root) / 2 * (plot.bottom - plot.top - 1)
        plot.write(left + 38, y, f"{np.sign(root) * root**2 * limit:+.2g}" if root else "0", "lm")


def resolved(spectrum: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which exponents are finite and above the floor."""
    return np.isfinite(spectrum) & (spectrum > EXPONENT_FLOOR)


def colours(values: NDArray[Any], limit: float) -> NDArray[np.uint8]:
    """Return RGB colours, ``(rows, columns, 3)``; grey for what is at the floor or not finite."""
    known = resolved(values)
    strength = np.clip(np.sqrt(np.abs(np.where(known, values, 0)) / limit), 0, 1)[..., None]
    # The strength of the colour grows evenly from white to either end.
    ends = np.where(values[..., None] > 0, np.array(GROWS, float), np.array(SHRINKS, float))
    colours = 255 + strength * (ends - 255)
    return np.where(known[..., None], colours, FLOOR_GREY).round().astype(np.uint8)


def ticks(count: int, most: int) -> list[int]:
    """Return up to ``most`` indices spread from the first to the last of ``count``."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})


def limits_around(values: NDArray[Any]) -> tuple[float, float]:
    """Return limits around ``values`` and zero, with a margin."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    margin = 0.06 * (high - low) if high - low > 1e-3 else 1e-3
    return low - margin, high + margin


def round_numbers(low: float, high: float) -> list[float]:
    """Return the multiples between two limits of a step that is 1, 2 or 5 times a power of ten: three to seven."""
    power = 10.0 ** math.floor(math.log10((high - low) / 7))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 7)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def colour_limit(spectra: NDArray[Any], length: float = math.nan) -> float:
    """Return the exponent of the full colour: that of the largest ones, but for a floor.

    An exponent that is an e-fold over the sequences or less stays pale, however small the others are.

    Args:
        spectra: nats per step.
        length: the steps of the sequences; NaN if they are not known.
    """
    sizes = np.abs(spectra[resolved(spectra)])
    floor = 1e-3 if math.isnan(length) else _PALE_E_FOLDS / max(length, 1.0)
    return max(float(np.quantile(sizes, 0.98)) if sizes.size else 1.0, floor)
