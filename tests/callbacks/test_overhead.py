"""The share of a run's time that measuring takes: the limit ``max_overhead``, and the warning without it."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from helpers import At, Regressor, Stream, TwoLayers, fit, hooks_of, make_trainer, messages, published, series
from torch.utils.data import DataLoader

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.functional import layer_growth


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning_lyapunov.callbacks.overhead.perf_counter", clock)
    return clock


class Cost(dict):
    """What the measurement of a layer costs, by its type: seconds, or an iterator of them."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def monitor(self, **options):
        """Return a monitor whose measurements cost that."""
        monitor = LyapunovMonitor(warmup=0, **options)
        monitor.growth_of = self.growth_of
        return monitor

    def growth_of(self, layer, *args, **options):
        seconds = self.get(type(layer.module).__name__, 0.0)
        self.clock.spend(next(seconds) if isinstance(seconds, Iterator) else seconds)
        return layer_growth(layer, *args, **options)


@pytest.fixture
def cost(clock):
    return Cost(clock)


def run(clock, monitor, *, batches, epochs=1, seconds=1.0, model=None, callbacks=(), **options):
    """Train so many batches that take so many seconds each; return the numbers of those that were measured."""
    measured, batch, seen = [], itertools.count(), [monitor.estimates]

    def look(trainer):
        number = next(batch)
        if monitor.estimates is not seen[-1]:
            measured.append(number)
            seen.append(monitor.estimates)

    passing = At("on_train_batch_start", lambda trainer: clock.spend(seconds))
    data = series(batches, batch_size=1, time=4)
    model = model or Regressor("GRU", 1)
    fit(model, passing, monitor, At("on_train_batch_end", look), *callbacks, data=data, max_epochs=epochs, **options)
    return measured


def in_plain_words(share, cost, *, batches, epochs, every_n_train_steps=None, every_n_epochs=None):
    """Return the batches to measure, decided at each batch with known costs: the definition, written out."""
    time = spent = 0.0
    measured, owed = [], False
    for batch in range(batches * epochs):
        due = not measured
        if every_n_train_steps and measured:
            due |= (batch + 1) // every_n_train_steps > (measured[-1] + 1) // every_n_train_steps
        if every_n_epochs and (batch + 1) % (batches * every_n_epochs) == 0:
            owed = True
        if (due or owed) and (not measured or (spent + cost) / (time + cost) <= share):
            measured.append(batch)
            spent, time, owed = spent + cost, time + cost, False
        time += 1.0  # a batch
    return measured


def by_epoch_or_step(every_n_train_steps=None, every_n_epochs=None):
    return {"every_n_train_steps": every_n_train_steps, "every_n_epochs": every_n_epochs}


SCHEDULES = [
    by_epoch_or_step(1),
    by_epoch_or_step(3),
    by_epoch_or_step(20),
    by_epoch_or_step(None, 1),
    by_epoch_or_step(None, 2),
    by_epoch_or_step(7, 2),
]


# Binary fractions, so that the sums are the same to the last bit.
@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("cost_of_one", [0.25, 2.0, 8.0])
@pytest.mark.parametrize("share", [0.5, 0.125])
def test_each_measurement_is_made_at_the_first_batch_at_which_it_fits(share, cost_of_one, schedule, clock, cost):
    cost["GRU"] = cost_of_one
    monitor = cost.monitor(max_overhead=share, log_spectrum=False, strict=True, **schedule)
    measured = run(clock, monitor, batches=10, epochs=7)
    assert measured == in_plain_words(share, cost_of_one, batches=10, epochs=7, **schedule)
    without = in_plain_words(1.0, 0.0, batches=10, epochs=7, **schedule)
    assert measured[0] == 0
    assert len(measured) <= len(without)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_share_is_kept_when_no_two_measurements_and_batches_take_as_long(share, seed, clock, cost):
    draw, costs, kept, dues = torch.Generator().manual_seed(seed), [], [], itertools.count()

    def seconds(mean, notes=None):
        while True:
            value = mean * (0.5 + float(torch.rand((), generator=draw)))
            if notes is not None:
                # Before this one is made: with the last one's cost once more the share is kept.
                kept.append(not notes or sum(notes) + notes[-1] <= share * (clock.now - began[0] + notes[-1]))
                notes.append(value)
            yield value

    def start(trainer):
        clock.spend(next(batch))
        if next(dues) == 0:
            began.append(clock.now)

    began, batch = [], seconds(1.0)
    cost["GRU"] = seconds(2.0, costs)
    monitor = cost.monitor(every_n_train_steps=1, max_overhead=share, log_spectrum=False)
    data = series(120, batch_size=1, time=4)
    fit(Regressor("GRU", 1), At("on_train_batch_start", start), monitor, data=data, max_epochs=1)
    assert all(kept)
    assert len(costs) > 3
    assert share / 2 < sum(costs) / (clock.now - began[0]) < share * 1.2


