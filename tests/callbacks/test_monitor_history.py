"""The history of a monitor: in checkpoints, copies, tables and figures."""

import copy
import csv
import pickle

import numpy as np
import pytest
import torch
from helpers import At, Regressor, fit, steps_of
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor


def test_history_holds_one_row_for_each_measurement():
    monitor = LyapunovMonitor(num_exponents=4)
    fit(Regressor(num_layers=2), monitor, max_epochs=3)
    assert list(monitor.history) == ["rnn.l0", "rnn.l1"]
    for measurements in monitor.history.values():
        assert measurements["step"].tolist() == [0, 2, 5, 8]
        assert measurements["spectrum"].shape == measurements["stderr"].shape == (4, 4)
        assert (measurements["spectrum"].diff(dim=1) <= 0).all()


def test_history_is_empty_before_a_fit():
    assert LyapunovMonitor().history == {}


def test_history_goes_through_a_checkpoint_and_on(tmp_path):
    monitor = LyapunovMonitor()
    fit(Regressor(), monitor).save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"][monitor.state_key]["history"]
    assert_close(saved, monitor.history)

    resumed = LyapunovMonitor()
    fit(Regressor(), resumed, max_epochs=4, ckpt_path=tmp_path / "two.ckpt")
    # The first batch after a resume is measured like the first of any fit.
    assert steps_of(resumed) == [0, 2, 5, 6, 8, 11]
    assert_close(resumed.history["rnn"]["spectrum"][:3], monitor.history["rnn"]["spectrum"])


def test_a_checkpoint_made_before_the_first_batch_is_loaded(tmp_path):
    monitor = LyapunovMonitor()
    save = At("on_train_start", lambda trainer: trainer.save_checkpoint(tmp_path / "start.ckpt"))
    fit(Regressor(), monitor, save)
    resumed = LyapunovMonitor()
    fit(Regressor(), resumed, ckpt_path=tmp_path / "start.ckpt")
    assert_close(resumed.history, monitor.history)


def test_a_resume_with_another_number_of_exponents_trains_on(tmp_path):
    fit(Regressor(), LyapunovMonitor(num_exponents=4)).save_checkpoint(tmp_path / "two.ckpt")
    monitor = LyapunovMonitor(num_exponents=2)
    trainer = fit(Regressor(), monitor, max_epochs=4, ckpt_path=tmp_path / "two.ckpt")
    assert trainer.current_epoch == 4
    assert monitor.history["rnn"]["spectrum"][-1].isfinite().sum() == 2


def test_a_monitor_can_watch_one_model_after_another():
    monitor = LyapunovMonitor()
    fit(Regressor("GRU", hidden_size=3), monitor)
    fit(Regressor("GRU", hidden_size=4), monitor)
    assert monitor.history["rnn"]["spectrum"][-1].shape == (4,)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda monitor: pickle.loads(pickle.dumps(monitor))}


@pytest.mark.parametrize("hook", ["setup", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_made_during_a_fit_is_free_of_it(copied, hook):
    monitor, copies = LyapunovMonitor(), []
    fit(Regressor(), monitor, At(hook, lambda trainer: copies.append((copied(monitor), monitor.history))))
    for other, history in copies:
        assert_close(other.history, history)
        assert not any(isinstance(value, torch.nn.Module) for value in vars(other).values())
    other, history = copies[0]
    fit(Regressor(), other, max_epochs=1)
    assert len(steps_of(other)) == 2 + len(history.get("rnn", {"step": []})["step"])


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_made_before_or_after_a_fit_measures_the_same(copied):
    monitor = LyapunovMonitor()
    before = copied(monitor)
    fit(Regressor(), monitor)
    after = copied(monitor)
    fit(Regressor(), before)
    assert_close(after.history, monitor.history)
    assert_close(before.history, monitor.history)


# Tables and figures


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_the_history_is_a_table_in_one_call(suffix, tmp_path):
    monitor = LyapunovMonitor()
    fit(Regressor(num_layers=2), monitor, max_epochs=2)
    monitor.save_history(tmp_path / f"history{suffix}")
    history = monitor.history["rnn.l1"]
    if suffix == ".npz":
        table = np.load(tmp_path / "history.npz")
        assert sorted(table) == [f"rnn.l{i}/{key}" for i in (0, 1) for key in ("spectrum", "stderr", "step")]
        assert np.array_equal(table["rnn.l1/spectrum"], history["spectrum"].numpy())
        assert table["rnn.l0/step"].tolist() == [0, 2, 5]
        return
    with (tmp_path / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] == "rnn.l1"]
    assert [float(row["value"]) for row in rows] == history["spectrum"].flatten().tolist()
    assert [float(row["stderr"]) for row in rows] == history["stderr"].flatten().tolist()
    assert [(row["step"], row["exponent"]) for row in rows[:11]] == [("0", str(i)) for i in range(1, 11)] + [("2", "1")]


def test_a_table_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"`path='history.xls'` must end in .csv or .npz"):
        LyapunovMonitor().save_history("history.xls")


def test_plot_draws_the_layer_that_is_worst_or_the_one_that_is_named():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monitor = LyapunovMonitor()
    with pytest.raises(ValueError, match=r"`layer=None` has not been measured\. Measured are: none"):
        monitor.plot()
    fit(Regressor(num_layers=2), monitor, max_epochs=2)
    history = monitor.history
    worst = max(history, key=lambda layer: history[layer]["spectrum"][-1, 0])
    other = next(layer for layer in history if layer != worst)
    for layer, asked in ((worst, None), (other, other)):
        over_training, now, largest, *_ = monitor.plot(asked).axes
        assert [line.get_label() for line in largest.lines[1:]] == list(history)
        drawn = {line.get_label(): (line.get_ydata(), line.get_color()) for line in largest.lines[1:]}
        assert all(np.allclose(drawn[name][0], history[name]["spectrum"][:, 0]) for name in history)
        assert [name for name in history if drawn[name][1] == "C3"] == [layer]
        assert layer in over_training.get_title()
        assert np.allclose(over_training.images[0].get_array(), history[layer]["spectrum"].T)
        assert np.allclose(now.lines[1].get_ydata(), history[layer]["spectrum"][-1])
    with pytest.raises(ValueError, match=r"`layer='head'` has not been measured\. Measured are: rnn\.l0, rnn\.l1"):
        monitor.plot("head")
    pyplot.close("all")
