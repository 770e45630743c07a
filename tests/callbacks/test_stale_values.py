"""What a value is from: the layer that is called now, in the trainer's own step; and what others log stays theirs."""

import math

import pytest
import torch
import torch.utils.checkpoint
from helpers import FEATURES, At, Regressor, TwoLayers, TwoOptimizers, fit, make_trainer, messages, published, series
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.testing import assert_close
from torchmetrics import MeanMetric

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.callbacks.measurement import MAX_REPEATS

REPEATED = f"repeated in up to {MAX_REPEATS} measurements"


class Values(Callback):
    """Keep what is published after each batch."""

    def __init__(self, key="lyapunov/rnn/max"):
        self.key, self.seen = key, []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(published(trainer)[self.key].item())


class Abandoning(TwoLayers):
    """Calls its second layer in the first batch only."""

    def forward(self, inputs):
        extra = self.sometimes(inputs)[0].mean(-1, keepdim=True) if self.calls == 0 else 0
        self.calls += 1
        return Regressor.forward(self, inputs) + extra


def every_step(**options):
    return LyapunovMonitor(every_n_train_steps=1, warmup=2, strict=True, **options)


def assert_repeated_and_then_nan(values):
    first, repeated, rest = values[0], values[1 : 1 + MAX_REPEATS], values[1 + MAX_REPEATS :]
    assert math.isfinite(first)
    assert repeated == [first] * MAX_REPEATS
    assert rest
    assert all(math.isnan(value) for value in rest)


def test_a_layer_that_is_no_longer_called_repeats_its_last_value_for_a_while():
    monitor, values, overall = every_step(), Values("lyapunov/sometimes/max"), Values("lyapunov/max")
    with pytest.warns(UserWarning, match=REPEATED) as record:
        fit(Abandoning(), monitor, values, overall, data=series(8), max_epochs=1)
    assert_repeated_and_then_nan(values.seen)
    assert len(messages(record, REPEATED)) == 1
    assert "lyapunov/sometimes/max" not in monitor.estimates
    assert monitor.estimates["lyapunov/max"].layer == "rnn"
    assert all(math.isfinite(value) for value in overall.seen)


@pytest.mark.filterwarnings("ignore:The recurrent layer")
def test_a_layer_that_was_replaced_is_nan_after_a_while():
    def replace(trainer):
        if trainer.global_step == 1:
            trainer.lightning_module.rnn = nn.LSTM(FEATURES, 5, batch_first=True)

    monitor, values = every_step(), Values()
    fit(Regressor(), monitor, values, At("on_train_batch_start", replace), data=series(8), max_epochs=1)
    assert_repeated_and_then_nan(values.seen)
    assert monitor.estimates == {}


@pytest.mark.filterwarnings("ignore:The recurrent layer")
def test_a_layer_that_is_called_again_is_measured_again():
    monitor, values = every_step(), Values("lyapunov/sometimes/max")
    fit(TwoLayers(), monitor, values, data=series(8), max_epochs=1)
    assert all(math.isfinite(value) for value in values.seen)
    assert values.seen[0::2] == values.seen[1::2]
    assert len(set(values.seen)) == 4


@pytest.mark.filterwarnings("ignore:The Lyapunov spectrum")
def test_a_layer_that_can_no_longer_be_measured_is_no_estimate_after_a_while():
    def freeze(trainer):
        if trainer.global_step == 1:
            trainer.lightning_module.rnn.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))

    monitor = LyapunovMonitor(every_n_train_steps=1, warmup=2)
    fit(Regressor(), monitor, At("on_train_batch_start", freeze), data=series(8), max_epochs=1)
    assert monitor.estimates == {}


