"""What passes the guard of a hook, what is kept of an error, and what a run, a thread or a signal finds in between."""

import functools
import gc
import inspect
import signal
import sys
import threading
import warnings
import weakref

import pytest
import torch
from helpers import (
    FEATURES,
    At,
    BeforeEachLine,
    CellModel,
    Regressor,
    SilentLogger,
    TanhCell,
    failing_monitor,
    fit,
    hooks_of,
    make_trainer,
    messages,
    published,
    series,
)
from lightning.pytorch import Callback
from torch import nn

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.callbacks.guard import guarded
from lightning_lyapunov.callbacks.next_step import NextStep
from lightning_lyapunov.callbacks.publish import Publisher
from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.reporting import room
from lightning_lyapunov.reporting.history import History

# The guard

OWN = [name for kind in (LyapunovMonitor, *LyapunovMonitor.__bases__) for name in vars(kind)]
HOOKS = [name for name in OWN if name.startswith("on_") or name == "teardown"]


@pytest.mark.parametrize("name", [*HOOKS, "state_dict", "load_state_dict"])
def test_every_hook_is_guarded_and_says_so(name):
    hook = getattr(LyapunovMonitor, name)
    assert hook.__wrapped__.__code__ is not hook.__code__
    assert "uarded" in inspect.getdoc(hook)


def test_every_hook_of_a_callback_that_the_monitor_has_is_among_them():
    assert len(HOOKS) == 15
    others = {"state_key", "state_dict", "load_state_dict"}
    assert {name for name in OWN if hasattr(Callback, name) and "__" not in name} == {*HOOKS, *others}


class Guarded:
    """Raises an error in a guarded hook."""

    def __init__(self, error, strict=False):
        self.error, self.strict, self.given_up = error, strict, []

    def _give_up(self, name, error):
        self.given_up.append((name, error))

    @guarded(passes=(ValueError,), default={})
    def hook(self):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("no"), AssertionError(), MemoryError()], ids=repr)
def test_an_error_ends_in_the_guard(error):
    callback = Guarded(error)
    assert callback.hook() == {}
    assert callback.given_up == [("hook", error)]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), ValueError(), UserWarning()], ids=repr
)
def test_what_is_not_ours_passes_the_guard(error):
    callback = Guarded(error)
    with pytest.raises(type(error)):
        callback.hook()
    assert callback.given_up == []


def test_a_strict_callback_raises():
    with pytest.raises(RuntimeError, match="no"):
        Guarded(RuntimeError("no"), strict=True).hook()


INSIDE = {
    "on_train_batch_start": ("schedule", "record_batch"),
    "start_recording": ("recorder", "start"),
    "on_train_batch_end": ("measurement", "metrics"),
    "on_train_epoch_end": ("schedule", "measure_epoch"),
}


def break_part(monitor, part, method, error=ZeroDivisionError):
    def fail(*_, **__):
        raise error("broken")

    return At("on_train_start", lambda trainer: setattr(getattr(monitor._run, part), method, fail))


@pytest.mark.parametrize(("hook", "where"), INSIDE.items(), ids=INSIDE)
def test_a_part_that_fails_in_a_hook_is_one_warning_and_the_run_goes_on(hook, where, recwarn):
    monitor, model = LyapunovMonitor(every_n_train_steps=1), Regressor()
    trainer = fit(model, break_part(monitor, *where), monitor)
    assert trainer.global_step == 6
    assert not hooks_of(model)
    assert not [name for name in vars(trainer.strategy) if name.endswith("_step")]
    (message,) = messages(recwarn, "`LyapunovMonitor` failed")
    assert message.startswith(f"`{hook}`")
    assert "ZeroDivisionError: broken" in message


@pytest.mark.parametrize(("hook", "where"), INSIDE.items(), ids=INSIDE)
def test_a_part_that_fails_in_a_hook_raises_if_that_is_asked_for(hook, where):
    monitor = LyapunovMonitor(every_n_train_steps=1, strict=True)
    with pytest.raises(ZeroDivisionError, match="broken"):
        fit(Regressor(), break_part(monitor, *where), monitor)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_measurement_ends_the_run(error):
    with pytest.raises(SystemExit):
        fit(Regressor(), failing_monitor(lambda number: number == 1, error, every_n_train_steps=1))


