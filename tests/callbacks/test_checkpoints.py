"""The history in checkpoints: layouts, other options, other devices, and runs without the monitor."""

import pytest
import torch
from helpers import SCHEDULES, Regressor, assert_equal, fit, make_trainer, ours, series, steps_of

from lightning_lyapunov import LyapunovMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


def saved(folder, *monitors, model=None, **options):
    """Train and return the path of a checkpoint of the end."""
    path = folder / "saved.ckpt"
    fit(model or Regressor(num_layers=2), *monitors, **options).save_checkpoint(path)
    return path


def resumed(path, *monitors):
    """Train on from a checkpoint and return the weights at the end."""
    model = Regressor(num_layers=2)
    trainer = fit(model, *monitors, max_epochs=4, ckpt_path=path)
    assert trainer.current_epoch == 4
    return model.state_dict()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Train and save; return the monitor, the checkpoint, and the weights after a resume without monitor."""
    folder, monitor = tmp_path_factory.mktemp("saved"), LyapunovMonitor()
    path = saved(folder, monitor)
    return monitor, path, resumed(path)


def rewritten(path, folder, change):
    """Return the path of a checkpoint with a changed state of the monitor."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {key: change(state) for key, state in checkpoint["callbacks"].items()}
    torch.save(checkpoint, folder / "rewritten.ckpt")
    return folder / "rewritten.ckpt"


def said(record):
    """Return the warnings about the history."""
    return [message for message in ours(record) if "history" in message or "Lyapunov spectrum" in message]


# Layouts. The first had no version: it was the history and nothing else.


def of_each_cell(change):
    return lambda state: {**state, "history": {cell: change(rows) for cell, rows in state["history"].items()}}


READABLE = {
    "this one": lambda state: state,
    "the first": lambda state: {"history": state["history"]},
    "without what tells the measurements": lambda state: {"version": 2, "history": state["history"]},
    "newer, with more keys": lambda state: {**state, "version": 9, "device": "cuda:0", "extra": {"rnn.l0": [1.0]}},
    "newer, with more of each cell": of_each_cell(lambda rows: {**rows, "entropy": torch.ones(3), "cell": "GRU"}),
    "newer, in double precision": of_each_cell(lambda rows: {key: rows.double() for key, rows in rows.items()}),
    "newer, as lists": of_each_cell(lambda rows: {key: rows.tolist() for key, rows in rows.items()}),
    "newer, counted in another way": lambda state: {**state, "interval": "even", "num_measured": [3]},
    "newer, with numbers that do not fit": lambda state: {**state, "interval": dict.fromkeys(state["history"], 4)},
}


@pytest.mark.parametrize("change", READABLE.values(), ids=READABLE)
def test_a_layout_that_can_be_read_goes_on_without_a_word(change, done, tmp_path, recwarn):
    before, path, weights = done
    after = LyapunovMonitor(strict=True)
    assert_equal(resumed(rewritten(path, tmp_path, change), after), weights)
    assert not said(recwarn)
    assert list(after.history) == ["rnn.l0", "rnn.l1"]
    for cell, rows in after.history.items():
        assert rows["step"].tolist() == [0, 2, 5, 6, 8, 11]
        assert_equal({key: values[:3] for key, values in rows.items()}, before.history[cell])


def test_the_first_version_can_read_what_this_one_writes():
    monitor = LyapunovMonitor()
    fit(Regressor(), monitor)
    # Its `load_state_dict`, as it was.
    kept = {
        layer: {name: list(values.unbind()) for name, values in measurements.items()}
        for layer, measurements in monitor.state_dict()["history"].items()
    }
    assert [len(rows) for rows in kept["rnn"].values()] == [3, 3, 3]


def without(key):
    return of_each_cell(lambda rows: {name: values for name, values in rows.items() if name != key})


