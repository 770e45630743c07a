"""Which batches are measured: ``Schedule`` without a fit, and schedules in a fit."""

import itertools

import pytest
import torch
from helpers import SCHEDULES, At, Regressor, Stream, TwoOptimizers, fit, series, steps_of

from lightning_lyapunov import LyapunovMonitor
from lightning_lyapunov.callbacks.schedule import Progress, Schedule
from lightning_lyapunov.recording.recorder import Recorder

# Without a fit


class FakeOverhead:
    """Counts batches, and returns given waits."""

    def __init__(self, waits=()):
        self.num_batches, self.waits, self.asked = 0, iter(waits), []

    def start_batch(self):
        self.num_batches += 1

    def batches_to_wait(self, share, done):
        self.asked.append(share)
        return next(self.waits, 0)


def follow(schedule, *, epochs=3, batches=4, steps_per_batch=1, cut_at=None):
    """Call the schedule as a fit does; return the numbers of the recorded batches, and of the measured ones.

    A measurement after an epoch is listed as ``"end of 1"``.
    """
    recorded, measured, step, batch = [], [], 0, 0
    for epoch in range(epochs):
        for number in range(batches):
            if (epoch, number) == cut_at:
                break
            is_last = number == batches - 1
            if record := schedule.record_batch(Progress(step, epoch, is_last)):
                recorded.append(batch)
            step += steps_per_batch
            if record and schedule.measure_batch(Progress(step, epoch, is_last)):
                measured.append(batch)
                schedule.measured(step)
            batch += 1
        if schedule.measure_epoch(Progress(step, epoch, False)):
            measured.append(f"end of {epoch}")
            schedule.measured(step)
    return recorded, measured


@pytest.mark.parametrize(
    ("every_n_epochs", "every_n_train_steps", "batches"),
    [
        (1, None, [0, 3, 7, 11]),
        (2, None, [0, 7]),
        (9, None, [0]),
        (None, 1, list(range(12))),
        (None, 3, [0, 2, 5, 8, 11]),
        (None, 5, [0, 4, 9]),
        (None, 100, [0]),
        (1, 3, [0, 2, 3, 5, 7, 8, 11]),
        (2, 5, [0, 4, 7, 9]),
        (None, None, [0]),
    ],
)
def test_a_batch_is_recorded_if_a_measurement_is_due_at_its_end(every_n_epochs, every_n_train_steps, batches):
    schedule = Schedule(every_n_epochs, every_n_train_steps, None, FakeOverhead())
    assert follow(schedule) == (batches, batches)


@pytest.mark.parametrize("options", [(1, None, None), (None, 7, None), (None, None, None), (9, None, 0.01)])
def test_the_first_batch_is_due_wherever_a_fit_starts(options):
    schedule = Schedule(*options, FakeOverhead([5]))
    assert schedule.measured_step is None
    assert schedule.record_batch(Progress(1234, 56, False))
    assert schedule.measure_batch(Progress(1235, 56, False))
    schedule.measured(1235)
    assert schedule.measured_step == 1235


def test_a_first_batch_that_takes_no_optimizer_step_is_measured_too():
    schedule = Schedule(None, 2, None, FakeOverhead())
    assert schedule.record_batch(Progress(0, 0, False))
    assert schedule.measure_batch(Progress(0, 0, False))


@pytest.mark.parametrize(
    ("every", "steps_per_batch", "batches"),
    [(1, 2, [0, 1, 2, 3]), (3, 2, [0, 1, 2]), (4, 3, [0, 1, 2, 3]), (9, 4, [0, 2])],
)
def test_a_batch_of_several_optimizer_steps_is_measured_if_it_passes_a_due_one(every, steps_per_batch, batches):
    schedule = Schedule(None, every, None, FakeOverhead())
    recorded, measured = follow(schedule, epochs=1, steps_per_batch=steps_per_batch)
    assert measured == batches
    # How many steps a batch takes is known from the first one on.
    assert recorded == batches


def test_a_batch_that_was_recorded_in_vain_is_not_measured():
    """With accumulated gradients a batch may take no optimizer step."""
    schedule = Schedule(None, 1, None, FakeOverhead())
    schedule.measured(0)
    assert schedule.record_batch(Progress(0, 0, False))
    assert not schedule.measure_batch(Progress(0, 0, False))
    assert schedule.record_batch(Progress(0, 0, False))
    assert schedule.measure_batch(Progress(1, 0, False))


def test_an_epoch_that_is_cut_short_is_measured_after_it():
    schedule = Schedule(1, None, None, FakeOverhead())
    assert follow(schedule, cut_at=(1, 2)) == ([0, 3, 9], [0, 3, "end of 1", 9])


def test_an_epoch_that_ends_where_it_was_measured_last_is_not_measured_again():
    schedule = Schedule(1, 1, None, FakeOverhead())
    assert follow(schedule, cut_at=(1, 2))[1] == list(range(10))


def test_an_epoch_without_a_batch_is_not_measured():
    schedule = Schedule(1, None, None, FakeOverhead())
    assert not schedule.measure_epoch(Progress(0, 0, False))
    assert schedule.measured_step is None


def test_an_epoch_is_not_measured_after_it_if_it_is_not_due():
    schedule = Schedule(2, None, None, FakeOverhead())
    assert follow(schedule, cut_at=(0, 2)) == ([0, 5], [0, 5])


