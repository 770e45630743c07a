"""Layers that are registered with ``register_layer``."""

import math

import pytest
import torch
from helpers import FEATURES, Regressor, TanhCell, fit, precise, run_cell, series
from torch import nn
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum, register_layer

TIME, BATCH, HIDDEN = 12, 3, 5


class WholeSequences(nn.Module):
    """Called with a whole sequence and another argument; returns outputs only."""

    def __init__(self):
        super().__init__()
        self.cell = TanhCell()

    def forward(self, sequence, *, scale=1.0):
        return run_cell(self.cell, scale * sequence, sequence.new_zeros(len(sequence), HIDDEN))


class Heir(WholeSequences):
    """Measured as its parent is."""


def register():
    register_layer(
        WholeSequences,
        step=lambda module, inputs, state: module.cell(inputs, state),
        read_call=lambda module, sequence, scale=1.0: (
            scale * sequence.transpose(0, 1),
            sequence.new_zeros(len(sequence), HIDDEN),
        ),
    )


@pytest.mark.parametrize("module_class", [WholeSequences, Heir])
def test_a_registered_class_and_its_heirs_are_measured(module_class):
    register()
    module, sequence = module_class(), torch.randn(BATCH, TIME, FEATURES)
    expected = precise(module.cell, sequence.transpose(0, 1), torch.zeros(BATCH, HIDDEN))
    assert_close(precise(module, sequence), expected, rtol=0, atol=1e-12)


def test_an_heir_may_be_registered_by_itself():
    register()
    register_layer(
        Heir,
        step=lambda module, inputs, state: 0.5 * state,
        read_call=lambda module, sequence: (sequence.transpose(0, 1), sequence.new_zeros(len(sequence), HIDDEN)),
    )
    sequence = torch.randn(BATCH, TIME, FEATURES)
    half = torch.full((BATCH, HIDDEN), math.log(0.5), dtype=torch.float64)
    assert_close(precise(Heir(), sequence), half, rtol=0, atol=1e-12)
    assert not torch.allclose(precise(WholeSequences(), sequence), half)


def test_what_is_registered_goes_before_what_is_known():
    class Halving(nn.GRU):
        pass

    register_layer(
        Halving,
        step=lambda module, inputs, state: 0.5 * state,
        read_call=lambda module, inputs, hx=None: (inputs, inputs.new_zeros(inputs.shape[1], HIDDEN)),
    )
    spectrum = precise(Halving(FEATURES, HIDDEN), torch.randn(TIME, BATCH, FEATURES))
    assert_close(spectrum, torch.full((BATCH, HIDDEN), math.log(0.5), dtype=torch.float64), rtol=0, atol=1e-12)


class RegisteredModel(Regressor):
    def __init__(self, module_class=WholeSequences):
        super().__init__()
        self.rnn = module_class()

    def forward(self, inputs):
        return self.head(self.rnn(inputs, scale=2.0))


@pytest.mark.parametrize("module_class", [WholeSequences, Heir])
def test_registered_layers_are_found_without_being_named(module_class):
    register()
    model, monitor = RegisteredModel(module_class), LyapunovMonitor(num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=series(1), max_steps=1)
    assert list(monitor.history) == ["rnn"]
    inputs, _ = next(iter(series(1)))
    expected = lyapunov_spectrum(
        model.rnn.cell, 2 * inputs.transpose(0, 1), torch.zeros(len(inputs), HIDDEN), num_exponents=1
    )
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0), rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_not_registered_is_refused_with_the_line_to_write():
    with pytest.raises(TypeError, match=r"WholeSequences is no recurrent layer.*`register_layer`"):
        lyapunov_spectrum(WholeSequences(), torch.randn(BATCH, TIME, FEATURES))
    with pytest.raises(ValueError, match=r"has no recurrent layer of torch.nn.*`register_layer`"):
        fit(RegisteredModel(), LyapunovMonitor())


def test_a_layer_that_was_not_registered_is_measured_when_it_is_named():
    model, monitor = RegisteredModel(), LyapunovMonitor("rnn", num_exponents=1, strict=True)
    fit(model, monitor, data=series(1, time=60), max_steps=1)
    inputs, _ = next(iter(series(1, time=60)))
    zeros = torch.zeros(len(inputs), HIDDEN)
    expected = lyapunov_spectrum(model.rnn.cell, 2 * inputs.transpose(0, 1), zeros, num_exponents=1, warmup=30)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0), rtol=0, atol=0.02)
