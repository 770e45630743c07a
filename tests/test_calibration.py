"""Calibration of the standard error: how often its 95 % interval contains the exponent of a long run."""

import math

import pytest
import torch
from helpers import fit, leading_exponents, published
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.confidence import student_t_quantile
from lightning_lyapunov.metrics import lyapunov_metrics

pytestmark = pytest.mark.slow

REPEATS, SEQUENCES = 400, 16


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


# Several passes over the same sequences in one training step


class Sam(torch.optim.SGD):
    """Moves the weights to where the loss is larger after each pass but the last, then takes its step from before."""

    def __init__(self, parameters, passes):
        super().__init__(parameters, lr=0.0)
        self.passes = passes

    def step(self, closure):
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        for _ in range(self.passes - 1):
            closure()
            size = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights))
            for weight in weights:
                weight.data += 0.02 / size * weight.grad
        closure()
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(old)
        super().step()


class Passes(LightningModule):
    """Passes each batch through its layer several times, without changing its weights."""

    drop = 0.0

    def __init__(self, passes):
        super().__init__()
        self.rnn, self.passes, self.count = driven("gru"), passes, 0
        self.rnn.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def loss(self, inputs):
        return self.rnn(nn.functional.dropout(inputs, self.drop))[0][-1].square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch.transpose(0, 1))


class SharpnessAware(Passes):
    """Makes all of its passes in one training step."""

    def __init__(self, passes):
        super().__init__(passes)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        def closure():
            self.zero_grad()
            self.manual_backward(self.loss(batch.transpose(0, 1)))

        self.optimizers().step(closure)

    def configure_optimizers(self):
        return Sam(self.parameters(), self.passes)


class Closures(Passes):
    """The optimizer evaluates the loss again."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.0, self.passes, tolerance_grad=0, tolerance_change=-1)


class RDrop(Passes):
    """The loss is the difference of passes with other dropout, which changes the exponent less than the data do."""

    drop = 0.2

    def training_step(self, batch, batch_idx):
        losses = torch.stack([self.loss(batch.transpose(0, 1)) for _ in range(self.passes)])
        return losses.var(correction=0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Intervals(Callback):
    """Keep each measurement with half the width of its 95 % interval."""

    def __init__(self):
        self.intervals = []

    def on_train_batch_end(self, trainer, *_):
        values = published(trainer)
        margin = student_t_quantile(0.975, int(values["lyapunov/rnn/num_sequences"]) - 1)
        self.intervals.append((values["lyapunov/rnn/max"], margin * values["lyapunov/rnn/max_stderr"]))


@pytest.mark.parametrize(
    ("kind", "passes"),
    [(SharpnessAware, 1), (SharpnessAware, 2), (SharpnessAware, 4), (Closures, 4), (RDrop, 2), (RDrop, 4)],
)
def test_the_interval_holds_the_exponent_as_often_however_often_data_are_passed(kind, passes):
    inputs = nn.functional.dropout(torch.randn(2000, 64, 2), kind.drop)
    truth = lyapunov_spectrum(driven("gru"), inputs, num_exponents=1, warmup=200).mean()
    model, intervals = kind(passes), Intervals()
    monitor = LyapunovMonitor(every_n_train_steps=1, num_exponents=1, metrics="all", strict=True)
    torch.manual_seed(11)
    data = DataLoader(torch.randn(REPEATS * SEQUENCES, 100, 2), SEQUENCES)
    fit(model, monitor, intervals, data=data, max_epochs=1)
    assert model.count == REPEATS * passes
    hits = [bool((value - truth).abs() <= margin) for value, margin in intervals.intervals]
    assert len(hits) == REPEATS
    assert 0.92 <= sum(hits) / REPEATS <= 0.98, sum(hits) / REPEATS
