"""Custom cells that are called as (input, state)."""

import importlib.util

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import FEATURES, ROOT, CellModel, TanhCell, fit, make_recorder, precise, randn, sequences_of, series
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import EXPONENT_FLOOR, LyapunovMonitor, jacobians, lyapunov_spectrum

_spec = importlib.util.spec_from_file_location("custom_cells", ROOT / "examples" / "custom_cells.py")
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

TIME, BATCH, INPUTS, UNITS = 12, 3, example.INPUTS, example.UNITS
HIDDEN = 5


# The cells of the example

REAL_CELLS = [example.LeakyTanhCell, example.MinimalGatedCell, example.ClosedFormContinuousTimeCell]
real_cells = pytest.mark.parametrize("cell_class", REAL_CELLS)


@real_cells
def test_spectrum_is_that_of_the_jacobians_of_the_cell(cell_class):
    cell, inputs, state = cell_class(), randn(TIME, BATCH, INPUTS), 0.3 * randn(BATCH, UNITS)
    assert_close(precise(cell, inputs, state), reference.spectra(jacobians(cell, inputs, state)), rtol=0, atol=1e-8)


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
    expected = reference.mean_log_determinant(jacobians(cell, inputs, state))
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
    """Return a layer whose rates differ so much that the frame aligns within few steps."""
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# Arguments and precision


class AdvancedCell(nn.Module):
    """Called with keywords, in any order."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, drive, memory):
        return self.linear(torch.cat((drive, 0.5 * memory), -1)).tanh()


@pytest.mark.parametrize("how", ["positional", "keywords", "keywords, the state first"])
def test_keywords_are_the_arguments_they_name(how):
    # Input and state have the same shape: only their names tell them apart.
    cell, inputs, state = AdvancedCell(), torch.randn(TIME, BATCH, HIDDEN), torch.randn(BATCH, HIDDEN)
    recorder = make_recorder(cell)
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
    sequences = sequences_of(recorder)["layer"]
    assert torch.equal(sequences.inputs, inputs)
    assert torch.equal(sequences.states[0], state)


def test_a_cell_that_forgets_at_once_is_at_the_floor():
    class Forgetful(TanhCell):
        def forward(self, inputs, state):
            return self.drive(inputs, 0 * state).tanh()

    spectrum = lyapunov_spectrum(Forgetful(), torch.randn(TIME, BATCH, FEATURES), torch.randn(BATCH, HIDDEN))
    assert_close(spectrum, torch.full((BATCH, HIDDEN), EXPONENT_FLOOR), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_custom_cells_are_measured_in_any_precision(precision):
    model, monitor = CellModel(TanhCell()), LyapunovMonitor("rnn", num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, data=series(1), max_steps=1, precision=precision)
    inputs, _ = next(iter(series(1)))
    expected = lyapunov_spectrum(model.rnn, inputs.transpose(0, 1), torch.zeros(4, HIDDEN), num_exponents=1)
    # What the loop was called with is rounded to three digits in bfloat16.
    tolerance = 1e-4 if precision == "64-true" else 0.02
    assert_close(monitor.history["rnn"]["spectrum"][0], expected.mean(0).float(), rtol=0, atol=tolerance)


# Side effects


class Busy(TanhCell):
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


# Closed loops


def test_a_closed_loop_has_the_exponents_of_the_composed_map():
    cell, head = nn.GRUCell(FEATURES, HIDDEN).double(), nn.Linear(HIDDEN, FEATURES).double()
    nn.init.normal_(cell.weight_hh, std=1.0)

    def closed(state, _):
        return cell(head(state), state)

    state, empty = randn(BATCH, HIDDEN), torch.zeros(60, BATCH, 0).double()
    spectrum = lyapunov_spectrum(closed, empty, state)
    assert_close(spectrum, reference.spectra(jacobians(closed, empty, state)), rtol=0, atol=1e-8)
    # By the chain rule, from the open loop: d h'/dh + (d h'/dx) (d x/dh).
    matrices = []
    with torch.no_grad():
        for _ in range(60):
            fed = head(state)
            through_state = torch.func.vmap(torch.func.jacrev(cell, argnums=1))(fed, state)
            through_input = torch.func.vmap(torch.func.jacrev(cell, argnums=0))(fed, state)
            matrices.append(through_state + through_input @ head.weight)
            state = cell(fed, state)
    assert_close(spectrum, reference.spectra(torch.stack(matrices)), rtol=0, atol=1e-8)


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
