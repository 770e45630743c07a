"""What belongs to one run of a trainer, and is forgotten with it."""

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_lyapunov.callbacks.guard import guarded
from lightning_lyapunov.callbacks.measurement import Measurement
from lightning_lyapunov.callbacks.next_step import NextStep
from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.callbacks.publish import Publisher
from lightning_lyapunov.callbacks.ranks import CommonSchedule
from lightning_lyapunov.callbacks.saved import Saved
from lightning_lyapunov.callbacks.schedule import Progress, Schedule, is_asked_for
from lightning_lyapunov.callbacks.step_recorder import StepRecorder
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.measuring.layers import Options
from lightning_lyapunov.recording.hooks import beside_modes
from lightning_lyapunov.recording.recorder import Recorder
from lightning_lyapunov.reporting.history import History

__all__ = ["Run", "failure_message"]

# Lightning's own, because it is shown.
_LOG = logging.getLogger("lightning.pytorch")
# Held while a monitor takes a run. Of the module, because a monitor is copied and pickled.
_STARTING = threading.Lock()
_BUSY = (
    "This `LyapunovMonitor` measures another run, which has not ended. It goes on with that one, and this one is not "
    "measured. Give each trainer a monitor of its own."
)
_LEFT = "The ranks of this run do not train together to its end. No more is measured; the last Lyapunov exponents stay."


def failure_message(hook: str, error: Exception) -> str:
    """Return the warning of an error in a hook."""
    return (
        f"`{hook}` of `LyapunovMonitor` failed; nothing is measured there and the run goes on. {type(error).__name__}: "
        f"{error} To raise this error, write `LyapunovMonitor(strict=True)`."
    )