UNREADABLE = {
    "a list": lambda state: ["history"],
    "a string": lambda state: "history",
    "nothing known": lambda state: {"version": 9, "measurements": state["history"]},
    "no version and nothing known": lambda state: {"rows": 3},
    "a list of cells": lambda state: {**state, "history": list(state["history"].values())},
    "a tensor for each cell": of_each_cell(lambda rows: rows["spectrum"]),
    "None for each cell": of_each_cell(lambda rows: None),
    "no steps": without("step"),
    "no spectra": without("spectrum"),
    "steps that do not match": of_each_cell(lambda rows: {**rows, "step": torch.arange(2)}),
    "one spectrum": of_each_cell(lambda rows: {**rows, "spectrum": rows["spectrum"][0]}),
    "errors that do not match": of_each_cell(lambda rows: {**rows, "stderr": rows["stderr"][:, :2]}),
    "words": of_each_cell(lambda rows: {**rows, "spectrum": "small"}),
    "values that are not there": of_each_cell(lambda rows: {**rows, "spectrum": rows["spectrum"].to("meta")}),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_a_layout_that_cannot_be_read_is_said_once_and_the_history_starts_anew(change, done, tmp_path, recwarn):
    _, path, weights = done
    monitor = LyapunovMonitor(strict=True)
    assert_equal(resumed(rewritten(path, tmp_path, change), monitor), weights)
    (message,) = said(recwarn)
    assert "in the checkpoint" in message
    assert steps_of_each(monitor) == {"rnn.l0": [6, 8, 11], "rnn.l1": [6, 8, 11]}


def steps_of_each(monitor):
    return {cell: rows["step"].tolist() for cell, rows in monitor.history.items()}


def test_of_a_history_that_can_be_read_in_part_that_part_goes_on(done, tmp_path, recwarn):
    def spoil(state):
        return {**state, "history": {**state["history"], "rnn.l0": {"step": torch.arange(3)}}}

    monitor = LyapunovMonitor()
    resumed(rewritten(done[1], tmp_path, spoil), monitor)
    assert steps_of_each(monitor) == {"rnn.l1": [0, 2, 5, 6, 8, 11], "rnn.l0": [6, 8, 11]}
    (message,) = said(recwarn)
    assert "layout 2" in message
    assert "rnn.l0: KeyError" in message
    assert "rnn.l1" not in message


@pytest.mark.parametrize("state", [torch.ones(3), 3, None, [], {}], ids=str)
def test_no_state_at_all_is_said_once(state, recwarn):
    monitor = LyapunovMonitor()
    monitor.load_state_dict(state)
    assert monitor.history == {}
    assert len(said(recwarn)) == 1


# Options

SCHEDULE_OPTIONS = {name: options for name, (options, _) in SCHEDULES.items()}
OPTIONS = {
    **SCHEDULE_OPTIONS,
    "num_exponents=2": {"num_exponents": 2},
    "num_exponents=None": {"num_exponents": None},
    "max_steps, warmup": {"max_steps": 6, "warmup": 1},
    "dtype": {"dtype": torch.float64},
    "max_overhead": {"max_overhead": 0.9},
    "modules": {"modules": ["rnn"]},
    "modules and schedule": {"modules": "rnn", "every_n_train_steps": 2},
}


BEFORE = ["neither", "every_3_steps", "modules"]


@pytest.fixture(scope="module")
def done_with(tmp_path_factory):
    """Return, for some options, the monitor and the checkpoint of a run."""
    monitors = {name: LyapunovMonitor(**OPTIONS[name]) for name in BEFORE}
    return {name: (monitor, saved(tmp_path_factory.mktemp(name), monitor)) for name, monitor in monitors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("after", OPTIONS)
def test_a_monitor_with_other_options_finds_the_history_again(before, after, done_with, recwarn):
    (first, path), second = done_with[before], LyapunovMonitor(strict=True, **OPTIONS[after])
    resumed(path, second)
    for cell, rows in first.history.items():
        count, width = rows["spectrum"].shape
        assert second.history[cell]["step"][:count].tolist() == rows["step"].tolist()
        assert second.history[cell]["step"][count] == 6
        assert_equal(second.history[cell]["spectrum"][:count, :width], rows["spectrum"])
    assert not said(recwarn)


def test_pictures_are_of_the_cells_that_are_measured_now(done, tmp_path, monkeypatch):
    model, shown = Regressor("GRU"), []
    monkeypatch.setattr(
        "lightning_lyapunov.callbacks.publish.log_spectra", lambda logger, history, *_, **__: shown.append(history)
    )
    monitor = LyapunovMonitor()
    monitor.load_state_dict(done[0].state_dict())
    fit(model, monitor, logger=True, default_root_dir=tmp_path, max_epochs=1)
    assert list(monitor.history) == ["rnn.l0", "rnn.l1", "rnn"]
    assert [list(history) for history in shown] == [["rnn"]] * 2


# Two monitors, before and after; which finds which: the numbers of the first batch and of each second, third ... step.

SEVERAL = {
    "the same": ([(None, 1), (None, 2)], [(None, 1), (None, 2)], [0, 1]),
    "in another order": ([(None, 1), (None, 2)], [(None, 2), (None, 1)], [1, 0]),
    "one with another schedule": ([(None, 1), (None, 2)], [(None, 3), (None, 2)], [0, 1]),
    "both with another schedule": ([(None, 1), (None, 2)], [(None, 3), (None, 4)], [0, 1]),
    "of two layers, one is gone": ([("rnn", 1), ("head_rnn", 2)], [("head_rnn", 3)], [1]),
    "of two layers, the order is another": ([("rnn", 1), ("head_rnn", 2)], [("head_rnn", 3), ("rnn", 4)], [1, 0]),
    "two where one was": ([(None, 2)], [("rnn", 3), ("head_rnn", 1)], [0, None]),
    "one that could be either": ([("rnn", 1), ("head_rnn", 2)], [(None, 3)], [None]),
}


class StackedGRU(Regressor):
    def __init__(self):
        super().__init__("GRU")
        self.head_rnn = torch.nn.GRU(5, 5, batch_first=True)

    def forward(self, inputs):
        return self.head(self.head_rnn(self.rnn(inputs)[0])[0])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "found"), SEVERAL.values(), ids=SEVERAL)
