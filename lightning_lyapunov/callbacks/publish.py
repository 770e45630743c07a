"""Where the numbers go: the trainer's metrics, the loggers and the history."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lyapunov.callbacks.measurement import MAX_REPEATS
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.measuring.summaries import CellMetrics
from lightning_lyapunov.reporting.advice import advice_for, headline
from lightning_lyapunov.reporting.budget import PictureBudget, worst_cells
from lightning_lyapunov.reporting.history import History
from lightning_lyapunov.reporting.loggers import Overview, log_spectra, takes_numbers_only

__all__ = ["DEFAULT_METRICS", "METRICS", "Publisher", "logger_step", "metrics_of", "show_in_bar"]

METRICS = (
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
"""What can be logged of each cell, by the last part of its key."""

DEFAULT_METRICS = ("max", "max_stderr", "log10_gradient_gain", "memory_steps", "sequence_length")
"""Is it stable, does it remember, and how sure is this."""

# The overview of a model of more cells shows the worst of them.
_MAX_LINES = 40
_LARGEST, _SMALLEST = "lyapunov/max", "lyapunov/smallest_max"


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


def show_in_bar(trainer: Any, estimates: Mapping[str, Estimate]) -> None:
    """Show the largest exponent in the progress bar, with the name of its layer if there are several."""
    estimate, connector = estimates.get(_LARGEST), trainer._logger_connector
    if estimate is not None and hasattr(connector, "_progress_bar_metrics"):
        layer = f" ({estimate.layer})" if _SMALLEST in estimates else ""
        connector._progress_bar_metrics["λ1"] = f"{estimate.value:+.3f}{layer}"


class Publisher:
    """Publish measurements on every rank, and once to each logger.

    Args:
        history: the measurements so far, to which each is added.
        warn: gives the warnings.
        log_spectrum: log pictures and histograms to the loggers that can show them.
        log_band: log the 95 % confidence band of the largest exponent of each cell, too.
        strict: raise what goes wrong in a logger's pictures.
        metrics: which of :data:`METRICS` to log of each cell.
        kinds: the kind of layer that each cell is of: ``"RNN"``, ``"LSTM"``, ``"GRU"``, or anything else.

    Attributes:
        estimates: the last measurement of each ``"lyapunov/<layer>/max"``, of ``"lyapunov/max"``, and with several
            cells of ``"lyapunov/smallest_max"``.
        advice: what to do, a sentence for each cell that needs it.
    """

    def __init__(
        self,
        history: History,
        warn: WarnOnce,
        *,
        log_spectrum: bool = True,
        log_band: bool = False,
        strict: bool = False,
        metrics: Collection[str] = DEFAULT_METRICS,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        self._history, self._warn = history, warn
        self._metrics, self._kinds = metrics, kinds or {}
        self._log_spectrum, self._log_band, self._strict = log_spectrum, log_band, strict
        self._latest: CellMetrics = {}
        self._repeats: dict[str, int] = {}
        self._measured: dict[str, Estimate] = {}
        self.estimates: dict[str, Estimate] = {}
        self.advice: tuple[str, ...] = ()
        self._worst: str | None = None
        self._first: dict[str, Estimate] = {}
        self._units = History()
        self._budget = PictureBudget()
        self._undrawn: tuple[list[str], int] | None = None

    def restore(self, estimates: dict[str, Estimate], cells: Collection[str]) -> None:
        """Go on with the estimates of an earlier run, of those of its cells that there are."""
        kept = {key: estimate for key, estimate in estimates.items() if estimate.layer in cells}
        self._measured = {key: estimate for key, estimate in kept.items() if key not in (_LARGEST, _SMALLEST)}
        self._first = {estimate.layer: estimate for estimate in self._measured.values()}
        self.estimates = kept

    def publish(
        self,
        trainer: Any,
        cells: CellMetrics,
        step: int,
        *,
        is_extra: bool = False,
        shares: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Publish the metrics of all cells, the same on every rank, at a step of the loggers.

        Args:
            trainer: the trainer.
            cells: the metrics of each cell.
            step: the step of the loggers.
            is_extra: whether it was measured only because a run was resumed.
            shares: of each unit in the leading direction of a cell, ``(units,)``, on this rank, if asked for.
        """
        scalars: dict[str, float] = {}
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for cell, metrics in cells.items():
            metrics = self._update(cell, metrics, step, is_extra)
            scalars.update({f"lyapunov/{cell}/{name}": float(metrics[name]) for name in self._metrics})
            spectrum, stderr = (metrics[name].float().cpu().reshape(-1) for name in ("spectrum", "stderr"))
            rows[cell] = spectrum, stderr
        self._history.append(step, rows)
        self._units.append(step, {cell: (share, share) for cell, share in (shares or {}).items()})
        overall = self._judge_all(list(cells))
        # Rounded once: loggers get what callbacks get.
        values = torch.tensor([*scalars.values(), *overall.values()], dtype=torch.float32, device="cpu")
        keys = [*scalars, *(f"lyapunov/{name}" for name in overall)]
        metrics_of(trainer).update(_by_key(keys, values.to(trainer.strategy.root_device)))
        numbers = dict(zip(keys, values.tolist(), strict=True))
        for logger in trainer.loggers:
            with self._guard(logger, "did not take the numbers"):
                epoch = {"epoch": float(trainer.current_epoch)} if takes_numbers_only(logger) else {}
                logger.log_metrics({**epoch, **numbers}, step=step)
        self._undrawn = None
        if self._log_spectrum and trainer.is_global_zero and trainer.loggers:
            if self._budget.is_due(step):
                with self._budget.drawing(step):
                    self._show(trainer.loggers, list(cells), step)
            else:
                self._undrawn = list(cells), step
                self._show(trainer.loggers, list(cells), step, pictures=False)

    def _judge_all(self, cells: list[str]) -> dict[str, float]:
        """Take note of the worst cells and of the advice; return what is logged of all cells together."""
        # NaN, of a network that is not finite, counts as growth.
        measured = self._measured.values()
        largest = max(measured, key=lambda e: (math.isnan(e.value), e.value), default=None)
        smallest = min(measured, key=lambda e: (math.isnan(e.value), e.value), default=None)
        self.estimates = dict(self._measured)
        if largest is not None and smallest is not None:
            self.estimates[_LARGEST] = largest
            if len(cells) > 1:
                self.estimates[_SMALLEST] = smallest
        self._worst = self._named(largest)
        for estimate in measured:
            self._first.setdefault(estimate.layer, estimate)
        sentences = [advice_for(e, self._kinds.get(e.layer, ""), self._first[e.layer]) for e in measured]
        self.advice = tuple(sentence for sentence in sentences if sentence)
        # Not NaN where a network is not finite: a rule with a threshold finds infinity, and NaN means not measured.
        overall = {
            "max": math.nan if largest is None else math.inf if math.isnan(largest.value) else largest.value,
            "max_stderr": math.nan if largest is None else largest.stderr,
            "worst_layer": math.nan if self._worst is None else cells.index(self._worst),
        }
        if len(cells) > 1:
            overall["smallest_max"] = math.nan if smallest is None else smallest.value
        return overall

    def _named(self, largest: Estimate | None) -> str | None:
        """Return the cell to name as the worst: the one of before, unless another is above it beyond their errors."""
        before = self._measured.get(f"lyapunov/{self._worst}/max")
        if largest is None or before is None or math.isnan(largest.value):
            return None if largest is None else largest.layer
        is_beyond = largest.value - before.value > math.hypot(largest.margin(), before.margin())
        return largest.layer if is_beyond else before.layer

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
        drawn = worst_cells(cells, {e.layer: e.value for e in self._measured.values()})
        shown = cells if self._log_band or len(cells) <= _MAX_LINES else sorted({*drawn, *filter(None, [self._worst])})
        history = self._history.tensors(shown, last_only=not pictures)
        options: dict[str, Any] = {
            "quantiles": {e.layer: e.quantile() for e in self.estimates.values()},
            "band": self._log_band,
            "overview": self._overview(),
            "units": self._units.tensors(last_only=not pictures),
            "lengths": {e.layer: e.length for e in self._measured.values()},
            "drawn": drawn,
            "numbers": numbers,
            "pictures": pictures,
        }
        for logger in loggers:
            with self._guard(logger, "did not take a picture"):
                if not log_spectra(logger, history, step, **options):
                    name = type(logger).__name__
                    self._warn(f"{type(logger)} is not known", f"{name} is not known to take pictures of the spectrum.")

    def _overview(self) -> Overview | None:
        if self._worst is None:
            return None
        sentence, tone = headline(self._measured[f"lyapunov/{self._worst}/max"])
        return Overview(self._worst, sentence, tone, self.advice)

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
