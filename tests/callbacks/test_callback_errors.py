"""Errors for bad arguments: they name the argument, what came, and what to write."""

import re

import pytest
import torch
from helpers import Regressor, fit, series
from torch import nn

from lightning_lyapunov import LyapunovMonitor

WRONG = {
    "every_n_epochs": [0, -1, 1.5, True, "1"],
    "every_n_train_steps": [0, -1, 1.5, True, "1"],
    "num_sequences": [0, -1, 2.5],
    "max_steps": [0, -1, 2.5],
    "num_exponents": [0, -1, 2.5],
    "qr_interval": [0, -1, 2.5, "fast"],
    "warmup": [-1, 1.5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_count_that_is_none_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"`{name}={value!r}` must be .* {int(name != 'warmup')} or more"):
        LyapunovMonitor(**{name: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_a_dtype_that_cannot_carry_a_frame_is_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"`dtype` must be torch.float32, torch.float64 or None, not {dtype}"):
        LyapunovMonitor(dtype=dtype)


@pytest.mark.parametrize(("warmup", "max_steps"), [(100, 100), (30, 10)])
def test_a_warmup_that_leaves_nothing_is_refused_by_name(warmup, max_steps):
    message = f"`warmup={warmup}` leaves nothing to average: `max_steps` is {max_steps}. Lower `warmup` or raise"
    with pytest.raises(ValueError, match=re.escape(message)):
        LyapunovMonitor(warmup=warmup, max_steps=max_steps)


class TwoKinds(Regressor):
    def __init__(self):
        super().__init__()
        self.decoder = nn.GRU(3, 4)


@pytest.mark.parametrize("modules", ["nn", ["rnn", "nn"], ("nn",)], ids=str)
def test_an_unknown_name_is_answered_with_the_names_there_are(modules):
    with pytest.raises(ValueError, match=r"`modules` names `nn`, .* `rnn` \(LSTM\), `decoder` \(GRU\)\."):
        fit(TwoKinds(), LyapunovMonitor(modules))


def test_a_layer_that_is_not_recurrent_is_answered_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"`modules`: `head` .*Linear is no recurrent layer.* `rnn` \(LSTM\), `decoder` \(GRU\)\."
    ):
        fit(TwoKinds(), LyapunovMonitor("head"))


class Feedforward(Regressor):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = None, nn.Linear(3, 1)

    def forward(self, inputs):
        return self.head(inputs)


def test_a_model_without_recurrent_layers_is_answered_with_the_line_to_write():
    with pytest.raises(
        ValueError, match=r'Feedforward has no recurrent layer .* `LyapunovMonitor\(modules="\.\.\."\)`'
    ):
        fit(Feedforward(), LyapunovMonitor())


@pytest.mark.parametrize("modules", [[], ()], ids=str)
def test_a_list_of_no_modules_is_refused_by_name(modules):
    with pytest.raises(ValueError, match="`modules`"):
        fit(Regressor(), LyapunovMonitor(modules))


def test_nothing_of_the_run_has_happened_when_a_name_is_refused():
    model, data = Regressor(), series()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="`nn`"):
        fit(model, LyapunovMonitor("nn"), data=data)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
