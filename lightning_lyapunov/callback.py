"""``LyapunovMonitor``: when to measure, and where the numbers go."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_lyapunov import dashboard
from lightning_lyapunov.custom_layers import CustomLayer
from lightning_lyapunov.figure import spectrum_figure
from lightning_lyapunov.functional import layer_growth, working_dtype
from lightning_lyapunov.history import History, save_table
from lightning_lyapunov.layers import as_layer, is_recurrent
from lightning_lyapunov.metrics import LyapunovSummary, student_t_quantile
from lightning_lyapunov.overhead import Overhead
from lightning_lyapunov.sampling import Recorder
from lightning_lyapunov.sequences import RecurrentLayer, Sequences
from lightning_lyapunov.sharding import gathered

__all__ = ["Estimate", "LyapunovMonitor"]

# What a window from a state of zeros needs before its largest exponent is that of the long run: see the benchmarks.
_WARMUP = 50
# A single sequence is cut into so many stretches: its error then comes from them.
_SEGMENTS = 8
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
)
_ROWS = ("spectrum", "stderr")


class Estimate(NamedTuple):
    """The last value of an exponent: its standard error, how many sequences it is from, its layer, and the step."""

    value: float
    stderr: float
    num_sequences: int
    layer: str
    step: int


class LyapunovMonitor(Callback):
    r"""Log the Lyapunov spectrum of the recurrent layers of a model while it trains.

    On a due batch the monitor copies a few of the sequences that each recurrent layer is called with, follows the
    layer along them with its new weights, and logs how fast perturbations grow or fade. It changes nothing of the run:
    it draws no random number, makes no gradient, calls no code of the user's and leaves no hook behind.

    The first value comes at the first training batch, so ``EarlyStopping`` and ``ModelCheckpoint`` find
    ``"lyapunov/max"`` whatever their settings and their place in the list of callbacks.

    Args:
        modules: dotted name or names of the layers to watch, as in ``named_modules()``; None for every recurrent layer.
        every_n_epochs: measure at the end of every so many epochs. Where no schedule is given: 1.
        every_n_train_steps: measure every so many optimizer steps. Both schedules may be given.
        num_sequences: sequences per measurement and rank.
        max_steps: the longest stretch of a sequence that is used, from its start.
        num_exponents: how many of the largest exponents to compute for each cell (all, if it has fewer); None for all.
        warmup: steps at the start of each sequence that are not averaged, at most half of the longest; None for 50.
        qr_interval: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        dtype: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        log_spectrum: log pictures and histograms of the spectra to the loggers that can show them.
        log_band: log the 95 % confidence band of the largest exponent of each cell to TensorBoard, too, as
            ``"lyapunov_band/<layer>/lower"`` and ``".../upper"``, for the charts of
            :func:`~lightning_lyapunov.lyapunov_layout`.
        strict: raise what goes wrong in a measurement, instead of warning once and logging NaN.
        max_overhead: the largest share of the time since the first training batch that measuring may take, such as
            0.01. The first batch is always measured. A measurement that would exceed the share, if it took as long as
            the last one, waits for the first batch at which it fits, and that of an epoch's end for one of a later
            epoch; until then every value stays what it was. The clock of rank 0 decides for all ranks. None to keep
            to the schedule: a warning says so if measuring takes more than a tenth of a time that matters.

    Attributes:
        estimates: the last measurement of each ``"lyapunov/<layer>/max"``, and of ``"lyapunov/max"``, as an
            :class:`Estimate`.

    Raises:
        ValueError: if an argument is out of range; at the start of a fit, if the model has no layer of a name in
            ``modules``, or no recurrent layer.

    The defaults are measured (``tests/benchmarks/bench_monitor.py``), on initialised and trained RNN, GRU and LSTM
    layers of 64 units, against a run of 10,000 steps: the largest exponent of 100 steps after 50 is off by at most
    0.005 nats per step, about the standard error of 16 sequences. After 20 it is off by up to 0.02, in 50 steps by up
    to 0.04; 250 steps are off by 0.001 and take two and a half times as long.

    Example::

        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> callbacks = [LyapunovMonitor(), EarlyStopping("lyapunov/max", divergence_threshold=0.5, patience=10**6)]
    """

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
        strict: bool = False,
        max_overhead: float | None = None,
    ) -> None:
        _check_at_least(1, num_sequences=num_sequences, max_steps=max_steps)
        if warmup is not None:
            _check_at_least(0, warmup=warmup)
        optional = {
            "every_n_epochs": every_n_epochs,
            "every_n_train_steps": every_n_train_steps,
            "num_exponents": num_exponents,
            "qr_interval": None if isinstance(qr_interval, str) and qr_interval == "auto" else qr_interval,
        }
        _check_at_least(1, **{name: value for name, value in optional.items() if value is not None})
        if warmup is not None and warmup >= max_steps:
            raise ValueError(
                f"`warmup={warmup}` leaves nothing to average: `max_steps` is {max_steps}. "
                "Lower `warmup` or raise `max_steps`."
            )
        if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"`dtype` must be torch.float32, torch.float64 or None, not {dtype}.")
        if max_overhead is not None and not (isinstance(max_overhead, float) and 0 < max_overhead < 1):
            raise ValueError(
                f"`max_overhead={max_overhead!r}` must be a share of the training time between 0 and 1, such as 0.01."
            )
        names = [modules] if isinstance(modules, str) else modules
        if names is not None and not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"`modules` must be a dotted name, a list of them, or None, not {modules!r:.100}.")
        self.modules = None if modules is None else [modules] if isinstance(modules, str) else list(modules)
        if self.modules == []:
            raise ValueError("`modules` is empty: it names nothing. Name the layers to watch, or write None for all.")
        self.every_n_epochs = 1 if every_n_epochs is None and every_n_train_steps is None else every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.num_sequences, self.max_steps = num_sequences, max_steps
        self.num_exponents, self.warmup = num_exponents, warmup
        self.qr_interval: int | Literal["auto"] = qr_interval
        self.dtype, self.log_spectrum, self.log_band, self.strict = dtype, log_spectrum, log_band, strict
        self.max_overhead = max_overhead
        self.estimates: dict[str, Estimate] = {}
        self._history = History()
        self._run: _Run | None = None

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

    # When to measure

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_run(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._run:
            return
        self._run.overhead.start_batch()
        if self._due(trainer, self._run, trainer.global_step + self._run.stride):
            if self._affords(trainer, self._run):
                self._run.recorder.start()
                self._run.started_at = trainer.global_step
            else:
                self._run.epoch_is_owed |= self._ends_due_epoch(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._run and self._run.recorder.recording:
            self._run.recorder.stop()
            self._run.stride = max(self._run.stride, trainer.global_step - self._run.started_at)
            if self._due(trainer, self._run, trainer.global_step):
                self._run.sequences = self._run.recorder.sequences()
                self._measure(trainer, self._run, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._run:
            return
        self._run.recorder.stop()
        # Where the epoch was cut short its end was not foreseen: the sequences of the last measurement serve again.
        if self._epoch_is_due(trainer) and self._run.measured_step not in (None, trainer.global_step):
            if self._affords(trainer, self._run):
                # At this hook Lightning has already counted one step further.
                self._measure(trainer, self._run, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
            else:
                self._run.epoch_is_owed = True

    # Outside of training, `trainer.validate` and `trainer.test`: once, at the first batch.

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._start_run(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start_run(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn != "fit" and self._run and self._run.measured_step is None:
            self._run.recorder.start()

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn != "fit" and self._run and self._run.recorder.recording:
            self._run.recorder.stop()
            self._run.sequences = self._run.recorder.sequences()
            self._measure(trainer, self._run, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_test_batch_start(self, trainer: Any, *_: Any) -> None:
        self.on_validation_batch_start(trainer)

    def on_test_batch_end(self, trainer: Any, *_: Any) -> None:
        self.on_validation_batch_end(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end_run()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end_run()

    def _start_run(self, trainer: Any, pl_module: Any) -> None:
        layers = _find_layers(pl_module, self.modules)
        recorder = Recorder(layers, self.num_sequences, self.max_steps)
        self._run = _Run(layers, recorder, Overhead(trainer.strategy.root_device))

    def _end_run(self) -> None:
        if self._run:
            self._run.recorder.stop()
        self._run = None

    def _epoch_is_due(self, trainer: Any) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _ends_due_epoch(self, trainer: Any) -> bool:
        return trainer.is_last_batch and self._epoch_is_due(trainer)

    def _due(self, trainer: Any, run: "_Run", global_step: int) -> bool:
        """Return whether to measure at the end of a batch that ends, or would end, at ``global_step``."""
        every = self.every_n_train_steps
        return (
            run.measured_step is None
            or run.epoch_is_owed
            or self._ends_due_epoch(trainer)
            or (every is not None and global_step // every > run.measured_step // every)
        )

    def _affords(self, trainer: Any, run: "_Run") -> bool:
        """Return whether a due measurement fits in ``max_overhead``, the same on every rank."""
        if self.max_overhead is None or run.measured_step is None:
            return True
        batch = run.overhead.num_batches
        if batch >= run.decide_at:
            # The ranks' clocks differ, so rank 0 decides. All count the batches to wait instead of asking at each.
            run.decide_at = batch + trainer.strategy.broadcast(run.overhead.batches_to_wait(self.max_overhead))
        return batch >= run.decide_at

    # What to measure

    def _measure(self, trainer: Any, run: "_Run", step: int) -> None:
        run.measured_step, run.epoch_is_owed = trainer.global_step, False
        with run.overhead.measurement():
            cells = {}
            for name, (_, layer) in run.layers.items():
                with run.overhead.layer(name):
                    cells.update(self._measure_layer(trainer, run, name, layer))
            self._publish(trainer, run, cells, step)
        complaint = run.overhead.complaint() if self.max_overhead is None and trainer.is_global_zero else None
        if complaint:
            run.warn("overhead", complaint)

    def _measure_layer(
        self, trainer: Any, run: "_Run", name: str, layer: RecurrentLayer
    ) -> dict[str, dict[str, Tensor]]:
        """Return the metrics of each cell of a layer, over the sequences of all ranks."""
        measured, device = {}, trainer.strategy.root_device
        # On a rank that has nothing to add, or fails, the others wait for it at the sums: it takes part all the same.
        growths = self._layer_growth(name, layer, run)
        if growths and _sees_a_copy(trainer):
            growths = []
        for index, cell in enumerate(layer.cell_names):
            count = self._num_exponents_of(layer, index, trainer)
            cell = f"{name}.{cell}" if len(layer.cell_names) > 1 else name
            metrics = LyapunovSummary(count).to("cpu" if device.type == "mps" else device)
            samples = growths[index] if growths else (torch.empty(0, count), torch.empty(0))
            if growths is None:
                samples = torch.full((1, count), math.nan), torch.full((1,), math.nan)
            metrics.update(*samples)
            measured[cell] = metrics.compute()
        return measured

    def _layer_growth(self, name: str, layer: RecurrentLayer, run: "_Run") -> list[tuple[Tensor, Tensor, int]] | None:
        """Return for each cell exponents ``(samples, num_exponents)``, steps ``(samples,)`` and samples per sequence.

        They are those of this rank. Nothing for a layer that was not called; None for one that could not be measured.
        """
        try:
            # In every process, whatever its batch held: all of them wait for it.
            with gathered(layer.module):
                return self._own_growth(name, layer, run)
        except Exception as error:
            if self.strict:
                raise
            run.warn(
                f"{name} could not be measured",
                f"The Lyapunov spectrum of `{name}` could not be measured; its values are NaN and training goes on. "
                f"{type(error).__name__}: {error} To raise this error, write `LyapunovMonitor(strict=True)`; for an "
                "`EarlyStopping` to wait for a first value, `check_finite=False`.",
            )
            return None

    def _own_growth(self, name: str, layer: RecurrentLayer, run: "_Run") -> list[tuple[Tensor, Tensor, int]]:
        if name in run.recorder.errors:
            raise run.recorder.errors[name]
        if name not in run.sequences:
            run.warn(
                f"{name} was not called",
                f"The recurrent layer `{name}` was not called in a training step (or it is compiled with others as "
                "one graph). Its last values are repeated.",
            )
            return []
        sequences = run.sequences[name]
        longest = int(sequences.lengths.max())
        warmup = min(_WARMUP if self.warmup is None else self.warmup, longest // 2)
        growths = layer_growth(
            layer,
            sequences,
            num_exponents=self.num_exponents,
            warmup=warmup,
            qr_interval=self.qr_interval,
            dtype=working_dtype(layer, sequences, self.dtype),
            segments=min(_SEGMENTS, longest - warmup) if len(sequences.lengths) == 1 else 1,
        )
        return [
            ((growth.total / growth.steps.unsqueeze(-1)).flatten(0, 1), growth.steps.flatten(), len(growth.steps))
            for _, growth in growths
        ]

    def _num_exponents_of(self, layer: RecurrentLayer, index: int, trainer: Any) -> int:
        """Return how many exponents of a cell to compute, the same on every rank."""
        size = layer.state_sizes[index]
        if isinstance(layer, CustomLayer):
            # Its size is known from its first call, and another rank may have seen that.
            known = torch.tensor(float(size), device=trainer.strategy.root_device)
            size = int(trainer.strategy.reduce(known, reduce_op="max")) or (self.num_exponents or 1)
        return size if self.num_exponents is None else min(self.num_exponents, size)

    # Where the numbers go

    def _publish(self, trainer: Any, run: "_Run", cells: dict[str, dict[str, Tensor]], step: int) -> None:
        scalars = {}
        for cell, metrics in cells.items():
            if metrics["num_sequences"] == 0:
                metrics = run.latest.get(cell, metrics)
            # A layer that was not called or not measured must not end a run; NaN in one that was is the network's own.
            elif metrics["num_sequences"] > 0:
                values = float(metrics["max"]), float(metrics["max_stderr"]), int(metrics["num_sequences"])
                run.measured[f"lyapunov/{cell}/max"] = Estimate(*values, layer=cell, step=step)
            run.latest[cell] = metrics
            scalars.update({f"lyapunov/{cell}/{name}": metrics[name] for name in _LOGGED})
            self._history.append(cell, step, *(metrics[name].float().cpu().reshape(-1) for name in _ROWS))
        value = stderr = place = math.nan
        worst_layer = None
        self.estimates = dict(run.measured)
        if run.measured:
            worst = max(run.measured.values(), key=lambda estimate: (math.isnan(estimate.value), estimate.value))
            self.estimates["lyapunov/max"], (value, stderr, *_) = worst, worst
            worst_layer, place = worst.layer, list(cells).index(worst.layer)
        overall = {"max": value, "max_stderr": stderr, "worst_layer": place}
        scalars.update({f"lyapunov/{name}": torch.tensor(number) for name, number in overall.items()})

        device = trainer.strategy.root_device
        trainer.callback_metrics.update({key: value.float().to(device) for key, value in scalars.items()})
        numbers = {key: float(value) for key, value in scalars.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers.copy(), step=step)
        if self.log_spectrum and trainer.is_global_zero and trainer.loggers:
            history = self.history
            history_so_far = {cell: history[cell] for cell in cells}
            quantiles = {e.layer: student_t_quantile(0.975, e.num_sequences - 1) for e in self.estimates.values()}
            for logger in trainer.loggers:
                try:
                    if not dashboard.log_spectra(
                        logger, history_so_far, step, quantiles=quantiles, band=self.log_band, worst=worst_layer
                    ):
                        run.warn(
                            f"{type(logger)} is not known",
                            f"{type(logger).__name__} is not known to take pictures of the spectrum.",
                        )
                except Exception as error:
                    if self.strict:
                        raise
                    message = f"{type(logger).__name__} did not take a picture: {type(error).__name__}: {error}"
                    run.warn(f"{type(logger)} failed", message)

    # Afterwards

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
        """Draw the spectrum of a layer over training, and the last one with a band of 1.96 standard errors.

        Args:
            layer: a key of :attr:`history`; by default the one with the largest exponent now.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: if nothing has been measured of that layer.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        history = self.history
        if layer is None and history:
            layer = max(history, key=lambda name: float(history[name]["spectrum"][-1, 0].nan_to_num(-math.inf)))
        if layer not in history:
            raise ValueError(f"`layer={layer!r}` has not been measured. Measured are: {', '.join(history) or 'none'}.")
        return spectrum_figure(layer, **{name: values.numpy() for name, values in history[layer].items()})

    # What is saved

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            modules=self.modules, every_n_epochs=self.every_n_epochs, every_n_train_steps=self.every_n_train_steps
        )

    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Find the history again of a monitor that had another schedule or other modules.

        Lightning looks for it by :attr:`state_key`, which must tell several monitors of one run apart.
        """
        states = checkpoint.get("callbacks") or {}
        monitors = [callback for callback in trainer.callbacks if type(callback) is type(self)]
        known = {monitor.state_key for monitor in monitors}
        left = [key for key in states if str(key).startswith(f"{type(self).__qualname__}{{") and key not in known]
        for monitor in (monitor for monitor in monitors if monitor.state_key not in states):
            modules = self._generate_state_key(modules=monitor.modules).removesuffix("}")
            found = [key for key in left if key.startswith(f"{modules},")] or (left if len(left) == 1 else [])
            if found and monitor is self:
                self.load_state_dict(states[found[0]])
            left = [key for key in left if key not in found[:1]]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave the run behind, and with it the model; so do the methods that Lightning binds here.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "_run": None}


@dataclass
class _Run:
    """What belongs to one fit."""

    layers: dict[str, tuple[nn.Module | None, RecurrentLayer]]
    recorder: Recorder
    overhead: Overhead
    sequences: dict[str, Sequences] = field(default_factory=dict)
    latest: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    measured: dict[str, Estimate] = field(default_factory=dict)
    measured_step: int | None = None
    # The end of an epoch that has not been measured yet, and the batch before which no measurement fits.
    epoch_is_owed: bool = False
    decide_at: int = 0
    # Where a recorded batch started, and how many optimizer steps the longest took.
    started_at: int = 0
    stride: int = 1
    warned: set[str] = field(default_factory=set)

    def warn(self, thing: str, message: str) -> None:
        """Warn once of each thing, whatever numbers the message holds."""
        if thing not in self.warned:
            self.warned.add(thing)
            warnings.warn(message, stacklevel=2)


def _find_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, tuple[nn.Module | None, RecurrentLayer]]:
    """Return the layers to watch by name.

    Raises:
        ValueError: if there are none, or none of a name.
    """
    # torch.compile wraps a module in another; both go by the name that the user gave, and so does a shared module.
    modules: dict[str, nn.Module] = {}
    one_graph = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(_without_wrappers(path), module)
        if getattr(getattr(module, "dynamo_ctx", None), "fullgraph", False):
            one_graph[_without_wrappers(path)] = module
    recurrent = {name: module for name, module in modules.items() if is_recurrent(getattr(module, "_orig_mod", module))}
    found = ", ".join(f"`{name}` ({type(module).__name__})" for name, module in recurrent.items()) or "none"
    if names is None and not recurrent:
        raise ValueError(
            f"{type(model).__name__} has no recurrent layer of torch.nn. Name the module to watch, "
            '`LyapunovMonitor(modules="...")`, or teach its class with `register_layer`.'
        )
    layers: dict[str, tuple[nn.Module | None, RecurrentLayer]] = {}
    for name in map(_without_wrappers, names or recurrent):
        if name not in modules:
            raise ValueError(f"`modules` names `{name}`, which the model does not have. Its recurrent layers: {found}.")
        try:
            layer = as_layer(modules[name])
        except TypeError as error:
            raise ValueError(
                f"`modules`: `{name}` cannot be watched. {error} The recurrent layers: {found}."
            ) from error
        if not any(layer.module is other.module for _, other in layers.values()):
            # A hook breaks a compiled graph: where that is an error it can only stand outside.
            inside = any(name.startswith(f"{path}.") for path in one_graph)
            layers[name] = (None if inside else one_graph.get(name, layer.module), layer)
    return layers


def _sees_a_copy(trainer: Any) -> bool:
    """Return whether another process counts the same batch: the first of those that share a layer between them."""
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    shared = "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
    return shared and mesh["tensor_parallel"].get_local_rank() > 0


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _check_at_least(low: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"`{name}={value!r}` must be a whole number, {low} or more.")
