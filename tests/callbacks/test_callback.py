"""``LyapunovMonitor`` in a fit: what it publishes, what it measures, and what it does not change."""

import math
import pickle

import pytest
import torch
from helpers import (
    At,
    Dial,
    Halves,
    Keyword,
    Language,
    Loop,
    Packed,
    Parts,
    Regressor,
    TwoLayers,
    failing_monitor,
    fit,
    hooks_of,
    keys_of,
    messages,
    published,
    series,
    tokens,
)
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum

# Published values


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


# Measured values


class ByHand(Callback):
    """Compute, with the weights after each batch, the spectra of what the layer is called with in it."""

    def __init__(self, calls, **options):
        self.calls, self.options, self.spectra = calls, options, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.call = self.calls(pl_module, batch[0])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.spectra.append(lyapunov_spectrum(pl_module.rnn, *self.call, **self.options))


def as_they_are(module, inputs):
    return inputs, None


def embedded(module, inputs):
    return module.embedding(inputs).detach(), None


def time_first(module, inputs):
    return inputs.transpose(0, 1), None


def with_state(module, inputs):
    state = torch.full((1, len(inputs), module.rnn.hidden_size), 0.3)
    return inputs, (state, -state)


CALLS = {
    "RNN": (lambda: Regressor("RNN"), series, as_they_are),
    "GRU": (lambda: Regressor("GRU"), series, as_they_are),
    "LSTM": (lambda: Regressor("LSTM"), series, as_they_are),
    "embedding": (Language, tokens, embedded),
    "keyword": (Keyword, series, with_state),
    "half of the steps at a time": (Halves, series, as_they_are),
    "half of the batch at a time": (Parts, series, as_they_are),
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
@pytest.mark.parametrize(
    ("rate", "memory", "share"),
    [(-0.5, 2.0, 0.0), (0.5, 2.0, 0.0), (-0.2, 5.0, 0.0), (-0.1, 8.0, 1.0), (0.0, 8.0, 1.0)],
)
def test_memory_is_resolved_up_to_the_window(rate, memory, share, batch_size):
    data = series(batch_size=batch_size, time=12)
    values = published(fit(Dial([rate]), LyapunovMonitor(warmup=4, metrics="all"), max_epochs=1, data=data))
    assert values["lyapunov/rnn/memory_steps"].item() == pytest.approx(memory, rel=1e-5)
    assert values["lyapunov/rnn/share_near_zero"] == share


# Side effects


def trace(cell, dropout, shuffle, *callbacks):
    """Return the weights and the state of the random numbers after a training."""
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


# Failures


def test_a_failure_of_the_monitor_is_said_once_and_training_goes_on(recwarn):
    model, untouched = Regressor(num_layers=2), Regressor(num_layers=2)
    trainer = fit(model, failing_monitor())
    fit(untouched)
    values = published(trainer)
    assert set(values) == keys_of("rnn.l0", "rnn.l1")
    assert all(value.isnan() for value in values.values())
    assert [message for message in messages(recwarn, "LinAlgError: no convergence") if "strict=True" in message]
    assert len(messages(recwarn, "could not be measured")) == 1
    assert all(map(torch.equal, model.state_dict().values(), untouched.state_dict().values()))


def test_a_strict_monitor_raises_its_failure():
    model = Regressor()
    with pytest.raises(torch.linalg.LinAlgError, match="no convergence"):
        fit(model, failing_monitor(strict=True))
    assert not hooks_of(model)


def test_a_network_that_is_not_finite_is_nan_on_every_number_and_no_error():
    model = Regressor()
    with torch.no_grad():
        model.rnn.weight_hh_l0[0, 0] = math.nan
    values = published(fit(model, LyapunovMonitor(strict=True)))
    assert values["lyapunov/rnn/max"].isnan()
    assert values["lyapunov/max"] == math.inf
    assert set(values) == keys_of("rnn")


def test_a_network_that_forgets_at_once_is_finite():
    model = Regressor("RNN", lr=0.0)
    torch.nn.init.zeros_(model.rnn.weight_hh_l0)
    values = published(fit(model, LyapunovMonitor(), max_epochs=1))
    assert all(value.isfinite() for value in values.values())
    assert values["lyapunov/max"] < -80


def test_a_layer_that_is_not_called_warns_once_and_keeps_its_values(recwarn):
    seen, monitor = FirstSeen(), LyapunovMonitor(every_n_train_steps=1)
    fit(TwoLayers(), monitor, seen, data=series(6), max_epochs=1)
    assert seen.keys == [keys_of("rnn", "sometimes")] * 6
    spectrum = monitor.history["sometimes"]["spectrum"]
    assert torch.equal(spectrum[0::2], spectrum[1::2])
    assert not torch.equal(spectrum[0], spectrum[2])
    assert len(messages(recwarn, "`sometimes` was not called")) == 1


def test_a_layer_that_is_not_called_at_first_is_no_worst_layer():
    model = TwoLayers()
    model.calls = 1
    trainer = fit(model, LyapunovMonitor(), max_steps=1)
    assert set(published(trainer)) == keys_of("rnn", "sometimes")
    assert trainer.callback_metrics["lyapunov/max"] == trainer.callback_metrics["lyapunov/rnn/max"]
