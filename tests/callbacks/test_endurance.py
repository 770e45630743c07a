"""Long runs, interrupted runs, and monitors that are used again: nothing accumulates and no hook is left."""

import gc
import inspect
import os
import sys
import tracemalloc
import types
import weakref

import pytest
import torch
from helpers import (
    FEATURES,
    At,
    BeforeEachLine,
    Regressor,
    SilentLogger,
    failing_monitor,
    fit,
    hooks_of,
    make_recorder,
    make_trainer,
    messages,
    published,
    sequences_of,
    series,
)
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_lyapunov import LyapunovMonitor
from lightning_lyapunov.callbacks.next_step import NextStep
from lightning_lyapunov.callbacks.publish import METRICS
from lightning_lyapunov.callbacks.run import Run
from lightning_lyapunov.recording.hooks import add_hooks, remove_hooks
from lightning_lyapunov.recording.recorder import Recorder
from lightning_lyapunov.reporting.history import MAX_MEASUREMENTS

pytestmark = pytest.mark.slow

# Thousands of measurements


def live_tensors():
    gc.collect()
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


def test_a_recorder_that_starts_and_stops_thousands_of_times_keeps_nothing():
    module = nn.GRU(FEATURES, 4)
    recorder, inputs = make_recorder(module, 4, 8), torch.rand(8, 4, FEATURES)

    def measure(times):
        for _ in range(times):
            recorder.start()
            with torch.no_grad():
                module(inputs)
            assert len(hooks_of(module)) == 2
            recorder.stop()
            assert len(sequences_of(recorder)) == 1
        return tracemalloc.get_traced_memory()[0], live_tensors()

    tracemalloc.start()
    measure(500)
    memory, tensors = measure(500)
    memory_later, tensors_later = measure(500)
    tracemalloc.stop()
    assert tensors_later == tensors
    # Less than the smallest object each; what other tests left behind may still move a little.
    assert memory_later - memory < 500 * 40
    assert not hooks_of(module)


class Tiny(Regressor):
    """A layer of one unit, which is quick to measure."""

    def __init__(self):
        super().__init__("RNN", 1, lr=0.0)


def test_hundreds_of_measurements_keep_their_history_and_nothing_else():
    monitor, model, tensors = LyapunovMonitor(every_n_train_steps=1, max_steps=2, warmup=0), Tiny(), []
    empty = monitor.state_dict()

    def count(trainer):
        if trainer.global_step % 100 == 0:
            assert len(monitor.history["rnn"]["step"]) == 100
            monitor.load_state_dict(empty)
            tensors.append(live_tensors())

    fit(model, monitor, At("on_train_batch_end", count), data=series(300, batch_size=2, time=2), max_epochs=1)
    assert len(tensors) == 3
    assert tensors[2] == tensors[1]
    assert not hooks_of(model)


class Dropping(SilentLogger):
    """A logger that counts its calls and keeps nothing."""

    calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1


def holdings(model):
    """Return what could accumulate: numbers of memory blocks, tensors, open files and hooks."""
    tensors = live_tensors()
    return sys.getallocatedblocks(), tensors, len(os.listdir("/dev/fd")), len(hooks_of(model))


