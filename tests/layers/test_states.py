"""States of custom cells: pytrees, complex states, and states that the cell makes itself."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import FEATURES, Regressor, TanhCell, fit, messages, precise, randn, series
from torch import nn
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, jacobians, lyapunov_spectrum

TIME, BATCH, HIDDEN = 12, 3, 5


class HandLSTM(nn.Module):
    """An LSTM written by hand. The subclasses pack its state in their own way."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, 4 * HIDDEN)

    def gates(self, inputs, h, c):
        i, f, g, o = self.linear(torch.cat((inputs, h), -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward(self, inputs, state):
        return self.gates(inputs, *state)

    def pack(self, h, c):
        return h, c


class OutputAndTuple(HandLSTM):
    def forward(self, inputs, state):
        h, c = self.gates(inputs, *state)
        return h, (h, c)


class DictState(HandLSTM):
    def forward(self, inputs, state):
        return self.pack(*self.gates(inputs, state["h"], state["c"]))

    def pack(self, h, c):
        return {"h": h, "c": c}


class NestedState(HandLSTM):
    """The state is a pytree in which the halves of ``c`` lie in matrices."""

    def forward(self, inputs, state):
        h, c = state["h"][0], torch.cat([part.flatten(1) for part in state["c"]], -1)
        return h, self.pack(*self.gates(inputs, h, c))

    def pack(self, h, c):
        return {"c": (c[:, :1], c[:, 1:].reshape(-1, 2, 2)), "h": [h]}


class NoneAtFirst(HandLSTM):
    def forward(self, inputs, state=None):
        zeros = inputs.new_zeros(len(inputs), HIDDEN)
        return self.gates(inputs, *(state or (zeros, zeros)))


class OutputAndNoneAtFirst(NoneAtFirst):
    def forward(self, inputs, state=None):
        h, c = super().forward(inputs, state)
        return h, (h, c)


STATES = [HandLSTM, OutputAndTuple, DictState, NestedState, NoneAtFirst, OutputAndNoneAtFirst]


def torchs_cell(module):
    """Return torch's LSTM cell with the weights of one written by hand."""
    other = nn.LSTMCell(FEATURES, HIDDEN)
    with torch.no_grad():
        other.weight_ih.copy_(module.linear.weight[:, :FEATURES])
        other.weight_hh.copy_(module.linear.weight[:, FEATURES:])
        other.bias_ih.copy_(module.linear.bias)
        other.bias_hh.zero_()
    return other.to(module.linear.weight.dtype)


@pytest.mark.parametrize("cell_class", STATES)
def test_a_state_may_be_any_pytree(cell_class):
    module, inputs = cell_class(), randn(TIME, BATCH, FEATURES)
    h, c = randn(BATCH, HIDDEN), randn(BATCH, HIDDEN)
    expected = precise(torchs_cell(module), inputs, (h, c), warmup=0)
    # The order of the parts in the flat state turns the frame: only what does not depend on it is the same.
    ours = precise(module, inputs, module.pack(h, c))
    assert_close(ours.sum(-1), expected.sum(-1), rtol=0, atol=1e-8)
    if cell_class not in (DictState, NestedState):
        assert_close(ours, expected, rtol=0, atol=1e-8)
    assert_close(ours, reference.spectra(jacobians(module, inputs, module.pack(h, c))), rtol=0, atol=1e-8)


class HandModel(Regressor):
    """A custom cell in the user's loop."""

    first_state = "zeros"

    def __init__(self, cell, **options):
        super().__init__(**options)
        self.rnn = cell

    def forward(self, inputs):
        zeros = inputs.new_zeros(len(inputs), HIDDEN)
        state = self.rnn.pack(zeros, zeros) if self.first_state == "zeros" else None
        outputs = []
        for step_inputs in inputs.unbind(1):
            returned = self.rnn(step_inputs, state) if state is not None else self.rnn(step_inputs)
            pair = isinstance(returned, tuple) and not isinstance(returned[1], torch.Tensor)
            state = returned[1] if pair else returned
            outputs.append(returned[0] if isinstance(returned, tuple) else returned["h"])
        return self.head(torch.stack(outputs, 1))


@pytest.mark.parametrize("cell_class", STATES)
def test_the_monitor_finds_the_state_in_what_a_cell_returns(cell_class):
    model, monitor = HandModel(cell_class()), LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=series(1), max_steps=1)
    inputs, _ = next(iter(series(1)))
    zeros = torch.zeros(len(inputs), HIDDEN)
    expected = lyapunov_spectrum(model.rnn, inputs.transpose(0, 1), model.rnn.pack(zeros, zeros), num_exponents=1)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell_class", [NoneAtFirst, OutputAndNoneAtFirst])
@pytest.mark.parametrize("explicit", [True, False], ids=["None is passed", "nothing is passed"])
def test_a_cell_that_makes_its_own_first_state_is_measured_from_there_on(cell_class, explicit):
    model, monitor = HandModel(cell_class()), LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
    model.first_state = None
    if explicit:
        cell = model.rnn
        model.rnn.register_forward_pre_hook(lambda _, args: args if len(args) == 2 else (*args, None))
        assert cell is model.rnn
    fit(model, monitor, data=series(1), max_steps=1)
    inputs, _ = next(iter(series(1)))
    assert monitor.history["rnn"]["spectrum"].shape == (1, 1)
    # The state that the first step ends in, before the optimizer's step, is close to that after it.
    first = model.rnn(inputs[:, 0])
    first = first[1] if cell_class is OutputAndNoneAtFirst else first
    expected = lyapunov_spectrum(model.rnn, inputs.transpose(0, 1)[1:], first, num_exponents=1)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0), rtol=0.01, atol=0.01)


