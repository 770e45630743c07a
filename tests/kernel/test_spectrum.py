"""Known spectra: from the reference implementation, from exact laws, and from the literature."""

import math

import pytest
import reference
import torch
from helpers import INTERVALS, ROUNDING, assert_near, descending, full, linear_spectrum, map_spectrum, randn, tensor
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_lyapunov import EXPONENT_FLOOR, jacobians, kaplan_yorke_dimension, lyapunov_spectrum

invertible_cells = pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm"])
intervals = pytest.mark.parametrize("qr_interval", INTERVALS)


def assert_near_literature(spectra, expected, tolerance):
    """Compare the mean over a batch: within four standard errors, which are themselves below the tolerance."""
    error = spectra.std(0) / len(spectra) ** 0.5
    assert (4 * error < tolerance).all(), error
    # Half a unit of the last of the digits that are printed.
    assert ((spectra.mean(0) - tensor(*expected)).abs() < 4 * error + 5e-5).all(), spectra.mean(0)


# Against the reference


# Not of a ReLU: the reference cannot tell a dead direction from a rounding error.
@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_spectrum_is_that_of_the_reference(cell, bias, warmup, device):
    module, inputs = reference.make(cell, bias=bias), randn(20, 2, 3)
    state = reference.initial_state(module, 2)
    expected = reference.module_spectrum(module, inputs, state, warmup=warmup).clamp(min=EXPONENT_FLOOR)
    there = tuple(part.to(device) for part in state) if isinstance(state, tuple) else state.to(device)
    spectrum = lyapunov_spectrum(module.to(device), inputs.to(device), there, warmup=warmup).cpu()
    assert_near(spectrum, expected, ROUNDING)


@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_spectrum_of_a_stack_is_the_union_of_the_spectra_of_its_layers(cell, num_layers):
    module, inputs = reference.make(cell, num_layers=num_layers), randn(20, 1, 3)
    state = reference.initial_state(module, 1)
    matrices = reference.jacobians(module, inputs[:, 0], reference.member(state, 0))
    size = matrices.shape[-1] // num_layers
    blocks = (slice(i * size, (i + 1) * size) for i in range(num_layers))
    expected = torch.cat([reference.spectrum(matrices[:, block, block]) for block in blocks])
    assert_near(lyapunov_spectrum(module, inputs, state)[0], descending(expected), ROUNDING)


# The condition numbers of single steps reach e^10, e^18 and e^40: the more saturated, the fewer digits float64 holds.
@pytest.mark.slow
@invertible_cells
@pytest.mark.parametrize(("gain", "tolerance"), [(1.0, 1e-11), (4.0, 1e-10), (10.0, 1e-5)])
def test_spectrum_of_a_saturated_network_is_exact(cell, gain, tolerance):
    module, inputs = reference.make(cell, hidden=3, gain=gain), randn(8, 1, 3)
    state = reference.initial_state(module, 1)
    expected = reference.exact_spectrum(reference.exact_step(module), inputs[:, 0], reference.member(state, 0))
    assert_near(lyapunov_spectrum(module, inputs, state)[0], expected, tolerance)


@intervals
@pytest.mark.parametrize("spread", [5.0, 20.0, 40.0])
def test_directions_that_one_step_drives_far_apart_are_exact(qr_interval, spread):
    # Factors of a generic matrix's rows, as the slopes of a saturated network are: up to e^40 between two of them.
    weight, exponents = randn(4, 4), torch.rand(6, 1, 4, dtype=torch.float64) * spread - spread
    inputs = exponents.exp()
    exact_weight = reference.exact(weight)
    expected = reference.exact_spectrum(lambda s, x: x * (exact_weight @ s), inputs[:, 0], torch.zeros(4))
    state = torch.zeros(1, 4).double()
    actual = lyapunov_spectrum(lambda s, x: x * (s @ weight.T), inputs, state, qr_interval=qr_interval)[0]
    assert expected[-1] > EXPONENT_FLOOR
    assert_near(actual, expected, 1e-10)


# Exact laws

ROTATION = tensor([0.6, -0.8], [0.8, 0.6])


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_constant_matrix_has_the_logarithms_of_its_eigenvalues(steps):
    exponents = tensor(1.0, 0.3, -0.5, -1.5)
    basis = torch.eye(4).double() + torch.ones(4, 4).double().triu(1) * 3  # far from normal
    matrix = basis @ exponents.exp().diag() @ basis.inverse()
    assert_near(linear_spectrum(matrix, 100 + steps, warmup=100), exponents, 1e-11)


