"""Where the numbers go: the trainer's metrics, the loggers and the history."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lyapunov.callbacks.measurement import MAX_REPEATS
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.confidence import student_t_quantile
from lightning_lyapunov.measuring.summaries import CellMetrics
from lightning_lyapunov.reporting.budget import PictureBudget, worst_cells
from lightning_lyapunov.reporting.history import History
from lightning_lyapunov.reporting.loggers import log_spectra

__all__ = ["Estimate", "Publisher", "logger_step", "metrics_of"]

_LOGGED = (
    "max",
    "max_stderr",
    "mean",
    "kaplan_yorke_dimension",
    "kolmogorov_sinai_entropy",
    "num_positive",
    "log10_gradient_gain",
    "memory_steps",
    "share_near_zero",
    "num_sequences",
    "num_steps",
    "sequence_length",
)


class Estimate(NamedTuple):
    """The last value of an exponent.

    Attributes:
        value: nats per step.
        stderr: its standard error.
        num_sequences: how many sequences, or segments of one, it is from.
        layer: the name of its layer.
        step: the step of the loggers.
        length: the mean length of the sequences that the layer was called with.
        is_extra: whether it was taken only because a run was resumed: without the break there would be none.
    """

    value: float
    stderr: float
    num_sequences: int
    layer: str
    step: int
    length: float = math.nan
    is_extra: bool = False

    @property
    def log10_gradient_gain(self) -> float:
        """The decades by which a gradient grows over a whole sequence."""
        return self.value * self.length / math.log(10)


def logger_step(trainer: Any, *, epoch_ended: bool = False) -> int:
    """Return the step at which Lightning itself logs now.

    Args:
        trainer: the trainer.
        epoch_ended: whether the hook is that of an epoch's end, where Lightning has counted one step further.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped - epoch_ended


def metrics_of(trainer: Any) -> dict[str, Tensor]:
    """Return the dictionary behind ``trainer.callback_metrics``.

    Reading the property computes what others have logged for the epoch, maybe before they have updated it, and lets the
    ranks wait for one another where it is reduced.
    """
    connector = trainer._logger_connector
    return connector._callback_metrics if hasattr(connector, "_callback_metrics") else trainer.callback_metrics


