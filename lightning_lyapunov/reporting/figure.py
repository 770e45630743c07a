"""The spectrum of a layer as a figure for a paper or a notebook."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR

__all__ = ["history_figure"]

# With more layers there is no room for their names.
_MAX_NAMED = 12


def history_figure(history: Mapping[str, Mapping[str, Tensor]], layer: str | None = None) -> Any:
    """Draw the largest exponents of all layers over training, and the spectrum of one.

    Args:
        history: for each layer ``"step"``, ``(m,)``, ``"spectrum"`` and ``"stderr"``, ``(m, num_exponents)``.
        layer: the layer whose spectrum to draw; None for that with the largest exponent now.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if nothing has been measured of that layer.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if layer is None and history:
        layer = max(history, key=lambda name: float(history[name]["spectrum"][-1, 0].nan_to_num(-math.inf)))
    if layer is None or layer not in history:
        raise ValueError(f"`layer={layer!r}` has not been measured. Measured are: {', '.join(history) or 'none'}.")
    from matplotlib import pyplot

    figure, (over_training, now, largest) = pyplot.subplots(1, 3, figsize=(15, 3.6), layout="constrained")
    measured = {name: values.numpy() for name, values in history[layer].items()}
    _draw_spectrum(over_training, now, layer, **measured)
    largest.axhline(0, color="0.6", linewidth=1)
    for name, measurements in history.items():
        values = measurements["spectrum"][:, 0].numpy()
        is_asked = name == layer
        largest.plot(
            measurements["step"].numpy(),
            np.where(values > EXPONENT_FLOOR, values, np.nan),
            color="C3" if is_asked else "0.6",
            zorder=3 if is_asked else 2,
            label=name,
        )
    largest.set(xlabel="training step", ylabel="nats per step", title="largest exponent of each layer")
    if len(history) <= _MAX_NAMED:
        largest.legend()
    return figure


def _draw_spectrum(
    over_training: Any,
    now: Any,
    layer: str,
    step: NDArray[Any],
    spectrum: NDArray[Any],
    stderr: NDArray[Any],
) -> None:
    """Draw exponents over training, and the last spectrum with a band of 1.96 standard errors and the zero line.

    Args:
        over_training: the axes of the first.
        now: the axes of the second.
        layer: the name of the layer, for the title.
        step: the step of each measurement, ``(m,)``.
        spectrum: nats per step, largest first, ``(m, num_exponents)``.
        stderr: the standard errors, of the same shape.
    """
    shown = np.where(spectrum > EXPONENT_FLOOR, spectrum, np.nan)
    limit = float(np.nanquantile(np.abs(shown), 0.98)) if np.isfinite(shown).any() else 1.0
    index = np.arange(1, spectrum.shape[1] + 1)
    # A column for each measurement, as in the picture of the dashboard: they may lie at uneven steps.
    image = over_training.imshow(shown.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    columns = np.unique(np.linspace(0, len(step) - 1, min(len(step), 6)).round().astype(int))
    over_training.set_xticks(columns, labels=[str(value) for value in step[columns]])
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), 6)).round().astype(int))
    over_training.set_yticks(rows, labels=[str(value) for value in index[rows]])
    over_training.set(xlabel="training step", ylabel="exponent", title=f"Lyapunov exponents of {layer}")
    over_training.figure.colorbar(image, ax=over_training, label="nats per step")
    now.axhline(0, color="0.6", linewidth=1)
    now.fill_between(index, shown[-1] - 1.96 * stderr[-1], shown[-1] + 1.96 * stderr[-1], alpha=0.3, linewidth=0)
    now.plot(index, shown[-1], ".-")
    now.set(xlabel="exponent", ylabel="nats per step", title=f"at step {step[-1]}")
