"""``LyapunovMonitor``: the callback's hooks, options and state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lyapunov.callbacks.guard import guarded
from lightning_lyapunov.callbacks.publish import DEFAULT_METRICS, METRICS
from lightning_lyapunov.callbacks.run import Run
from lightning_lyapunov.callbacks.saved import Saved
from lightning_lyapunov.callbacks.trainer_hooks import TrainerHooks
from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.functional import layer_growth
from lightning_lyapunov.reporting.figure import history_figure
from lightning_lyapunov.reporting.history import History, save_table
from lightning_lyapunov.reporting.page import save_page

__all__ = ["LyapunovMonitor"]


class LyapunovMonitor(TrainerHooks):
    r"""Log the Lyapunov spectrum of the recurrent layers of a model while it trains.

    The monitor measures at the first training batch, and by default at the end of every epoch. On such a batch it
    copies a few of the input sequences of each recurrent layer. After the batch it follows the layer along them, with
    the new weights, and logs how fast perturbations grow or fade. The run itself is not changed: the monitor draws no
    random numbers, computes no gradients of the model and leaves no hook behind. Where a layer draws or counts in
    evaluation mode, random states (of torch, Python and NumPy) and the attributes of its class are given back; global
    variables and what a closure holds cannot be reached.

    ``EarlyStopping`` and ``ModelCheckpoint`` find ``"lyapunov/max"`` whatever their settings and their place in the
    list of callbacks, because it is there from the first training batch on. With several ranks, all measure after the
    same optimizer step, from the first one on. Their epochs may differ in length: those of rank 0 count, and where the
    data do not tell how long they are, a measurement may come some steps after the end of one.

    Only calls in the trainer's own step are data, not those of other callbacks. A layer that is not called any more, or
    was replaced by another one, repeats its last values in up to three measurements, with a warning; then they are NaN.

    Args:
        modules: dotted name or names of the layers to watch, as in ``named_modules()``; None for every recurrent layer.
        every_n_epochs: measure at the end of every ``n``-th epoch; 1 if no schedule is given.
        every_n_train_steps: measure every ``n`` optimizer steps. Both schedules may be given.
        num_sequences: sequences per measurement and rank.
        max_steps: the number of steps of a sequence that are used, from its start.
        num_exponents: how many of the largest exponents to compute for each cell; None for all.
        warmup: steps at the start of each sequence that are not averaged, at most half of the longest; None for 50.
        qr_interval: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        dtype: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        log_spectrum: log pictures and histograms of the spectra to the loggers that can show them: pictures whenever
            the run is a quarter longer than at the last ones, if drawing takes at most 1 % of its time, and at its end.
        log_band: log the 95 % confidence band of the largest exponent of each cell to TensorBoard, too, as
            ``"lyapunov_band/<layer>/lower"`` and ``".../upper"``, for the charts of
            :func:`~lightning_lyapunov.lyapunov_layout`.
        log_units: log which units carry the leading direction of each cell: a picture over training,
            ``"lyapunov/<layer>/unit_shares"``, and the heaviest units of the worst layer as the text
            ``"lyapunov/units"``. It is another pass over the sequences, with one vector, of rank 0.
        metrics: which numbers to log of each cell: a list of names, or ``"all"``; None for ``max``, ``max_stderr``,
            ``log10_gradient_gain``, ``memory_steps`` and ``sequence_length``, the fewest that tell whether it is
            stable, whether it remembers, and how sure that is. The others are ``mean``, ``kaplan_yorke_dimension``,
            ``kolmogorov_sinai_entropy``, ``num_positive``, ``share_near_zero``, ``num_sequences`` and ``num_steps``.
        prog_bar: show the largest exponent in the progress bar, with the name of its layer if there are several.
        strict: raise an error of a measurement, instead of warning once and logging NaN.
        max_overhead: the largest share of the time since the first training batch that measuring may take, such as
            0.01. The first batch is always measured. A due measurement waits until the share allows it, assuming that
            it takes as long as the last one; meanwhile the last values stay. The clock of rank 0 decides for all
            ranks. None: no limit, and a warning if measuring takes more than 30 s and more than a tenth of the time.

    Attributes:
        estimates: the last measurement of each ``"lyapunov/<layer>/max"``, and of ``"lyapunov/max"``: value, standard
            error, number of sequences, layer, step and the length of the sequences. They are saved in checkpoints.
        growth_of: computes the growth of the cells of a layer: :func:`~lightning_lyapunov.functional.layer_growth`. A
            subclass may replace it.

    Raises:
        ValueError: if an argument is out of range; at the start of a fit, if the model has no layer of a name in
            ``modules``, or no recurrent layer.
        TypeError: if ``modules`` is no name and no list of names.

    The defaults follow from measurements (``tests/benchmarks/bench_monitor.py``) on initialised and trained RNN, GRU
    and LSTM layers of 64 units, against runs of 10,000 steps. With 100 steps and a warm-up of 50, the largest exponent
    is off by at most 0.005 nats per step, which is about the standard error of 16 sequences. With a warm-up of 20 it is
    off by up to 0.02, with 50 steps by up to 0.04, with 250 steps by 0.001 at two and a half times the cost.

    Example::

        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [LyapunovMonitor(every_n_train_steps=100), ModelCheckpoint(monitor="val_loss")]
    """

    growth_of = staticmethod(layer_growth)

    def __init__(
        self,
        modules: str | Sequence[str] | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        num_sequences: int = 16,
        max_steps: int = 100,
        num_exponents: int | None = 16,
        warmup: int | None = None,
        qr_interval: int | Literal["auto"] = "auto",
        dtype: torch.dtype | None = None,
        log_spectrum: bool = True,
        log_band: bool = False,
        log_units: bool = False,
        metrics: Sequence[str] | Literal["all"] | None = None,
        prog_bar: bool = False,
        strict: bool = False,
        max_overhead: float | None = None,
    ) -> None:
        counts = {
            "every_n_epochs": every_n_epochs,
            "every_n_train_steps": every_n_train_steps,
            "num_exponents": num_exponents,
            "qr_interval": None if isinstance(qr_interval, str) and qr_interval == "auto" else qr_interval,
        }
        _check_at_least(1, num_sequences=num_sequences, max_steps=max_steps)
        _check_at_least(1, **{name: value for name, value in counts.items() if value is not None})
        _check_warmup(warmup, max_steps)
        _check_dtype(dtype)
        _check_share(max_overhead)
        self.metrics, self.prog_bar, self.log_units = _checked_metrics(metrics), prog_bar, log_units
        self.modules = _checked_names(modules)
        self.every_n_epochs = 1 if every_n_epochs is None and every_n_train_steps is None else every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.num_sequences, self.max_steps = num_sequences, max_steps
        self.num_exponents, self.warmup = num_exponents, warmup
        self.qr_interval: int | Literal["auto"] = qr_interval
        self.dtype, self.log_spectrum, self.log_band, self.strict = dtype, log_spectrum, log_band, strict
        self.max_overhead = max_overhead
        self.estimates: dict[str, Estimate] = {}
        self._advice: tuple[str, ...] = ()
        self._history = History()
        self._run: Run | None = None
        self._measured_step: int | None = None
        self._loaded: Saved | None = None

    @property
    def history(self) -> dict[str, dict[str, Tensor]]:
        """The measurements of each cell so far.

        For ``m`` measurements ``history[layer]`` holds ``"step"`` ``(m,)``, the step of the loggers; ``"spectrum"``
        ``(m, num_exponents)``, nats per step, largest first; and ``"stderr"``, its standard error, of the same shape:
        tensors on the CPU. NaN fills up what was measured with fewer exponents.

        At most 1,000 measurements of a cell are kept. When there are more, every second one is dropped, and from then
        on every second new one: what is kept covers the whole run evenly, the first and the last measurement included.
        """
        return self._history.tensors()

    # Afterwards

    def advice(self) -> list[str]:
        """Return what is wrong at the last measurement and what to do, a sentence for each cell that needs it.

        It is logged to TensorBoard, too, as the text ``"lyapunov/advice"``, and said at the end of a fit. Nothing is
        said of a cell whose 95 % confidence interval does not lie beyond the limit as a whole.
        """
        return list(self._advice)

    def report(self, path: str | Path) -> None:
        """Write one page about the run that needs no network: overview, spectra, advice and settings.

        Args:
            path: the ``.html`` file.

        Raises:
            ValueError: if ``path`` does not end in ``.html``, or nothing has been measured.
        """
        names = [
            *("modules", "every_n_epochs", "every_n_train_steps", "num_sequences", "max_steps", "num_exponents"),
            *("warmup", "qr_interval", "dtype", "max_overhead"),
        ]
        settings = {name: getattr(self, name) for name in names}
        save_page(path, self.history, self.estimates, self.advice(), settings)

    def save_history(self, path: str | Path) -> None:
        """Write :attr:`history` to a table: a row for each layer, step and exponent.

        Args:
            path: a ``.csv`` file, with the columns ``layer``, ``step``, ``exponent`` (from 1), ``value``, ``stderr``,
                or a ``.npz`` file, with the arrays ``<layer>/step``, ``<layer>/spectrum`` and ``<layer>/stderr``.

        Raises:
            ValueError: if ``path`` ends in neither.
        """
        save_table(self.history, path)

    def plot(self, layer: str | None = None) -> Any:
        """Draw the spectrum of a layer, over training and now, and the largest exponents of all layers.

        The band around the last spectrum is of 1.96 standard errors.

        Args:
            layer: a key of :attr:`history`; by default the one with the largest exponent now.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: if nothing has been measured of that layer.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return history_figure(self.history, layer)

    # What is saved

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            modules=self.modules, every_n_epochs=self.every_n_epochs, every_n_train_steps=self.every_n_train_steps
        )

    @guarded(default={})
    def state_dict(self) -> dict[str, Any]:
        """Return the history and the estimates. Guarded: without them, the checkpoint is saved all the same."""
        return {**self._history.state_dict(), **Saved.of(self).state_dict()}

    @guarded()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a history and estimates. Guarded, and each of its cells in :class:`History`."""
        self._history.load_state_dict(state_dict)
        self._loaded = Saved.read(state_dict)
        if self._run:  # some strategies load it after the start of the fit
            self._run.resume(self)

    @guarded()
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Find the history again of a monitor that had another schedule or other modules. Guarded.

        Lightning looks for it by :attr:`state_key`, which must tell several monitors of one run apart.
        """
        if (state := _state_of(self, trainer.callbacks, checkpoint.get("callbacks") or {})) is not None:
            self.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave the run behind, and with it the model; so do the methods that Lightning binds here.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "_run": None}


