"""Custom cells that not every method of differentiation supports, compared with a plain cell of the same weights."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, CellModel, TanhCell, fit, precise, series
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, jacobians, lyapunov_spectrum

TIME, BATCH, HIDDEN = 12, 3, 5


class Tanh(torch.autograd.Function):
    """Has a backward only, and no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


class OldFunction(TanhCell):
    def forward(self, inputs, state):
        return Tanh.apply(self.drive(inputs, state))


class AsksForNumbers(TanhCell):
    def forward(self, inputs, state):
        factor = 1.0 if state.detach().abs().max().item() < 1e9 else 0.0
        return factor * self.drive(inputs, state).tanh()


class Branches(TanhCell):
    def forward(self, inputs, state):
        if (state.abs() > 1e9).any():
            return state
        return self.drive(inputs, state).tanh()


class ThroughNumpy(TanhCell):
    """Converts its input to NumPy and back, and has a backward only."""

    def forward(self, inputs, state):
        return Tanh.apply(self.drive(torch.from_numpy(inputs.detach().cpu().numpy().copy()), state))


class EvaluatedBatchNorm(TanhCell):
    """Batch norm with mean 0 and variance 1: it does nothing in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, eps=0.0)

    def forward(self, inputs, state):
        return self.norm(self.drive(inputs, state)).tanh()


class Dropout(TanhCell):
    def forward(self, inputs, state):
        return F.dropout(self.drive(inputs, state), 0.5, self.training).tanh()


class DropoutModule(TanhCell):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs, state):
        return self.dropout(self.drive(inputs, state)).tanh()


class TensorAttribute(TanhCell):
    """Has a matrix that is neither parameter nor buffer, and so stays in float32."""

    def __init__(self):
        super().__init__()
        self.identity = torch.eye(HIDDEN)

    def forward(self, inputs, state):
        return (self.drive(inputs, state) @ self.identity).tanh()


class InPlace(TanhCell):
    """Writes the next state over the current one."""

    def forward(self, inputs, state):
        return state.copy_(self.drive(inputs, state).tanh())


class InPlaceOldFunction(TanhCell):
    """Writes over its state, and has a backward only."""

    def forward(self, inputs, state):
        return state.copy_(Tanh.apply(self.drive(inputs, state)))


class Remembers(TanhCell):
    """Keeps its states, with their graphs."""

    def __init__(self):
        super().__init__()
        self.last, self.all, self.named = None, [], {}

    def forward(self, inputs, state):
        state = self.drive(inputs, state).tanh()
        self.last, self.named["last"] = state, state
        self.all.append(state)
        return state


ODD = [
    OldFunction,
    AsksForNumbers,
    Branches,
    ThroughNumpy,
    EvaluatedBatchNorm,
    Dropout,
    DropoutModule,
    TensorAttribute,
    InPlace,
    Remembers,
]


def with_tanh_cell(cell_class):
    """Return a cell in training mode, and the plain cell with its weights."""
    cell, other = cell_class(), TanhCell()
    other.linear.load_state_dict(cell.linear.state_dict())
    return cell.train(), other


@pytest.mark.parametrize("cell_class", [*ODD, InPlaceOldFunction])
def test_a_cell_has_the_spectrum_of_its_plain_cell(cell_class):
    cell, other = with_tanh_cell(cell_class)
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    expected = lyapunov_spectrum(other, inputs, state.clone())
    assert_close(lyapunov_spectrum(cell, inputs, state), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cell_class", [cell for cell in ODD if cell not in (InPlace, Dropout, DropoutModule)])
def test_the_monitor_gives_a_cell_the_spectrum_of_its_plain_cell(cell_class):
    spectra = []
    for cell in with_tanh_cell(cell_class):
        if isinstance(cell, EvaluatedBatchNorm):
            cell.norm.momentum = 0.0  # a training forward moves its statistics
        monitor = LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
        model = CellModel(cell, lr=0.0)
        if cell_class is EvaluatedBatchNorm:
            model.on_train_start = lambda model=model: model.rnn.eval()
        fit(model, monitor, data=series(1), max_steps=1)
        spectra.append(monitor.history["rnn"]["spectrum"])
    assert_close(*spectra, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cell_class", [cell for cell in ODD if cell is not InPlace])
def test_a_cell_has_the_jacobians_of_its_plain_cell(cell_class):
    cell, other = with_tanh_cell(cell_class)
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    matrices = jacobians(cell, inputs, state).double()
    assert_close(matrices, jacobians(other, inputs, state), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_exponents", [1, None])
def test_a_step_may_write_over_its_input(num_exponents):
    def step(state, inputs):
        return torch.tanh(1.5 * state + inputs.mul_(2))

    inputs, state = torch.randn(30, 2, 3), torch.randn(2, 3)
    before = inputs.clone()
    expected = lyapunov_spectrum(lambda s, x: torch.tanh(1.5 * s + 2 * x), inputs, state, num_exponents=num_exponents)
    assert torch.equal(lyapunov_spectrum(step, inputs, state, num_exponents=num_exponents), expected)
    assert torch.equal(inputs, before)


def test_a_step_may_write_over_its_state():
    def logistic(s, _):
        s.mul_(1 - s).mul_(3.9)
        return s

    state, inputs = torch.rand(BATCH, 1).double() * 0.8 + 0.1, torch.zeros(TIME, BATCH, 0)
    expected = lyapunov_spectrum(lambda s, _: 3.9 * s * (1 - s), inputs, state)
    given = state.clone()
    assert_close(lyapunov_spectrum(logistic, inputs, given), expected, rtol=0, atol=1e-10)
    assert torch.equal(given, state)


@pytest.mark.parametrize("cell_class", [TanhCell, OldFunction, AsksForNumbers, Branches])
def test_the_way_to_differentiate_is_chosen_once(cell_class, monkeypatch):
    cell, counts = cell_class(), []
    for steps in (5, 25):
        monkeypatch.setattr(TanhCell, "calls", [])
        lyapunov_spectrum(cell, torch.randn(steps, BATCH, FEATURES), torch.randn(BATCH, HIDDEN), qr_interval=1)
        counts.append(len(TanhCell.calls))
    # Each further step costs one call on the way and one for its tangents, and no attempt that fails.
    assert counts[1] - counts[0] == 2 * 20


class AroundTorchs(nn.Module):
    """A custom cell around one of torch's cells or layers."""

    def __init__(self, kind):
        super().__init__()
        self.inner = kind(FEATURES, HIDDEN)

    def forward(self, inputs, state):
        if isinstance(self.inner, nn.RNNBase):
            parts = tuple(part.unsqueeze(0).contiguous() for part in state) if isinstance(state, tuple) else state[None]
            _, final = self.inner(inputs.unsqueeze(0), parts)
            return tuple(part[0] for part in final) if isinstance(final, tuple) else final[0]
        return self.inner(inputs, state)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.RNN, nn.GRU, nn.LSTM])