def test_a_hundred_thousand_measurements_are_kept_and_logged_without_anything_piling_up():
    """Publishes made-up spectra, because measuring so many would take hours."""
    model, monitor, logger, seen = Tiny(), LyapunovMonitor(log_spectrum=False), Dropping(), []
    total = 100_000

    def made_up(step):
        numbers = dict.fromkeys(METRICS, torch.tensor(-float(step)))
        spectrum = torch.tensor([-float(step), -1e6])
        return {**numbers, "spectrum": spectrum, "stderr": spectrum.abs(), "num_sequences": torch.tensor(4)}

    def measure_on(trainer):
        monitor.load_state_dict({"history": {}})
        for step in range(total):
            monitor._run.publisher.publish(trainer, {"rnn": made_up(step)}, step)
            if step in (total // 2, total - 1):
                size = len(monitor.history["rnn"]["step"])
                seen.append((*holdings(model), len(monitor._run.warn._given), size > MAX_MEASUREMENTS))

    measure_once = At("on_train_end", measure_on)
    fit(model, monitor, measure_once, data=series(1), max_epochs=1, logger=logger)
    half, whole = seen
    # 783 are kept of 50,001 and of 100,000; a block of memory for each measurement would be 49,999 more.
    (blocks, tensors, *others), (blocks_later, tensors_later, *others_later) = half, whole
    assert others_later == others == [others[0], 0, 0, False]
    assert abs(tensors_later - tensors) <= 10
    assert abs(blocks_later - blocks) <= 1000
    assert logger.calls >= total
    steps = monitor.history["rnn"]["step"].tolist()
    assert MAX_MEASUREMENTS // 2 <= len(steps) <= MAX_MEASUREMENTS
    assert (steps[0], steps[-1]) == (0, total - 1)
    assert torch.equal(monitor.history["rnn"]["spectrum"][:, 0], -torch.tensor(steps).float())


def test_a_failure_that_reads_differently_each_time_is_said_once(recwarn):
    monitor = failing_monitor(every_n_train_steps=1)
    fit(Tiny(), monitor, data=series(20), max_epochs=1)
    assert monitor.growth_of.calls == 20
    assert len(messages(recwarn, "no convergence in measurement")) == 1


def test_a_monitor_that_has_ended_holds_no_model_and_no_data():
    monitor, model = LyapunovMonitor(), Tiny()
    gone, layer = weakref.ref(model), weakref.ref(model.rnn)
    trainer = fit(model, monitor)
    del model, trainer
    # Lightning binds these to the module that it trained last.
    for name in ("log", "log_dict"):
        vars(monitor).pop(name, None)
    gc.collect()
    assert gone() is None
    assert layer() is None


# Interrupted runs

EVENTS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]


class StopError(BaseException):
    """Is not an ``Exception``."""


@pytest.mark.parametrize("order", [1, -1], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopError])
@pytest.mark.parametrize("event", EVENTS)
def test_a_run_that_breaks_off_in_any_hook_leaves_no_hook_behind(event, error, order):
    def stop(trainer):
        raise error

    model, monitor = Tiny(), LyapunovMonitor(every_n_train_steps=1)
    with pytest.raises((error, SystemExit)):
        fit(model, *[monitor, At(event, stop)][::order], data=series(1), val=series(1))
    assert not hooks_of(model)
    # Both can be used again.
    trainer = fit(model, monitor, data=series(1), max_epochs=1)
    assert published(trainer)
    assert not hooks_of(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopError])
@pytest.mark.parametrize("where", ["forward", "after forward", "the layer", "loading"])
def test_a_run_that_breaks_off_in_a_batch_leaves_no_hook_behind(where, error):
    model, seen = Tiny(), []

    def fail(*_, **__):
        seen.append(len(hooks_of(model)))
        raise error

    data = series(2)
    if where == "forward":
        model.forward = fail
    elif where == "after forward":
        model.head.forward = fail
    elif where == "the layer":
        model.rnn.forward = fail
    else:
        data.collate_fn = fail
    with pytest.raises((error, SystemExit)):
        fit(model, LyapunovMonitor(), data=data)
    assert seen == [2 * int(where != "loading")]  # one hook before a call, one after it
    assert not hooks_of(model)


def test_an_interrupt_in_a_measurement_leaves_no_hook_and_no_half_of_a_row():
    model, monitor = Tiny(), failing_monitor(lambda _: True, KeyboardInterrupt, every_n_train_steps=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model, monitor)
    assert not hooks_of(model)
    assert monitor.history == {}


HANDLE_HOOKS = (
    Recorder.start,
    Recorder.stop,
    add_hooks,
    remove_hooks,
    NextStep.__init__,
    NextStep.__call__,
    NextStep.withdraw,
    Run.record,
    Run.stop,
    inspect.unwrap(Run.start_recording),
    inspect.unwrap(Run.stop_recording),
    inspect.unwrap(LyapunovMonitor.on_train_batch_start),
    inspect.unwrap(LyapunovMonitor.on_train_batch_end),
    inspect.unwrap(LyapunovMonitor.on_train_epoch_end),
    LyapunovMonitor._end_run,
    nn.Module.register_forward_hook,
)