def test_layer_at_rest_has_the_logarithms_of_its_weights_eigenvalues():
    module = nn.RNN(1, 6, bias=False).double()
    exponents = descending(torch.linalg.eigvals(module.weight_hh_l0.detach()).abs().log())
    spectrum = lyapunov_spectrum(module, torch.zeros(1000, 1, 1).double(), warmup=200)[0]
    # A pair of conjugate eigenvalues rotates its directions: 1 / steps remains.
    assert_near(spectrum, exponents, 2e-3)


def test_largest_exponent_is_found_whichever_axis_it_lies_on():
    matrix = tensor(0.5, 0.9, 2.0).diag()
    assert_near(linear_spectrum(matrix, 150, warmup=100, num_exponents=1), tensor(math.log(2)))


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_orthogonal_matrix_has_exponents_of_zero(steps):
    assert_near(linear_spectrum(torch.linalg.qr(randn(6, 6)).Q, steps), torch.zeros(6).double())


@pytest.mark.parametrize("steps", [1, 100])
def test_unitary_matrix_has_exponents_of_zero(steps):
    unitary = torch.linalg.qr(torch.randn(3, 3, dtype=torch.complex128)).Q
    real = torch.cat((torch.cat((unitary.real, -unitary.imag), 1), torch.cat((unitary.imag, unitary.real), 1)))
    assert_near(linear_spectrum(real, steps), torch.zeros(6).double())


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0])
def test_scaled_rotation_has_the_logarithm_of_its_factor(steps, factor):
    assert_near(linear_spectrum(factor * ROTATION, steps), tensor(*[math.log(factor)] * 2))


@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
@pytest.mark.parametrize("steps", [1, 2, 15, 33])
def test_sum_is_the_mean_log_determinant(cell, steps):
    module, inputs = reference.make(cell, num_layers=2), randn(steps, 2, 3)
    state = reference.initial_state(module, 2)
    determinants = jacobians(module, inputs, state).slogdet().logabsdet.mean(0)
    for qr_interval in INTERVALS:
        sums = lyapunov_spectrum(module, inputs, state, qr_interval=qr_interval).sum(-1)
        assert_near(sums, determinants, ROUNDING)


def test_sum_is_the_mean_log_determinant_of_each_ragged_sequence():
    module, lengths = reference.make("lstm"), [9, 1, 20]
    packed = pack_padded_sequence(randn(20, 3, 3), torch.tensor(lengths), enforce_sorted=False)
    determinants = jacobians(module, packed).slogdet().logabsdet.nanmean(0)
    assert_near(lyapunov_spectrum(module, packed).sum(-1), determinants, ROUNDING)


def test_jacobians_after_the_end_of_a_sequence_are_not_a_number():
    module, lengths = reference.make("gru"), torch.tensor([3, 5])
    ended = jacobians(module, pack_padded_sequence(randn(5, 2, 3), lengths, enforce_sorted=False)).isnan()
    assert torch.equal(ended.all(-1).all(-1), ended.any(-1).any(-1))
    assert ended[..., 0, 0].T.tolist() == [[False, False, False, True, True], [False] * 5]


def test_cat_map():
    matrix, exponent = tensor([2.0, 1.0], [1.0, 1.0]), math.log((3 + math.sqrt(5)) / 2)
    spectrum = map_spectrum(lambda s, _: (s @ matrix.T) % 1, torch.rand(2, 2).double(), 120, warmup=20)
    assert_near(spectrum, tensor(exponent, -exponent).expand(2, 2))


def test_bakers_map():
    def step(s, _):
        return torch.stack(((2 * s[:, 0]) % 1, (s[:, 1] + (2 * s[:, 0]).floor()) / 2), -1)

    spectrum = map_spectrum(step, torch.rand(2, 2).double(), 50, warmup=30)
    assert_near(spectrum, tensor(math.log(2), -math.log(2)).expand(2, 2))


def test_tent_map():
    # A slope of 2 would shift every binary digit out of the state.
    spectrum = map_spectrum(lambda s, _: 1.9999 * torch.minimum(s, 1 - s), torch.rand(3, 1).double(), 200)
    assert_near(spectrum, full((3, 1), math.log(1.9999)))