class Publisher:
    """Publish measurements on every rank, and once to each logger.

    Args:
        history: the measurements so far, to which each is added.
        warn: gives the warnings.
        log_spectrum: log pictures and histograms to the loggers that can show them.
        log_band: log the 95 % confidence band of the largest exponent of each cell, too.
        strict: raise what goes wrong in a logger's pictures.

    Attributes:
        estimates: the last measurement of each ``"lyapunov/<layer>/max"``, and of ``"lyapunov/max"``.
    """

    def __init__(
        self,
        history: History,
        warn: WarnOnce,
        *,
        log_spectrum: bool = True,
        log_band: bool = False,
        strict: bool = False,
    ) -> None:
        self._history, self._warn = history, warn
        self._log_spectrum, self._log_band, self._strict = log_spectrum, log_band, strict
        self._latest: CellMetrics = {}
        self._repeats: dict[str, int] = {}
        self._measured: dict[str, Estimate] = {}
        self.estimates: dict[str, Estimate] = {}
        self._budget = PictureBudget()
        self._undrawn: tuple[list[str], int] | None = None

    def restore(self, estimates: dict[str, Estimate], cells: Collection[str]) -> None:
        """Go on with the estimates of an earlier run, of those of its cells that there are."""
        kept = {key: estimate for key, estimate in estimates.items() if estimate.layer in cells}
        self._measured = {key: estimate for key, estimate in kept.items() if key != "lyapunov/max"}
        self.estimates = kept

    def publish(self, trainer: Any, cells: CellMetrics, step: int, *, is_extra: bool = False) -> None:
        """Publish the metrics of all cells, the same on every rank, at a step of the loggers."""
        scalars: dict[str, float] = {}
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for cell, metrics in cells.items():
            metrics = self._update(cell, metrics, step, is_extra)
            scalars.update({f"lyapunov/{cell}/{name}": float(metrics[name]) for name in _LOGGED})
            spectrum, stderr = (metrics[name].float().cpu().reshape(-1) for name in ("spectrum", "stderr"))
            rows[cell] = spectrum, stderr
        self._history.append(step, rows)
        worst = max(self._measured.values(), key=lambda e: (math.isnan(e.value), e.value), default=None)
        self.estimates = dict(self._measured) if worst is None else {**self._measured, "lyapunov/max": worst}
        overall = {
            # Not NaN where a network is not finite: a rule with a threshold finds infinity, and NaN means not measured.
            "max": math.nan if worst is None else math.inf if math.isnan(worst.value) else worst.value,
            "max_stderr": math.nan if worst is None else worst.stderr,
            "worst_layer": math.nan if worst is None else list(cells).index(worst.layer),
        }
        # Rounded once: loggers get what callbacks get.
        values = torch.tensor([*scalars.values(), *overall.values()], dtype=torch.float32, device="cpu")
        keys = [*scalars, *(f"lyapunov/{name}" for name in overall)]
        metrics_of(trainer).update(_by_key(keys, values.to(trainer.strategy.root_device)))
        numbers = dict(zip(keys, values.tolist(), strict=True))
        for logger in trainer.loggers:
            with self._guard(logger, "did not take the numbers"):
                logger.log_metrics(numbers.copy(), step=step)
        self._undrawn = None
        if self._log_spectrum and trainer.is_global_zero and trainer.loggers:
            self._show(trainer.loggers, list(cells), step, pictures=self._budget.is_due(step))

    def finish(self, trainer: Any) -> None:
        """Draw the last measurement of a run, if its pictures were left out."""
        if self._undrawn is not None:
            (cells, step), self._undrawn = self._undrawn, None
            self._show(trainer.loggers, cells, step, numbers=False)

    def _update(self, cell: str, metrics: dict[str, Tensor], step: int, is_extra: bool) -> dict[str, Tensor]:
        """Return the metrics to publish of a cell: for a while the last ones, where it was not called on any rank."""
        if metrics["num_sequences"] > 0:
            self._repeats[cell] = 0
            # A layer that was not called or not measured must not end a run; NaN in one that was is the network's own.
            values = float(metrics["max"]), float(metrics["max_stderr"]), int(metrics["num_sequences"])
            length = float(metrics["sequence_length"])
            self._measured[f"lyapunov/{cell}/max"] = Estimate(*values, cell, step, length, is_extra)
        else:
            self._repeats[cell] = self._repeats.get(cell, 0) + 1
            if self._repeats[cell] > MAX_REPEATS:
                self._measured.pop(f"lyapunov/{cell}/max", None)
            elif metrics["num_sequences"] == 0:
                metrics = self._latest.get(cell, metrics)
        self._latest[cell] = metrics
        return metrics

    def _show(self, loggers: Any, cells: list[str], step: int, *, numbers: bool = True, pictures: bool = True) -> None:
        """Log the numbers that loggers take beside scalars, and pictures of the worst cells."""
        if not pictures:
            self._undrawn = cells, step
        drawn = worst_cells(cells, {e.layer: e.value for e in self._measured.values()})
        worst = self.estimates.get("lyapunov/max")
        history = self._history.tensors(cells if self._log_band else drawn, last_only=not pictures)
        options: dict[str, Any] = {
            "quantiles": {e.layer: student_t_quantile(0.975, e.num_sequences - 1) for e in self.estimates.values()},
            "band": self._log_band,
            "worst": None if worst is None else worst.layer,
            "drawn": drawn,
            "numbers": numbers,
            "pictures": pictures,
        }
        for logger in loggers:
            with self._guard(logger, "did not take a picture"):
                if not log_spectra(logger, history, step, **options):
                    name = type(logger).__name__
                    self._warn(f"{type(logger)} is not known", f"{name} is not known to take pictures of the spectrum.")

    @contextmanager
    def _guard(self, logger: Any, problem: str) -> Iterator[None]:
        """Warn once of an error in a logger: the other loggers are served, and the run goes on."""
        try:
            yield
        except Exception as error:
            if self._strict or isinstance(error, Warning):
                raise
            message = f"{type(logger).__name__} {problem}: {type(error).__name__}: {error}"
            self._warn(f"{type(logger)} {problem}", message)


def _by_key(keys: list[str], values: Tensor) -> dict[str, Tensor]:
    """Return each value as a tensor of its own: whoever keeps or saves one keeps no other."""
    return {key: value.clone() for key, value in zip(keys, values.unbind(), strict=True)}