def interrupted_at(number):
    """Fit until that line and return how many there were, and the model and monitor."""
    model, monitor = Tiny(), LyapunovMonitor(every_n_train_steps=1, max_steps=2, warmup=0)
    model.other = nn.GRU(FEATURES, 1)
    trainer = make_trainer(monitor, max_epochs=1)

    def interrupt(line):
        if line == number:
            raise KeyboardInterrupt

    trace, before = BeforeEachLine(HANDLE_HOOKS, interrupt), sys.gettrace()
    sys.settrace(trace)
    try:
        trainer.fit(model, series(1, batch_size=2, time=2))
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        sys.settrace(before)
    return trace.lines, model, monitor


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_at_any_line_that_handles_hooks_leaves_none_behind():
    lines, model, monitor = interrupted_at(None)
    assert lines > 40
    assert len(monitor.history["rnn"]["step"]) == 1
    for number in range(1, lines + 1):
        reached, model, monitor = interrupted_at(number)
        assert reached >= number
        assert not hooks_of(model), number
        assert not any(vars(module)["_forward_hooks_with_kwargs"] for module in model.modules()), number


# Several monitors, and several fits


def test_a_trainer_has_as_many_monitors_as_there_are_schedules():
    monitors = [LyapunovMonitor(every_n_train_steps=n, strict=True) for n in (1, 2, 3)]
    model, together = Tiny(), []
    look = model.head.register_forward_pre_hook(lambda *_: together.append(len(hooks_of(model.rnn))))
    fit(model, *monitors, data=series(6), max_epochs=1)
    assert [len(monitor.history["rnn"]["step"]) for monitor in monitors] == [6, 4, 3]
    look.remove()
    # Two hooks for each that is due at the batch's end: after steps 1 to 6.
    assert together == [6, 4, 4, 4, 2, 6]
    assert not hooks_of(model)
    steps = {int(step): row for monitor in monitors for step, row in zip(*rows(monitor), strict=True)}
    for monitor in monitors:
        assert all(torch.equal(steps[int(step)], row) for step, row in zip(*rows(monitor), strict=True))


def rows(monitor):
    return monitor.history["rnn"]["step"], monitor.history["rnn"]["spectrum"]


def test_two_monitors_of_one_schedule_are_refused_by_lightning_and_not_by_chance():
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(LyapunovMonitor(), LyapunovMonitor())


def test_the_learning_rate_finder_neither_measures_nor_loses_the_monitor(tmp_path):
    monitor, model = LyapunovMonitor(), Regressor()
    trainer = make_trainer(monitor, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(model, series(), num_training=5)
    assert monitor.history == {}
    assert not hooks_of(model)
    trainer.fit(model, series())
    assert monitor.history["rnn"]["step"].tolist() == [0, 2, 5]


def test_the_learning_rate_found_is_the_same_with_the_monitor(tmp_path):
    found = []
    for callbacks in ([], [LyapunovMonitor()]):
        torch.manual_seed(0)
        trainer = make_trainer(*callbacks, default_root_dir=tmp_path)
        finder = Tuner(trainer).lr_find(Regressor(), series(), num_training=20)
        found.append(finder.results)
    assert found[0] == found[1]


def test_the_batch_size_finder_neither_measures_nor_loses_the_monitor(tmp_path):
    monitor, model = LyapunovMonitor(), Regressor()
    model.batch_size = 2
    model.val_dataloader = series
    model.train_dataloader = types.MethodType(lambda self: series(4, batch_size=self.batch_size), model)
    trainer = make_trainer(monitor, default_root_dir=tmp_path, limit_val_batches=0)
    Tuner(trainer).scale_batch_size(model, max_trials=2, steps_per_trial=1)
    assert monitor.history == {}
    trainer.fit(model)
    assert len(monitor.history["rnn"]["step"]) == 3
    assert not hooks_of(model)


@pytest.mark.parametrize("times", [2, 5])
def test_a_trainer_that_fits_again_and_again_measures_each_time_and_keeps_no_hook(times):
    monitor, model = LyapunovMonitor(strict=True), Tiny()
    trainer = make_trainer(monitor, max_epochs=0)
    for time in range(times):
        trainer.fit_loop.max_epochs = time + 1
        trainer.fit(model, series(2))
        assert not hooks_of(model)
    # The first batch of each fit, and the end of its epoch.
    assert monitor.history["rnn"]["step"].tolist() == list(range(2 * times))


def test_a_trainer_that_fits_another_model_watches_that_one():
    monitor, first, second = LyapunovMonitor(), Regressor("GRU", 3), Regressor("LSTM", 4)
    second.decoder = nn.GRU(FEATURES, 2)
    trainer = make_trainer(monitor)
    trainer.fit(first, series())
    trainer.fit_loop.max_epochs = 4
    monitor.modules = ["rnn"]
    trainer.fit(second, series())
    assert monitor.history["rnn"]["spectrum"].shape == (6, 8)
    assert not hooks_of(first) + hooks_of(second)
