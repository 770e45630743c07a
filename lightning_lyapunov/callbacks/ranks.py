"""When the ranks of a run measure, together, and the list of all that they do together.

A *collective* is a call that returns once every rank has made it. These are all of the package. Each stands where every
rank arrives, whatever batches it has. The sources of truth are what the run itself keeps equal on all ranks: the number
of optimizer steps (of batches with manual optimization), because gradients are averaged in each, and what rank 0 has
said at an earlier collective. ``is_last_batch``, the epoch and the clock of a rank are never among them.

In training, at the end of a batch whose optimizer step is the one that was agreed on last (:class:`CommonSchedule`):

* ``strategy.reduce`` of the size of a state (``Measurement._num_exponents_of``), for each cell of a layer whose states
  have no size before it is called. Which layers these are is a matter of their classes.
* ``CellSummaries.compute`` (``summarised``) gathers sums over sequences, once for all cells with as many exponents. The
  cells are those of the model at the start of the run; a rank without data, with a failed measurement, or in whose
  batch a layer was not called adds nothing or NaN, and makes the call. With ``strict`` the error is raised after it.
* ``strategy.broadcast`` of whether the first measurement of a fit is made only because it was resumed
  (``Run._take_note``).
* ``strategy.broadcast`` of the next agreement (``CommonSchedule.end_batch``): after the measurement, or instead of it.
* ``strategy.reduce_boolean_decision`` (``InstabilityStopping``): at each new measurement, which all ranks publish in
  the same hook.

In training, where :class:`~lightning_lyapunov.GradientFlossing` is due by a schedule of the same kind:

* ``strategy.broadcast`` of what rank 0 has done, the weights among it, whatever has failed there
  (``GradientFlossing._floss``); and then of the next agreement (``CommonSchedule.end_batch``).

In ``trainer.validate`` and ``trainer.test`` the gathering of a measurement, once: at the end of the first batch of a
rank; at the end of the epoch of a rank that had no batch; in ``teardown`` of a rank for which Lightning left the loop
out, which it does only with ``allow_zero_length_dataloader_with_multiple_devices``. Each rank meets one of the three
before the run itself lets the ranks meet again.

With weights that are spread over processes, ``DTensor.full_tensor``, over the processes of the tensor:

* of the weights (``sharding.gathered``), at each measurement, on every rank, whether it was called there or not;
* of arguments and results (``recorder``, ``custom``), in a recorded batch: calling such a layer is collective itself,
  so that all processes are in the same call, and all record the same batches.

Nothing else waits: loggers, pictures, warnings and the history are each rank's own. With one rank there is no
collective, also in a process group of somebody else's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.callbacks.schedule import Progress

__all__ = ["Agreement", "CommonSchedule", "left_out"]


class Agreement(NamedTuple):
    """What the ranks do next together.

    Attributes:
        at: the number of optimizer steps, or batches, after which.
        measure: whether they measure there. Otherwise rank 0 only says what comes next.
    """

    at: float
    measure: bool


class CommonSchedule:
    """Decide for all ranks after which optimizer steps to measure.

    Epochs may differ in length between ranks and end at different steps. Rank 0 therefore says at each measurement
    after which optimizer step the next one is due: at the end of the epoch on rank 0, if its length is known from the
    data or the last epoch. As long as it is not known, the ranks meet after 2, 4, 8 ... steps, until an epoch of rank 0
    has ended. The last step of ``max_steps`` ends an epoch, too. Between these meetings no rank asks another.

    Args:
        every_n_epochs: a measurement is due at the end of every so many epochs of rank 0; None for none of these.
        every_n_train_steps: a measurement is due every so many optimizer steps; None for none of these.
        max_overhead: the largest share of the time of rank 0 that measuring may take; None for any.
        overhead: the clock.
        broadcast: returns what rank 0 gives.
        is_first: whether this is rank 0.
        automatic: whether Lightning takes the optimizer steps. Otherwise batches are counted instead.

    Attributes:
        measured_step: the optimizer step of the last measurement; None before the first.
    """

    def __init__(
        self,
        every_n_epochs: int | None,
        every_n_train_steps: int | None,
        max_overhead: float | None,
        overhead: Overhead,
        *,
        broadcast: Callable[[Any], Any],
        is_first: bool,
        automatic: bool = True,
    ) -> None:
        self._every_n_train_steps, self._max_overhead = every_n_train_steps, max_overhead
        self._overhead, self._broadcast, self._is_first = overhead, broadcast, is_first
        self._epochs, self._automatic = _Epochs(every_n_epochs), automatic
        self._next: Agreement | None = None
        self._meets = False
        self._batches = self._begin = self._begin_step = 0
        self.measured_step: int | None = None

    def record_batch(self, progress: Progress) -> bool:
        """Count a batch that starts; return whether to record it, because a measurement will be due at its end."""
        self._overhead.start_batch()
        count = self._count(progress)
        if self._next is None:
            self._begin, self._begin_step = count, progress.global_step
            self._next = Agreement(count + 1, True)
            self._epochs.start(progress, count)
        return self._next.measure and count + 1 >= self._next.at

    def measure_batch(self, progress: Progress) -> bool:
        """Return whether to measure at the end of a batch, the same on every rank, recorded or not."""
        self._batches += 1
        if progress.is_last_batch:
            self._epochs.end(progress.epoch, self._count(progress), self._length(progress))
        self._meets = self._next is not None and self._count(progress) >= self._next.at
        return self._meets and self._next is not None and self._next.measure

    def end_batch(self, progress: Progress) -> None:
        """Let rank 0 say what is next, at the end of a batch after which that was agreed on.

        Raises:
            RuntimeError: if a rank has left; then there is no other agreement.
        """
        if self._meets:
            self._meets, self._next = False, Agreement(math.inf, False)
            plan = self._plan(progress, self._count(progress)) if self._is_first else None
            self._next = Agreement(*self._broadcast(plan and tuple(plan)))

    def measure_epoch(self, progress: Progress) -> bool:
        """Return False: the ranks do not end their epochs together."""
        self._epochs.end(progress.epoch, self._count(progress), self._length(progress))
        return False

    def measured(self, global_step: int) -> None:
        """Take note of a measurement."""
        self.measured_step, self._epochs.pending = global_step, False

    def _count(self, progress: Progress) -> int:
        return progress.global_step if self._automatic else self._batches

    def _plan(self, progress: Progress, count: int) -> Agreement:
        """Return what rank 0 wants next."""
        last = count + self._batches_of(progress.max_steps - progress.global_step, progress, count)
        due, known = self._epochs.due(self._length(progress), count, last if progress.max_steps > 0 else math.inf)
        at = min(due, self._step_due(progress, count))
        if not known and at > count + 1:
            look = count + max(1, count - self._begin)
            return Agreement(min(look, at - 1), False)
        if self._max_overhead is None or at == math.inf:
            return Agreement(at, True)
        if at > count + 1:
            return Agreement(at - 1, False)
        wait = self._overhead.batches_to_wait(self._max_overhead, self._overhead.num_batches)
        each = progress.accumulate if self._automatic else 1
        return Agreement(count + math.ceil(wait / each), False) if wait else Agreement(at, True)

    def _step_due(self, progress: Progress, count: int) -> float:
        every = self._every_n_train_steps
        if every is None or self.measured_step is None:
            return math.inf
        steps = (self.measured_step // every + 1) * every - progress.global_step
        return count + max(1, self._batches_of(steps, progress, count))

    def _batches_of(self, steps: int, progress: Progress, count: int) -> int:
        """Return the count of so many optimizer steps: with manual optimization, of the batches with so many."""
        if self._automatic:
            return steps
        done = max(1, progress.global_step - self._begin_step)
        return math.ceil(steps * (count - self._begin) / done)

    def _length(self, progress: Progress) -> int | None:
        if progress.num_batches == math.inf:
            return None
        return math.ceil(progress.num_batches / (progress.accumulate if self._automatic else 1))


class _Epochs:
    """The epochs of this rank, in counts of the schedule."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._epoch, self._start = 0, 0
        self._seen_length: int | None = None
        self.pending = False

    def start(self, progress: Progress, count: int) -> None:
        self._epoch, self._start = progress.epoch, count - progress.batch // progress.accumulate

    def end(self, epoch: int, count: int, length: int | None) -> None:
        """Take note of the end of an epoch, once; of its length, if the data do not tell it or it was cut short."""
        if epoch >= self._epoch:
            self.pending |= self._is_due(epoch)
            seen = count - self._start
            self._seen_length = seen if length is None or seen < length else None
            self._epoch, self._start = epoch + 1, count

    def due(self, length: int | None, count: int, last: float) -> tuple[float, bool]:
        """Return when the next due epoch ends, and whether that is known.

        Args:
            length: the length of an epoch, as far as the data tell; None if they do not.
            count: now.
            last: the end of the run.
        """
        if self._every is None:
            return math.inf, True
        if self.pending:
            return count + 1, True
        length = self._seen_length or length
        epoch, start = self._epoch, self._start
        if length and start + length == count:  # it ends now, as far as is known
            epoch, start = epoch + 1, count
        if not length or start + length < count:  # or it is longer than it should be
            return (last if self._is_due(epoch) else math.inf), False
        ahead = -(epoch + 1) % self._every
        end = start + (ahead + 1) * length
        cut = last < end and self._is_due(epoch + int(last - 1 - start) // length)
        return (last if cut else end), True

    def _is_due(self, epoch: int) -> bool:
        return self._every is not None and (epoch + 1) % self._every == 0


def left_out(trainer: Any, pl_module: Any) -> bool:
    """Return whether Lightning leaves out the loop of a rank without batches, in ``trainer.validate`` or ``test``."""
    limits = {"validate": trainer.limit_val_batches, "test": trainer.limit_test_batches}
    sources = pl_module, trainer.datamodule
    return (
        trainer.world_size > 1
        and limits.get(trainer.state.fn, 0) != 0
        and any(getattr(source, "allow_zero_length_dataloader_with_multiple_devices", False) for source in sources)
    )