def test_logistic_map():
    # The map is conjugate to the tent map, so its growth is that of the tent's plus a function of the two ends.
    def logistic(s, _):
        return 4 * s * (1 - s)

    def density(s):
        return (s * (1 - s)).log() / 2

    first = torch.rand(100, 1).double() * 0.8 + 0.1
    last = first
    for _ in range(500):
        last = logistic(last, None)
    expected = math.log(2) + (density(last) - density(first)) / 500
    assert_near(map_spectrum(logistic, first, 500), expected, 1e-8)  # 1 - s loses digits where s is close to 1
    assert_near(expected.mean(), torch.tensor(math.log(2)).double(), 2e-3)


def henon(s, _):
    return s @ tensor([0.0, 1.0], [0.3, 0.0]).T + tensor(1.0, 0.0) * (1 - 1.4 * s[:, :1] ** 2)


def standard_map(s, _):
    angle, momentum = s.unbind(-1)
    momentum = momentum + 10 * angle.sin()
    return torch.stack((angle + momentum, momentum), -1) % (2 * math.pi)


def test_henon_map_contracts_areas_evenly():
    sums = map_spectrum(henon, torch.rand(4, 2).double() * 0.1, 100).sum(-1)
    assert_near(sums, full((4,), math.log(0.3)))


def test_exponents_of_an_area_preserving_map_are_opposite():
    spectrum = map_spectrum(standard_map, torch.rand(5, 2).double(), 100)
    assert spectrum[:, 0].min() > 1
    assert_near(spectrum[:, 0], -spectrum[:, 1])


def test_exponents_of_a_symplectic_matrix_come_in_opposite_pairs():
    exponents, form = tensor(1.1, 0.5, 0.2), torch.zeros(6, 6).double()
    form[:3, 3:], form[3:, :3] = torch.eye(3), -torch.eye(3)
    symmetric = (half := randn(6, 6)) + half.T
    basis = (0.3 * form @ symmetric).matrix_exp()  # symplectic, like everything that is made of it
    matrix = basis @ torch.cat((exponents, -exponents)).exp().diag() @ basis.inverse()
    assert_near(matrix.T @ form @ matrix, form, 1e-10)
    spectrum = linear_spectrum(matrix, 200, warmup=100)
    assert_near(spectrum, torch.cat((exponents, -exponents.flip(0))), 1e-10)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_gru_without_weights_forgets_at_its_update_gates_pace(bias):
    module = nn.GRU(3, 4).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(module.bias_ih_l0[4:8], bias)
    expected = full((2, 4), bias).sigmoid().log()
    assert_near(lyapunov_spectrum(module, randn(9, 2, 3), randn(1, 2, 4)), expected)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_lstm_without_weights_forgets_at_its_forget_gates_pace(bias):
    module = nn.LSTM(3, 4).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(module.bias_hh_l0[4:8], bias)
    # The first step moves every direction into the image of the Jacobian, which is the same from then on.
    spectrum = lyapunov_spectrum(module, randn(9, 2, 3), warmup=1)
    assert_near(spectrum[:, :4], full((2, 4), bias).sigmoid().log())
    assert torch.equal(spectrum[:, 4:], full((2, 4), EXPONENT_FLOOR))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("steps", [1, 9])
def test_rnn_without_weights_forgets_at_once(nonlinearity, steps):
    module = nn.RNN(3, 4, nonlinearity=nonlinearity).double()
    nn.init.zeros_(module.weight_hh_l0)
    assert torch.equal(lyapunov_spectrum(module, randn(steps, 2, 3)), full((2, 4), EXPONENT_FLOOR))


