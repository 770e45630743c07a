"""A spectrum as pictures and histograms, for the loggers that can show them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_lyapunov.spectrum import FLOOR

__all__ = ["log_spectra", "spectrum_picture"]

# TensorBoard shows a card of about 340 x 240 points: twice that, with letters that can still be read there.
_WIDTH, _HEIGHT, _FONT_SIZE = 800, 560, 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 100, 630, 58, 462  # the edges of the plot
_BACKGROUND, _INK, _FLOOR_GREY = (255, 255, 255), (40, 40, 40), (110, 110, 110)
# Blue, white, red: the strength of the colour grows evenly from white to either end.
_SHRINKS, _ZERO, _GROWS = np.array([[33, 84, 163], [255, 255, 255], [178, 24, 43]], dtype=float)


def log_spectra(logger: Any, history: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Send the last spectrum of each layer as a histogram, and all of them as one picture, if ``logger`` takes them.

    Loggers are told by what their ``experiment`` can do, because two packages have classes of the same name.
    """
    experiment: Any = getattr(logger, "experiment", None)
    for layer, measurements in history.items():
        spectrum = measurements["spectrum"][-1]
        resolved = spectrum[spectrum.isfinite() & (spectrum > FLOOR)].numpy()
        if hasattr(experiment, "add_histogram") and len(resolved):
            experiment.add_histogram(f"lyapunov/{layer}/spectrum", resolved, step)
        if hasattr(experiment, "add_image"):
            picture = spectrum_picture(
                measurements["step"].numpy(), measurements["spectrum"].numpy(), f"Lyapunov exponents of {layer}"
            )
            experiment.add_image(f"lyapunov/{layer}/spectrum_over_training", picture, step, dataformats="HWC")


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
    # Comes with tensorboard.
    from PIL import Image, ImageDraw, ImageFont

    resolved = np.abs(spectra[np.isfinite(spectra) & (spectra > FLOOR)])
    limit = max(float(np.quantile(resolved, 0.98)) if resolved.size else 1.0, 1e-3)
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT_SIZE)

    def paint(values: NDArray[Any], left: int, right: int) -> None:
        cells = Image.fromarray(_colours(values, limit))
        image.paste(cells.resize((right - left, _BOTTOM - _TOP), Image.Resampling.NEAREST), (left, _TOP))
        draw.rectangle((left - 1, _TOP - 1, right, _BOTTOM), outline=_INK)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text((x, y), text, _INK, font, anchor=anchor)

    measurements, exponents = spectra.shape
    paint(spectra.T, _LEFT, _RIGHT)
    write(_LEFT, 26, title, "lm")
    write((_LEFT + _RIGHT) / 2, _HEIGHT - 28, "training step", "mm")
    for column in _ticks(measurements, 4):
        x = _LEFT + (column + 0.5) * (_RIGHT - _LEFT) / measurements
        draw.line((x, _BOTTOM, x, _BOTTOM + 6), _INK, 2)
        write(x, _BOTTOM + 24, str(int(steps[column])), "mm")
    for row in _ticks(exponents, 5):
        y = _TOP + (row + 0.5) * (_BOTTOM - _TOP) / exponents
        draw.line((_LEFT - 7, y, _LEFT - 1, y), _INK, 2)
        write(_LEFT - 12, y, str(row + 1), "rm")
    upright = Image.new("RGB", (_BOTTOM - _TOP, 36), _BACKGROUND)
    ImageDraw.Draw(upright).text(((_BOTTOM - _TOP) / 2, 18), "exponent", _INK, font, anchor="mm")
    image.paste(upright.rotate(90, expand=True), (6, _TOP))

    roots = np.linspace(1, -1, _BOTTOM - _TOP)
    paint((np.sign(roots) * roots**2 * limit)[:, None], _RIGHT + 32, _RIGHT + 60)
    write(_RIGHT + 32, 26, "nats/step", "lm")
    for root in (1, 0.5, 0, -0.5, -1):
        y = _TOP + (1 - root) / 2 * (_BOTTOM - _TOP - 1)
        write(_RIGHT + 70, y, f"{np.sign(root) * root**2 * limit:+.2g}" if root else "0", "lm")
    return np.asarray(image)


def _colours(values: NDArray[Any], limit: float) -> NDArray[np.uint8]:
    """Return RGB colours, ``(rows, columns, 3)``; grey for what is at the floor or not finite."""
    known = np.isfinite(values) & (values > FLOOR)
    strength = np.clip(np.sqrt(np.abs(np.where(known, values, 0)) / limit), 0, 1)[..., None]
    ends = np.where(values[..., None] > 0, _GROWS, _SHRINKS)
    colours = _ZERO + strength * (ends - _ZERO)
    return np.where(known[..., None], colours, _FLOOR_GREY).round().astype(np.uint8)


def _ticks(count: int, most: int) -> list[int]:
    """Return up to ``most`` indices spread from the first to the last of ``count``."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})
