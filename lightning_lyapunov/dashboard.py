"""A spectrum as pictures and histograms, for the loggers that can show them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_lyapunov.spectrum import FLOOR

__all__ = ["log_spectra", "spectrum_picture"]

_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 62, 118, 44, 52
_PLOT_WIDTH, _PLOT_HEIGHT = 620, 336
_BACKGROUND, _INK, _FLOOR_GREY = (255, 255, 255), (40, 40, 40), (110, 110, 110)
# Blue, white, red: the ends of Moreland's diverging map, lightness growing evenly to white.
_SHRINKS, _ZERO, _GROWS = np.array([[33, 84, 163], [255, 255, 255], [178, 24, 43]], dtype=float)


def log_spectra(logger: Any, history: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Send the last spectrum of each layer as a histogram, and all of them as one picture, if ``logger`` takes them.

    Loggers are told by what their ``experiment`` can do, because two packages have classes of the same name.
    """
    experiment = logger.experiment
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

    Red directions grow, blue ones shrink, white ones do neither. The colour follows the square root of the exponent, so
    that a weak instability shows beside strong contraction.

    Args:
        steps: the step of each measurement, ``(m,)``.
        spectra: nats per step, largest first, ``(m, num_exponents)``.
        title: what to write above.

    Returns:
        An RGB picture, ``(height, width, 3)``.
    """
    from PIL import Image, ImageDraw, ImageFont

    resolved = spectra[np.isfinite(spectra) & (spectra > FLOOR)]
    limit = max(float(np.quantile(np.abs(resolved), 0.98)) if resolved.size else 1.0, 1e-3)
    image = Image.new(
        "RGB", (_MARGIN_LEFT + _PLOT_WIDTH + _MARGIN_RIGHT, _MARGIN_TOP + _PLOT_HEIGHT + _MARGIN_BOTTOM), _BACKGROUND
    )
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)

    def paste(cells: NDArray[Any], left: int, width: int) -> None:
        colours = Image.fromarray(_colours(cells, limit))
        image.paste(colours.resize((width, _PLOT_HEIGHT), Image.Resampling.NEAREST), (left, _MARGIN_TOP))
        draw.rectangle((left - 1, _MARGIN_TOP - 1, left + width, _MARGIN_TOP + _PLOT_HEIGHT), outline=_INK)

    bottom, right = _MARGIN_TOP + _PLOT_HEIGHT, _MARGIN_LEFT + _PLOT_WIDTH
    paste(spectra.T, _MARGIN_LEFT, _PLOT_WIDTH)
    draw.text((_MARGIN_LEFT + _PLOT_WIDTH / 2, 24), title, _INK, font, anchor="mm")
    draw.text((_MARGIN_LEFT + _PLOT_WIDTH / 2, bottom + 38), "training step", _INK, font, anchor="mm")
    columns, rows = spectra.shape
    for column in _ticks(columns, 5):
        x = _MARGIN_LEFT + (column + 0.5) * _PLOT_WIDTH / columns
        draw.line((x, bottom, x, bottom + 4), _INK)
        draw.text((x, bottom + 16), str(int(steps[column])), _INK, font, anchor="mm")
    for row in _ticks(rows, 6):
        y = _MARGIN_TOP + (row + 0.5) * _PLOT_HEIGHT / rows
        draw.line((_MARGIN_LEFT - 5, y, _MARGIN_LEFT - 1, y), _INK)
        draw.text((_MARGIN_LEFT - 9, y), str(row + 1), _INK, font, anchor="rm")
    label = Image.new("RGB", (_PLOT_HEIGHT, 20), _BACKGROUND)
    ImageDraw.Draw(label).text((_PLOT_HEIGHT / 2, 10), "exponent", _INK, font, anchor="mm")
    image.paste(label.rotate(90, expand=True), (4, _MARGIN_TOP))

    shades = np.linspace(1, -1, _PLOT_HEIGHT)
    paste((np.sign(shades) * shades**2 * limit)[:, None], right + 22, 18)
    for share in (1, 0.5, 0, -0.5, -1):
        y = _MARGIN_TOP + (1 - share) / 2 * (_PLOT_HEIGHT - 1)
        draw.text(
            (right + 47, y), f"{np.sign(share) * share**2 * limit:+.2g}" if share else "0", _INK, font, anchor="lm"
        )
    draw.text((right + 20, 24), "nats/step", _INK, font, anchor="lm")
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