def test_a_cell_around_torchs_own_is_it(kind):
    cell, inputs = AroundTorchs(kind), torch.randn(TIME, BATCH, FEATURES)
    state = torch.randn(BATCH, HIDDEN)
    state = (state, torch.randn(BATCH, HIDDEN)) if kind in (nn.LSTMCell, nn.LSTM) else state
    theirs = state
    if issubclass(kind, nn.RNNBase):
        theirs = tuple(part.unsqueeze(0) for part in state) if isinstance(state, tuple) else state.unsqueeze(0)
        cell.inner(inputs)  # it has been used: its flat weights are in place
    assert_close(precise(cell, inputs, state), precise(cell.inner, inputs, theirs), rtol=0, atol=1e-7)


@pytest.mark.parametrize("refreshed", [True, False], ids=["as made", "after a step"])
def test_a_pruned_cell_is_measured_without_the_weights_it_lost(refreshed):
    cell, other = with_tanh_cell(TanhCell)
    prune.l1_unstructured(cell.linear, "weight", 0.4)
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    cell(inputs[0], state)
    with torch.no_grad():
        if not refreshed:  # the optimizer moves weight_orig, and the weight follows at the next forward
            cell.linear.weight_orig.mul_(1.5)
        other.linear.weight.copy_(cell.linear.weight_orig * cell.linear.weight_mask)
    assert_close(lyapunov_spectrum(cell, inputs, state), lyapunov_spectrum(other, inputs, state), rtol=0, atol=1e-4)