def test_nothing_is_recorded_and_every_value_stays_on_a_batch_that_is_skipped(clock, cost):
    cost["GRU"], hooks, values = 8.0, [], []
    model = Regressor("GRU", 2)
    model.head.register_forward_pre_hook(lambda *_: hooks.append(len(hooks_of(model.rnn))))
    look = [At("on_train_batch_end", lambda trainer: values.append(published(trainer)))]
    monitor = cost.monitor(every_n_train_steps=1, max_overhead=0.5)
    measured = run(clock, monitor, batches=30, model=model, callbacks=look)
    assert measured == [0, 16, 24]
    assert [batch for batch, count in enumerate(hooks) if count] == measured
    for batch, (earlier, later) in enumerate(itertools.pairwise(values), 1):
        assert later.keys() == earlier.keys()
        assert all(torch.equal(later[key], earlier[key]) for key in later) == (batch not in measured)
    assert monitor.history["rnn"]["step"].tolist() == measured


def test_an_epoch_that_is_cut_short_and_does_not_fit_is_measured_in_a_later_one(clock, cost):
    class Cut(Regressor):
        """Ends its first epoch at its third batch, which cannot be foreseen."""

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    def measured_by(share):
        clock.now, cost["GRU"] = 0.0, 4.0
        monitor = cost.monitor(max_overhead=share)
        run(clock, monitor, batches=10, epochs=2, model=Cut("GRU", 1))
        return monitor.history["rnn"]["step"].tolist()

    assert measured_by(None) == [0, 2, 12]
    # Half of the time is 8 of 16 seconds: at the start of the ninth batch, of which one was left out.
    assert measured_by(0.5) == [0, 7, 12]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_no_optimizer_step_is_measured_twice(accumulate, clock, cost):
    cost["GRU"] = 6.0
    monitor = cost.monitor(every_n_train_steps=1, max_overhead=0.25)
    # 12 of 36 + 12 seconds are a quarter, then 18 of 54 + 18: whether the optimizer steps after that batch or not.
    assert run(clock, monitor, batches=64, accumulate_grad_batches=accumulate) == [0, 36, 54]
    steps = monitor.history["rnn"]["step"].tolist()
    assert steps == [0, 36 // accumulate, 54 // accumulate]


@pytest.mark.slow
@pytest.mark.parametrize(("early", "late"), [(0.125, 8.0), (8.0, 0.125), (1.0, 1.0)], ids=str)
def test_batches_that_become_slower_or_faster_put_a_measurement_off_no_longer_than_twice(early, late, clock, cost):
    cost["GRU"], starts = 16.0, []
    times = itertools.chain(itertools.repeat(early, 20), itertools.repeat(late))

    def start(trainer):
        clock.spend(next(times))
        starts.append(clock.now - starts[0] if starts else clock.now)

    starts_at = At("on_train_batch_start", start)
    monitor = cost.monitor(every_n_train_steps=1, max_overhead=0.25, log_spectrum=False)
    data = series(200, batch_size=1, time=4)
    fit(Regressor("GRU", 1), starts_at, monitor, data=data, max_epochs=1)
    # The second is a quarter when 32 of 112 + 16 seconds went into measuring.
    first_fit = next(batch for batch, now in enumerate(starts[1:], 1) if now >= 112)
    assert first_fit <= monitor.history["rnn"]["step"][1] <= 2 * first_fit


def test_without_a_share_nobody_is_asked(clock, cost, monkeypatch):
    asked = []
    monkeypatch.setattr(Overhead, "batches_to_wait", lambda *_: asked.append(1))
    run(clock, cost.monitor(every_n_train_steps=1), batches=5)
    assert not asked


def test_a_stopping_rule_counts_what_is_measured_and_nothing_else(clock, cost):
    cost["GRU"] = 8.0
    rule = InstabilityStopping(threshold=-100.0, patience=3, verbose=False)
    monitor = cost.monitor(every_n_train_steps=1, max_overhead=0.5)
    run(clock, monitor, batches=60, callbacks=[rule])
    assert monitor.history["rnn"]["step"].tolist() == [0, 16, 24]
    assert rule.wait_count == 3


@pytest.mark.parametrize(
    ("seconds", "schedule", "batches", "epochs", "count"),
    [
        (100.0, {"every_n_train_steps": 1}, 40, 1, 1),
        (100.0, {}, 2, 20, 1),
        (4.0, {"every_n_train_steps": 1}, 40, 1, 0),
        (100.0, {"every_n_train_steps": 10}, 40, 1, 0),
    ],
)
def test_a_rule_with_nothing_new_to_judge_for_long_says_so_once(
    seconds, schedule, batches, epochs, count, clock, cost, recwarn
):
    cost["GRU"] = seconds
    monitor = cost.monitor(max_overhead=0.5, **schedule)
    run(clock, monitor, batches=batches, epochs=epochs, callbacks=[InstabilityStopping()])
    said = messages(recwarn, "has judged nothing since step 0: `max_overhead` has postponed the last 10 measurements")
    assert len(said) == len(messages(recwarn, "has judged nothing")) == count


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, 1.5, 10, math.nan, math.inf, True, "0.1", (0.1,)], ids=repr)
def test_what_is_no_share_is_refused_by_name(share):
    with pytest.raises(ValueError, match=r"`max_overhead=.*` must be a share of the training time between 0 and 1"):
        LyapunovMonitor(max_overhead=share)