def test_a_checkpoint_is_saved_without_a_history_that_cannot_be_read(tmp_path, recwarn):
    monitor = LyapunovMonitor()
    trainer = fit(Regressor(), monitor)
    monitor._history.state_dict = functools.partial(int, "x")
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert "state" in torch.load(tmp_path / "it.ckpt", weights_only=True)["callbacks"] or messages(
        recwarn, "`state_dict`"
    )


# Damaged histories

SPECTRUM = torch.ones(2, 3)
DAMAGED = {
    "a step of 1e30": {"step": torch.tensor([0.0, 1e30]), "spectrum": SPECTRUM},
    "a step that is NaN": {"step": torch.tensor([0.0, torch.nan]), "spectrum": SPECTRUM},
    "half a step": {"step": torch.tensor([0.0, 0.5]), "spectrum": SPECTRUM},
    "complex": {"step": torch.arange(2), "spectrum": SPECTRUM * 1j},
    "no tensor": {"step": "now", "spectrum": SPECTRUM},
    "meta": {"step": torch.arange(2), "spectrum": SPECTRUM.to("meta")},
}


@pytest.mark.parametrize("cell", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_damaged_cell_starts_anew_and_the_others_go_on(cell):
    history, good = History(), {"step": torch.arange(2), "spectrum": SPECTRUM}
    with pytest.warns(UserWarning, match="cannot be read and starts anew"):
        history.load_state_dict({"version": 2, "history": {"bad": cell, "good": good}})
    history.append(5, {name: (torch.ones(3), torch.ones(3)) for name in ("bad", "good")})
    assert history.tensors()["good"]["step"].tolist() == [0, 1, 5]
    assert history.tensors()["bad"]["step"].tolist() == [5]
    assert history.state_dict()["num_measured"] == {"good": 3, "bad": 1}


def test_a_sparse_history_is_read():
    history = History()
    history.load_state_dict(
        {"history": {"rnn": {"step": torch.arange(2).to_sparse(), "spectrum": SPECTRUM.to_sparse()}}}
    )
    assert torch.equal(history.tensors()["rnn"]["spectrum"], SPECTRUM)


def test_a_rule_reads_a_state_without_a_side():
    rule = InstabilityStopping()
    state = rule.state_dict()
    del state["side"]
    rule.load_state_dict(state)
    assert rule.wait_count == 0


def test_a_rule_words_an_exponent_of_zero():
    rule = InstabilityStopping(threshold=0.5, lower_threshold=0.3)
    assert "memory" not in rule._sentence(Estimate(0.0, 0.0, 4, "rnn", 0), "below")


# Signals between two lines


def whole(history):
    """Return whether two cells have the same measurements."""
    steps = [cell["step"].tolist() for cell in history.values()]
    return all(step == steps[0] for step in steps) and len(steps) in (0, 2)


KEEP_THE_BOOKS = (Publisher.publish, Publisher._update, History.append)


def traced(action, **options):
    model, monitor = Regressor("GRU", 2, num_layers=2), LyapunovMonitor(every_n_train_steps=1, **options)
    trace, before = BeforeEachLine(KEEP_THE_BOOKS, functools.partial(action, monitor)), sys.gettrace()
    sys.settrace(trace)
    try:
        fit(model, monitor, data=series(2), max_epochs=1)
    except SystemExit:
        pass
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return monitor, trace.lines


def test_a_checkpoint_of_a_handler_of_a_signal_holds_whole_measurements():
    seen = []

    def save(monitor, line):
        seen.append(whole(monitor.state_dict()["history"]))

    _, lines = traced(save)
    assert len(seen) == lines > 40
    assert all(seen)


@pytest.mark.slow
def test_ctrl_c_between_any_two_lines_of_the_books_leaves_whole_measurements():
    def interrupt(at, monitor, line):
        if line == at:
            raise KeyboardInterrupt

    _, lines = traced(lambda monitor, line: None)
    for at in range(1, lines + 1):
        monitor, _ = traced(functools.partial(interrupt, at))
        assert whole(monitor.history), at


# Runs that meet


class Nested(Callback):
    """Trains another model inside of the first epoch, with the same monitor."""

    def __init__(self, monitor):
        self.monitor, self.inner = monitor, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.inner is None:
            self.inner = make_trainer(self.monitor, max_epochs=1)
            self.inner.fit(Regressor("GRU"), series())


@pytest.mark.parametrize("order", [1, -1], ids=["monitor first", "monitor last"])
def test_a_run_inside_of_another_with_the_same_monitor_is_not_measured_and_the_outer_one_is(order, recwarn):
    monitor, alone = (LyapunovMonitor(every_n_train_steps=1) for _ in range(2))
    nested = Nested(monitor)
    fit(Regressor(), *[monitor, nested][::order])
    fit(Regressor(), alone)
    assert nested.inner.global_step == 3
    assert not published(nested.inner)
    assert len(messages(recwarn, "measures another run")) == 1
    assert torch.equal(monitor.history["rnn"]["spectrum"], alone.history["rnn"]["spectrum"])


def test_a_run_inside_of_another_with_the_same_strict_monitor_is_refused():
    monitor = LyapunovMonitor(strict=True)
    with pytest.raises(RuntimeError, match="Give each trainer a monitor of its own"):
        fit(Regressor(), monitor, Nested(monitor))


def test_a_second_thread_is_refused_and_the_first_goes_on(recwarn):
    monitor, alone = (LyapunovMonitor(every_n_train_steps=1) for _ in range(2))
    inside, done, trainers = threading.Event(), threading.Event(), []

    def wait(trainer):
        inside.set()
        assert done.wait(60)

    def first():
        trainers.append(fit(Regressor(), At("on_train_batch_start", wait), monitor))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    second = fit(Regressor("GRU"), monitor)
    done.set()
    thread.join()
    fit(Regressor(), alone)
    assert second.global_step == trainers[0].global_step == 6
    assert not published(second)
    assert len(messages(recwarn, "measures another run")) == 1
    assert torch.equal(monitor.history["rnn"]["spectrum"], alone.history["rnn"]["spectrum"])


class FailsAgain(Callback):
    """Fails in a batch, and again in its own ``on_exception``."""

    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, trainer, *_):
        if trainer.global_step == 1:
            raise ValueError("no")

    def on_exception(self, trainer, module, exception):
        raise LookupError("no, again")


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_train_batch_end"])
@pytest.mark.parametrize("order", [1, -1], ids=["monitor first", "monitor last"])
def test_a_callback_that_fails_in_its_own_on_exception_leaves_no_hook_and_the_monitor_can_be_used_again(hook, order):
    model, monitor = Regressor(), LyapunovMonitor(every_n_train_steps=1)
    trainer = make_trainer(*[monitor, FailsAgain(hook)][::order])
    with pytest.raises(LookupError):
        trainer.fit(model, series())
    assert not hooks_of(model)
    assert not any("__prepare_scriptable__" in vars(module) for module in model.modules())
    before = sum(len(cell["step"]) for cell in monitor.history.values())
    fit(model, monitor)
    assert len(monitor.history["rnn"]["step"]) == before + 6
    assert not hooks_of(model)