def test_without_a_budget_the_clock_is_not_asked():
    overhead = FakeOverhead([100])
    follow(Schedule(1, 1, None, overhead))
    assert overhead.num_batches == 12
    assert not overhead.asked


def test_with_a_budget_the_clock_is_not_asked_where_nothing_is_due():
    overhead = FakeOverhead([100])
    assert follow(Schedule(9, None, 0.1, overhead)) == ([0], [0])
    assert not overhead.asked


def test_the_clock_is_asked_once_and_then_batches_are_counted():
    overhead = FakeOverhead([3, 0, 2, 0])
    schedule = Schedule(None, 1, 0.1, overhead)
    # Asked at batch 1 it is 3 batches, and again at batch 4, before which nothing is recorded; so at 5 and 7.
    assert follow(schedule, epochs=1, batches=8) == ([0, 4, 7], [0, 4, 7])
    assert overhead.asked == [0.1] * 4


def test_the_end_of_an_epoch_that_does_not_fit_is_pending_until_it_does():
    # Due at batch 3, the last one of its epoch, it waits until batch 6; then at 7 it fits at once.
    schedule = Schedule(1, None, 0.1, FakeOverhead([3, 0, 0]))
    assert follow(schedule, epochs=2) == ([0, 6, 7], [0, 6, 7])


def test_a_pending_end_of_an_epoch_is_measured_once():
    # Batch 3 waits past batch 7, the end of the next epoch: one measurement at batch 8 is for both.
    schedule = Schedule(1, None, 0.1, FakeOverhead([5, 0, 0]))
    assert follow(schedule) == ([0, 8, 11], [0, 8, 11])


def test_a_due_step_that_does_not_fit_waits_until_it_does():
    # Due at batches 1, 3, 5, 7. Asked at 1, the clock says 1: that one is measured at batch 2.
    schedule = Schedule(None, 2, 0.1, FakeOverhead([1, 0, 0, 0]))
    assert follow(schedule, epochs=1, batches=8) == ([0, 2, 3, 5, 7], [0, 2, 3, 5, 7])


def test_an_epoch_that_is_cut_short_and_does_not_fit_is_pending():
    # Asked after the cut, at batch 5, the clock says 2.
    schedule = Schedule(1, None, 0.1, FakeOverhead([0, 2, 0, 0]))
    assert follow(schedule, cut_at=(1, 2)) == ([0, 3, 7, 9], [0, 3, 7, 9])


# In a fit


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [torch.utils.data.TensorDataset, Stream])
@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_counts_from_the_start_of_training(schedule, steps, dataset):
    monitor = LyapunovMonitor(**schedule)
    fit(Regressor(), monitor, data=series(4, dataset=dataset), max_epochs=3)
    assert steps_of(monitor) == steps


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"limit_train_batches": 3, "max_epochs": 2}, [0, 2, 5]),
        ({"limit_train_batches": 1, "max_epochs": 2}, [0, 1]),
        ({"max_steps": 6, "max_epochs": -1}, [0, 3, 5]),
        ({"max_steps": 1, "max_epochs": -1}, [0]),
        ({"max_steps": 8, "max_epochs": -1}, [0, 3, 7]),
    ],
    ids=str,
)
def test_every_epoch_has_a_measurement_at_its_last_batch_however_it_ends(options, steps):
    monitor = LyapunovMonitor()
    fit(Regressor(), monitor, data=series(4), **options)
    assert steps_of(monitor) == steps


def batches_measured(model, schedule, **options):
    """The numbers of the batches at whose end the monitor has measured."""
    monitor, counts = LyapunovMonitor(**schedule), []
    fit(model, monitor, At("on_train_batch_end", lambda trainer: counts.append(len(steps_of(monitor)))), **options)
    return [batch for batch, (before, now) in enumerate(itertools.pairwise([0, *counts])) if now > before]


@pytest.mark.parametrize(
    ("schedule", "batches"),
    [
        ({}, [0, 7, 15]),
        ({"every_n_train_steps": 1}, [0, 2, 5, 7, 10, 13, 15]),
        ({"every_n_train_steps": 2}, [0, 5, 10, 15]),
    ],
    ids=str,
)
def test_train_steps_are_those_of_the_optimizer(schedule, batches):
    # Lightning steps after every third batch and at the end of the epoch: after batches 2, 5, 7, 10, 13, 15.
    options = {"data": series(8), "accumulate_grad_batches": 3}
    assert batches_measured(Regressor(), schedule, **options) == batches


@pytest.mark.parametrize(
    ("every", "batches"),
    [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 2, 3, 4, 5]), (3, [0, 1, 2, 4, 5]), (4, [0, 1, 3, 5]), (6, [0, 2, 5])],
)
def test_each_batch_that_passes_a_due_step_is_measured(every, batches):
    # Two optimizers: batch b ends at the global step 2 b + 2.
    schedule = {"every_n_train_steps": every}
    assert batches_measured(TwoOptimizers(), schedule, data=series(6), max_epochs=1) == batches


def test_a_batch_that_is_not_recorded_is_not_searched_for_hooks(monkeypatch):
    stops, stop = [], Recorder.stop
    monkeypatch.setattr(Recorder, "stop", lambda recorder: stops.append(stop(recorder)))
    counts = []
    count = At("on_train_batch_end", lambda _: counts.append(len(stops)))
    fit(Regressor(), LyapunovMonitor(), count, data=series(8), max_epochs=1)
    assert counts[0] > 0
    assert counts[0] == counts[6] < counts[7]
