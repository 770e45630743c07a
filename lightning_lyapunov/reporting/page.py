"""One page about a run, which needs no network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_lyapunov.confidence import NORMAL_QUANTILE, Estimate
from lightning_lyapunov.reporting.advice import headline
from lightning_lyapunov.reporting.overview import overview_picture
from lightning_lyapunov.reporting.pictures import current_spectrum_picture, spectrum_picture

__all__ = ["save_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Lyapunov exponents</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ width: 100%; max-width: 27rem; vertical-align: top; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; }}
</style></head><body>
<h1>Lyapunov exponents</h1>
<p>{sentence}</p>
{overview}
<h2>What to do</h2>
{advice}
<h2>At the last measurement</h2>
<table><tr><th>layer</th><th>largest exponent, nats per step</th><th>decades over a sequence</th><th>steps of a sequence
</th><th>sequences</th></tr>{rows}</table>
<h2>Spectra</h2>
{spectra}
<h2>Settings</h2>
<table>{settings}</table>
</body></html>
"""


def save_page(
    path: str | Path,
    history: Mapping[str, Mapping[str, Tensor]],
    estimates: Mapping[str, Estimate],
    advice: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write one self-contained page: the overview, the spectrum of each cell, the advice and the settings.

    Args:
        path: the ``.html`` file.
        history: for each cell ``"step"``, ``(m,)``, ``"spectrum"`` and ``"stderr"``, ``(m, num_exponents)``.
        estimates: the last measurement by key, as :class:`~lightning_lyapunov.LyapunovMonitor` keeps it.
        advice: sentences on what to do.
        settings: names and values to list.

    Raises:
        ValueError: if ``path`` does not end in ``.html``, or nothing has been measured.
    """
    if Path(path).suffix != ".html":
        raise ValueError(f"`path={str(path)!r}` must end in .html.")
    worst = estimates.get("lyapunov/max")
    if worst is None or worst.layer not in history:
        raise ValueError("Nothing has been measured yet: train with the monitor first.")
    arrays = {name: {key: values.numpy() for key, values in one.items()} for name, one in history.items()}
    cells = {one.layer: one for key, one in estimates.items() if key == f"lyapunov/{one.layer}/max"}
    quantiles = {name: one.quantile() for name, one in cells.items()}
    sentence, tone = headline(worst)
    options: dict[str, Any] = {"tone": tone, "quantiles": quantiles, "length": worst.length}
    spectra = [
        _spectra(name, one, cells.get(name), quantiles.get(name, NORMAL_QUANTILE)) for name, one in arrays.items()
    ]
    page = _PAGE.format(
        sentence=html.escape(sentence),
        overview=_image(overview_picture(arrays, worst.layer, sentence, **options), "overview"),
        advice="".join(f"<p>{html.escape(one)}</p>" for one in advice) or "<p>Nothing.</p>",
        rows="".join(_row(*map(str, cell)) for cell in map(_numbers, cells.values())),
        spectra="\n".join(spectra),
        settings="".join(_row(name, str(value)) for name, value in settings.items()),
    )
    Path(path).write_text(page, encoding="utf-8")


def _numbers(cell: Estimate) -> tuple[str, ...]:
    exponent = f"{cell.value:+.4f} ± {cell.stderr:.4f}"
    return cell.layer, exponent, f"{cell.log10_gradient_gain:+.1f}", f"{cell.length:.0f}", str(cell.num_sequences)


def _spectra(name: str, measurements: Mapping[str, NDArray[Any]], cell: Estimate | None, quantile: float) -> str:
    spectra, title = measurements["spectrum"], f"Lyapunov exponents of {name}"
    length = {} if cell is None else {"length": cell.length}
    over_training = spectrum_picture(measurements["step"], spectra, title, **length)
    now = current_spectrum_picture(spectra[-1], quantile * measurements["stderr"][-1], f"{title}, 95 % band")
    return f"<h3>{html.escape(name)}</h3>" + _image(over_training, f"{name}, over training") + _image(now, name)


def _image(picture: NDArray[np.uint8], what: str) -> str:
    from PIL import Image  # comes with tensorboard

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