def test_random_matrix_has_the_exponents_of_the_circular_law():
    size, gain = 128, 0.8
    module = nn.RNN(1, size, bias=False).double()
    nn.init.normal_(module.weight_hh_l0, std=gain / size**0.5)
    spectrum = lyapunov_spectrum(module, torch.zeros(150, 1, 1).double(), warmup=50)[0]
    rank = (torch.arange(size) + 0.5) / size
    expected = math.log(gain) + (1 - rank).log() / 2
    bulk = slice(size // 10, -size // 10)
    # Of one matrix of this size: the eigenvalues scatter by about 1 / sqrt(size).
    assert_near(spectrum[bulk], expected[bulk].double(), 0.09)
    assert_near(spectrum.mean(), torch.linalg.slogdet(module.weight_hh_l0).logabsdet.detach() / size, 1e-11)


# The literature, as collected in J. C. Sprott, Chaos and Time-Series Analysis (2003), where nothing else is said


def runge_kutta(velocity, dt):
    def step(s, _):
        k1 = velocity(s)
        k2 = velocity(s + dt / 2 * k1)
        k3 = velocity(s + dt / 2 * k2)
        k4 = velocity(s + dt * k3)
        return s + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


def lorenz(s):
    linear, product = tensor([-10, 10, 0], [28, -1, 0], [0, 0, -8 / 3]), tensor([0.0] * 3, [0, 0, -1], [0, 1, 0])
    return s @ linear.T + s[:, :1] * (s @ product.T)


def roessler(s):
    linear = tensor([0, -1, -1], [1, 0.2, 0], [0, 0, -5.7])
    return s @ linear.T + tensor(0, 0, 1) * (0.2 + s[:, :1] * s[:, 2:])


def settled(step, state, steps):
    """Return where a batch of states is after the transient."""
    for _ in range(steps):
        state = step(state, None)
    return state


@pytest.mark.slow
def test_henon_map():
    spectra = map_spectrum(henon, torch.rand(2000, 2).double() * 0.1, 300, warmup=50)
    assert_near_literature(spectra, (0.419217, -1.623190), 0.005)
    assert_near(kaplan_yorke_dimension(spectra.mean(0)), tensor(1.258267)[0], 0.005)


@pytest.mark.slow
def test_standard_map():
    # Chirikov's estimate for large K is ln(K / 2); 1.6197 is found by long simulation.
    spectra = map_spectrum(standard_map, torch.rand(2000, 2).double() * 6, 120, warmup=20)
    assert_near_literature(spectra, (1.6197, -1.6197), 0.01)
    assert abs(spectra[:, 0].mean() - math.log(5)) < 0.02


@pytest.mark.slow
def test_lorenz_system():
    step, dt = runge_kutta(lorenz, 0.01), 0.01
    state = settled(step, torch.randn(400, 3).double() * 5 + tensor(0, 0, 25), 4000)
    spectra = map_spectrum(step, state, 500, warmup=100) / dt
    assert_near_literature(spectra, (0.90563, 0, -14.57219), 0.1)
    # The divergence of the velocity is constant; the integrator's errs by O(dt^4).
    assert_near(spectra.sum(-1), full((400,), -(10 + 1 + 8 / 3)), 5e-4)
    assert_near(kaplan_yorke_dimension(spectra.mean(0)), tensor(2.06215)[0], 0.005)


@pytest.mark.slow
def test_roessler_system():
    step, dt = runge_kutta(roessler, 0.03), 0.03
    state = settled(step, torch.rand(400, 3).double() * tensor(2, 2, 0) - tensor(6, 0, 0), 6000)
    spectra = map_spectrum(step, state, 500, warmup=100) / dt
    assert_near_literature(spectra, (0.0714, 0, -5.3943), 0.3)


def random_network(size, gain, batch):
    """Return x' = J tanh x in coordinates that have its spectrum, h = tanh x and h' = tanh(J h), and settled states."""
    module = nn.RNN(1, size, bias=False).double()
    nn.init.normal_(module.weight_hh_l0, std=gain / size**0.5)
    with torch.no_grad():
        return module, module(torch.zeros(400, batch, 1).double(), randn(1, batch, size))[1]


# From dynamic mean-field theory, for infinitely many units; 512 of them deviate by their share of 1 / sqrt(512) = 0.04.


@pytest.mark.slow
def test_random_network_is_chaotic():
    module, state = random_network(512, 1.5, batch=2)
    spectrum = lyapunov_spectrum(module, torch.zeros(300, 2, 1).double(), state, num_exponents=1, warmup=100)
    assert abs(spectrum.mean() - 0.0652) < 0.03


@pytest.mark.slow
def test_random_network_contracts_on_average():
    module, state = random_network(512, 1.5, batch=8)
    spectrum = lyapunov_spectrum(module, torch.zeros(3, 8, 1).double(), state)
    assert abs(spectrum.mean() + 0.7144) < 0.03
