"""Any cell: what is called as (input, state) works as it is, what is not is taught, and what cannot be is refused."""

import copy
import importlib.util
import math
from pathlib import Path
from typing import ClassVar

import naive
import pytest
import torch
import torch.nn.functional as F
from models import FEATURES, Regressor, fit, make_trainer, series
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import EXPONENT_FLOOR, LyapunovMonitor, jacobians, lyapunov_spectrum, register_layer
from lightning_lyapunov.layers import registry
from lightning_lyapunov.layers.registry import as_layer
from lightning_lyapunov.recording.recorder import Recorder

_spec = importlib.util.spec_from_file_location(
    "custom_cells", Path(__file__).parent.parent / "examples" / "custom_cells.py"
)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

TIME, BATCH, INPUTS, UNITS = 12, 3, example.INPUTS, example.UNITS
HIDDEN = 5


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def precise(module, *arguments, **options):
    return lyapunov_spectrum(module, *arguments, dtype=torch.float64, **options)


def by_qr(matrices):
    """Return the spectra of Jacobians ``(time, batch, state, state)``, with a QR decomposition at every step."""
    return torch.stack([naive.spectrum(matrices[:, i]) for i in range(matrices.shape[1])])


def mean_log_determinant(matrices):
    return matrices.slogdet().logabsdet.mean(0)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


# The cells of the example

REAL_CELLS = [example.LeakyTanhCell, example.MinimalGatedCell, example.ClosedFormContinuousTimeCell]
real_cells = pytest.mark.parametrize("cell_class", REAL_CELLS)


@real_cells
def test_spectrum_is_that_of_the_jacobians_of_the_cell(cell_class):
    cell, inputs, state = cell_class(), randn(TIME, BATCH, INPUTS), 0.3 * randn(BATCH, UNITS)
    assert_close(precise(cell, inputs, state), by_qr(jacobians(cell, inputs, state)), rtol=0, atol=1e-8)


@real_cells
def test_jacobians_are_those_of_autograd(cell_class):
    cell, inputs, state = cell_class().double(), randn(1, BATCH, INPUTS), 0.3 * randn(BATCH, UNITS)

    def step(before, member):
        after = cell(inputs[0, [member]], before.unsqueeze(0))
        return (after[1] if isinstance(after, tuple) else after).squeeze(0)

    for i in range(BATCH):
        expected = torch.autograd.functional.jacobian(lambda s, i=i: step(s, i), state[i])
        assert_close(jacobians(cell, inputs, state)[0, i], expected, rtol=0, atol=1e-14)


@real_cells
@pytest.mark.parametrize("steps", [1, 17])
@pytest.mark.parametrize("qr_interval", [1, 4, "auto"])
def test_sum_is_the_mean_log_determinant(cell_class, steps, qr_interval):
    cell, inputs, state = cell_class(), randn(steps, BATCH, INPUTS), 0.3 * randn(BATCH, UNITS)
    expected = mean_log_determinant(jacobians(cell, inputs, state))
    assert_close(precise(cell, inputs, state, qr_interval=qr_interval).sum(-1), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 50])
