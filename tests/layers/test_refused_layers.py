"""Errors for layers that cannot be measured: they name the layer and say what to write."""

import copy

import pytest
import torch
from helpers import (
    FEATURES,
    Regressor,
    TanhCell,
    fit,
    make_recorder,
    make_trainer,
    messages,
    run_cell,
    sequences_of,
    series,
)
from torch import nn
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.recording.cells import NotFollowedError

TIME, BATCH, HIDDEN = 12, 3, 5


def scripted():
    return torch.jit.script(nn.LSTM(FEATURES, HIDDEN, batch_first=True))


def quantised():
    model = nn.Sequential(nn.LSTM(FEATURES, HIDDEN, batch_first=True))
    return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, torch.qint8)[0]


def of_deepspeed():
    module = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
    module.weight_hh_l0.ds_id = 7
    return module


def sharded_away():
    module = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
    module.weight_hh_l0.data = torch.empty(0)
    return module


def linear():
    return nn.Linear(FEATURES, HIDDEN)


REFUSED = {
    "scripted": (scripted, "is scripted.* Pass the module that was scripted"),
    "quantised": (quantised, "LSTM is quantised.* Pass the module before quantisation"),
    "DeepSpeed": (
        of_deepspeed,
        "parameters of LSTM are sharded, and `weight_hh_l0` is not here.*keep .* DeepSpeed: stage 2",
    ),
    "empty": (sharded_away, "parameters of LSTM are sharded, and `weight_hh_l0` is not here.*or measure a gathered"),
    "linear": (linear, r"Linear is no recurrent layer: it is not called as \(input, state\).*`register_layer`"),
}
refused = pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)


@pytest.mark.filterwarnings("ignore")
@refused
def test_the_plain_function_refuses_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        lyapunov_spectrum(make(), torch.randn(BATCH, TIME, FEATURES))


@pytest.mark.filterwarnings("ignore")
@refused
def test_the_monitor_refuses_a_named_module_before_the_run(make, message):
    model = Regressor()
    model.rnn = make()
    with pytest.raises(ValueError, match=f"`modules`: `rnn` cannot be watched.*{message}"):
        make_trainer(LyapunovMonitor("rnn")).fit(model, series())


class Growing(TanhCell):
    """Appends to its state."""

    def forward(self, inputs, state):
        return torch.cat((state, inputs), -1)


class GrowingModel(Regressor):
    def __init__(self):
        super().__init__()
        self.rnn = Growing()

    def forward(self, inputs):
        state = inputs.new_zeros(len(inputs), HIDDEN)
        for step_inputs in inputs.unbind(1):
            state = self.rnn(step_inputs, state)
        return self.head(state[:, None, :HIDDEN]).expand(-1, inputs.shape[1], -1)


def test_a_state_that_changes_its_size_is_refused_by_name():
    state, inputs = torch.zeros(BATCH, HIDDEN), torch.randn(TIME, BATCH, FEATURES)
    with pytest.raises(ValueError, match=r"\(output, state\)|changes its size"):
        lyapunov_spectrum(Growing(), inputs, state)
    with pytest.raises(ValueError, match=r"must return a state of shape \(3, 5\), but it returned \(3, 8\)"):
        lyapunov_spectrum(lambda s, x: torch.cat((s, x), -1), inputs, state)


class Halving(nn.Module):
    """Takes a state of any size."""

    def forward(self, inputs, state):
        return 0.5 * state


def test_calls_with_states_of_two_sizes_are_refused_by_name():
    cell = Halving()
    recorder = make_recorder(cell)
    recorder.start()
    for size in (HIDDEN, HIDDEN + 1):
        cell(torch.randn(BATCH, FEATURES), torch.randn(BATCH, size))
    recorder.stop()
    with pytest.raises(NotFollowedError, match="no argument of it is a state that an earlier call returned"):
        sequences_of(recorder)


def test_a_state_that_changes_its_size_is_said_once_and_training_goes_on(recwarn):
    trainer = fit(GrowingModel(), LyapunovMonitor("rnn"))
    assert trainer.global_step == 6
    assert len(messages(recwarn, "`rnn` could not be measured")) == 1
    assert trainer.callback_metrics["lyapunov/max"].isnan()


def test_a_strict_monitor_raises_for_a_state_that_changes_its_size():
    with pytest.raises(ValueError, match=r"A step must return the next state|changes its size"):
        fit(GrowingModel(), LyapunovMonitor("rnn", strict=True))


class ThreeArguments(TanhCell):
    def forward(self, inputs, state, time):
        return super().forward(inputs, state) * time


class ThreeArgumentsModel(Regressor):
    def __init__(self):
        super().__init__()
        self.rnn = ThreeArguments()

    def forward(self, inputs):
        zeros = inputs.new_zeros(len(inputs), HIDDEN)
        return self.head(run_cell(lambda step_inputs, state: self.rnn(step_inputs, state, 0.9), inputs, zeros))


def test_a_cell_with_more_arguments_is_measured_with_them():
    model, monitor = ThreeArgumentsModel(), LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=series(1), max_steps=1)
    inputs, _ = next(iter(series(1)))
    cell = copy.deepcopy(model.rnn).double()
    zeros = torch.zeros(len(inputs), HIDDEN).double()
    expected = lyapunov_spectrum(lambda s, x: cell(x, s, 0.9), inputs.transpose(0, 1).double(), zeros, num_exponents=1)
    assert_close(monitor.history["rnn"]["spectrum"][0].double(), expected.mean(0), rtol=0, atol=1e-4)
