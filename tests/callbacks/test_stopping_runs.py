"""``InstabilityStopping()`` on real runs: those that learn to remember go on, chaotic and exploding ones end."""

import math

import lightning.pytorch as L
import pytest
import torch
from helpers import fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import EXPONENT_FLOOR, InstabilityStopping, LyapunovMonitor

UNITS, VALUES, BATCH_SIZE, NOISE = 64, 2, 32, 0.3


class Recall(L.LightningModule):
    """Says at the end of a sequence what its first input was. A loss of 1 is chance."""

    def __init__(self, rnn, optimizer, learning_rate, **options):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(UNITS, VALUES)
        self.optimizer = lambda: optimizer(self.parameters(), learning_rate, **options)
        self.losses = []

    def training_step(self, batch, batch_idx):
        (inputs,) = batch
        loss = nn.functional.mse_loss(self.head(self.rnn(inputs)[0][:, -1]), inputs[:, 0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.optimizer()


def remembering(num_batches, length, seed):
    """Return sequences of a value and then noise, each to be seen once."""
    inputs = torch.randn(num_batches * BATCH_SIZE, length, VALUES, generator=torch.Generator().manual_seed(seed))
    inputs[:, 1:] *= NOISE
    return DataLoader(TensorDataset(inputs), BATCH_SIZE)


def gated(cell):
    rnn = cell(VALUES, UNITS, batch_first=True)
    with torch.no_grad():  # the second block: the forget gate of an LSTM, the update gate of a GRU
        rnn.bias_ih_l0[UNITS : 2 * UNITS] = 3.0
    return rnn


def tanh(gain):
    rnn = nn.RNN(VALUES, UNITS, batch_first=True)
    nn.init.normal_(rnn.weight_hh_l0, std=gain / math.sqrt(UNITS))
    return rnn


def orthogonal():
    rnn = tanh(1.0)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    return rnn


def relu_from_the_identity():
    rnn = nn.RNN(VALUES, UNITS, nonlinearity="relu", batch_first=True)
    nn.init.eye_(rnn.weight_hh_l0)
    for bias in (rnn.bias_ih_l0, rnn.bias_hh_l0):
        nn.init.zeros_(bias)
    return rnn


LEARNING = {
    "LSTM, forget bias 3": (lambda: gated(nn.LSTM), 3e-3),
    "GRU, update bias 3": (lambda: gated(nn.GRU), 3e-3),
    "tanh, orthogonal": (orthogonal, 1e-3),
    "tanh, gain 1.3": (lambda: tanh(1.3), 1e-3),
}
# Of three seeds each, over 50 to 100 steps.
each_seed = pytest.mark.parametrize(("seed", "length"), [(0, 100), (1, 50), (2, 75)])


def run(make, rule, seed, length, *, optimizer=torch.optim.Adam, rate=1e-3, batches=60, **options):
    """Train; return the model, the trainer, and the monitor."""
    L.seed_everything(seed, verbose=False)
    model = Recall(make(), optimizer, rate, **options.pop("optimizer_options", {}))
    monitor = LyapunovMonitor(every_n_train_steps=10)
    trainer = fit(model, monitor, rule, data=remembering(batches, length, seed), max_epochs=1, **options)
    return model, trainer, monitor


@pytest.mark.slow
@each_seed
@pytest.mark.parametrize(("make", "rate"), LEARNING.values(), ids=LEARNING)
def test_a_run_that_learns_to_remember_is_never_stopped(make, rate, seed, length):
    rule = InstabilityStopping()
    model, trainer, _ = run(make, rule, seed, length, rate=rate, batches=150, gradient_clip_val=0.1)
    assert rule.stopping_reason_message is None
    assert trainer.global_step == 150
    assert sum(model.losses[-20:]) / 20 < 0.8


@pytest.mark.slow
@each_seed
def test_a_chaotic_run_is_ended_within_half_of_its_batches(seed, length):
    rule = InstabilityStopping()
    _, trainer, _ = run(lambda: tanh(4.0), rule, seed, length, gradient_clip_val=0.1)
    assert trainer.global_step <= 30
    assert "gradients explode" in rule.stopping_reason_message


@pytest.mark.slow
@each_seed
def test_an_exploding_run_is_ended_within_half_of_its_batches(seed, length):
    # Where the step that is too far kills all units instead, the network has collapsed: that is the other side.
    momentum = {"optimizer": torch.optim.SGD, "rate": 3e-2, "optimizer_options": {"momentum": 0.9}}
    _, trainer, monitor = run(relu_from_the_identity, InstabilityStopping(), seed, length, **momentum)
    spectrum = monitor.history["rnn"]["spectrum"]
    if spectrum[-1, 0] == pytest.approx(EXPONENT_FLOOR, abs=0.1):
        rule = InstabilityStopping(lower_threshold=-1.0)
        _, trainer, _ = run(relu_from_the_identity, rule, seed, length, **momentum)
    assert trainer.global_step <= 30
