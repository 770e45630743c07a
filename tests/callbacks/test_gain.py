"""``log10_gradient_gain``: over the whole sequences that a layer was called with, however many steps are followed."""

import math

import pytest
import torch
from helpers import Dial, Halves, Loop, Packed, Parts, fit, published, series
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import LyapunovMonitor


def gain_and_length(model, monitor, **options):
    values = published(fit(model, monitor, max_epochs=1, **options))
    return [values[f"lyapunov/rnn/{name}"].item() for name in ("log10_gradient_gain", "sequence_length")]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_gain_of_gradients_is_that_over_the_whole_sequence(batch_size):
    rate, time = -0.5, 12
    data = series(batch_size=batch_size, time=time)
    gain, length = gain_and_length(Dial([rate]), LyapunovMonitor(warmup=4), data=data)
    assert (gain, length) == pytest.approx((rate * time / math.log(10), time), rel=1e-5)


@pytest.mark.parametrize(("time", "features"), [(300, 3), (300, 3_000)], ids=["kept whole", "cut in recording"])
def test_the_gain_is_over_the_steps_beyond_those_that_are_followed_too(time, features):
    model = Dial([-0.05])
    model.rnn.weight_ih_l0 = nn.Parameter(torch.full((5, features), 0.1))
    model.rnn.input_size = features
    inputs = torch.rand(4, time, features)
    assert (inputs.nbytes > 2**22) == (features > 3)
    data = DataLoader(TensorDataset(inputs, torch.zeros(4, time, 1)), 4)
    gain, length = gain_and_length(model, LyapunovMonitor(strict=True), data=data)
    assert (gain, length) == pytest.approx((-0.05 * time / math.log(10), time), rel=1e-4)


class DialPacked(Packed, Dial):
    """:class:`Packed` with the rates of :class:`Dial`."""


def test_the_gain_of_sequences_of_unlike_length_is_over_the_mean_of_them():
    gain, length = gain_and_length(DialPacked([-0.3]), LyapunovMonitor(strict=True, max_steps=8))
    assert length == pytest.approx(Packed.lengths.float().mean().item())
    assert gain == pytest.approx(-0.3 * length / math.log(10), rel=1e-4)


@pytest.mark.parametrize(("model", "length"), [(Loop, 12), (Halves, 12), (Parts, 12)])
def test_the_length_is_that_of_all_calls_that_go_on_from_one_another(model, length):
    assert gain_and_length(model(), LyapunovMonitor(strict=True, max_steps=5))[1] == length


def test_calls_for_which_there_was_no_memory_count_for_the_length(monkeypatch):
    monkeypatch.setattr("lightning_lyapunov.recording.recorder._MAX_BYTES", 2_000)
    with_all = gain_and_length(Loop(), monitor := LyapunovMonitor(strict=True))[1]
    assert with_all == 12
    assert monitor.estimates["lyapunov/rnn/max"].length == 12


@pytest.mark.parametrize("every", [1, 2])
def test_a_member_of_several_sequences_has_their_mean_length(every):
    class Restarts(Loop):
        def forward(self, inputs):
            return torch.cat([super(Restarts, self).forward(part) for part in inputs.chunk(every, 1)], 1)

    assert gain_and_length(Restarts(), LyapunovMonitor(strict=True))[1] == 12 / every


def test_the_lengths_of_a_packed_batch_that_was_cut_are_those_before(monkeypatch):
    monkeypatch.setattr("lightning_lyapunov.recording.trimming._SMALL_CALL", 0)
    monitor = LyapunovMonitor(strict=True, max_steps=8, num_sequences=3)
    # The longest three of 5, 12, 9 and 7.
    assert gain_and_length(DialPacked([-0.3]), monitor)[1] == pytest.approx((12 + 9 + 7) / 3)
