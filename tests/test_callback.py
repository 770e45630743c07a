"""``LyapunovMonitor`` inside a training that is somebody else's."""

import copy
import csv
import itertools
import math
import pickle

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from models import (
    Dial,
    Halves,
    Keyword,
    Language,
    Loop,
    Packed,
    Parts,
    Regressor,
    Stream,
    TwoLayers,
    TwoOptimizers,
    fit,
    make_trainer,
    regressor,
    series,
    tokens,
)
from torch import nn
from torch.testing import assert_close

import lightning_lyapunov.callbacks.monitor
from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum

NUMBERS = {
    "max",
    "max_stderr",
    "mean",
    "kaplan_yorke_dimension",
    "kolmogorov_sinai_entropy",
    "num_positive",
    "log10_gradient_gain",
    "memory_steps",
    "share_near_zero",
}


def keys_of(*cells):
    overall = {"lyapunov/max", "lyapunov/max_stderr", "lyapunov/worst_layer"}
    return overall | {f"lyapunov/{cell}/{name}" for cell in cells for name in NUMBERS}


def published(trainer):
    return {key: value for key, value in trainer.callback_metrics.items() if key.startswith("lyapunov/")}


def steps_of(monitor):
    (measurements,) = monitor.history.values()
    return measurements["step"].tolist()


class At(Callback):
    """Do something in a hook."""

    def __init__(self, hook, action):
        setattr(self, hook, lambda trainer, *_, **__: action(trainer))


# When it measures: steps count batches from 0, an epoch has four.

SCHEDULES = {
    "neither": ({}, [0, 3, 7, 11]),
    "every_epoch": ({"every_n_epochs": 1}, [0, 3, 7, 11]),
    "every_2_epochs": ({"every_n_epochs": 2}, [0, 7]),
    "every_9_epochs": ({"every_n_epochs": 9}, [0]),
    "every_step": ({"every_n_train_steps": 1}, list(range(12))),
    "every_3_steps": ({"every_n_train_steps": 3}, [0, 2, 5, 8, 11]),
    "every_5_steps": ({"every_n_train_steps": 5}, [0, 4, 9]),
    "both": ({"every_n_epochs": 1, "every_n_train_steps": 3}, [0, 2, 3, 5, 7, 8, 11]),
}


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


# Where the numbers go


class FirstSeen(Callback):
    """Note what is published after each batch."""

    def __init__(self):
        self.keys = []

    def on_train_batch_end(self, trainer, *_):
        self.keys.append(set(published(trainer)))


