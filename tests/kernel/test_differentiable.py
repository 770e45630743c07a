"""The spectrum with a graph: its values, and its derivatives by weights, inputs and states."""

import math
from functools import partial

import pytest
import reference
import torch
from helpers import Cube, TanhCell, assert_equal, assert_near, randn, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_lyapunov import EXPONENT_FLOOR, lyapunov_spectrum

cells = pytest.mark.parametrize("cell", reference.CELLS)
LAYOUTS = {"one": {}, "stacked": {"num_layers": 2}, "bidirectional": {"num_layers": 2, "bidirectional": True}}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Along random directions, not entry by entry.
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
gradgradcheck = partial(torch.autograd.gradgradcheck, fast_mode=True)


def differentiable(*arguments, **options):
    return lyapunov_spectrum(*arguments, differentiable=True, **options)


def gradients(spectrum, module):
    return torch.autograd.grad(spectrum.square().mean(), list(module.parameters()), materialize_grads=True)


def loop_spectrum(module, inputs, state):
    """Return the spectrum of one sequence with a graph, by torch's own forward, autograd and a QR at every step."""
    weights = dict(module.named_parameters())

    def step(before, x):
        arguments = (x.unsqueeze(0), reference.unflatten(module, before))
        return reference.flatten(torch.func.functional_call(module, weights, arguments)[1])

    frame, growth = None, 0
    for x in inputs:
        matrix = torch.autograd.functional.jacobian(lambda before, x=x: step(before, x), state, create_graph=True)
        frame = reference.generic_frame(len(state), len(state)) if frame is None else frame
        frame, factor = torch.linalg.qr(matrix @ frame)
        growth = growth + factor.diagonal().abs().log()
        state = step(state, x)
    return (growth / len(inputs)).sort(descending=True).values


# The numbers