def test_the_plain_function_asks_for_the_first_state_of_a_custom_cell():
    with pytest.raises(ValueError, match="`state` is required for NoneAtFirst"):
        lyapunov_spectrum(NoneAtFirst(), torch.randn(TIME, BATCH, FEATURES))


class ComplexTanhCell(nn.Module):
    """Nonlinear, but holomorphic: a Jacobian over the complex numbers is one over the reals."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, HIDDEN, dtype=torch.complex64)

    def forward(self, inputs, state):
        return self.linear(torch.cat((inputs.to(state.dtype), state), -1)).tanh()


class ModReLUCell(ComplexTanhCell):
    """The modulus goes through a rectifier, the phase stays: not holomorphic."""

    def forward(self, inputs, state):
        z = self.linear(torch.cat((inputs.to(state.dtype), state), -1))
        return torch.polar(F.softplus(z.abs() - 0.3), z.angle())


def real_jacobians(cell, inputs, state):
    """Return by autograd the Jacobians of real and imaginary parts, side by side unit by unit."""
    cell, matrices = copy.deepcopy(cell).to(torch.complex128), []
    for step_inputs in inputs:

        def step(flat, step_inputs=step_inputs):
            z = torch.view_as_complex(flat.reshape(-1, 2))
            return torch.view_as_real(cell(step_inputs.unsqueeze(0), z.unsqueeze(0)).squeeze(0)).flatten()

        flat = torch.view_as_real(state).flatten()
        matrices.append(torch.autograd.functional.jacobian(step, flat))
        state = torch.view_as_complex(step(flat).detach().reshape(-1, 2))
    return torch.stack(matrices)


@pytest.mark.parametrize("cell_class", [ComplexTanhCell, ModReLUCell])
def test_a_complex_state_has_two_exponents_for_each_number(cell_class):
    cell, inputs, state = cell_class(), randn(TIME, BATCH, FEATURES), randn(BATCH, HIDDEN, dtype=torch.complex128)
    spectrum = precise(cell, inputs, state)
    assert spectrum.shape == (BATCH, 2 * HIDDEN)
    for i in range(BATCH):
        matrices = real_jacobians(cell, inputs[:, i], state[i])
        assert_close(jacobians(cell, inputs, state)[:, i], matrices, rtol=0, atol=1e-10)
        assert_close(spectrum[i], reference.spectrum(matrices), rtol=0, atol=1e-8)
        assert_close(spectrum[i].sum(), reference.mean_log_determinant(matrices), rtol=0, atol=1e-8)


class BesideComplex(nn.Module):
    """A real state and a complex one, which do not meet."""

    def __init__(self):
        super().__init__()
        self.real, self.complex = TanhCell(), ComplexTanhCell()

    def forward(self, inputs, state):
        return {"real": self.real(inputs, state["real"]), "z": self.complex(inputs, state["z"])}


@pytest.mark.parametrize("batch", [1, BATCH])
def test_a_complex_state_may_stand_behind_an_odd_number_of_real_components(batch):
    assert HIDDEN % 2
    cell, inputs, real = BesideComplex(), randn(TIME, batch, FEATURES), randn(batch, HIDDEN)
    z = randn(batch, HIDDEN, dtype=torch.complex128)
    both = precise(cell, inputs, {"real": real, "z": z}, warmup=0)
    apart = precise(cell.real, inputs, real, warmup=0), precise(cell.complex, inputs, z, warmup=0)
    assert_close(both.sum(-1), sum(spectrum.sum(-1) for spectrum in apart), rtol=0, atol=1e-8)


def test_exponents_of_a_holomorphic_map_come_in_equal_pairs():
    cell = ComplexTanhCell()
    spectrum = precise(cell, randn(600, 1, FEATURES), randn(1, HIDDEN, dtype=torch.complex128), warmup=100)[0]
    assert_close(spectrum[0::2], spectrum[1::2], rtol=0, atol=0.02)


class LateModel(HandModel):
    """Its cell is not called in the first batch."""

    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) if self.calls > 1 else self.head(inputs.new_zeros(*inputs.shape[:2], HIDDEN))


def test_a_custom_cell_that_is_not_called_at_first_does_not_end_the_run(recwarn):
    monitor = LyapunovMonitor("rnn", every_n_train_steps=1)
    trainer = fit(LateModel(HandLSTM()), monitor, data=series(4), max_epochs=1)
    assert trainer.global_step == 4
    assert messages(recwarn, "`rnn` was not called")
    spectrum = monitor.history["rnn"]["spectrum"]
    assert spectrum[0].isnan().all()
    assert spectrum[-1, : 2 * HIDDEN].isfinite().all()