# The warning


def warned(record):
    return messages(record, "Measuring Lyapunov spectra took")


# Seconds of a measurement and of a batch, batches; one warning or none. Half a minute, twice after the first, a tenth.
SLOW = {
    "a huge layer": (16.0, 1.0, 3, 1),
    "a slow layer, for long": (2.0, 1.0, 20, 1),
    "just a tenth of the time": (11.0, 99.0, 4, 1),
    "less than a tenth": (11.0, 101.0, 20, 0),
    "less than half a minute": (1.4, 0.1, 21, 0),
    "two measurements": (1000.0, 1.0, 2, 0),
    "a first one that is slow": (0.125, 1.0, 20, 0),
    "nothing": (0.0, 1.0, 20, 0),
}


@pytest.mark.parametrize("limit", [None, 0.9])
@pytest.mark.parametrize(("seconds", "batch", "batches", "count"), SLOW.values(), ids=SLOW)
def test_a_slow_measurement_is_said_once_where_it_matters(seconds, batch, batches, count, limit, clock, cost, recwarn):
    first = [100.0] if seconds == 0.125 else []
    cost["GRU"] = itertools.chain(first, itertools.repeat(seconds))
    monitor = cost.monitor(every_n_train_steps=1, max_overhead=limit, log_spectrum=False)
    run(clock, monitor, batches=batches, seconds=batch)
    assert len(warned(recwarn)) == (count if limit is None else 0)