@pytest.mark.filterwarnings("ignore:The recurrent layer")
def test_an_epoch_that_is_cut_short_does_not_measure_a_layer_that_has_left_the_model():
    def leave(trainer):
        if trainer.global_step == 2:
            trainer.lightning_module.rnn = nn.LSTM(FEATURES, 5, batch_first=True)
            trainer.should_stop = True

    class Last(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.rows = monitor.history["rnn"]["spectrum"]

    monitor, last = LyapunovMonitor(warmup=2, strict=True), Last()
    weights = At("on_train_batch_end", lambda trainer: trainer.global_step == 2 and spoil(monitor))
    fit(Regressor(lr=1.0), monitor, weights, At("on_train_batch_end", leave), last, data=series(8), max_epochs=1)
    # The old layer would be another one by now: its last value is repeated.
    assert len(last.rows) == 2
    assert torch.equal(last.rows[0], last.rows[1])


def spoil(monitor):
    with torch.no_grad():
        for found in monitor._run.measurement._layers.values():
            found.module.weight_hh_l0.mul_(3)


@pytest.mark.filterwarnings("ignore:The recurrent layer")
def test_no_rule_judges_a_value_again_that_is_repeated():
    rule = InstabilityStopping(-50.0, patience=3, monitor="lyapunov/sometimes/max")
    trainer = fit(Abandoning(), every_step(), rule, data=series(10), max_epochs=1)
    assert (trainer.global_step, rule.wait_count) == (10, 1)


# Calls of the model that are not the trainer's

HOOKS = [
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "on_before_optimizer_step",
    "on_train_batch_end",
]


def call_the_model(trainer):
    with torch.no_grad():
        trainer.lightning_module(torch.full((5, 12, FEATURES), 3.0))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("model", [Regressor, TwoOptimizers], ids=["automatic", "manual"])
@pytest.mark.parametrize("monitor_first", [True, False])
def test_a_callback_that_calls_the_model_adds_no_data(hook, model, monitor_first):
    without, beside = Values("lyapunov/rnn/max"), Values("lyapunov/rnn/max")
    fit(model(), every_step(), without)
    monitor = every_step()
    callbacks = [monitor, At(hook, call_the_model)]
    fit(model(), *(callbacks if monitor_first else callbacks[::-1]), beside)
    assert beside.seen == without.seen
    assert set(monitor.estimates) == {"lyapunov/max", "lyapunov/rnn/max"}
    assert monitor.estimates["lyapunov/max"].num_sequences == 4


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_callback_that_calls_the_model_in_an_evaluation_adds_no_data(verb):
    class Model(Regressor):
        def test_step(self, batch, batch_idx):
            self(batch[0])

    name = {"validate": "validation"}.get(verb, verb)
    values = []
    for callbacks in ([], [At(f"on_{name}_batch_start", call_the_model), At(f"on_{name}_batch_end", call_the_model)]):
        trainer = make_trainer(every_step(), *callbacks)
        getattr(trainer, verb)(Model(), series(), verbose=False)
        values.append(published(trainer))
    assert_close(*values, rtol=0, atol=0)


class Checkpointed(Regressor):
    """Computes its layer again in the backward pass."""

    def forward(self, inputs):
        return self.head(torch.utils.checkpoint.checkpoint(self.rnn, inputs, use_reentrant=False)[0])


def test_what_is_computed_again_in_the_backward_pass_is_no_data():
    values = [Values("lyapunov/rnn/max_stderr") for _ in range(2)]
    for model, seen in zip((Regressor(), Checkpointed()), values, strict=True):
        fit(model, every_step(), seen)
    assert values[0].seen == values[1].seen


# Values that others log


class Late(Regressor):
    """Updates an epoch's metric once more at its end."""

    def __init__(self):
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch, batch_idx):
        self.metric.update(3.0)
        self.log("late", self.metric, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.metric.update(100.0)


def stop(trainer):
    trainer.should_stop |= trainer.global_step == 2


@pytest.mark.parametrize("rule", [[], [InstabilityStopping(50.0)]], ids=["monitor", "with a rule"])
def test_a_metric_of_others_is_computed_when_they_have_updated_it(rule):
    values = []
    for callbacks in ([], [LyapunovMonitor(warmup=2), *rule]):
        trainer = fit(Late(), *callbacks, At("on_train_batch_end", stop), data=series(5), max_epochs=1)
        values.append(trainer.callback_metrics["late"].item())
    assert values[0] == values[1] > 30


def test_the_largest_exponent_is_not_rounded_to_the_default_dtype():
    expected = fit(Regressor(), LyapunovMonitor(warmup=2)).callback_metrics

    class Single(Regressor):
        def on_fit_start(self):
            torch.set_default_dtype(torch.bfloat16)

    try:
        metrics = fit(Single(), LyapunovMonitor(warmup=2)).callback_metrics
    finally:
        torch.set_default_dtype(torch.float32)
    for key in ("lyapunov/max", "lyapunov/max_stderr", "lyapunov/rnn/max"):
        assert metrics[key].dtype == torch.float32
        assert metrics[key] == expected[key]
