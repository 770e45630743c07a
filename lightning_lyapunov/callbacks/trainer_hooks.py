"""What a monitor does in the hooks of a trainer."""

from collections.abc import Sequence
from typing import Any

from lightning_lyapunov.callbacks.guard import guarded
from lightning_lyapunov.callbacks.host import AnyCallback
from lightning_lyapunov.callbacks.publish import logger_step, show_in_bar
from lightning_lyapunov.callbacks.ranks import left_out
from lightning_lyapunov.callbacks.run import Run, failure_message
from lightning_lyapunov.callbacks.saved import Saved
from lightning_lyapunov.callbacks.schedule import Progress
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.layers.discovery import find_layers
from lightning_lyapunov.reporting.history import History

__all__ = ["TrainerHooks", "progress_of"]


class TrainerHooks(AnyCallback):  # type: ignore[misc]
    """The hooks of a monitor. Each is `guarded`: that is the one place in which its errors end.

    Attributes:
        modules: the names of the layers to watch; None for every recurrent layer.
        prog_bar: whether to show the largest exponent in the progress bar.
        estimates: the last measurement.
    """

    modules: str | Sequence[str] | None
    estimates: dict[str, Estimate]
    prog_bar: bool
    _advice: tuple[str, ...]
    _history: History
    _run: Run | None
    _measured_step: int | None
    _loaded: Saved | None

    # While a model trains

    @guarded(passes=(ValueError,))
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers. Guarded, but for the errors of `modules`, which name nothing that can be measured."""
        self._start_run(trainer, pl_module)

    @guarded()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Let the training step be recorded, if a measurement is due after it. Guarded."""
        run = self._run_of(trainer)
        if run and self.prog_bar:  # Lightning empties the bar at the start of an epoch
            show_in_bar(trainer, self.estimates)
        if run and run.start_batch(trainer, progress_of(trainer)):
            run.record(trainer.strategy, "training_step")

    @guarded()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if it is due and the step was recorded. Guarded; what was recorded is dropped in any case."""
        if run := self._run_of(trainer):
            with run.recorded():
                run.end_batch(trainer, progress_of(trainer), logger_step(trainer))
                self._take(run)
                if self.prog_bar:
                    show_in_bar(trainer, self.estimates)

    @guarded()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure on the last sequences, if that is due and the last batch was not foreseen. Guarded."""
        if run := self._run_of(trainer):
            run.stop()
            if run.schedule.measure_epoch(progress_of(trainer)):
                # No batch was recorded for it: the sequences of the last measurement serve again.
                run.measurement.forget_all_but(pl_module)
                run.measure(trainer, logger_step(trainer, epoch_ended=True), again=True)
                self._take(run)

    # `trainer.validate` and `trainer.test`: once, at the first batch, or where the other ranks wait for one without.

    @guarded(passes=(ValueError,))
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers in `trainer.validate`. Guarded as `on_fit_start`."""
        if trainer.state.fn == "validate":
            self._start_run(trainer, pl_module)

    @guarded(passes=(ValueError,))
    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers. Guarded as `on_fit_start`."""
        self._start_run(trainer, pl_module)

    @guarded()
    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        """Let the first step of `trainer.validate` and `trainer.test` be recorded. Guarded."""
        run = self._run_of(trainer)
        if run and trainer.state.fn != "fit" and run.schedule.measured_step is None:
            run.record(trainer.strategy, "test_step" if trainer.state.fn == "test" else "validation_step")

    @guarded()
    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        """Measure, if the step was recorded. Guarded as `on_train_batch_end`."""
        run = self._run_of(trainer)
        if trainer.state.fn != "fit" and run and run.next_step is not None:
            with run.recorded():
                run.measure(trainer, logger_step(trainer))
                self._take(run)

    @guarded()
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take part in the measurement of the other ranks, if there was no batch here. Guarded."""
        run = self._run_of(trainer)
        if trainer.state.fn != "fit" and run:
            run.join(trainer, logger_step(trainer))
            self._take(run)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    @guarded()
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the run. Guarded. It may not come at all: nothing that this removes outlasts a step."""
        self._end_run(trainer)

    @guarded()
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the run; first join the other ranks, if this one was left out. Guarded."""
        if self._run is None and left_out(trainer, pl_module):
            self._start_run(trainer, pl_module)
            if run := self._run_of(trainer):
                run.join(trainer, logger_step(trainer))
        self._end_run(trainer)

    def _take(self, run: Run) -> None:
        """Keep what was published last."""
        self.estimates, self._advice = run.publisher.estimates, run.publisher.advice

    def _give_up(self, hook: str, error: Exception) -> None:
        run = self._run
        run._give_up(hook, error) if run else WarnOnce()(hook, failure_message(hook, error))

    def _start_run(self, trainer: Any, pl_module: Any) -> None:
        Run.start(self, trainer, pl_module, find_layers(pl_module, self.modules), self._history)

    def _run_of(self, trainer: Any) -> Run | None:
        run = self._run
        return run if run is not None and run.trainer() is trainer else None

    def _end_run(self, trainer: Any) -> None:
        if run := self._run_of(trainer):
            run.stop()
            self._measured_step, self._loaded, self._run = run.last_step, None, None
            run.finish(trainer)


def progress_of(trainer: Any) -> Progress:
    """Return where a fit is."""
    loop = trainer.fit_loop
    return Progress(
        trainer.global_step,
        trainer.current_epoch,
        trainer.is_last_batch,
        max(0, loop.batch_idx),
        loop.max_batches,
        trainer.accumulate_grad_batches,
        trainer.max_steps,
    )
