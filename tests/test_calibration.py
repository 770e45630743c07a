"""Calibration of the standard error: how often its 95 % interval contains the exponent of a long run."""

import pytest
import torch
from helpers import leading_exponents
from torch import nn

from lightning_lyapunov.confidence import student_t_quantile
from lightning_lyapunov.metrics import lyapunov_metrics

pytestmark = pytest.mark.slow

REPEATS = 400


def driven(cell):
    torch.manual_seed(3)
    module = {"rnn": nn.RNN(2, 12), "gru": nn.GRU(2, 8), "lstm": nn.LSTM(2, 8)}[cell]
    gain = {"rnn": 5.0, "gru": 3.0, "lstm": 3.0}[cell]
    module.weight_hh_l0.data *= gain
    return module


def coverage(samples, truth):
    """Return the share of the samples, ``(repeats, n, 2)``, whose 95 % interval contains the true exponent."""
    hits = 0
    for sample in samples:
        metrics = lyapunov_metrics(2)
        metrics.update(sample)
        values = metrics.compute()
        margin = student_t_quantile(0.975, sample.shape[0] - 1) * values["max_stderr"]
        hits += bool((values["max"] - truth).abs() <= margin)
    return hits / len(samples)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_interval_holds_the_exponent_of_a_long_run_as_often_as_it_says(cell):
    module = driven(cell)
    truth = leading_exponents(module, 64, steps=4000, warmup=500)[..., 0].mean()
    # Windows long enough for the frame to forget where it started: what is left is the scatter.
    samples = leading_exponents(module, 64 * REPEATS, steps=200, warmup=100)[0]
    for num_sequences in (8, 16, 64):
        share = coverage(samples[: num_sequences * REPEATS].view(REPEATS, num_sequences, 2), truth)
        assert 0.92 <= share <= 0.98, (num_sequences, share)


def test_the_error_of_one_long_sequence_comes_from_its_stretches():
    module = driven("rnn")
    truth = leading_exponents(module, 64, steps=4000, warmup=500)[..., 0].mean()
    samples = leading_exponents(module, 200, steps=1100, warmup=100, segments=8).transpose(0, 1)
    assert 0.9 <= coverage(samples, truth) <= 0.98