class Strategy:
    """Has one step, which counts."""

    def __init__(self):
        self.said = []

    def training_step(self, *batch):
        self.said.append("step")
        return batch


@pytest.mark.parametrize("withdrawn", [(), (0,), (1,), (0, 1), (1, 0)], ids=str)
def test_steps_that_stand_before_one_another_come_once_and_go(withdrawn):
    strategy = Strategy()
    said = strategy.said
    steps = [
        NextStep(strategy, "training_step", lambda i=i: said.append(f"in {i}"), lambda i=i: said.append(f"out {i}"))
        for i in range(2)
    ]
    for number in withdrawn:
        steps[number].withdraw()
    assert strategy.training_step(1, 2) == (1, 2)
    inner = [number for number in (1, 0) if number not in withdrawn]
    assert said == [f"in {n}" for n in inner] + ["step"] + [f"out {n}" for n in inner[::-1]]
    assert "training_step" not in vars(strategy)
    strategy.training_step()
    assert said[-1] == "step"


def test_a_step_that_another_has_replaced_is_given_back():
    strategy = Strategy()
    strategy.training_step = mine = lambda: "mine"
    NextStep(strategy, "training_step", lambda: None, lambda: None)
    assert strategy.training_step() == "mine"
    assert strategy.training_step is mine


