"""The spectrum of a layer as a figure for a paper or a notebook."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR

__all__ = ["history_figure", "spectrum_figure"]


def history_figure(history: Mapping[str, Mapping[str, Tensor]], layer: str | None = None) -> Any:
    """Draw the spectrum of a layer of a history; by default that with the largest exponent now.

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
    return spectrum_figure(layer, **{name: values.numpy() for name, values in history[layer].items()})


def spectrum_figure(layer: str, step: NDArray[Any], spectrum: NDArray[Any], stderr: NDArray[Any]) -> Any:
    """Draw exponents over training, and the last spectrum with a band of 1.96 standard errors and the zero line.

    Args:
        layer: the name of the layer, for the title.
        step: the step of each measurement, ``(m,)``.
        spectrum: nats per step, largest first, ``(m, num_exponents)``.
        stderr: the standard errors, of the same shape.

    Returns:
        The matplotlib figure.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib import pyplot

    shown = np.where(spectrum > EXPONENT_FLOOR, spectrum, np.nan)
    limit = float(np.nanquantile(np.abs(shown), 0.98)) if np.isfinite(shown).any() else 1.0
    index = np.arange(1, spectrum.shape[1] + 1)
    figure, (over_training, now) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    # A column for each measurement, as in the picture of the dashboard: they may lie at uneven steps.
    image = over_training.imshow(shown.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    columns = np.unique(np.linspace(0, len(step) - 1, min(len(step), 6)).round().astype(int))
    over_training.set_xticks(columns, labels=[str(value) for value in step[columns]])
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), 6)).round().astype(int))
    over_training.set_yticks(rows, labels=[str(value) for value in index[rows]])
    over_training.set(xlabel="training step", ylabel="exponent", title=f"Lyapunov exponents of {layer}")
    figure.colorbar(image, label="nats per step")
    now.axhline(0, color="0.6", linewidth=1)
    now.fill_between(index, shown[-1] - 1.96 * stderr[-1], shown[-1] + 1.96 * stderr[-1], alpha=0.3, linewidth=0)
    now.plot(index, shown[-1], ".-")
    now.set(xlabel="exponent", ylabel="nats per step", title=f"at step {step[-1]}")
    return figure