@pytest.mark.parametrize("schedule", [{}, {"every_n_epochs": 9}, {"every_n_train_steps": 100}], ids=str)
def test_every_key_is_there_from_the_first_batch_on(schedule):
    seen = FirstSeen()
    fit(Regressor(), LyapunovMonitor(**schedule), seen, max_epochs=2)
    assert seen.keys == [keys_of("rnn")] * 6


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({}, ["rnn"]),
        ({"num_layers": 2}, ["rnn.l0", "rnn.l1"]),
        ({"bidirectional": True}, ["rnn.l0", "rnn.l0_reverse"]),
        ({"num_layers": 2, "bidirectional": True}, ["rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_each_cell_has_its_keys(cell, options, cells):
    monitor = LyapunovMonitor()
    trainer = fit(Regressor(cell, **options), monitor, max_epochs=1)
    assert set(published(trainer)) == keys_of(*cells)
    assert list(monitor.history) == cells


def test_the_largest_exponent_over_all_cells_is_the_one_to_stop_on():
    values = published(fit(Regressor(num_layers=2), LyapunovMonitor()))
    worst = max(("rnn.l0", "rnn.l1"), key=lambda cell: values[f"lyapunov/{cell}/max"])
    assert values["lyapunov/max"] == values[f"lyapunov/{worst}/max"]
    assert values["lyapunov/max_stderr"] == values[f"lyapunov/{worst}/max_stderr"]


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_the_worst_layer_is_told_by_its_place(worst):
    model = Regressor("RNN", num_layers=3, lr=0.0)
    for place in {0, 1, 2} - {worst}:
        nn.init.zeros_(getattr(model.rnn, f"weight_hh_l{place}"))
    monitor = LyapunovMonitor(strict=True)
    values = published(fit(model, monitor, max_epochs=1))
    assert values["lyapunov/worst_layer"] == worst
    assert list(monitor.history)[worst] == monitor.estimates["lyapunov/max"].layer == f"rnn.l{worst}"


@pytest.mark.parametrize("modules", ["rnn", ["rnn"], ("rnn",)], ids=str)
def test_only_the_modules_named_are_watched(modules):
    trainer = fit(TwoLayers(), LyapunovMonitor(modules), max_epochs=1)
    assert set(published(trainer)) == keys_of("rnn")


VALIDATION = {
    "default": ({}, {}),
    "val_check_interval=0.5": ({"val_check_interval": 0.5}, {}),
    "check_val_every_n_epoch=2": ({"check_val_every_n_epoch": 2}, {}),
    "no validation": ({"limit_val_batches": 0}, {}),
    "check_on_train_epoch_end=False": ({}, {"check_on_train_epoch_end": False}),
}


@pytest.mark.parametrize("order", [1, -1], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize(("options", "stopping"), VALIDATION.values(), ids=VALIDATION)
def test_stops_in_the_epoch_that_becomes_unstable_and_keeps_the_most_stable(options, stopping, order, tmp_path):
    stop = EarlyStopping("lyapunov/max", divergence_threshold=0.2, patience=10**6, **stopping)
    keep = ModelCheckpoint(tmp_path, monitor="lyapunov/max", mode="min")
    callbacks = [LyapunovMonitor(), stop, keep][::order]
    options = {"max_epochs": 8, "enable_checkpointing": True, **options}
    trainer = fit(Dial([-0.2, -0.5, -0.3, 0.5] + [0.0] * 4), *callbacks, data=series(2), val=series(2), **options)
    assert trainer.current_epoch == 4
    assert stop.stopped_epoch == 3
    assert keep.best_model_score.item() == pytest.approx(-0.5, abs=1e-6)
    assert torch.load(keep.best_model_path, weights_only=True)["epoch"] == 1


# What it measures


class ByHand(Callback):
    """Compute, with the weights after each batch, the spectra of what the layer is called with in it."""

    def __init__(self, calls, **options):
        self.calls, self.options, self.spectra = calls, options, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.call = self.calls(pl_module, batch[0])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.spectra.append(lyapunov_spectrum(pl_module.rnn, *self.call, **self.options))


def plain(module, inputs):
    return inputs, None


def embedded(module, inputs):
    return module.embedding(inputs).detach(), None


def time_first(module, inputs):
    return inputs.transpose(0, 1), None


def with_state(module, inputs):
    state = torch.full((1, len(inputs), module.rnn.hidden_size), 0.3)
    return inputs, (state, -state)


CALLS = {
    "RNN": (lambda: Regressor("RNN"), series, plain),
    "GRU": (lambda: Regressor("GRU"), series, plain),
    "LSTM": (lambda: Regressor("LSTM"), series, plain),
    "embedding": (Language, tokens, embedded),
    "keyword": (Keyword, series, with_state),
    "half of the steps at a time": (Halves, series, plain),
    "half of the batch at a time": (Parts, series, plain),
    "a cell in a loop": (Loop, series, time_first),
}


@pytest.mark.parametrize(("model", "data", "calls"), CALLS.values(), ids=CALLS)
def test_values_are_those_by_hand_of_the_inputs_and_weights_of_that_moment(model, data, calls):
    monitor = LyapunovMonitor(every_n_train_steps=1, num_exponents=1, warmup=4)
    by_hand = ByHand(calls, num_exponents=1, warmup=4)
    trainer = fit(model(), monitor, by_hand, data=data())
    spectra = torch.stack(by_hand.spectra)
    assert_close(monitor.history["rnn"]["spectrum"], spectra.mean(1), rtol=1e-4, atol=1e-5)
    assert_close(monitor.history["rnn"]["stderr"], spectra.std(1) / math.sqrt(4), rtol=1e-3, atol=1e-5)
    assert_close(trainer.callback_metrics["lyapunov/max"], spectra[-1].mean(), rtol=1e-4, atol=1e-5)


def test_weights_of_the_moment_change_from_one_measurement_to_the_next():
    monitor = LyapunovMonitor(every_n_train_steps=1)
    fit(Regressor(), monitor)
    assert (monitor.history["rnn"]["spectrum"][:, 0].diff() != 0).all()


def test_padding_is_not_data():
    monitor = LyapunovMonitor(every_n_train_steps=1, num_exponents=1, warmup=0)
    model, spectra = Packed("GRU", lr=0.0), []
    fit(model, monitor, max_epochs=1)
    for inputs, _ in series():
        parts = [
            (lyapunov_spectrum(model.rnn, sequence[:length].unsqueeze(0), num_exponents=1) * length).item()
            for sequence, length in zip(inputs, Packed.lengths, strict=True)
        ]
        spectra.append(sum(parts) / Packed.lengths.sum())
    assert_close(monitor.history["rnn"]["spectrum"][:, 0], torch.stack(spectra), rtol=1e-4, atol=1e-5)


def test_no_more_sequences_and_steps_than_asked_for_are_used():
    monitor = LyapunovMonitor(num_sequences=2, max_steps=6, warmup=0, num_exponents=1)
    model = Regressor(lr=0.0)
    fit(model, monitor, max_steps=1, data=series(1))
    # Two of the four members of the batch, spread evenly over it.
    (inputs, _) = next(iter(series(1)))
    expected = lyapunov_spectrum(model.rnn, inputs[[0, 2], :6], num_exponents=1).mean(0)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_exponents", "computed"), [(1, 1), (3, 3), (99, 10), (None, 10)])
def test_a_cell_has_no_more_exponents_than_its_state(num_exponents, computed):
    monitor = LyapunovMonitor(num_exponents=num_exponents)
    fit(Regressor("LSTM", hidden_size=5), monitor, data=series(1), max_epochs=1)
    assert monitor.history["rnn"]["spectrum"].shape == (1, computed)


def test_a_batch_of_one_sequence_has_an_error_too():
    values = published(fit(Regressor(), LyapunovMonitor(), data=series(batch_size=1, time=40)))
    assert 0 < values["lyapunov/max_stderr"] < 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_gain_of_gradients_is_that_over_the_window(batch_size):
    rate, time, warmup = -0.5, 12, 4
    data = series(batch_size=batch_size, time=time)
    trainer = fit(Dial([rate]), LyapunovMonitor(warmup=warmup), max_epochs=1, data=data)
    gain = trainer.callback_metrics["lyapunov/rnn/log10_gradient_gain"].item()
    assert gain == pytest.approx(rate * (time - warmup) / math.log(10), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("rate", "memory", "share"),
    [(-0.5, 2.0, 0.0), (0.5, 2.0, 0.0), (-0.2, 5.0, 0.0), (-0.1, 8.0, 1.0), (0.0, 8.0, 1.0)],
)
def test_memory_is_resolved_up_to_the_window(rate, memory, share, batch_size):
    data = series(batch_size=batch_size, time=12)
    values = published(fit(Dial([rate]), LyapunovMonitor(warmup=4), max_epochs=1, data=data))
    assert values["lyapunov/rnn/memory_steps"].item() == pytest.approx(memory, rel=1e-5)
    assert values["lyapunov/rnn/share_near_zero"] == share


# What it leaves alone


def trace(cell, dropout, shuffle, *callbacks):
    """Everything that a training leaves: weights, and the state of the random numbers."""
    seed_everything(0, verbose=False)
    model = Regressor(cell, num_layers=2, dropout=dropout)
    seed_everything(1, verbose=False)
    trainer = fit(model, *callbacks, data=series(shuffle=shuffle), val=series(1))
    assert trainer.global_step == 6
    return {**model.state_dict(), "random": torch.get_rng_state()}


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_run_with_the_monitor_is_bitwise_that_without(cell, dropout, shuffle):
    without = trace(cell, dropout, shuffle)
    monitored = trace(cell, dropout, shuffle, LyapunovMonitor(every_n_train_steps=1))
    assert all(torch.equal(value, monitored[name]) for name, value in without.items())


def test_gradients_are_left_as_they_are():
    gradients = [[], []]
    for kept, callbacks in zip(gradients, [[], [LyapunovMonitor()]], strict=True):
        model = Regressor()
        fit(model, *callbacks, max_steps=1)
        kept += [parameter.grad for parameter in model.parameters()]
    assert all(map(torch.equal, *gradients))


def hooks_of(model):
    """The hooks on a model's calls."""
    return [
        hook
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        for hook in hooks.values()
    ]


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_epoch_end", "on_train_end"])
def test_no_hook_is_on_a_layer_outside_training_batches(hook):
    model, seen = Regressor(), []
    look = At(hook, lambda trainer: seen.append(hooks_of(trainer.lightning_module)))
    fit(model, look, LyapunovMonitor(every_n_train_steps=1), val=series(1))
    assert seen
    assert not any(seen)
    assert not hooks_of(model)


class Skipping(Regressor):
    """Leaves each epoch at its second batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 else None


def test_no_hook_is_on_a_layer_after_an_epoch_was_left():
    model, seen = Skipping(), []
    look = At("on_train_epoch_end", lambda trainer: seen.append(hooks_of(model)))
    fit(model, LyapunovMonitor(every_n_train_steps=1), look)
    assert len(seen) == 2
    assert not any(seen)


class Failing(Regressor):
    def training_step(self, batch, batch_idx):
        self.recorded = bool(hooks_of(self))
        super().training_step(batch, batch_idx)
        raise RuntimeError("out of memory")


def test_no_hook_is_left_after_an_exception():
    model = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(model, LyapunovMonitor())
    assert model.recorded
    assert not hooks_of(model)


def test_a_layer_can_be_pickled_in_a_batch_that_is_recorded():
    layers, model = [], Regressor()
    keep = At("on_train_batch_end", lambda trainer: layers.append(pickle.loads(pickle.dumps(model.rnn))))
    fit(model, keep, LyapunovMonitor())
    assert len(layers) == 6


# What it keeps


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


# Other ways to train


def test_several_monitors_watch_at_several_times():
    rare, often = LyapunovMonitor("rnn"), LyapunovMonitor("sometimes", every_n_train_steps=1)
    trainer = fit(TwoLayers(), rare, often, max_epochs=1, data=series(5))
    assert steps_of(rare) == [0, 4]
    assert steps_of(often) == [0, 1, 2, 3, 4]
    assert set(published(trainer)) == keys_of("rnn", "sometimes")


def ours(record):
    return [
        str(warning.message) for warning in record if "yapunov" in str(warning.message) or "`" in str(warning.message)
    ]


def test_a_layer_that_is_not_called_warns_once_and_keeps_its_values(recwarn):
    seen, monitor = FirstSeen(), LyapunovMonitor(every_n_train_steps=1)
    fit(TwoLayers(), monitor, seen, data=series(6), max_epochs=1)
    assert seen.keys == [keys_of("rnn", "sometimes")] * 6
    spectrum = monitor.history["sometimes"]["spectrum"]
    assert torch.equal(spectrum[0::2], spectrum[1::2])
    assert not torch.equal(spectrum[0], spectrum[2])
    assert len([message for message in ours(recwarn) if "`sometimes` was not called" in message]) == 1


def test_a_layer_that_is_not_called_at_first_is_no_worst_layer():
    model = TwoLayers()
    model.calls = 1
    trainer = fit(model, LyapunovMonitor(), max_steps=1)
    assert set(published(trainer)) == keys_of("rnn", "sometimes")
    assert trainer.callback_metrics["lyapunov/max"] == trainer.callback_metrics["lyapunov/rnn/max"]


@pytest.fixture
def broken(monkeypatch):
    def layer_growth(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(lightning_lyapunov.callbacks.monitor, "layer_growth", layer_growth)


@pytest.mark.usefixtures("broken")
def test_a_failure_of_the_monitor_is_said_once_and_training_goes_on(recwarn):
    model, untouched = Regressor(num_layers=2), Regressor(num_layers=2)
    trainer = fit(model, LyapunovMonitor())
    fit(untouched)
    values = published(trainer)
    assert set(values) == keys_of("rnn.l0", "rnn.l1")
    assert all(value.isnan() for value in values.values())
    assert [
        message for message in ours(recwarn) if "LinAlgError: no convergence" in message and "strict=True" in message
    ]
    assert len([message for message in ours(recwarn) if "could not be measured" in message]) == 1
    assert all(map(torch.equal, model.state_dict().values(), untouched.state_dict().values()))


@pytest.mark.usefixtures("broken")
def test_a_strict_monitor_raises_its_failure():
    model = Regressor()
    with pytest.raises(torch.linalg.LinAlgError, match="no convergence"):
        fit(model, LyapunovMonitor(strict=True))
    assert not hooks_of(model)


def test_a_network_that_is_not_finite_is_nan_on_every_number_and_no_error():
    model = Regressor()
    with torch.no_grad():
        model.rnn.weight_hh_l0[0, 0] = math.nan
    values = published(fit(model, LyapunovMonitor(strict=True)))
    assert values["lyapunov/max"].isnan()
    assert set(values) == keys_of("rnn")


def test_a_network_that_forgets_at_once_is_finite():
    model = Regressor("RNN", lr=0.0)
    torch.nn.init.zeros_(model.rnn.weight_hh_l0)
    values = published(fit(model, LyapunovMonitor(), max_epochs=1))
    assert all(value.isfinite() for value in values.values())
    assert values["lyapunov/max"] < -80


TRAINERS = {
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run=3": {"fast_dev_run": 3},
    "logger=False": {"logger": False},
    "barebones": {"barebones": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "detect_anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_any_trainer_can_have_a_monitor(cell, options):
    monitor = LyapunovMonitor(strict=True)
    trainer = fit(Regressor(cell), monitor, **options)
    values = published(trainer)
    assert set(values) == keys_of("rnn")
    assert all(value.isfinite() for value in values.values())
    assert monitor.history["rnn"]["spectrum"].dtype == torch.float32
    torch.use_deterministic_algorithms(False)


def test_low_precision_changes_the_weights_and_not_the_arithmetic():
    """The exponents in bf16 are, to float32's accuracy, those of the rounded weights and inputs."""
    monitor, model = LyapunovMonitor(num_exponents=1, warmup=0), Regressor("GRU", lr=0.0)
    fit(model, monitor, max_steps=1, data=series(1), precision="bf16-true")
    (inputs, _) = next(iter(series(1)))
    rounded = copy.deepcopy(model.rnn).bfloat16().float()
    expected = lyapunov_spectrum(rounded, inputs.bfloat16().float(), num_exponents=1).mean(0)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected, rtol=1e-4, atol=1e-5)


def test_a_second_fit_goes_on_where_the_first_ended():
    monitor, model = LyapunovMonitor(), Regressor()
    trainer = make_trainer(monitor)
    trainer.fit(model, series())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, series())
    assert steps_of(monitor) == [0, 2, 5, 6, 8, 11]
    assert not hooks_of(model)


def test_prediction_measures_nothing():
    monitor = LyapunovMonitor()
    make_trainer(monitor).predict(Regressor(), [batch[0] for batch in series()])
    assert monitor.history == {}


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_validate_and_test_measure_once_and_log(stage, cell):
    class Tested(Regressor):
        test_step = Regressor.validation_step

    # The first batch of `series` is all that is seen, so the plain function gives the same.
    model, monitor = Tested(cell), LyapunovMonitor(warmup=2, dtype=torch.float64, strict=True)
    trainer = make_trainer(monitor)
    getattr(trainer, stage)(model, series(), verbose=False)
    expected = lyapunov_spectrum(model.rnn, next(iter(series()))[0], warmup=2, dtype=torch.float64).mean(0)
    torch.testing.assert_close(monitor.history["rnn"]["spectrum"][0].double(), expected[:16], rtol=0, atol=1e-6)
    assert monitor.history["rnn"]["step"].tolist() == [0]
    assert trainer.callback_metrics["lyapunov/max"] == pytest.approx(float(expected[0]), abs=1e-6)
    assert not hooks_of(model)


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_the_history_is_a_table_in_one_call(suffix, tmp_path):
    monitor = LyapunovMonitor()
    fit(Regressor(num_layers=2), monitor, max_epochs=2)
    monitor.save_history(tmp_path / f"history{suffix}")
    history = monitor.history["rnn.l1"]
    if suffix == ".npz":
        table = np.load(tmp_path / "history.npz")
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
        over_training, now, *_ = monitor.plot(asked).axes
        assert layer in over_training.get_title()
        assert np.allclose(over_training.images[0].get_array(), history[layer]["spectrum"].T)
        assert np.allclose(now.lines[1].get_ydata(), history[layer]["spectrum"][-1])
    with pytest.raises(ValueError, match=r"`layer='head'` has not been measured\. Measured are: rnn\.l0, rnn\.l1"):
        monitor.plot("head")
    pyplot.close("all")


@pytest.mark.parametrize("pl", [lightning.pytorch, pytorch_lightning], ids=["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_run_it(pl, tmp_path):
    monitor = LyapunovMonitor()
    stop = pl.callbacks.EarlyStopping("lyapunov/max", divergence_threshold=-99.0, patience=10**6)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="lyapunov/max")
    options = {"pl": pl, "max_epochs": 3, "enable_checkpointing": True}
    trainer = fit(regressor(pl)(), stop, keep, monitor, **options)
    assert trainer.current_epoch == 1
    assert set(published(trainer)) == keys_of("rnn")
    assert keep.best_model_score == trainer.callback_metrics["lyapunov/max"]


def test_a_compiled_layer_keeps_its_name():
    model = Regressor()
    model.rnn = torch.compile(model.rnn, backend="eager")
    model.rnn.bidirectional = False
    assert set(published(fit(model, LyapunovMonitor(), max_epochs=1))) == keys_of("rnn")


class SaveResults(Callback):
    """Write down what each process has published, and what its layer was called with."""

    def __init__(self, folder):
        self.folder, self.inputs = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.inputs.append(batch[0])

    def on_train_end(self, trainer, pl_module):
        torch.save({"values": published(trainer), "inputs": self.inputs}, f"{self.folder}/{trainer.global_rank}.pt")


def test_every_process_publishes_the_value_over_all_of_them(tmp_path):
    model = Regressor(lr=0.0)
    options = {"devices": 2, "strategy": "ddp_spawn", "max_epochs": 1, "data": series(4, shuffle=False)}
    fit(model, LyapunovMonitor(num_exponents=1, warmup=0), SaveResults(tmp_path), **options)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(first["values"]) == keys_of("rnn")
    assert_close(first["values"], second["values"], rtol=0, atol=0)
    inputs = torch.cat((first["inputs"][-1], second["inputs"][-1]))
    assert not torch.equal(*inputs.chunk(2))
    expected = lyapunov_spectrum(model.rnn, inputs, num_exponents=1).mean()
    assert_close(first["values"]["lyapunov/max"], expected, rtol=1e-4, atol=1e-5)