def test_the_warning_names_the_share_the_slowest_layer_and_what_lowers_it(clock, cost, recwarn):
    cost.update(LSTM=7.0, GRU=9.0)
    monitor = cost.monitor(every_n_train_steps=1, log_spectrum=False)
    model = TwoLayers()
    model.forward = lambda inputs: model.head(model.rnn(inputs)[0]) + model.sometimes(inputs)[0].sum() * 0
    run(clock, monitor, batches=3, seconds=5.0, model=model)
    # At the third: 32 seconds of 42, counted from the end of the first measurement.
    (message,) = warned(recwarn)
    assert "took 76% of the time" in message
    assert "2 measurements after the first one, 16.0 s each, most of it for `sometimes`" in message
    for name in (
        "num_exponents",
        "max_steps",
        "num_sequences",
        "every_n_train_steps",
        "every_n_epochs",
        "max_overhead",
    ):
        assert f"`{name}`" in message or f"{name}=" in message
        assert hasattr(monitor, name)


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_warns(first, clock, cost, recwarn, monkeypatch):
    cost["GRU"] = 60.0
    monkeypatch.setattr(type(make_trainer().strategy), "is_global_zero", property(lambda self: first))
    run(clock, cost.monitor(every_n_train_steps=1, log_spectrum=False), batches=5)
    assert len(warned(recwarn)) == first


# What the next measurement will cost


def said(caplog):
    return [record.getMessage() for record in caplog.records if "The first measurement of" in record.getMessage()]


# Seconds of the first measurement and of a batch, batches of an epoch, and what is said.
FORECASTS = {
    "more than a hundredth": (2.0, 1.0, 100, "took 2 s, and the next will take about as long: 2 % of an epoch of 100 "),
    "more than an epoch": (30.0, 1.0, 10, "took 30 s, and the next will take about as long: 300 % of an epoch of 10"),
    "just a hundredth": (1.0, 1.0, 100, None),
    "less": (0.25, 1.0, 50, None),
}


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize(("cost_of_first", "batch", "batches", "text"), FORECASTS.values(), ids=FORECASTS)
def test_the_cost_of_the_next_measurement_is_said_once_above_a_hundredth_of_an_epoch(
    cost_of_first, batch, batches, text, every, clock, cost, caplog
):
    cost["GRU"] = cost_of_first
    # The first batch takes longer: it counts for nothing.
    slow_start = At("on_train_start", lambda trainer: clock.spend(500.0))
    monitor = cost.monitor(every_n_train_steps=every, log_spectrum=False)
    run(clock, monitor, batches=batches, epochs=2, seconds=batch, callbacks=[slow_start])
    messages = said(caplog)
    assert len(messages) == (text is not None)
    assert all(text in message and "`LyapunovMonitor(max_overhead=0.01)`" in message for message in messages)


@pytest.mark.parametrize("options", [{"max_overhead": 0.5}, {}], ids=str)
def test_the_cost_is_not_said_where_it_is_limited_or_an_epoch_has_no_known_length(options, clock, cost, caplog):
    cost["GRU"] = 30.0
    data = series(10, batch_size=1, time=4)
    if not options:
        data = DataLoader(Stream(*data.dataset.tensors), batch_size=1)
    passing = At("on_train_batch_start", lambda trainer: clock.spend(1.0))
    fit(Regressor("GRU", 1), passing, cost.monitor(log_spectrum=False, **options), data=data, max_epochs=1)
    assert not said(caplog)


# What is timed


@pytest.mark.parametrize("pending", [0.0, 5.0])
def test_what_the_device_still_has_to_do_is_waited_for_at_both_ends(pending, clock, monkeypatch):
    """A device works on after the call has returned: the training's work is not the measurement's, and its own is."""
    queue = [pending]

    def synchronize():
        while queue:
            clock.spend(queue.pop())

    monkeypatch.setattr(torch.cpu, "synchronize", synchronize)
    overhead = Overhead(torch.device("cpu"))
    overhead.start_batch()
    with overhead.measurement():
        queue.append(2.0)
        with overhead.layer("rnn"):
            queue.append(3.0)
        queue.append(1.0)
    assert (overhead._spent, overhead._last, overhead._layers) == (6.0, 6.0, {"rnn": 3.0})


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu", "xla", "hpu", "meta"])
def test_each_kind_of_device_is_waited_for_if_torch_knows_how(kind, monkeypatch):
    waited = []
    if hasattr(getattr(torch, kind, None), "synchronize"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda: waited.append(kind))
    with Overhead(torch.device(kind)).measurement():
        pass
    assert waited == ([kind] * 2 if kind in ("cpu", "cuda", "mps", "xpu") else [])
