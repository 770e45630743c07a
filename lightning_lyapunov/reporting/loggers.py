"""Which logger takes what: pictures, histograms and charts of a spectrum."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_lyapunov.confidence import NORMAL_QUANTILE
from lightning_lyapunov.reporting.canvas import resolved
from lightning_lyapunov.reporting.overview import overview_picture
from lightning_lyapunov.reporting.pictures import current_spectrum_picture, spectrum_picture, units_picture
from lightning_lyapunov.reporting.room import check_room
from lightning_lyapunov.units import participation

__all__ = ["Overview", "log_spectra", "lyapunov_layout", "takes_numbers_only"]

# TensorBoard orders by name, and an underscore comes before letters.
_OVERVIEW = "lyapunov/_overview"

_PictureCall: TypeAlias = Callable[[str, NDArray[np.uint8], int], Any]


class Overview(NamedTuple):
    """What the overview says of a measurement.

    Attributes:
        worst: the cell to name.
        sentence: what the measurement means, in a few words.
        tone: ``"grows"``, ``"forgets"`` or "".
        advice: what to do, a sentence for each cell that needs it.
    """

    worst: str
    sentence: str
    tone: str = ""
    advice: tuple[str, ...] = ()


def log_spectra(
    logger: Any,
    history: Mapping[str, Mapping[str, Tensor]],
    step: int,
    *,
    quantiles: Mapping[str, float] | None = None,
    band: bool = False,
    overview: Overview | None = None,
    units: Mapping[str, Mapping[str, Tensor]] | None = None,
    lengths: Mapping[str, float] | None = None,
    drawn: Collection[str] | None = None,
    numbers: bool = True,
    pictures: bool = True,
) -> bool:
    """Send the overview and two pictures of each layer, its last spectrum and all of them, to a logger of pictures.

    TensorBoard gets the last spectrum as a histogram, too. Loggers are told by what they can do, because two packages
    have classes of the same name. The ``prefix`` of a logger stands before these tags, as before those of the scalars.

    Args:
        logger: a logger of Lightning's kind.
        history: for each layer ``"step"``, ``(m,)``, ``"spectrum"`` and ``"stderr"``, ``(m, num_exponents)``, nats per
            step, largest first: CPU tensors.
        step: the step of the last measurement.
        quantiles: for each layer how many standard errors a 95 % confidence interval reaches to either side;
            1.96, that of many sequences, for those not named.
        band: log the 95 % confidence band of the largest exponent as scalars, too, where a logger takes them by
            ``add_scalar``: ``"lyapunov_band/<layer>/lower"`` and ``".../upper"``. See :func:`lyapunov_layout`.
        overview: what the overview says; the worst layer and the advice are sent as text, ``"lyapunov/worst_layer"``
            and ``"lyapunov/advice"``, where a logger takes it by ``add_text``. None for no overview.
        units: for each layer ``"step"``, ``(m,)``, and as ``"spectrum"`` the shares of its units in the leading
            direction, ``(m, units)``: a picture of each, and of the worst layer the text ``"lyapunov/units"``.
        lengths: for each layer the steps of its sequences, if they are known.
        drawn: the layers that get pictures and a histogram of their own; None for all of ``history``.
        numbers: send the text, histograms and bands.
        pictures: send the pictures.

    Returns:
        False for a logger that is not known to take pictures, nor to take numbers only.

    Raises:
        OSError: if there is no room for pictures on the disk.
    """
    show = _picture_call(logger)
    layers = history if drawn is None else drawn
    if show:
        check_room(logger, len(layers) + (overview is not None))
    if numbers and overview is not None:
        _add_texts(logger, overview, (units or {}).get(overview.worst), step)
    if pictures and show and overview is not None:
        worst, sentence, tone, _ = overview
        length = (lengths or {}).get(worst, math.nan)
        arrays = {name: {key: values.numpy() for key, values in one.items()} for name, one in history.items()}
        picture = overview_picture(arrays, worst, sentence, tone=tone, quantiles=quantiles, length=length)
        show(_OVERVIEW, picture, step)
    for layer, measurements in history.items():
        half_width = (quantiles or {}).get(layer, NORMAL_QUANTILE) * measurements["stderr"][-1].numpy()
        is_drawn = layer in layers
        if numbers:
            _add_numbers(logger, layer, measurements["spectrum"][-1].numpy(), half_width, step, band, is_drawn)
        if pictures and show and is_drawn:
            _draw(show, layer, measurements, half_width, step, (lengths or {}).get(layer, math.nan))
    for layer, measurements in (units or {}).items():
        if pictures and show and layer in layers:
            steps, shares = (measurements[key].numpy() for key in ("step", "spectrum"))
            show(f"lyapunov/{layer}/unit_shares", units_picture(steps, shares, f"Units of {layer}"), step)
    return show is not None or takes_numbers_only(logger)


def _add_texts(logger: Any, overview: Overview, units: Mapping[str, Tensor] | None, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    prefix = _prefix_of(logger)
    if hasattr(experiment, "add_text"):
        experiment.add_text(f"{prefix}lyapunov/worst_layer", f"`{overview.worst}`", step)
        if units is not None:
            experiment.add_text(f"{prefix}lyapunov/units", _heaviest(overview.worst, units["spectrum"][-1]), step)
        if overview.advice:
            experiment.add_text(f"{prefix}lyapunov/advice", "\n\n".join(overview.advice), step)


def _heaviest(layer: str, shares: Tensor) -> str:
    """Name the units that carry the most of the leading direction, at most five, and say how many carry it."""
    largest, units = shares.topk(min(5, len(shares)))
    names = ", ".join(map(str, units.tolist()))
    return (
        f"`{layer}`: the units {names} carry {float(largest.sum()):.0%} of the leading direction, which is spread over "
        f"{float(participation(shares)) * len(shares):.3g} of {len(shares)}."
    )


def _draw(
    show: _PictureCall,
    layer: str,
    measurements: Mapping[str, Tensor],
    half_width: NDArray[Any],
    step: int,
    length: float,
) -> None:
    spectra, title = measurements["spectrum"].numpy(), f"Lyapunov exponents of {layer}"
    over_training = spectrum_picture(measurements["step"].numpy(), spectra, title, length)
    show(f"lyapunov/{layer}/spectrum_over_training", over_training, step)
    now = current_spectrum_picture(spectra[-1], half_width, f"{title}, 95 % band")
    show(f"lyapunov/{layer}/spectrum_now", now, step)


def lyapunov_layout(layers: Iterable[str], *, band: bool = False, prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """Return a page of charts for TensorBoard's tab "Custom Scalars": the layers side by side.

    TensorBoard keeps the last layout of a run only, so join it with yours and add both in one call.

    Args:
        layers: the names of the layers, as in the logged keys ``"lyapunov/<layer>/max"``.
        band: add a chart for each layer of its largest exponent with the 95 % confidence band. It stays empty unless
            the band is logged: see :func:`log_spectra`.
        prefix: that of the logger, if it has one.

    Returns:
        One category for ``SummaryWriter.add_custom_scalars``.

    Example::

        >>> mine = {"losses": {"both": ["Multiline", ["train_loss", "val_loss"]]}}
        >>> layout = mine | lyapunov_layout(["encoder", "decoder"])
        >>> # logger.experiment.add_custom_scalars(layout)
        >>> list(layout)
        ['losses', 'Lyapunov exponents']
    """
    largest = {layer: f"{_joined(prefix)}lyapunov/{layer}/max" for layer in layers}
    charts: dict[str, list[Any]] = {
        "Largest exponent, nats per step": ["Multiline", [_exactly(tag) for tag in largest.values()]],
        "Standard error of the largest exponent": [
            "Multiline",
            [_exactly(f"{tag}_stderr") for tag in largest.values()],
        ],
    }
    if band:
        for layer, tag in largest.items():
            charts[f"{layer}: largest exponent, 95 % band"] = ["Margin", [tag, *_band_tags(_joined(prefix), layer)]]
    return {"Lyapunov exponents": charts}


def _exactly(tag: str) -> str:
    """Return the regular expression that a chart of many lines finds ``tag`` by, and no longer one."""
    return f"{re.escape(tag)}$"


def _band_tags(prefix: str, layer: str) -> tuple[str, str]:
    # In a group of their own, so that they are no cards among the exponents.
    return f"{prefix}lyapunov_band/{layer}/lower", f"{prefix}lyapunov_band/{layer}/upper"


def _prefix_of(logger: Any) -> str:
    """Return what the logger puts before the keys of the scalars; its experiment would not."""
    prefix = getattr(logger, "_prefix", "")
    return _joined(prefix) if isinstance(prefix, str) else ""


def _joined(prefix: str) -> str:
    return f"{prefix}-" if prefix else ""  # Lightning's `LOGGER_JOIN_CHAR`


def _add_numbers(
    logger: Any,
    layer: str,
    spectrum: NDArray[Any],
    half_width: NDArray[Any],
    step: int,
    band: bool,
    histogram: bool,
) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    prefix, known = _prefix_of(logger), spectrum[resolved(spectrum)]
    if histogram and hasattr(experiment, "add_histogram") and len(known):
        experiment.add_histogram(f"{prefix}lyapunov/{layer}/spectrum", known, step)
    if band and hasattr(experiment, "add_scalar"):
        for tag, bound in zip(_band_tags(prefix, layer), (-half_width[0], half_width[0]), strict=True):
            experiment.add_scalar(tag, float(spectrum[0] + bound), step)


def _picture_call(logger: Any) -> _PictureCall | None:
    """Return the call by which a logger is shown a picture, ``(tag, picture, step)``; None for one that takes none."""
    experiment: Any = getattr(logger, "experiment", None)
    prefix = _prefix_of(logger)
    if hasattr(experiment, "add_image"):  # TensorBoard
        return lambda tag, picture, step: experiment.add_image(prefix + tag, picture, step, dataformats="HWC")
    # W&B: the logger keeps our step beside W&B's own and adds its prefix.
    if hasattr(logger, "log_image"):
        return lambda tag, picture, step: logger.log_image(tag, [picture], step=step)
    if hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
        run_id = logger.run_id
        return lambda tag, picture, step: _add_to_mlflow(experiment.log_image, run_id, prefix + tag, picture, step)
    return None


def _add_to_mlflow(log_image: Callable[..., Any], run_id: str, tag: str, picture: NDArray[np.uint8], step: int) -> None:
    # MLflow refuses these characters; Lightning's logger leaves them out of the names of scalars, too.
    key = re.sub("[^a-zA-Z0-9_/. -]+", "", tag)
    if "key" in inspect.signature(log_image).parameters:
        log_image(run_id, picture, key=key, step=step)
    else:  # an older MLflow, which has files only
        log_image(run_id, picture, f"{key}/{step:08d}.png")


def takes_numbers_only(logger: Any) -> bool:
    """Return whether a logger writes a table of numbers and nothing else."""
    return hasattr(getattr(logger, "experiment", None), "metrics_file_path")  # CSV