def test_unitary_cell_has_every_exponent_at_zero(steps):
    cell, state = example.UnitaryCell(), randn(BATCH, UNITS // 2, dtype=torch.complex64)
    zeros, inputs = torch.zeros(BATCH, UNITS).double(), randn(steps, BATCH, INPUTS)
    # torch keeps a factor of the matrix in a buffer, of single precision here: it is unitary to 1e-7.
    assert_close(precise(cell, inputs, state), zeros, rtol=0, atol=1e-6)
    recurrent = nn.Linear(UNITS // 2, UNITS // 2, bias=False, dtype=torch.complex128)
    cell.recurrent = nn.utils.parametrizations.orthogonal(recurrent, orthogonal_map="cayley")
    cell.drive.to(torch.complex128)
    assert_close(precise(cell, inputs, state), zeros, rtol=0, atol=1e-13)


def state_space():
    """Return a layer whose rates lie so far apart that a frame finds each unit's direction soon."""
    layer = example.SelectiveStateSpace()
    nn.init.uniform_(layer.step_size.weight, -1, 1)
    with torch.no_grad():
        layer.log_rate.copy_(torch.linspace(0, 3, UNITS))
    return layer


def exponents_of_state_space(layer, inputs):
    """Return the known answer: a step multiplies unit ``i`` by ``exp(-size(x) rate_i)``."""
    with torch.no_grad():
        size = F.softplus(layer.step_size(inputs)).mean(1)
        return (-size * layer.log_rate.exp()).sort(-1, descending=True).values


def test_state_space_has_its_known_exponents_in_each_sequence():
    layer, inputs = state_space(), torch.randn(BATCH, 300, INPUTS)
    expected = exponents_of_state_space(layer, inputs[:, 200:]).double()
    assert (expected.diff(dim=0).abs() > 1e-3).all()  # the sequences differ
    assert_close(precise(layer, inputs, warmup=200), expected, rtol=1e-6, atol=1e-6)


def test_the_sum_of_a_state_space_is_known_from_the_first_step_on():
    layer, inputs = example.SelectiveStateSpace(), torch.randn(BATCH, TIME, INPUTS)
    expected = exponents_of_state_space(layer, inputs).sum(-1).double()
    assert_close(precise(layer, inputs).sum(-1), expected, rtol=1e-6, atol=0)


CELLS = [*REAL_CELLS, example.UnitaryCell]


@pytest.mark.parametrize("modules", ["cell", None], ids=["named", "found"])
def test_monitor_has_the_known_exponents_of_a_registered_layer(modules):
    inputs, model = torch.randn(4, 300, INPUTS), example.Recall(state_space())
    monitor = LyapunovMonitor(modules, num_exponents=None, max_steps=300, warmup=150, strict=True)
    fit(model, monitor, data=DataLoader(TensorDataset(inputs), 4), max_steps=1)
    (measurements,) = monitor.history.values()
    known = exponents_of_state_space(model.cell, inputs[:, 150:]).mean(0)
    assert_close(measurements["spectrum"][0], known, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell_class", CELLS)
def test_monitor_measures_a_named_cell_in_a_loop(cell_class):
    inputs, model = torch.randn(4, TIME, INPUTS), example.Recall(cell_class())
    monitor = LyapunovMonitor("cell", num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=DataLoader(TensorDataset(inputs), 4), max_steps=1)
    first = torch.zeros(4, UNITS)
    if cell_class is example.UnitaryCell:
        first = torch.zeros(4, UNITS // 2, dtype=torch.complex64)
    expected = lyapunov_spectrum(model.cell, inputs.transpose(0, 1), first, num_exponents=1).mean(0)
    assert_close(monitor.history["cell"]["spectrum"][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell_class", [*CELLS, example.SelectiveStateSpace])
def test_a_run_with_the_monitor_is_bitwise_that_without(cell_class):
    def trained(*callbacks):
        torch.manual_seed(4)
        model, inputs = example.Recall(cell_class()), torch.randn(8, TIME, INPUTS)
        fit(model, *callbacks, data=DataLoader(TensorDataset(inputs), 4))
        return {**model.state_dict(), "random": torch.get_rng_state()}

    without = trained()
    with_monitor = trained(LyapunovMonitor("cell", every_n_train_steps=1, strict=True))
    assert all(torch.equal(value, with_monitor[name]) for name, value in without.items())


# States


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


def torchs_twin(module):
    """Return torch's LSTM cell with the weights of one written by hand."""
    twin = nn.LSTMCell(FEATURES, HIDDEN)
    with torch.no_grad():
        twin.weight_ih.copy_(module.linear.weight[:, :FEATURES])
        twin.weight_hh.copy_(module.linear.weight[:, FEATURES:])
        twin.bias_ih.copy_(module.linear.bias)
        twin.bias_hh.zero_()
    return twin.to(module.linear.weight.dtype)


@pytest.mark.parametrize("cell_class", STATES)
def test_a_state_may_be_any_pytree(cell_class):
    module, inputs = cell_class(), randn(TIME, BATCH, FEATURES)
    h, c = randn(BATCH, HIDDEN), randn(BATCH, HIDDEN)
    expected = precise(torchs_twin(module), inputs, (h, c), warmup=0)
    # The order of the parts in the flat state turns the frame: only what does not depend on it is the same.
    ours = precise(module, inputs, module.pack(h, c))
    assert_close(ours.sum(-1), expected.sum(-1), rtol=0, atol=1e-8)
    if cell_class not in (DictState, NestedState):
        assert_close(ours, expected, rtol=0, atol=1e-8)
    assert_close(ours, by_qr(jacobians(module, inputs, module.pack(h, c))), rtol=0, atol=1e-8)


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
        assert_close(spectrum[i], naive.spectrum(matrices), rtol=0, atol=1e-8)
        assert_close(spectrum[i].sum(), mean_log_determinant(matrices), rtol=0, atol=1e-8)


class BesideComplex(nn.Module):
    """A real state and a complex one, which do not meet."""

    def __init__(self):
        super().__init__()
        self.real, self.complex = Plain(), ComplexTanhCell()

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


class AdvancedCell(nn.Module):
    """Called with keywords, in an order of the caller's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, drive, memory):
        return self.linear(torch.cat((drive, 0.5 * memory), -1)).tanh()


@pytest.mark.parametrize("how", ["positional", "keywords", "keywords, the state first"])
def test_keywords_are_the_arguments_they_name(how):
    # Input and state have the same shape: only their names tell them apart.
    cell, inputs, state = AdvancedCell(), torch.randn(TIME, BATCH, HIDDEN), torch.randn(BATCH, HIDDEN)
    recorder = Recorder({"cell": (cell, as_layer(cell))}, 16, 100)
    recorder.start()
    memory = state
    for drive in inputs:
        if how == "positional":
            memory = cell(drive, memory)
        elif how == "keywords":
            memory = cell(drive=drive, memory=memory)
        else:
            memory = cell(memory=memory, drive=drive)
    recorder.stop()
    assert not recorder.errors
    sequences = recorder.sequences()["cell"]
    assert torch.equal(sequences.inputs, inputs)
    assert torch.equal(sequences.states[0], state)


# Cells that some ways of differentiation do not know


class Tanh(torch.autograd.Function):
    """Written the old way: nothing but a backward."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


class Plain(nn.Module):
    """h' = tanh(W [x, h]); the subclasses compute it in ways that need a fallback."""

    calls: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def drive(self, inputs, state):
        self.calls.append(1)
        return self.linear(torch.cat((inputs, state), -1))

    def forward(self, inputs, state):
        return self.drive(inputs, state).tanh()


class OldFunction(Plain):
    def forward(self, inputs, state):
        return Tanh.apply(self.drive(inputs, state))


class AsksForNumbers(Plain):
    def forward(self, inputs, state):
        factor = 1.0 if state.detach().abs().max().item() < 1e9 else 0.0
        return factor * self.drive(inputs, state).tanh()


class Branches(Plain):
    def forward(self, inputs, state):
        if (state.abs() > 1e9).any():
            return state
        return self.drive(inputs, state).tanh()


class ThroughNumpy(Plain):
    """The input passes by NumPy, on its way into a cell that has a backward only."""

    def forward(self, inputs, state):
        return Tanh.apply(self.drive(torch.from_numpy(inputs.detach().cpu().numpy().copy()), state))


class EvaluatedBatchNorm(Plain):
    """Its statistics are those of a standardised input: in evaluation mode it does nothing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, eps=0.0)

    def forward(self, inputs, state):
        return self.norm(self.drive(inputs, state)).tanh()


class Dropout(Plain):
    def forward(self, inputs, state):
        return F.dropout(self.drive(inputs, state), 0.5, self.training).tanh()


class DropoutModule(Plain):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs, state):
        return self.dropout(self.drive(inputs, state)).tanh()


class PlainTensor(Plain):
    """A matrix that is neither parameter nor buffer stays in float32, whatever the module is cast to."""

    def __init__(self):
        super().__init__()
        self.identity = torch.eye(HIDDEN)

    def forward(self, inputs, state):
        return (self.drive(inputs, state) @ self.identity).tanh()


class InPlace(Plain):
    """Writes the next state over the one before."""

    def forward(self, inputs, state):
        return state.copy_(self.drive(inputs, state).tanh())


class InPlaceOldFunction(Plain):
    """Writes over its state, and has a backward only."""

    def forward(self, inputs, state):
        return state.copy_(Tanh.apply(self.drive(inputs, state)))


class Remembers(Plain):
    """Keeps what it made, with the graph that hangs on it."""

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
    PlainTensor,
    InPlace,
    Remembers,
]


class Looped(Regressor):
    """A custom cell, called step by step from zeros."""

    def __init__(self, cell, **options):
        super().__init__(**options)
        self.rnn = cell

    def forward(self, inputs):
        state, outputs = inputs.new_zeros(len(inputs), HIDDEN), []
        for step_inputs in inputs.unbind(1):
            state = self.rnn(step_inputs, state)
            outputs.append(state)
        return self.head(torch.stack(outputs, 1))


def with_plain_twin(cell_class):
    """Return a cell, in training, and the plain one with its weights."""
    cell, twin = cell_class(), Plain()
    twin.linear.load_state_dict(cell.linear.state_dict())
    return cell.train(), twin


@pytest.mark.parametrize("cell_class", [*ODD, InPlaceOldFunction])
def test_a_cell_has_the_spectrum_of_its_plain_twin(cell_class):
    cell, twin = with_plain_twin(cell_class)
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    expected = lyapunov_spectrum(twin, inputs, state.clone())
    assert_close(lyapunov_spectrum(cell, inputs, state), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cell_class", [cell for cell in ODD if cell not in (InPlace, Dropout, DropoutModule)])
def test_the_monitor_gives_a_cell_the_spectrum_of_its_plain_twin(cell_class):
    spectra = []
    for cell in with_plain_twin(cell_class):
        if isinstance(cell, EvaluatedBatchNorm):
            cell.norm.momentum = 0.0  # a training forward moves its statistics
        monitor = LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
        model = Looped(cell, lr=0.0)
        if cell_class is EvaluatedBatchNorm:
            model.on_train_start = lambda model=model: model.rnn.eval()
        fit(model, monitor, data=series(1), max_steps=1)
        spectra.append(monitor.history["rnn"]["spectrum"])
    assert_close(*spectra, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cell_class", [cell for cell in ODD if cell is not InPlace])
def test_a_cell_has_the_jacobians_of_its_plain_twin(cell_class):
    cell, twin = with_plain_twin(cell_class)
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    matrices = jacobians(cell, inputs, state).double()
    assert_close(matrices, jacobians(twin, inputs, state), rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("cell_class", [Plain, OldFunction, AsksForNumbers, Branches])
def test_the_way_to_differentiate_is_chosen_once(cell_class, monkeypatch):
    cell, counts = cell_class(), []
    for steps in (5, 25):
        monkeypatch.setattr(Plain, "calls", [])
        lyapunov_spectrum(cell, torch.randn(steps, BATCH, FEATURES), torch.randn(BATCH, HIDDEN), qr_interval=1)
        counts.append(len(Plain.calls))
    # Each further step costs one call on the way and one for its tangents, and no attempt that fails.
    assert counts[1] - counts[0] == 2 * 20


class AroundTorchs(nn.Module):
    """A custom cell that contains one of torch's, and what it remembers in its own state."""

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
    cell, twin = with_plain_twin(Plain)
    prune.l1_unstructured(cell.linear, "weight", 0.4)
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    cell(inputs[0], state)
    with torch.no_grad():
        if not refreshed:  # the optimizer moves weight_orig, and the weight follows at the next forward
            cell.linear.weight_orig.mul_(1.5)
        twin.linear.weight.copy_(cell.linear.weight_orig * cell.linear.weight_mask)
    assert_close(lyapunov_spectrum(cell, inputs, state), lyapunov_spectrum(twin, inputs, state), rtol=0, atol=1e-4)


# What a measurement leaves alone


class Busy(Plain):
    """Has buffers that every call changes, dropout and batch norm, and parts of which some are in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.still = nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5), nn.Dropout(0.1).eval()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, inputs, state):
        self.count += 1
        return self.still(self.dropout(self.norm(self.drive(inputs, state)))).tanh()


def test_a_measurement_leaves_no_trace():
    cell, called = Busy(), []
    cell.linear.bias.requires_grad_(False)
    cell.register_forward_hook(lambda *_: called.append("forward"))
    cell.linear.register_forward_pre_hook(lambda *_: called.append("before"))
    cell.norm.register_full_backward_hook(lambda *_: called.append("backward"))
    inputs, state = torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN)
    cell(inputs[0], state).sum().backward()
    called.clear()

    def traces():
        parameters = {name: (value.grad, value.requires_grad) for name, value in cell.named_parameters()}
        flags = {name: (part.training, len(part._forward_hooks)) for name, part in cell.named_modules()}
        return [tensor.clone() for tensor in cell.state_dict().values()], parameters, flags, torch.get_rng_state()

    before = traces()
    lyapunov_spectrum(cell, inputs, state)
    after = traces()
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1].keys() == after[1].keys()
    assert all(before[1][name][0] is grad and before[1][name][1] is flag for name, (grad, flag) in after[1].items())
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])
    assert called == []


# Teaching


class WholeSequences(nn.Module):
    """Called with a whole sequence and something more; returns outputs only."""

    def __init__(self):
        super().__init__()
        self.cell = Plain()

    def forward(self, sequence, *, scale=1.0):
        state, outputs = sequence.new_zeros(len(sequence), HIDDEN), []
        for inputs in sequence.unbind(1):
            state = self.cell(scale * inputs, state)
            outputs.append(state)
        return torch.stack(outputs, 1)


class Heir(WholeSequences):
    pass


def teach(module_class=WholeSequences):
    register_layer(
        module_class,
        step=lambda module, inputs, state: module.cell(inputs, state),
        read_call=lambda module, sequence, scale=1.0: (
            scale * sequence.transpose(0, 1),
            sequence.new_zeros(len(sequence), HIDDEN),
        ),
    )


@pytest.mark.parametrize("module_class", [WholeSequences, Heir])
def test_a_taught_class_and_its_heirs_are_measured(module_class):
    teach()
    module, sequence = module_class(), torch.randn(BATCH, TIME, FEATURES)
    expected = precise(module.cell, sequence.transpose(0, 1), torch.zeros(BATCH, HIDDEN))
    assert_close(precise(module, sequence), expected, rtol=0, atol=1e-12)


def test_an_heir_may_be_taught_by_itself():
    teach()
    register_layer(
        Heir,
        step=lambda module, inputs, state: 0.5 * state,
        read_call=lambda module, sequence: (sequence.transpose(0, 1), sequence.new_zeros(len(sequence), HIDDEN)),
    )
    sequence = torch.randn(BATCH, TIME, FEATURES)
    half = torch.full((BATCH, HIDDEN), math.log(0.5), dtype=torch.float64)
    assert_close(precise(Heir(), sequence), half, rtol=0, atol=1e-12)
    assert not torch.allclose(precise(WholeSequences(), sequence), half)


def test_what_is_taught_goes_before_what_is_known():
    class Halving(nn.GRU):
        pass

    register_layer(
        Halving,
        step=lambda module, inputs, state: 0.5 * state,
        read_call=lambda module, inputs, hx=None: (inputs, inputs.new_zeros(inputs.shape[1], HIDDEN)),
    )
    spectrum = precise(Halving(FEATURES, HIDDEN), torch.randn(TIME, BATCH, FEATURES))
    assert_close(spectrum, torch.full((BATCH, HIDDEN), math.log(0.5), dtype=torch.float64), rtol=0, atol=1e-12)


class TaughtModel(Regressor):
    def __init__(self, module_class=WholeSequences):
        super().__init__()
        self.rnn = module_class()

    def forward(self, inputs):
        return self.head(self.rnn(inputs, scale=2.0))


@pytest.mark.parametrize("module_class", [WholeSequences, Heir])
def test_taught_layers_are_found_without_being_named(module_class):
    teach()
    model, monitor = TaughtModel(module_class), LyapunovMonitor(num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=series(1), max_steps=1)
    assert list(monitor.history) == ["rnn"]
    inputs, _ = next(iter(series(1)))
    expected = lyapunov_spectrum(
        model.rnn.cell, 2 * inputs.transpose(0, 1), torch.zeros(len(inputs), HIDDEN), num_exponents=1
    )
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0), rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_not_taught_is_refused_with_the_line_to_write():
    with pytest.raises(TypeError, match=r"WholeSequences is no recurrent layer.*`register_layer`"):
        lyapunov_spectrum(WholeSequences(), torch.randn(BATCH, TIME, FEATURES))
    with pytest.raises(ValueError, match=r"`modules`: `rnn` cannot be watched.*`register_layer`"):
        fit(TaughtModel(), LyapunovMonitor("rnn"))


# Closed loops


def test_a_closed_loop_has_the_exponents_of_the_composed_map():
    cell, head = nn.GRUCell(FEATURES, HIDDEN).double(), nn.Linear(HIDDEN, FEATURES).double()
    nn.init.normal_(cell.weight_hh, std=1.0)

    def closed(state, _):
        return cell(head(state), state)

    state, empty = randn(BATCH, HIDDEN), torch.zeros(60, BATCH, 0).double()
    spectrum = lyapunov_spectrum(closed, empty, state)
    assert_close(spectrum, by_qr(jacobians(closed, empty, state)), rtol=0, atol=1e-8)
    # By the chain rule, from the open loop: d h'/dh + (d h'/dx) (d x/dh).
    matrices = []
    with torch.no_grad():
        for _ in range(60):
            fed = head(state)
            through_state = torch.func.vmap(torch.func.jacrev(cell, argnums=1))(fed, state)
            through_input = torch.func.vmap(torch.func.jacrev(cell, argnums=0))(fed, state)
            matrices.append(through_state + through_input @ head.weight)
            state = cell(fed, state)
    assert_close(spectrum, by_qr(torch.stack(matrices)), rtol=0, atol=1e-8)


def test_a_closed_loop_is_not_the_open_one():
    cell, head = nn.GRUCell(FEATURES, HIDDEN).double(), nn.Linear(HIDDEN, FEATURES).double()
    state, fed = randn(1, HIDDEN), []
    spectrum = lyapunov_spectrum(lambda s, _: cell(head(s), s), torch.zeros(30, 1, 0).double(), state)
    current = state
    with torch.no_grad():
        for _ in range(30):
            fed.append(head(current))
            current = cell(fed[-1], current)
    assert (spectrum - lyapunov_spectrum(cell, torch.stack(fed), state)).abs().max() > 0.01


# What cannot be measured says so by name, and what to do


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


class Growing(Plain):
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
    recorder = Recorder({"cell": (cell, as_layer(cell))}, 16, 100)
    recorder.start()
    for size in (HIDDEN, HIDDEN + 1):
        cell(torch.randn(BATCH, FEATURES), torch.randn(BATCH, size))
    recorder.stop()
    assert "The state of Halving changes its size or structure: (batch, 6) after (batch, 5)" in str(recorder.errors)


def test_a_state_that_changes_its_size_is_said_once_and_training_goes_on(recwarn):
    trainer = fit(GrowingModel(), LyapunovMonitor("rnn"))
    assert trainer.global_step == 6
    said = [str(warning.message) for warning in recwarn if "`rnn` could not be measured" in str(warning.message)]
    assert len(said) == 1
    assert trainer.callback_metrics["lyapunov/max"].isnan()


def test_a_strict_monitor_raises_for_a_state_that_changes_its_size():
    with pytest.raises(ValueError, match=r"A step must return the next state|changes its size"):
        fit(GrowingModel(), LyapunovMonitor("rnn", strict=True))


class ThreeArguments(Plain):
    def forward(self, inputs, state, time):
        return super().forward(inputs, state) * time


class ThreeArgumentsModel(Regressor):
    def __init__(self):
        super().__init__()
        self.rnn = ThreeArguments()

    def forward(self, inputs):
        state, outputs = inputs.new_zeros(len(inputs), HIDDEN), []
        for step_inputs in inputs.unbind(1):
            state = self.rnn(step_inputs, state, 0.9)
            outputs.append(state)
        return self.head(torch.stack(outputs, 1))


def test_a_cell_with_more_arguments_says_what_to_write_and_training_goes_on(recwarn):
    trainer = fit(ThreeArgumentsModel(), LyapunovMonitor("rnn"))
    assert trainer.global_step == 6
    (said,) = {str(warning.message) for warning in recwarn if "`rnn` could not be measured" in str(warning.message)}
    assert "ThreeArguments is not called as (input, state). Register it: `register_layer(" in said
    with pytest.raises(TypeError, match="ThreeArguments is not called as"):
        fit(ThreeArgumentsModel(), LyapunovMonitor("rnn", strict=True))


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
    assert [warning for warning in recwarn if "`rnn` was not called" in str(warning.message)]
    spectrum = monitor.history["rnn"]["spectrum"]
    assert spectrum[0].isnan().all()
    assert spectrum[-1, : 2 * HIDDEN].isfinite().all()


def test_a_cell_that_forgets_at_once_is_at_the_floor():
    class Forgetful(Plain):
        def forward(self, inputs, state):
            return self.drive(inputs, 0 * state).tanh()

    spectrum = lyapunov_spectrum(Forgetful(), torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN))
    assert_close(spectrum, torch.full((BATCH, HIDDEN), EXPONENT_FLOOR), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_custom_cells_are_measured_in_any_precision(precision):
    model, monitor = Looped(Plain()), LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=series(1), max_steps=1, precision=precision)
    inputs, _ = next(iter(series(1)))
    expected = lyapunov_spectrum(model.rnn, inputs.transpose(0, 1), torch.zeros(4, HIDDEN), num_exponents=1)
    # What the loop was called with is rounded to three digits in bfloat16.
    tolerance = 1e-4 if precision == "64-true" else 0.02
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0).float(), rtol=0, atol=tolerance)
