"""When a measurement is due, and whether the budget of time allows it."""

import math
from typing import NamedTuple

from lightning_lyapunov.callbacks.overhead import Overhead

__all__ = ["Progress", "Schedule", "is_asked_for"]


class Progress(NamedTuple):
    """Where a fit is.

    Attributes:
        global_step: the optimizer steps taken so far.
        epoch: the current epoch, from 0.
        is_last_batch: whether the current batch is the last one of its epoch.
        batch: the batches of the epoch before the current one.
        num_batches: the batches of an epoch; infinite if that is not known.
        accumulate: the batches of an optimizer step.
        max_steps: the optimizer steps of the fit; -1 if they are not limited.
    """

    global_step: int
    epoch: int
    is_last_batch: bool
    batch: int = 0
    num_batches: float = math.inf
    accumulate: int = 1
    max_steps: int = -1


def is_asked_for(every_n_epochs: int | None, every_n_train_steps: int | None, progress: Progress, since: int) -> bool:
    """Return whether a schedule asks for a measurement at the end of a batch, whatever the budget.

    Args:
        every_n_epochs: at the end of every so many epochs; None for none of these.
        every_n_train_steps: every so many optimizer steps; None for none of these.
        progress: at the end of the batch.
        since: the optimizer steps before it, or at the last measurement.
    """
    ends_epoch = every_n_epochs is not None and progress.is_last_batch and (progress.epoch + 1) % every_n_epochs == 0
    every = every_n_train_steps
    return ends_epoch or (every is not None and progress.global_step // every > since // every)


class Schedule:
    """Decide which batches are recorded and measured, where one rank alone trains. A :class:`Progress` comes in.

    The first batch is always due. A measurement that does not fit in the budget waits for the first batch at which it
    does, that of an epoch's end for one of a later epoch.

    Args:
        every_n_epochs: a measurement is due at the end of every so many epochs; None for none of these.
        every_n_train_steps: a measurement is due every so many optimizer steps; None for none of these.
        max_overhead: the largest share of the time that measuring may take; None for any.
        overhead: the clock.

    Attributes:
        measured_step: the optimizer step of the last measurement; None before the first.
    """

    def __init__(
        self,
        every_n_epochs: int | None,
        every_n_train_steps: int | None,
        max_overhead: float | None,
        overhead: Overhead,
    ) -> None:
        self._every_n_epochs, self._every_n_train_steps = every_n_epochs, every_n_train_steps
        self._max_overhead, self._overhead = max_overhead, overhead
        self.measured_step: int | None = None
        # The end of an epoch that has not been measured yet, and the batch before which no measurement fits.
        self._epoch_pending, self._decide_at = False, 0
        # Where a recorded batch started, and the most optimizer steps that one took.
        self._recorded_from: int | None = None
        self._steps_per_batch = 1

    def record_batch(self, progress: Progress) -> bool:
        """Count a batch that starts; return whether to record it, because a measurement will be due at its end."""
        self._overhead.start_batch()
        self._recorded_from = None
        if not self._is_due(progress, progress.global_step + self._steps_per_batch):
            return False
        if self._within_budget():
            self._recorded_from = progress.global_step
            return True
        self._epoch_pending |= self._ends_due_epoch(progress)
        return False

    def measure_batch(self, progress: Progress) -> bool:
        """Return whether to measure at the end of a batch."""
        if self._recorded_from is None:
            return False
        self._steps_per_batch = max(self._steps_per_batch, progress.global_step - self._recorded_from)
        self._recorded_from = None
        return self._is_due(progress, progress.global_step)

    def end_batch(self, progress: Progress) -> None:
        """Do nothing: there is no other rank to agree with."""

    def measure_epoch(self, progress: Progress) -> bool:
        """Return whether to measure after an epoch: where it was cut short, its last batch was not foreseen."""
        if not self._epoch_is_due(progress) or self.measured_step in (None, progress.global_step):
            return False
        self._epoch_pending = not self._within_budget()
        return not self._epoch_pending

    def measured(self, global_step: int) -> None:
        """Take note of a measurement."""
        self.measured_step, self._epoch_pending = global_step, False

    def _is_due(self, progress: Progress, global_step: int) -> bool:
        """Return whether to measure at the end of a batch that ends, or would end, at ``global_step``."""
        every = self._every_n_train_steps
        return (
            self.measured_step is None
            or self._epoch_pending
            or self._ends_due_epoch(progress)
            or (every is not None and global_step // every > self.measured_step // every)
        )

    def _ends_due_epoch(self, progress: Progress) -> bool:
        return progress.is_last_batch and self._epoch_is_due(progress)

    def _epoch_is_due(self, progress: Progress) -> bool:
        return self._every_n_epochs is not None and (progress.epoch + 1) % self._every_n_epochs == 0

    def _within_budget(self) -> bool:
        """Return whether a due measurement fits in the budget."""
        if self._max_overhead is None or self.measured_step is None:
            return True
        batch = self._overhead.num_batches
        if batch >= self._decide_at:
            self._decide_at = batch + self._overhead.batches_to_wait(self._max_overhead, batch - 1)
        return batch >= self._decide_at