# What is kept alive


class Argument:
    """An object that holds inputs."""

    def __init__(self, values):
        self.values = values


class OfObjects(nn.Module):
    """A cell that takes such objects, and cannot be read in some batches."""

    def __init__(self, fails):
        super().__init__()
        self.cell, self.fails = nn.GRUCell(FEATURES, 5), fails

    def forward(self, inputs, state):
        if self.fails and torch.is_grad_enabled() is False:
            raise LookupError("called again")
        return self.cell(inputs.values, state)


@pytest.mark.filterwarnings("ignore:.*could not be measured")
@pytest.mark.parametrize("fails", [False, True])
def test_no_argument_is_kept_alive_after_the_batch(fails):
    arguments, alive = [], []

    class Model(CellModel):
        def forward(self, inputs):
            state, states = inputs.new_zeros(len(inputs), 5), []
            for step in inputs.unbind(1):
                argument = Argument(step + 0 * state.mean())
                arguments.append(weakref.ref(argument))
                state = self.rnn(argument, state)
                states.append(state)
            return self.head(torch.stack(states, 1))

    def count(trainer):
        gc.collect()
        alive.append(sum(argument() is not None for argument in arguments))

    look = At("on_train_batch_start", count)
    fit(Model(OfObjects(fails)), LyapunovMonitor("rnn", every_n_train_steps=1), look)
    assert len(arguments) > 50
    assert alive == [0] * 6


@pytest.mark.filterwarnings("ignore:.*could not be measured")
def test_an_error_in_recording_keeps_no_frame(monkeypatch):
    class Big:
        pass

    marks = []

    class Fails(TanhCell):
        def forward(self, inputs, state):
            mark = Big()
            marks.append(weakref.ref(mark))
            if not torch.is_grad_enabled():
                raise LookupError("called again")
            return super().forward(inputs, state)

    alive = []
    look = At("on_before_backward", lambda trainer: alive.append(sum(mark() is not None for mark in marks)))
    fit(CellModel(Fails()), LyapunovMonitor("rnn", every_n_train_steps=1), look)
    assert len(alive) == 6
    assert not any(alive)


# Loggers and disks


class Refuses(SilentLogger):
    calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if "lyapunov/max" in metrics:
            raise KeyError("lyapunov/max")


def test_a_logger_that_refuses_our_keys_is_named_once_and_all_values_are_published(recwarn):
    logger, monitor = Refuses(), LyapunovMonitor(every_n_train_steps=1, log_spectrum=False)
    trainer = fit(Regressor(), monitor, logger=logger)
    assert logger.calls >= 6
    assert len(messages(recwarn, "Refuses did not take the numbers: KeyError: 'lyapunov/max'")) == 1
    assert published(trainer)["lyapunov/max"].isfinite()
    assert len(monitor.history["rnn"]["step"]) == 6


def test_a_logger_that_refuses_our_keys_raises_if_that_is_asked_for():
    with pytest.raises(KeyError):
        fit(Regressor(), LyapunovMonitor(strict=True), logger=Refuses())


class OnDisk:
    def __init__(self, folder):
        self.log_dir, self.experiment, self.flush = str(folder), self, lambda: None


def test_a_disk_that_is_nearly_full_has_no_room_for_pictures(tmp_path, monkeypatch):
    room.check_room(OnDisk(tmp_path), 2)
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="nearly full"):
        room.check_room(OnDisk(tmp_path), 2)
    room.check_room(SilentLogger(), 2)


def test_a_limit_on_files_leaves_half_of_it_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_max_file_size", lambda: 1_000_000)
    room.check_room(OnDisk(tmp_path), 2)
    (tmp_path / "events").write_bytes(bytes(200_000))
    with pytest.raises(OSError, match="limit"):
        room.check_room(OnDisk(tmp_path), 2)


def test_warnings_that_are_errors_stay_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not be measured")
        with pytest.raises(UserWarning, match="could not be measured"):
            fit(Regressor(), failing_monitor())