def _state_of(monitor: LyapunovMonitor, callbacks: Sequence[Any], states: dict[str, Any]) -> Any:
    """Return the saved state that is taken to be a monitor's, if none goes by its key; None if none is."""
    kind = type(monitor)
    monitors = [callback for callback in callbacks if type(callback) is kind]
    known = {other.state_key for other in monitors}
    left = [key for key in states if str(key).startswith(f"{kind.__qualname__}{{") and key not in known]
    for other in (other for other in monitors if other.state_key not in states):
        modules = other._generate_state_key(modules=other.modules).removesuffix("}")
        found = [key for key in left if key.startswith(f"{modules},")] or (left if len(left) == 1 else [])
        if found and other is monitor:
            return states[found[0]]
        left = [key for key in left if key not in found[:1]]
    return None


def _check_at_least(low: int, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"`{name}={value!r}` must be a whole number, {low} or more.")


def _check_warmup(warmup: int | None, max_steps: int) -> None:
    if warmup is None:
        return
    _check_at_least(0, warmup=warmup)
    if warmup >= max_steps:
        raise ValueError(
            f"`warmup={warmup}` leaves nothing to average: `max_steps` is {max_steps}. "
            "Lower `warmup` or raise `max_steps`."
        )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64)):
        raise ValueError(f"`dtype` must be torch.float32, torch.float64 or None, not {dtype}.")


def _check_share(max_overhead: float | None) -> None:
    if max_overhead is not None and not (isinstance(max_overhead, float) and 0 < max_overhead < 1):
        raise ValueError(
            f"`max_overhead={max_overhead!r}` must be a share of the training time between 0 and 1, such as 0.01."
        )


def _checked_metrics(metrics: Sequence[str] | str | None) -> tuple[str, ...]:
    if metrics is None:
        return DEFAULT_METRICS
    names = METRICS if metrics == "all" else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f'`metrics` has no {unknown[0]!r}. Write `metrics="all"`, or some of {", ".join(METRICS)}.')
    return tuple(name for name in METRICS if name in names)


def _checked_names(modules: str | Sequence[str] | None) -> list[str] | None:
    names = [modules] if isinstance(modules, str) else modules
    if names is not None and not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"`modules` must be a dotted name, a list of them, or None, not {modules!r:.100}.")
    if names is not None and not names:
        raise ValueError("`modules` is empty: it names nothing. Name the layers to watch, or write None for all.")
    return None if names is None else list(names)