@dataclass
class Run:
    """The parts of a monitor that live as long as one run.

    Attributes:
        trainer: a reference to the trainer that runs; it keeps no trainer alive.
        strict: raise what goes wrong, instead of warning once.
        has_budget: whether a budget of time was given; without one, an expensive measurement is reported.
        next_step: records the step of the current batch; None for a batch that is not recorded.
        every: the epochs and the optimizer steps after which a measurement is due.
        resumed_from: the optimizer step of the last measurement of the run that this one resumes; None if of none.
        num_postponed: how many measurements were due since the last one, and did not fit in the budget.
        is_extra: whether a measurement is made only because the run was resumed at its batch.
        said_cost: whether the cost of a measurement was said.
    """

    trainer: weakref.ReferenceType[Any]
    recorder: Recorder
    schedule: Schedule | CommonSchedule
    measurement: Measurement
    publisher: Publisher
    overhead: Overhead
    warn: WarnOnce
    strict: bool = False
    has_budget: bool = False
    next_step: NextStep | None = None
    every: tuple[int | None, int | None] = (None, None)
    resumed_from: int | None = None
    num_postponed: int = 0
    is_extra: bool = False
    said_cost: bool = False
    _step: int = 0

    @classmethod
    def start(
        cls, monitor: Any, trainer: Any, pl_module: Any, layers: Mapping[str, FoundLayer], history: History
    ) -> None:
        """Give a monitor its run.

        One that goes on around this one, or in another thread, stays and is still measured, and this one is not.
        """
        warn, overhead = WarnOnce(), Overhead(trainer.strategy.root_device)
        limits = monitor.num_sequences, monitor.max_steps
        how = ("num_exponents", "warmup", "qr_interval", "dtype", "strict", "log_units")
        how_to_measure = Options(*limits, **{name: getattr(monitor, name) for name in how})
        measurement = Measurement(layers, how_to_measure, warn, monitor.growth_of)
        options = ("log_spectrum", "log_band", "metrics", "strict")
        logged = {name: getattr(monitor, name) for name in options} | {"kinds": measurement.kinds}
        run = cls(
            trainer=weakref.ref(trainer),
            recorder=StepRecorder(pl_module, layers, *limits),
            schedule=_schedule(monitor, trainer, pl_module, overhead),
            measurement=measurement,
            publisher=Publisher(history, warn, **logged),
            overhead=overhead,
            warn=warn,
            strict=monitor.strict,
            has_budget=monitor.max_overhead is not None,
            every=(monitor.every_n_epochs, monitor.every_n_train_steps),
        )
        with _STARTING:
            other: Run | None = monitor._run
            if other is None or not other._goes_on_beside(trainer):
                monitor._run = run
                run.resume(monitor)
                return
        if monitor.strict:
            raise RuntimeError(_BUSY)
        warn("another run", _BUSY)

    def _goes_on_beside(self, trainer: Any) -> bool:
        # One that failed may not have told: Lightning marks it before it calls any `on_exception`.
        mine = self.trainer()
        return mine is not None and mine is not trainer and mine.state.status == "running"

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Use what was recorded in a batch, and drop it."""
        try:
            yield
        finally:
            if self.next_step is not None:  # or nothing was recorded, and looking for hooks takes time in a large model
                self.stop()

    def record(self, strategy: Any, step: str) -> None:
        """Record the layers during the next step of a strategy, of a name such as ``"training_step"``."""
        self.stop()
        self.next_step = NextStep(strategy, step, self.start_recording, self.stop_recording)

    @guarded()
    def start_recording(self) -> None:
        """Put the hooks on the layers, at the start of a step. Guarded."""
        self.recorder.start()

    @guarded()
    def stop_recording(self) -> None:
        """Take the hooks from the layers, at the end of a step, also after an error. Guarded."""
        self.recorder.stop()

    def start_batch(self, trainer: Any, progress: Progress) -> bool:
        """Count a batch, and say once what a measurement costs; return whether to record the batch."""
        is_due = self.schedule.record_batch(progress)
        if not self.said_cost and not self.has_budget and trainer.is_global_zero:
            message = self.overhead.forecast(progress.num_batches)
            if message is not None:
                self.said_cost = True
                _LOG.info(message)
        return is_due

    def end_batch(self, trainer: Any, progress: Progress, step: int) -> None:
        """Measure at the end of a batch, if that is due, and let the ranks agree on what is next."""
        try:
            is_due = self.schedule.measure_batch(progress)
            self._take_note(trainer, progress, is_due)
            if is_due:
                self.measure(trainer, step)
        finally:  # also after an error that the other ranks may not have had
            self._agree(progress)

    def _take_note(self, trainer: Any, progress: Progress, is_due: bool) -> None:
        """Count a measurement that is asked for and postponed, and find out whether one is made only after a resume."""
        self.num_postponed += self.has_budget and not is_due and is_asked_for(*self.every, progress, self._step)
        self._step, since = progress.global_step, self.resumed_from
        is_first = self.schedule.measured_step is None
        only_resumed = since is not None and not is_asked_for(*self.every, progress, since)
        # Epochs may end at other steps on other ranks: rank 0 decides.
        self.is_extra = is_due and is_first and bool(trainer.strategy.broadcast(only_resumed))

    def measure(self, trainer: Any, step: int, *, again: bool = False) -> None:
        """Measure and publish at a step of the loggers, from the recorded calls or ``again`` from the last ones."""
        self.schedule.measured(trainer.global_step)
        self.num_postponed = 0
        with beside_modes(), self.overhead.measurement():
            calls = None if again else self.recorder.take()
            try:
                cells = self.measurement.metrics(calls, self.recorder.errors, trainer.strategy, self.overhead)
            except RuntimeError as error:
                if self.strict or trainer.world_size == 1:
                    raise
                self._warn_of_ranks(error)
                return
            self.publisher.publish(trainer, cells, step, is_extra=self.is_extra, shares=self.measurement.unit_shares)
        if not self.has_budget and trainer.is_global_zero and (message := self.overhead.warning_message()):
            self.warn("overhead", message)

    def join(self, trainer: Any, step: int) -> None:
        """Take part in the measurement of the other ranks, without a batch."""
        if trainer.world_size > 1 and self.schedule.measured_step is None:
            self.measure(trainer, step, again=True)

    def resume(self, monitor: Any) -> None:
        """Go on where the checkpoint was saved that a monitor has loaded; without one, start without estimates."""
        saved: Saved | None = monitor._loaded
        if saved is not None:
            self.resumed_from = saved.measured_step
            self.publisher.restore(saved.estimates, self.measurement.cell_names)
        monitor.estimates, monitor._loaded = self.publisher.estimates, None

    @property
    def last_step(self) -> int | None:
        """The optimizer step of the last measurement, also of that in the run that this one resumes."""
        return self.resumed_from if self.schedule.measured_step is None else self.schedule.measured_step

    def stop(self) -> None:
        """Record no more, and forget what was recorded in the current batch."""
        if self.next_step is not None:
            self.next_step.withdraw()
        self.next_step = None
        self.recorder.stop()
        self.recorder.forget()

    def finish(self, trainer: Any) -> None:
        """Draw what was left out, and say at the end of a fit what to do."""
        self.publisher.finish(trainer)
        if trainer.state.fn == "fit" and trainer.is_global_zero and self.publisher.advice:
            _LOG.info("\n".join(("Lyapunov exponents at the end of the fit:", *self.publisher.advice)))

    def _give_up(self, hook: str, error: Exception) -> None:
        """Record no more in this batch, and warn."""
        self.stop()
        self.warn(f"{hook} failed", failure_message(hook, error))

    def _agree(self, progress: Progress) -> None:
        try:
            self.schedule.end_batch(progress)
        except RuntimeError as error:
            if self.strict:
                raise
            self._warn_of_ranks(error)

    def _warn_of_ranks(self, error: RuntimeError) -> None:
        self.warn("ranks", f"{_LEFT} {type(error).__name__}: {error}")


def _schedule(monitor: Any, trainer: Any, pl_module: Any, overhead: Overhead) -> Schedule | CommonSchedule:
    options = monitor.every_n_epochs, monitor.every_n_train_steps, monitor.max_overhead, overhead
    if trainer.world_size == 1:
        return Schedule(*options)
    shared = {"broadcast": trainer.strategy.broadcast, "is_first": trainer.is_global_zero}
    return CommonSchedule(*options, **shared, automatic=pl_module.automatic_optimization)