@cells
@layouts
@pytest.mark.parametrize("qr_interval", [1, 3, "auto"])
@pytest.mark.parametrize("num_exponents", [None, 2])
def test_the_numbers_are_those_of_the_ordinary_path(cell, layout, qr_interval, num_exponents):
    module, inputs = reference.make(cell, **LAYOUTS[layout]), randn(12, 2, 3)
    state, options = reference.initial_state(module, 2), {"num_exponents": num_exponents, "warmup": 3}
    expected = lyapunov_spectrum(module, inputs, state, qr_interval=1, **options)
    actual = differentiable(module, inputs, state, qr_interval=qr_interval, **options)
    assert actual.requires_grad
    assert_near(actual.detach(), expected, 1e-8)


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    cell, hidden, gain = draw(st.sampled_from(list(reference.CELLS))), draw(st.integers(3, 7)), draw(st.floats(0.1, 6))
    module = reference.make(cell, hidden, gain, bias=draw(st.booleans()), num_layers=draw(st.integers(1, 2)))
    time, batch = draw(st.integers(2, 20)), draw(st.integers(1, 3))
    inputs = randn(time, batch, 3)
    if ragged := draw(st.booleans()):
        inputs = pack_padded_sequence(inputs, torch.randint(2, time + 1, (batch,)), enforce_sorted=False)
    options = {"warmup": draw(st.integers(0, 1 if ragged else time - 1))}
    options["num_exponents"] = draw(st.none() | st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    inputs = (
        PackedSequence(*(part.to(dtype) if i == 0 else part for i, part in enumerate(inputs)))
        if ragged
        else (inputs.to(dtype))
    )
    return module.to(dtype), inputs, options, draw(st.sampled_from([1, 2, 5, "auto"]))


@pytest.mark.slow
@given(problems())
def test_the_numbers_are_those_of_the_ordinary_path_for_any_problem(problem):
    module, inputs, options, qr_interval = problem
    expected = lyapunov_spectrum(module, inputs, qr_interval=1, **options, dtype=torch.float64)
    actual = differentiable(module, inputs, qr_interval=qr_interval, **options, dtype=torch.float64)
    assert_near(actual.detach(), expected, 1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(actual, module))


@cells
def test_a_saturated_network_keeps_its_digits(cell):
    module, inputs = reference.make(cell, hidden=4, gain=8.0), randn(20, 2, 3)
    spectrum = differentiable(module, inputs)
    assert_near(spectrum.detach(), lyapunov_spectrum(module, inputs, qr_interval=1), 1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(spectrum, module))


def test_an_interval_that_float64_does_not_resolve_is_shortened():
    matrix = tensor(0.0, -5.0, -10.0).exp().diag().requires_grad_()
    inputs, state = torch.zeros(40, 1, 0), torch.zeros(1, 3).double()
    spectrum = differentiable(lambda s, _: s @ matrix.T, inputs, state, qr_interval=40, warmup=5)
    assert_near(spectrum[0].detach(), tensor(0.0, -5.0, -10.0), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_of_training_is_left_to_the_weights(dtype):
    module, inputs = reference.make("gru").to(dtype), randn(20, 2, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = differentiable(module, inputs)
    assert spectrum.dtype == torch.float32
    assert_near(spectrum.double().detach(), lyapunov_spectrum(module, inputs, dtype=torch.float64), 1e-6)
    assert {gradient.dtype for gradient in gradients(spectrum, module)} == {dtype}


# The derivatives


@pytest.mark.slow
@cells
@layouts
def test_derivatives_by_weights_inputs_and_state_are_those_of_finite_differences(cell, layout):
    module, inputs = reference.make(cell, hidden=3, **LAYOUTS[layout]), randn(5, 2, 3).requires_grad_()
    state = reference.initial_state(module, 2)
    parts = [part.requires_grad_() for part in (state if isinstance(state, tuple) else (state,))]
    independent = [*module.parameters(), inputs, *parts]
    assert gradcheck(lambda *_: differentiable(module, inputs, state, num_exponents=2), independent)


@pytest.mark.slow
@cells
@layouts
def test_second_derivatives_are_those_of_finite_differences(cell, layout):
    module, inputs = reference.make(cell, hidden=3, **LAYOUTS[layout]), randn(4, 1, 3).requires_grad_()
    weights = [weight for name, weight in module.named_parameters() if name.startswith("weight_hh")]
    assert gradgradcheck(lambda *_: differentiable(module, inputs, num_exponents=2), [*weights, inputs])


@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
def test_derivatives_are_those_of_a_loop_of_autograd(cell):
    module, inputs, state = reference.make(cell), randn(15, 1, 3), reference.initial_state(reference.make(cell), 1)
    expected = gradients(loop_spectrum(module, inputs[:, 0], reference.member(state, 0)), module)
    for actual, wanted in zip(gradients(differentiable(module, inputs, state), module), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("qr_interval", [2, 7, "auto"])
def test_derivatives_do_not_depend_on_the_interval(qr_interval):
    module, inputs = nn.GRU(3, 12).double(), randn(40, 2, 3)
    expected = gradients(differentiable(module, inputs, num_exponents=6, qr_interval=1), module)
    actual = gradients(differentiable(module, inputs, num_exponents=6, qr_interval=qr_interval), module)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_the_sum_of_all_exponents_has_the_derivative_of_the_log_determinant():
    matrix = randn(5, 5).requires_grad_()
    spectrum = differentiable(lambda s, _: s @ matrix.T, torch.zeros(30, 1, 0), torch.zeros(1, 5).double())
    (gradient,) = torch.autograd.grad(spectrum.sum(), matrix)
    assert_near(gradient, matrix.detach().inverse().T, 1e-8)


def test_each_exponent_of_a_matrix_has_the_derivative_of_its_eigenvalue():
    factors = tensor(0.5, 0.9, 2.0).requires_grad_()
    inputs, state = torch.zeros(100, 1, 0), torch.zeros(1, 3).double()
    spectrum = differentiable(lambda s, _: s * factors, inputs, state, warmup=70)[0]
    for exponent, factor in zip(spectrum, (2, 1, 0), strict=True):
        (gradient,) = torch.autograd.grad(exponent, factors, retain_graph=True)
        assert_near(gradient, torch.eye(3).double()[factor] / factors.detach(), 1e-8)


def test_exponents_that_cross_keep_the_derivative_of_the_one_that_they_are():
    factors = tensor(0.9, 0.5).requires_grad_()
    inputs, state = torch.zeros(2, 1, 0), torch.zeros(1, 2).double()
    # In two steps the frame has not turned: the first vector may still grow less than the second.
    assert gradcheck(lambda f: differentiable(lambda s, _: s * f.flip(0), inputs, state), factors)


# Every kind of module


def made(change):
    module = reference.make("rnn-tanh")
    change(module, "weight_hh_l0")
    return module


MADE = {
    "orthogonal": parametrizations.orthogonal,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruned": lambda module, name: prune.random_unstructured(module, name, amount=5),
    "older weight norm": old_weight_norm,
    "older spectral norm": old_spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_is_made_has_derivatives_by_what_it_is_made_of(kind):
    module, inputs = made(MADE[kind]), randn(5, 1, 3)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert_near(differentiable(module, inputs).detach(), lyapunov_spectrum(module, inputs, qr_interval=1), 1e-10)
    assert gradcheck(lambda *_: differentiable(module, inputs, num_exponents=2), list(module.parameters()))
    assert_equal(dict(module.named_buffers()), before)


class Nested(nn.Module):
    """A GRU cell below an LSTM cell, with a state of three tensors."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.GRUCell(3, 2), nn.LSTMCell(2, 3)

    def forward(self, x, state):
        h, pair = state
        h = self.below(x, h)
        pair = self.above(h, pair)
        return pair[0], (h, pair)


class Unitary(nn.Module):
    """Turns a complex state."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128)), nn.Parameter(tensor(0.9))

    def forward(self, x, z):
        return self.scale * z @ torch.matrix_exp(self.weight - self.weight.mH) + x[:, :2]


class OwnFunction(TanhCell):
    def forward(self, x, h):
        return Cube.apply(super().forward(x, h)) + 0.3 * h


def zeros(*sizes):
    return torch.zeros(2, *sizes).double()


CUSTOM = {
    "tanh": (TanhCell, zeros(5)),
    "nested": (Nested, (zeros(2), (zeros(3), zeros(3)))),
    "complex": (Unitary, torch.zeros(2, 2, dtype=torch.complex128)),
    "own function": (OwnFunction, zeros(5)),
}


@pytest.mark.parametrize("kind", CUSTOM)
def test_a_cell_of_ones_own_has_derivatives(kind):
    make, state = CUSTOM[kind]
    module, inputs = make().double(), randn(5, 2, 3)
    expected = lyapunov_spectrum(module, inputs, state, qr_interval=1)
    assert_near(differentiable(module, inputs, state).detach(), expected, 1e-9)
    # The exponents of a complex number come in pairs.
    assert gradcheck(lambda *_: differentiable(module, inputs, state, num_exponents=2), list(module.parameters()))


@pytest.mark.parametrize("kind", ["tanh", "nested", "own function"])
def test_a_cell_of_ones_own_has_second_derivatives(kind):
    make, state = CUSTOM[kind]
    module, inputs = make().double(), randn(3, 2, 3)
    assert gradgradcheck(
        lambda *_: differentiable(module, inputs, state, num_exponents=2), list(module.parameters())[:2]
    )


def test_a_module_in_training_mode_with_a_gradient_is_left_as_it_is():
    module, inputs = nn.GRU(3, 4, num_layers=2, dropout=0.5), torch.randn(10, 2, 3)
    module(inputs)[0].sum().backward()
    before = [(weight.clone(), weight.grad.clone()) for weight in module.parameters()]
    random = torch.get_rng_state()
    differentiable(module, inputs)
    assert module.training
    assert_equal([(weight.detach(), weight.grad) for weight in module.parameters()], before)
    assert_equal(torch.get_rng_state(), random)


def test_weights_that_are_not_trained_have_no_graph():
    module = nn.GRU(3, 4).requires_grad_(False)
    assert not differentiable(module, torch.randn(10, 2, 3)).requires_grad
    module.weight_hh_l0.requires_grad_()
    assert differentiable(module, torch.randn(10, 2, 3)).requires_grad


def test_no_graph_is_kept_where_the_caller_keeps_none():
    module, inputs = reference.make("gru"), randn(10, 2, 3)
    with torch.no_grad():
        spectrum = differentiable(module, inputs)
    assert not spectrum.requires_grad
    assert_near(spectrum, lyapunov_spectrum(module, inputs, qr_interval=1), 1e-12)


# Where there is no derivative


def test_a_direction_that_dies_has_a_gradient_of_zero():
    module = nn.RNN(3, 6, nonlinearity="relu").double()
    with torch.no_grad():
        module.bias_hh_l0[:3] = -100  # the first three units never fire
    spectrum = differentiable(module, inputs := randn(20, 2, 3))
    assert_near(spectrum.detach(), lyapunov_spectrum(module, inputs, qr_interval=1), 1e-8)
    dead = spectrum == EXPONENT_FLOOR
    assert (dead.sum(-1) >= 3).all()
    options = {"retain_graph": True, "materialize_grads": True}
    of_dead = torch.autograd.grad(spectrum[dead].sum(), list(module.parameters()), **options)
    assert all((gradient == 0).all() for gradient in of_dead)
    assert all(gradient.isfinite().all() for gradient in gradients(spectrum, module))


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("unit", [0, 1, 2])
def test_those_that_live_beside_a_dead_direction_have_their_derivative(step, unit):
    inputs = torch.rand(8, 1, 3).double() + 0.5
    inputs[step, 0, unit] = 0  # one unit is switched off for one step
    weight = (torch.eye(3).double() + 0.2 * randn(3, 3)).requires_grad_()

    def spectrum(weight):
        return differentiable(lambda s, x: x * (s @ weight.T), inputs, torch.zeros(1, 3).double())

    assert spectrum(weight)[0, -1] == EXPONENT_FLOOR
    assert spectrum(weight)[0, 1] > -10
    assert gradcheck(spectrum, weight)
    assert gradgradcheck(spectrum, weight)


@cells
@pytest.mark.parametrize("gain", [20.0, 200.0])
def test_what_float64_does_not_resolve_has_a_gradient_of_zero(cell, gain):
    module, inputs = reference.make(cell, hidden=6, gain=gain), randn(20, 2, 3)
    spectrum = differentiable(module, inputs)
    options = {"retain_graph": True, "materialize_grads": True}
    slowest = torch.autograd.grad(spectrum[:, -1].sum(), module.weight_hh_l0, **options)[0]
    assert slowest.abs().max() < 1e6  # without the limit up to 1e200, or NaN
    assert all(gradient.isfinite().all() for gradient in gradients(spectrum, module))


@pytest.mark.parametrize("spread", [15.0, 17.0])
def test_a_derivative_is_right_up_to_a_spread_of_sixteen_nats_in_one_step(spread):
    matrix = (
        torch.linalg.qr(randn(2, 2)).Q @ tensor(0.0, -spread).exp().diag() @ torch.linalg.qr(randn(2, 2)).Q
    ).requires_grad_()
    inputs, state = torch.zeros(10, 1, 0), torch.zeros(1, 2).double()
    spectrum = differentiable(lambda s, _: s @ matrix.T, inputs, state)[0]
    assert_near(spectrum.sum().detach(), tensor(-spread).squeeze(), 1e-6)
    (gradient,) = torch.autograd.grad(spectrum[1], matrix, retain_graph=True)
    if spread > 16:
        assert (gradient == 0).all()
    else:
        (other,) = torch.autograd.grad(spectrum[0], matrix)
        torch.testing.assert_close(gradient + other, matrix.detach().inverse().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_network_of_zeros_has_finite_gradients(make):
    module = make(3, 4)
    for weight in module.parameters():
        nn.init.zeros_(weight)
    spectrum = differentiable(module, torch.randn(10, 2, 3))
    assert_near(spectrum.detach(), lyapunov_spectrum(module, torch.randn(10, 2, 3)), 1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(spectrum, module))


def test_a_network_that_is_not_finite_gets_an_error():
    module = nn.RNN(3, 4, nonlinearity="relu")
    with torch.no_grad():
        module.weight_hh_l0.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite"):
        differentiable(module, torch.randn(10, 2, 3))


def test_a_step_that_leaves_its_parameters_out_of_the_graph_gets_an_error():
    class Detached(TanhCell):
        def forward(self, x, h):
            return super().forward(x, h).detach() + 0.5 * h

    with pytest.raises(ValueError, match="no graph leads from its state to its parameters"):
        differentiable(Detached().double(), randn(5, 2, 3), zeros(5))
