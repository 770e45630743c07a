"""Models with many cells, and the memory and disk that a run may take: operations and bytes are counted, not seconds."""

import sys

import pytest
import torch
from helpers import FEATURES, Regressor, assert_equal, fit
from torch import nn

from lightning_lyapunov import LyapunovMonitor
from lightning_lyapunov.callbacks.summaries import CellSamples, CellSummaries, summarised
from lightning_lyapunov.layers.discovery import find_layers
from lightning_lyapunov.metrics import LyapunovSummary


class Layers(Regressor):
    """Many small layers side by side."""

    def __init__(self, count: int) -> None:
        super().__init__("RNN", 2, lr=0.0)
        self.layers = nn.ModuleList(nn.RNN(FEATURES, 2, batch_first=True) for _ in range(count))

    def forward(self, inputs):
        return super().forward(inputs) + sum(layer(inputs)[0].mean() for layer in self.layers)


def random_samples(samples, count, segments=1):
    return CellSamples(torch.randn(samples, count).double(), torch.randint(1, 50, (samples,)), segments)


def test_the_metrics_of_many_cells_are_those_of_each_alone():
    samples = {
        "a": random_samples(4, 3),
        "b": random_samples(16, 3, segments=8),
        "c": random_samples(1, 1),
        "nothing": CellSamples(torch.empty(0, 3), torch.empty(0)),
        "failed": CellSamples(torch.full((1, 3), torch.nan), torch.full((1,), torch.nan)),
        "one": random_samples(5, 1),
        "two": random_samples(2, 2),
    }
    together = summarised(samples, torch.device("cpu"))
    assert list(together) == list(samples)
    for cell, (spectrum, steps, segments) in samples.items():
        alone = LyapunovSummary(spectrum.shape[1])
        alone.update(spectrum, steps, segments)
        assert_equal(together[cell], alone.compute())


@pytest.mark.parametrize("layers", [1, 30])
def test_a_measurement_computes_the_metrics_of_all_cells_once(layers, monkeypatch):
    computed, estimates = [], CellSummaries.estimates
    monkeypatch.setattr(CellSummaries, "estimates", lambda self: computed.append(self.moments.shape) or estimates(self))
    fit(Regressor("RNN", 2, num_layers=layers), LyapunovMonitor(), max_epochs=1)
    assert computed == [(layers, *computed[0][1:])] * 2


def calls_in(function):
    """Return how many Python functions are entered, or generators resumed, in a call."""
    entered = []
    sys.setprofile(lambda frame, event, argument: entered.append(1) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(entered)


def test_finding_layers_compares_no_two_of_them():
    few, many = Layers(100), Layers(400)
    assert calls_in(lambda: find_layers(many)) < 5 * calls_in(lambda: find_layers(few))