def test_each_of_several_monitors_finds_its_own_history(before, after, found, tmp_path):
    saving = [LyapunovMonitor(modules, every_n_train_steps=n) for modules, n in before]
    path = saved(tmp_path, *saving, model=StackedGRU())
    histories = [monitor.history for monitor in saving]
    loading = [LyapunovMonitor(modules, every_n_train_steps=n) for modules, n in after]
    make_trainer(*loading, max_epochs=2).fit(StackedGRU(), series(), ckpt_path=path)  # it has ended: only loaded
    assert len({monitor.state_key for monitor in loading}) == len(loading)
    for monitor, index in zip(loading, found, strict=True):
        assert_equal(monitor.history, {} if index is None else histories[index])


def test_another_callback_of_a_similar_name_is_left_alone(tmp_path):
    class LyapunovMonitorOfMine(LyapunovMonitor):
        pass

    LyapunovMonitorOfMine.__qualname__ = "LyapunovMonitorOfMine"
    path = saved(tmp_path, LyapunovMonitorOfMine(every_n_train_steps=2))
    monitor = LyapunovMonitor()
    resumed(path, monitor)
    assert steps_of_each(monitor)["rnn.l0"] == [6, 8, 11]


# Without the monitor, before or after


def test_a_run_without_the_monitor_loads_the_file_and_trains_the_same(done, tmp_path):
    _, path, weights = done
    assert torch.load(path, weights_only=True)["callbacks"]
    without = saved(tmp_path)
    assert not torch.load(without, weights_only=True)["callbacks"]
    assert_equal(resumed(without), weights)


def test_a_run_with_the_monitor_loads_a_file_without_it(done, tmp_path, recwarn):
    monitor = LyapunovMonitor()
    assert_equal(resumed(saved(tmp_path), monitor), done[2])
    assert steps_of_each(monitor)["rnn.l0"] == [6, 8, 11]
    assert not said(recwarn)


# Devices


class Elsewhere(torch.Tensor):
    """A tensor on another device, until it is moved to the CPU."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_what_is_loaded_from_another_device_is_brought_to_the_cpu(done):
    monitor, other = done[0], LyapunovMonitor()
    state = monitor.state_dict()
    state["history"] = {
        cell: {key: values.as_subclass(Elsewhere) for key, values in rows.items()}
        for cell, rows in state["history"].items()
    }
    other.load_state_dict(state)
    assert all(type(values) is torch.Tensor for values in other.history["rnn.l0"].values())
    assert_equal(other.history, monitor.history)


def test_a_file_that_is_mapped_to_the_device_goes_on_on_the_cpu(device, done):
    monitor, path, _ = done
    state = torch.load(path, weights_only=True, map_location=device)["callbacks"][monitor.state_key]
    assert {values.device.type for rows in state["history"].values() for values in rows.values()} == {device}
    other = LyapunovMonitor()
    other.load_state_dict(state)
    assert {values.device.type for rows in other.history.values() for values in rows.values()} == {"cpu"}
    assert_equal(other.history, monitor.history)


def test_what_a_device_has_measured_is_saved_from_the_cpu(device, tmp_path):
    monitor = LyapunovMonitor()
    path = saved(tmp_path, monitor, accelerator="gpu" if device == "cuda" else device)
    state = torch.load(path, weights_only=True)["callbacks"][monitor.state_key]
    assert {values.device.type for rows in state["history"].values() for values in rows.values()} == {"cpu"}


# Size


def test_the_history_of_a_monitor_is_one_of_bounded_size(monkeypatch):
    monkeypatch.setattr("lightning_lyapunov.reporting.history.MAX_MEASUREMENTS", 4)
    monitor = LyapunovMonitor(every_n_train_steps=1)
    fit(Regressor(), monitor, data=series(11), max_epochs=1)
    assert steps_of(monitor) == [0, 4, 8, 10]
