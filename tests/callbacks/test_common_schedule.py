"""``CommonSchedule`` without a fit: when ranks meet whose epochs differ."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lyapunov.callbacks.ranks import CommonSchedule
from lightning_lyapunov.callbacks.schedule import Progress


class Clock:
    """Counts batches, and returns given waits."""

    def __init__(self, waits=()):
        self.num_batches, self.waits = 0, iter(waits)

    def start_batch(self):
        self.num_batches += 1

    def batches_to_wait(self, share, done):
        return next(self.waits, 0)


def rank_of(lengths, said, *, is_first=True, known=True, max_steps=12, accumulate=1, automatic=True, **options):
    """Follow a rank with epochs of these lengths, again and again; return the steps at which it meets the others.

    A meeting is ``(optimizer step, whether to measure)``. Rank 0 appends to ``said`` what the others read from it.
    """
    heard = iter(list(said))

    def broadcast(plan):
        if is_first:
            said.append(plan)
            return plan
        return next(heard)

    choices = {"every_n_epochs": None, "every_n_train_steps": None, "max_overhead": None, "waits": ()} | options
    num_batches = choices.pop("num_batches", None)
    clock = Clock(choices.pop("waits"))
    schedule = CommonSchedule(**choices, overhead=clock, broadcast=broadcast, is_first=is_first, automatic=automatic)
    meetings, step = [], 0
    for epoch, length in enumerate(itertools.cycle(lengths)):
        for batch in range(length):
            last = batch == (num_batches or length) - 1
            rest = (batch, (num_batches or length) if known else math.inf, accumulate, max_steps)
            schedule.record_batch(Progress(step, epoch, last, *rest))
            step += last or (batch + 1) % accumulate == 0
            progress, before = Progress(step, epoch, last, *rest), len(meetings)
            if schedule.measure_batch(progress):
                meetings.append((step, True))
                schedule.measured(step)
            if schedule._meets and before == len(meetings):
                meetings.append((step, False))
            schedule.end_batch(progress)
            if step == max_steps:
                return meetings
        assert not schedule.measure_epoch(Progress(step, epoch, True, *rest))
    return meetings


def measured(lengths, **options):
    return [step for step, is_measured in rank_of(lengths, [], **options) if is_measured]


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=4)
counts = st.none() | st.integers(1, 5)


@given(
    ranks=st.lists(lengths, min_size=2, max_size=3),
    known=st.booleans(),
    accumulate=st.integers(1, 3),
    max_steps=st.integers(1, 40),
    every_n_epochs=counts,
    every_n_train_steps=counts,
    max_overhead=st.none() | st.just(0.1),
    waits=st.lists(st.integers(0, 5), max_size=8),
)
def test_ranks_meet_at_the_same_optimizer_steps_whatever_their_epochs(ranks, **options):
    said = []
    first, *others = [rank_of(one, said, is_first=number == 0, **options) for number, one in enumerate(ranks)]
    assert all(other == first for other in others)
    assert first[0] == (1, True)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_epochs": 1}, [1, 4, 8, 12]),
        ({"every_n_epochs": 2}, [1, 8]),
        ({"every_n_epochs": 3}, [1, 12]),
        ({"every_n_train_steps": 1}, list(range(1, 13))),
        ({"every_n_train_steps": 5}, [1, 5, 10]),
        ({"every_n_epochs": 1, "every_n_train_steps": 3}, [1, 3, 4, 6, 8, 9, 12]),
        ({"every_n_epochs": 1, "max_steps": 6}, [1, 4, 6]),
        ({"every_n_epochs": 1, "accumulate": 3}, [1, 2, 4, 6, 8, 10, 12]),
        ({"every_n_epochs": 1, "automatic": False, "max_steps": 10}, [1, 4, 8, 10]),
    ],
    ids=str,
)
def test_epochs_of_a_known_length_are_measured_at_their_ends(options, steps):
    assert measured([4], **options) == steps


def test_an_epoch_of_unknown_length_is_measured_soon_after_it_has_ended_and_the_next_at_its_end():
    meetings = rank_of([10], [], known=False, every_n_epochs=1, max_steps=45)
    # The ranks meet after 2, 4, 8 and 16 steps. Then rank 0 knows that 10 make an epoch.
    before = [(1, True), (2, False), (4, False), (8, False), (16, False)]
    assert meetings == before + [(step, True) for step in (17, 20, 30, 40, 45)]


def test_an_epoch_is_taken_to_be_as_long_as_the_last_one_if_the_data_do_not_tell():
    # Epochs end at 4, 11, 18, 25; the second is expected at 8.
    assert measured([4, 7, 7, 7, 7, 7], known=False, every_n_epochs=1, max_steps=30) == [1, 5, 8, 12, 18, 25, 30]
    # One that is far longer is not measured again and again.
    assert measured([4, 1000], known=False, every_n_epochs=1, max_steps=1000) == [1, 5, 8, 12, 1000]


def test_an_epoch_that_was_cut_short_shortens_the_next():
    # The data have 8 batches, and the run leaves each epoch after 4.
    cut = {"every_n_epochs": 1, "num_batches": 8}
    assert measured([4], max_steps=20, **cut) == [1, 8, 12, 16, 20]


@pytest.mark.parametrize("known", [True, False])
def test_the_ranks_meet_rarely(known):
    meetings = rank_of([1000], [], known=known, every_n_epochs=1, max_steps=10_000)
    assert len(meetings) < 30


def test_ranks_are_asked_seldom_for_a_measurement_that_is_put_off():
    # The clock says a wait as long as the run so far, eight times.
    waits = [2**power for power in range(8)]
    meetings = rank_of([1000], [], every_n_train_steps=1, max_overhead=0.1, waits=waits, max_steps=300)
    assert [step for step, is_measured in meetings if is_measured][:2] == [1, 257]
    assert len([step for step, _ in meetings if step < 257]) == 9


def test_a_rank_that_has_left_ends_the_meetings():
    def fail(plan):
        raise RuntimeError("connection closed")

    options = {"broadcast": fail, "is_first": True}
    schedule = CommonSchedule(None, 1, None, Clock(), **options)
    assert schedule.record_batch(Progress(0, 0, False))
    assert schedule.measure_batch(Progress(1, 0, False))
    with pytest.raises(RuntimeError, match="closed"):
        schedule.end_batch(Progress(1, 0, False))
    for step in range(1, 9):
        assert not schedule.record_batch(Progress(step, 0, False))
        assert not schedule.measure_batch(Progress(step + 1, 0, False))
        schedule.end_batch(Progress(step + 1, 0, False))
