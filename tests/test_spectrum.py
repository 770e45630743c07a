"""Spectra that are known: by a twin, by a law, by the literature; and what must not change them."""

import math
from unittest import mock

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import CELLS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_lyapunov import EXPONENT_FLOOR, jacobians, kaplan_yorke_dimension, lyapunov_spectrum
from lightning_lyapunov.kernel import interval, orthonormalise
from lightning_lyapunov.layers.registry import as_layer
from lightning_lyapunov.kernel.propagation import generic_frame, log_growth

INTERVALS = [1, 2, 3, 7, 16, "auto"]
cells = pytest.mark.parametrize("cell", CELLS)
invertible_cells = pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm"])
intervals = pytest.mark.parametrize("qr_interval", INTERVALS)

# How far the growth rates of a random network may lie apart, computed in two ways: a frame may lean by e^8, so that the
# condition number of its Gram matrix is e^16, and eps of that is 2e-9; the rest is the condition of single steps.
ROUNDING = 1e-7


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def full(shape, value):
    return torch.full(shape, value, dtype=torch.float64)


def descending(values):
    return values.sort(dim=-1, descending=True).values


def members(state, indices):
    return tuple(part[:, indices] for part in state) if isinstance(state, tuple) else state[:, indices]


def map_spectrum(step, state, steps, **options):
    """Return the spectra of a map without input."""
    return lyapunov_spectrum(step, torch.zeros(steps, len(state), 0), state, **options)


def linear_spectrum(matrix, steps, **options):
    state = torch.zeros(1, len(matrix)).double()
    return map_spectrum(lambda s, _: s @ matrix.T.to(s.dtype), state, steps, **options)[0]


def assert_near_literature(spectra, expected, tolerance):
    """Compare the mean over a batch: within four standard errors, which are themselves below the tolerance."""
    error = spectra.std(0) / len(spectra) ** 0.5
    assert (4 * error < tolerance).all(), error
    # Half a unit of the last of the digits that are printed.
    assert ((spectra.mean(0) - tensor(*expected)).abs() < 4 * error + 5e-5).all(), spectra.mean(0)


# The parts of the kernel


@given(st.integers(1, 9), st.data())
def test_elimination_goes_on_with_p_times_l(rows, data):
    vectors = randn(2, rows, data.draw(st.integers(1, rows)))
    permutation, lower, upper = torch.linalg.lu(vectors)
    frame, growth, lean = orthonormalise.eliminate(vectors, torch.ones(2, vectors.shape[-1], dtype=torch.bool), math.inf)
    assert_close(frame, permutation @ lower, 1e-15)
    assert_close(growth, upper.diagonal(dim1=-2, dim2=-1).abs().log())
    assert lean == pytest.approx(float((vectors.abs().amax((-2, -1))[:, None].log() - growth).amax()))


@pytest.mark.parametrize("count", [1, 31, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_frame_is_that_of_householders_method(count, dtype):
    vectors, alive = randn(2, 90, count).to(dtype), torch.ones(2, count, dtype=torch.bool)
    expected, factor = torch.linalg.qr(vectors.double())
    signs = factor.diagonal(dim1=-2, dim2=-1).sign()
    frame, growth, _ = orthonormalise.orthonormalise_cholesky(vectors.clone(), alive, math.inf)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert_close(frame.double(), expected * signs.unsqueeze(-2), tolerance)
    assert_close(growth, factor.diagonal(dim1=-2, dim2=-1).abs().log(), tolerance)


# Against the twin


# Not of a ReLU: the twin cannot tell a dead direction from a rounding error.
@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_spectrum_is_that_of_the_twin(cell, bias, warmup, device):
    module, inputs = naive.make(cell, bias=bias), randn(20, 2, 3)
    state = naive.initial_state(module, 2)
    expected = naive.module_spectrum(module, inputs, state, warmup=warmup).clamp(min=EXPONENT_FLOOR)
    there = tuple(part.to(device) for part in state) if isinstance(state, tuple) else state.to(device)
    spectrum = lyapunov_spectrum(module.to(device), inputs.to(device), there, warmup=warmup).cpu()
    assert_close(spectrum, expected, ROUNDING)


@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_spectrum_of_a_stack_is_the_union_of_the_twins_of_its_layers(cell, num_layers):
    module, inputs = naive.make(cell, num_layers=num_layers), randn(20, 1, 3)
    matrices = naive.jacobians(module, inputs[:, 0], naive.member(state := naive.initial_state(module, 1), 0))
    size = matrices.shape[-1] // num_layers
    blocks = (slice(i * size, (i + 1) * size) for i in range(num_layers))
    expected = torch.cat([naive.spectrum(matrices[:, block, block]) for block in blocks])
    assert_close(lyapunov_spectrum(module, inputs, state)[0], descending(expected), ROUNDING)


# The condition numbers of single steps reach e^10, e^18 and e^40: the more saturated, the fewer digits float64 holds.
@invertible_cells
@pytest.mark.parametrize(("gain", "tolerance"), [(1.0, 1e-11), (4.0, 1e-10), (10.0, 1e-5)])
def test_spectrum_of_a_saturated_network_is_exact(cell, gain, tolerance):
    module, inputs = naive.make(cell, hidden=3, gain=gain), randn(8, 1, 3)
    state = naive.initial_state(module, 1)
    expected = naive.exact_spectrum(naive.exact_step(module), inputs[:, 0], naive.member(state, 0))
    assert_close(lyapunov_spectrum(module, inputs, state)[0], expected, tolerance)


@intervals
@pytest.mark.parametrize("spread", [5.0, 20.0, 40.0])
def test_directions_that_one_step_drives_far_apart_are_exact(qr_interval, spread):
    # Factors of a generic matrix's rows, as the slopes of a saturated network are: up to e^40 between two of them.
    weight, exponents = randn(4, 4), torch.rand(6, 1, 4, dtype=torch.float64) * spread - spread
    inputs = exponents.exp()
    exact_weight = naive.exact(weight)
    expected = naive.exact_spectrum(lambda s, x: x * (exact_weight @ s), inputs[:, 0], torch.zeros(4))
    state = torch.zeros(1, 4).double()
    actual = lyapunov_spectrum(lambda s, x: x * (s @ weight.T), inputs, state, qr_interval=qr_interval)[0]
    assert expected[-1] > EXPONENT_FLOOR
    assert_close(actual, expected, 1e-10)


# Exact laws

ROTATION = tensor([0.6, -0.8], [0.8, 0.6])


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_constant_matrix_has_the_logarithms_of_its_eigenvalues(steps):
    exponents = tensor(1.0, 0.3, -0.5, -1.5)
    basis = torch.eye(4).double() + torch.ones(4, 4).double().triu(1) * 3  # far from normal
    matrix = basis @ exponents.exp().diag() @ basis.inverse()
    assert_close(linear_spectrum(matrix, 100 + steps, warmup=100), exponents, 1e-11)


def test_layer_at_rest_has_the_logarithms_of_its_weights_eigenvalues():
    module = nn.RNN(1, 6, bias=False).double()
    exponents = descending(torch.linalg.eigvals(module.weight_hh_l0.detach()).abs().log())
    spectrum = lyapunov_spectrum(module, torch.zeros(1000, 1, 1).double(), warmup=200)[0]
    # A pair of conjugate eigenvalues rotates its directions: 1 / steps remains.
    assert_close(spectrum, exponents, 2e-3)


def test_largest_exponent_is_found_whichever_axis_it_lies_on():
    matrix = tensor(0.5, 0.9, 2.0).diag()
    assert_close(linear_spectrum(matrix, 150, warmup=100, num_exponents=1), tensor(math.log(2)))


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_orthogonal_matrix_has_exponents_of_zero(steps):
    assert_close(linear_spectrum(torch.linalg.qr(randn(6, 6)).Q, steps), torch.zeros(6).double())


@pytest.mark.parametrize("steps", [1, 100])
def test_unitary_matrix_has_exponents_of_zero(steps):
    unitary = torch.linalg.qr(torch.randn(3, 3, dtype=torch.complex128)).Q
    real = torch.cat((torch.cat((unitary.real, -unitary.imag), 1), torch.cat((unitary.imag, unitary.real), 1)))
    assert_close(linear_spectrum(real, steps), torch.zeros(6).double())


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0])
def test_scaled_rotation_has_the_logarithm_of_its_factor(steps, factor):
    assert_close(linear_spectrum(factor * ROTATION, steps), tensor(*[math.log(factor)] * 2))


@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm", "lstm-proj"])
@pytest.mark.parametrize("steps", [1, 2, 15, 33])
def test_sum_is_the_mean_log_determinant(cell, steps):
    module, inputs = naive.make(cell, num_layers=2), randn(steps, 2, 3)
    state = naive.initial_state(module, 2)
    determinants = jacobians(module, inputs, state).slogdet().logabsdet.mean(0)
    for qr_interval in INTERVALS:
        sums = lyapunov_spectrum(module, inputs, state, qr_interval=qr_interval).sum(-1)
        assert_close(sums, determinants, ROUNDING)


def test_sum_is_the_mean_log_determinant_of_each_ragged_sequence():
    module, lengths = naive.make("lstm"), [9, 1, 20]
    packed = pack_padded_sequence(randn(20, 3, 3), torch.tensor(lengths), enforce_sorted=False)
    determinants = jacobians(module, packed).slogdet().logabsdet.nanmean(0)
    assert_close(lyapunov_spectrum(module, packed).sum(-1), determinants, ROUNDING)


def test_jacobians_after_the_end_of_a_sequence_are_not_a_number():
    module, lengths = naive.make("gru"), torch.tensor([3, 5])
    ended = jacobians(module, pack_padded_sequence(randn(5, 2, 3), lengths, enforce_sorted=False)).isnan()
    assert torch.equal(ended.all(-1).all(-1), ended.any(-1).any(-1))
    assert ended[..., 0, 0].T.tolist() == [[False, False, False, True, True], [False] * 5]


def test_cat_map():
    matrix, exponent = tensor([2.0, 1.0], [1.0, 1.0]), math.log((3 + math.sqrt(5)) / 2)
    spectrum = map_spectrum(lambda s, _: (s @ matrix.T) % 1, torch.rand(2, 2).double(), 120, warmup=20)
    assert_close(spectrum, tensor(exponent, -exponent).expand(2, 2))


def test_bakers_map():
    def step(s, _):
        return torch.stack(((2 * s[:, 0]) % 1, (s[:, 1] + (2 * s[:, 0]).floor()) / 2), -1)

    spectrum = map_spectrum(step, torch.rand(2, 2).double(), 50, warmup=30)
    assert_close(spectrum, tensor(math.log(2), -math.log(2)).expand(2, 2))


def test_tent_map():
    # A slope of 2 would shift every binary digit out of the state.
    spectrum = map_spectrum(lambda s, _: 1.9999 * torch.minimum(s, 1 - s), torch.rand(3, 1).double(), 200)
    assert_close(spectrum, full((3, 1), math.log(1.9999)))


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
    assert_close(map_spectrum(logistic, first, 500), expected, 1e-8)  # 1 - s loses digits where s is close to 1
    assert_close(expected.mean(), torch.tensor(math.log(2)).double(), 2e-3)


def henon(s, _):
    return s @ tensor([0.0, 1.0], [0.3, 0.0]).T + tensor(1.0, 0.0) * (1 - 1.4 * s[:, :1] ** 2)


def standard_map(s, _):
    angle, momentum = s.unbind(-1)
    momentum = momentum + 10 * angle.sin()
    return torch.stack((angle + momentum, momentum), -1) % (2 * math.pi)


def test_henon_map_contracts_areas_evenly():
    sums = map_spectrum(henon, torch.rand(4, 2).double() * 0.1, 100).sum(-1)
    assert_close(sums, full((4,), math.log(0.3)))


def test_exponents_of_an_area_preserving_map_are_opposite():
    spectrum = map_spectrum(standard_map, torch.rand(5, 2).double(), 100)
    assert spectrum[:, 0].min() > 1
    assert_close(spectrum[:, 0], -spectrum[:, 1])


def test_exponents_of_a_symplectic_matrix_come_in_opposite_pairs():
    exponents, form = tensor(1.1, 0.5, 0.2), torch.zeros(6, 6).double()
    form[:3, 3:], form[3:, :3] = torch.eye(3), -torch.eye(3)
    symmetric = (half := randn(6, 6)) + half.T
    basis = (0.3 * form @ symmetric).matrix_exp()  # symplectic, like everything that is made of it
    matrix = basis @ torch.cat((exponents, -exponents)).exp().diag() @ basis.inverse()
    assert_close(matrix.T @ form @ matrix, form, 1e-10)
    spectrum = linear_spectrum(matrix, 200, warmup=100)
    assert_close(spectrum, torch.cat((exponents, -exponents.flip(0))), 1e-10)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_gru_without_weights_forgets_at_its_update_gates_pace(bias):
    module = nn.GRU(3, 4).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(module.bias_ih_l0[4:8], bias)
    expected = full((2, 4), bias).sigmoid().log()
    assert_close(lyapunov_spectrum(module, randn(9, 2, 3), randn(1, 2, 4)), expected)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_lstm_without_weights_forgets_at_its_forget_gates_pace(bias):
    module = nn.LSTM(3, 4).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(module.bias_hh_l0[4:8], bias)
    # The first step moves every direction into the image of the Jacobian, which is the same from then on.
    spectrum = lyapunov_spectrum(module, randn(9, 2, 3), warmup=1)
    assert_close(spectrum[:, :4], full((2, 4), bias).sigmoid().log())
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
    assert_close(spectrum[bulk], expected[bulk].double(), 0.09)
    assert_close(spectrum.mean(), torch.linalg.slogdet(module.weight_hh_l0).logabsdet.detach() / size, 1e-11)


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


def test_henon_map():
    spectra = map_spectrum(henon, torch.rand(2000, 2).double() * 0.1, 300, warmup=50)
    assert_near_literature(spectra, (0.419217, -1.623190), 0.005)
    assert_close(kaplan_yorke_dimension(spectra.mean(0)), tensor(1.258267)[0], 0.005)


def test_standard_map():
    # Chirikov's estimate for large K is ln(K / 2); 1.6197 is found by long simulation.
    spectra = map_spectrum(standard_map, torch.rand(2000, 2).double() * 6, 120, warmup=20)
    assert_near_literature(spectra, (1.6197, -1.6197), 0.01)
    assert abs(spectra[:, 0].mean() - math.log(5)) < 0.02


def test_lorenz_system():
    step, dt = runge_kutta(lorenz, 0.01), 0.01
    state = settled(step, torch.randn(400, 3).double() * 5 + tensor(0, 0, 25), 4000)
    spectra = map_spectrum(step, state, 500, warmup=100) / dt
    assert_near_literature(spectra, (0.90563, 0, -14.57219), 0.1)
    # The divergence of the velocity is constant; the integrator's errs by O(dt^4).
    assert_close(spectra.sum(-1), full((400,), -(10 + 1 + 8 / 3)), 5e-4)
    assert_close(kaplan_yorke_dimension(spectra.mean(0)), tensor(2.06215)[0], 0.005)


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


def test_random_network_is_chaotic():
    module, state = random_network(512, 1.5, batch=2)
    spectrum = lyapunov_spectrum(module, torch.zeros(300, 2, 1).double(), state, num_exponents=1, warmup=100)
    assert abs(spectrum.mean() - 0.0652) < 0.03


def test_random_network_contracts_on_average():
    module, state = random_network(512, 1.5, batch=8)
    spectrum = lyapunov_spectrum(module, torch.zeros(3, 8, 1).double(), state)
    assert abs(spectrum.mean() + 0.7144) < 0.03


# What must not change a spectrum


@cells
@intervals
@pytest.mark.parametrize("steps", [1, 23])
def test_qr_interval_changes_nothing(cell, qr_interval, steps):
    module, inputs = naive.make(cell, hidden=8), randn(steps, 2, 3)
    expected = lyapunov_spectrum(module, inputs, qr_interval=1)
    assert_close(lyapunov_spectrum(module, inputs, qr_interval=qr_interval), expected, ROUNDING)
    leading = lyapunov_spectrum(module, inputs, qr_interval=qr_interval, num_exponents=3)
    assert_close(leading, lyapunov_spectrum(module, inputs, qr_interval=1, num_exponents=3), ROUNDING)


@intervals
@pytest.mark.parametrize("warmup", [1, 10, 22])
def test_qr_interval_changes_nothing_after_a_warmup(qr_interval, warmup):
    module, inputs = naive.make("lstm"), randn(23, 2, 3)
    expected = lyapunov_spectrum(module, inputs, qr_interval=1, warmup=warmup)
    assert_close(lyapunov_spectrum(module, inputs, qr_interval=qr_interval, warmup=warmup), expected, ROUNDING)


def total_growth(module, inputs, state=None, **options):
    """Return the summed growth of each vector of the frame, unsorted."""
    layer = as_layer(module)
    sequences = layer.read(inputs, state)
    (driven,) = layer.drive(sequences)
    options = {"num_exponents": driven.recurrence.state_size} | options
    with torch.no_grad():
        return log_growth(driven.recurrence, driven.inputs, driven.state, sequences.lengths, **options)


@cells
def test_leading_vectors_grow_as_they_do_among_all(cell):
    module, inputs = naive.make(cell), randn(23, 2, 3)
    everything = total_growth(module, inputs).total
    for k in range(1, everything.shape[-1]):
        assert_close(total_growth(module, inputs, num_exponents=k).total, everything[..., :k], ROUNDING)


def test_leading_vectors_of_the_frame_are_those_of_a_larger_one():
    frame = generic_frame(6, 6)
    assert_close(frame.T @ frame, torch.eye(6).double(), 1e-14)
    assert_close(generic_frame(6, 2), frame[:, :2], 1e-14)


def test_leading_exponents_are_the_first_of_all():
    module, inputs = naive.make("gru", hidden=6), randn(300, 2, 3)
    everything = lyapunov_spectrum(module, inputs, warmup=200)
    for k in range(1, 7):
        assert_close(lyapunov_spectrum(module, inputs, warmup=200, num_exponents=k), everything[:, :k], ROUNDING)


@cells
@intervals
def test_batch_is_its_members(cell, qr_interval):
    module, inputs = naive.make(cell, num_layers=2), randn(23, 3, 3)
    alone = [lyapunov_spectrum(module, inputs[:, i : i + 1], qr_interval=qr_interval) for i in range(3)]
    assert_close(lyapunov_spectrum(module, inputs, qr_interval=qr_interval), torch.cat(alone), ROUNDING)


@cells
@intervals
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both-ways"])
def test_ragged_batch_is_its_members(cell, qr_interval, bidirectional):
    module = naive.make(cell, num_layers=2, bidirectional=bidirectional)
    inputs, lengths = randn(23, 4, 3), [7, 23, 5, 23]
    state, options = naive.initial_state(module, 4), {"qr_interval": qr_interval, "warmup": 3}
    packed = pack_padded_sequence(inputs, torch.tensor(lengths), enforce_sorted=False)
    spectra = lyapunov_spectrum(module, packed, state, **options)
    for i, length in enumerate(lengths):
        alone = lyapunov_spectrum(module, inputs[:length, [i]], members(state, [i]), **options)
        assert_close(spectra[[i]], alone, ROUNDING)


def test_what_follows_a_sequence_is_not_read():
    inputs, lengths, module = randn(9, 2, 3), torch.tensor([4, 9]), naive.make("gru")
    expected = total_growth(module, pack_padded_sequence(inputs, lengths, enforce_sorted=False))
    inputs[4:, 0] = torch.nan
    layer = as_layer(module)
    sequences = layer.read(inputs)._replace(lengths=lengths)
    (driven,) = layer.drive(sequences)
    growth = log_growth(driven.recurrence, inputs, driven.state.detach(), lengths, num_exponents=4)
    assert_close(growth.total, expected.total)
    assert growth.steps.tolist() == [[4, 9]]


def permuted(module, order):
    """Return the same one-layer network, its hidden units in another order."""
    twin = type(module)(module.input_size, module.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            blocks = parameter.unflatten(0, (-1, module.hidden_size))[:, order]
            blocks = blocks[..., order] if name.startswith("weight_hh") else blocks
            getattr(twin, name).copy_(blocks.flatten(0, 1))
    return twin


@invertible_cells
def test_order_of_the_units_does_not_matter(cell):
    module, inputs, order = naive.make(cell, hidden=3, gain=1.0), randn(1500, 1, 3), torch.tensor([2, 0, 1])
    spectrum = lyapunov_spectrum(module, inputs, warmup=500)
    other = lyapunov_spectrum(permuted(module, order), inputs, warmup=500)
    assert_close(other.sum(), spectrum.sum(), 1e-10)
    assert_close(other, spectrum, 2e-3)  # the frame is another one to these units, and is forgotten as 1 / steps


@pytest.fixture(params=["small in float64", "all in float32"])
def small_states(request, monkeypatch):
    """Small layers as a CPU follows them, in float64, and as what is large or elsewhere is followed."""
    if request.param == "all in float32":
        monkeypatch.setattr(interval, "_SMALL_STATE", {})


@invertible_cells
@intervals
@pytest.mark.usefixtures("small_states")
def test_single_precision_agrees_with_double(cell, qr_interval):
    module, inputs = naive.make(cell, hidden=8, num_layers=2).float(), torch.randn(60, 2, 3)
    single = lyapunov_spectrum(module, inputs, qr_interval=qr_interval, warmup=5)
    double = lyapunov_spectrum(module.double(), inputs.double(), qr_interval=qr_interval, warmup=5)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    # Frames may lean by e^8, and a direction's growth then has that many times float32's rounding error.
    assert_close(single.double(), double, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_products(dtype):
    module, inputs = naive.make("gru").float(), torch.randn(60, 2, 3)
    assert lyapunov_spectrum(module, inputs, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    module, inputs = naive.make("gru").to(dtype), torch.randn(20, 2, 3).to(dtype)
    spectrum = lyapunov_spectrum(module, inputs)
    assert spectrum.dtype == torch.float32
    assert_close(spectrum.double(), lyapunov_spectrum(module.double(), inputs.double()), 1e-4)


def test_autocast_changes_nothing():
    module, inputs = naive.make("gru").float(), torch.randn(20, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lyapunov_spectrum(module, inputs), expected)


def test_no_gradient_is_recorded_and_no_random_number_drawn():
    module, inputs, before = naive.make("lstm"), randn(20, 2, 3), torch.get_rng_state()
    spectrum = lyapunov_spectrum(module, inputs.requires_grad_())
    assert not spectrum.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_mode_changes_nothing():
    module, inputs = naive.make("lstm"), randn(20, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    with torch.inference_mode():
        assert torch.equal(lyapunov_spectrum(module, inputs), expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_dropout_is_not_measured(cell):
    module, inputs = naive.make(cell, num_layers=2, dropout=0.5).train(), randn(20, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    module.dropout = 0.0
    assert torch.equal(lyapunov_spectrum(module, inputs), expected)


@cells
@intervals
@pytest.mark.parametrize("warmup", [1, 8, 22])
def test_warmup_is_going_on(cell, qr_interval, warmup):
    module, inputs = naive.make(cell), randn(23, 2, 3)
    whole, start = total_growth(module, inputs), total_growth(module, inputs[:warmup])
    rest = total_growth(module, inputs, warmup=warmup, qr_interval=qr_interval)
    assert rest.steps.tolist() == [[23 - warmup] * 2]
    # A direction that was wiped out stays so: -inf - -inf.
    alive = start.total.isfinite()
    assert_close(rest.total[alive], (whole.total - start.total)[alive], 1e-6)
    assert (rest.total[~alive] == -math.inf).all()


@pytest.mark.parametrize("segments", [1, 2, 5, 15])
def test_segments_share_the_steps_and_the_growth(segments):
    module, lengths = naive.make("gru"), torch.tensor([23, 12])
    packed = pack_padded_sequence(randn(23, 2, 3), lengths)
    whole, parts = total_growth(module, packed, warmup=4), total_growth(module, packed, warmup=4, segments=segments)
    assert parts.total.shape == (segments, 2, 4)
    assert torch.equal(parts.steps.sum(0), lengths - 4)
    assert (parts.steps[:, 0].max() - parts.steps[:, 0].min()) <= 1
    assert_close(parts.total.sum(0), whole.total[0], 1e-7)


@pytest.mark.usefixtures("small_states")
@pytest.mark.parametrize("gain", [0.5, 4.0])
def test_long_warmup_in_single_precision(gain):
    module, inputs = naive.make("rnn-tanh", hidden=8, gain=gain).float(), 0.3 * torch.randn(1100, 2, 3)
    single = lyapunov_spectrum(module, inputs, warmup=1000)
    double = lyapunov_spectrum(module.double(), inputs.double(), warmup=1000)
    assert (double.abs().amax(-1) * 1000 > 88).all()  # more than float32 holds, e^88 or e^-88
    assert_close(single.double(), double, 1e-3)


@st.composite
def problems(draw):
    """Draw a module, inputs of shape (time, batch, input), a state or none, and options."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    cell = draw(st.sampled_from(["rnn-tanh", "gru", "lstm"]))
    layout = {"bias": draw(st.booleans()), "num_layers": draw(st.integers(1, 3)), "bidirectional": draw(st.booleans())}
    module = naive.make(cell, draw(st.integers(1, 6)), draw(st.sampled_from([0.1, 1.0, 3.0])), **layout)
    module = module.to(draw(st.sampled_from([torch.float32, torch.float64])))
    steps, batch = draw(st.integers(1, 25)), draw(st.integers(1, 3))
    inputs = randn(steps, batch, 3).to(module.weight_hh_l0.dtype)
    state = naive.initial_state(module, batch) if draw(st.booleans()) else None
    warmup, interval = draw(st.integers(0, steps - 1)), draw(st.sampled_from([1, 2, 5, 40, "auto"]))
    return module, inputs, state, {"warmup": warmup, "qr_interval": interval}


@given(problems())
def test_spectrum_is_finite_sorted_and_of_the_promised_shape(problem):
    module, inputs, state, options = problem
    spectrum = lyapunov_spectrum(module, inputs, state, **options)
    cells = module.num_layers * (1 + module.bidirectional)
    assert spectrum.shape == (inputs.shape[1], cells * module.hidden_size * (1 + (module.mode == "LSTM")))
    assert spectrum.dtype == module.weight_hh_l0.dtype
    assert (spectrum >= EXPONENT_FLOOR).all()
    assert (spectrum.diff() <= 0).all()


@given(problems())
def test_no_option_but_warmup_changes_the_numbers(problem):
    module, inputs, state, options = problem
    expected = lyapunov_spectrum(module.double(), inputs.double(), state, warmup=options["warmup"], qr_interval=1)
    assert_close(lyapunov_spectrum(module, inputs.double(), state, **options), expected, 1e-6)
    for small_states in (interval._SMALL_STATE, {}):
        with mock.patch.object(interval, "_SMALL_STATE", small_states):
            single = lyapunov_spectrum(module, inputs.double(), state, dtype=torch.float32, **options)
        assert_close(single.double(), expected, 1e-3)


@given(problems(), st.data())
def test_members_do_not_meet(problem, data):
    module, inputs, state, options = problem
    i = data.draw(st.integers(0, inputs.shape[1] - 1))
    first = None if state is None else members(state, [i])
    alone = lyapunov_spectrum(module, inputs[:, [i]], first, dtype=torch.float64, **options)
    assert_close(lyapunov_spectrum(module, inputs, state, dtype=torch.float64, **options)[[i]], alone, 1e-6)


@given(problems())
def test_sum_is_the_mean_log_determinant_whatever_the_options(problem):
    module, inputs, state, options = problem
    if module.bidirectional:
        return
    matrices = jacobians(module, inputs, state)[options["warmup"] :]
    determinants = matrices.slogdet().logabsdet.mean(0)
    spectrum = lyapunov_spectrum(module, inputs, state, dtype=torch.float64, **options)
    assert_close(spectrum.sum(-1), determinants, 1e-6)


# Dead directions: minus infinity, reported as the floor


def test_floor_is_the_smallest_factor_of_single_precision():
    assert math.exp(EXPONENT_FLOOR) == pytest.approx(torch.finfo(torch.float32).tiny)


def assert_floor(spectra, number):
    """Assert that exactly so many of the exponents are the floor, exactly."""
    assert ((spectra == EXPONENT_FLOOR).sum(-1) == number).all(), spectra


@intervals
def test_dead_units_are_dead_directions(qr_interval):
    module = naive.make("rnn-relu", hidden=6)
    with torch.no_grad():
        module.bias_ih_l0[:2], module.bias_ih_l0[2:] = -1e3, 1e3
        module.weight_hh_l0.mul_(0.1)
    assert_floor(lyapunov_spectrum(module, randn(23, 2, 3), qr_interval=qr_interval), 2)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize("gain", [0.3, 1.5, 4.0])
def test_what_a_low_rank_weight_wipes_out_is_dead(rank, steps, gain):
    module = naive.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0.copy_(gain * randn(6, rank) @ randn(rank, 6) / 6)
    inputs = randn(steps, 3, 3)
    for qr_interval in INTERVALS:
        assert_floor(lyapunov_spectrum(module, inputs, qr_interval=qr_interval), 6 - rank)


@intervals
@pytest.mark.parametrize("columns", [[0], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_units_that_nothing_listens_to_are_dead_directions(qr_interval, columns):
    module = naive.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0[:, columns] = 0
    assert_floor(lyapunov_spectrum(module, randn(23, 2, 3), qr_interval=qr_interval), len(columns))


@intervals
@pytest.mark.parametrize("steps", [1, 2, 5, 6, 20])
def test_chain_of_units_forgets_one_direction_per_step(qr_interval, steps):
    module = naive.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0.tril_(-1)
    assert_floor(lyapunov_spectrum(module, randn(steps, 2, 3), qr_interval=qr_interval), min(steps, 6))


@intervals
def test_direction_wiped_out_during_the_warmup_stays_dead(qr_interval):
    inputs = torch.ones(20, 1, 2).double()
    inputs[3, 0, 1] = 0
    state = torch.zeros(1, 2).double()
    spectrum = lyapunov_spectrum(lambda s, x: x * s, inputs, state, warmup=10, qr_interval=qr_interval)
    assert_close(spectrum, tensor([0.0, EXPONENT_FLOOR]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@intervals
@pytest.mark.usefixtures("small_states")
def test_dead_directions_are_as_many_in_any_precision(dtype, qr_interval):
    module = naive.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0[:, :2] = 0
    assert_floor(lyapunov_spectrum(module, randn(23, 2, 3), qr_interval=qr_interval, dtype=dtype), 2)


@intervals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_that_dies_in_front_of_others_takes_none_with_it(qr_interval, dtype):
    # The fastest unit listens to nobody and is switched off for one step; the others turn and shrink.
    module, inputs = nn.RNN(1, 4, nonlinearity="relu").double(), torch.ones(300, 1, 1).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_hh_l0[:3, :3] = torch.linalg.qr(randn(3, 3)).Q * 0.2
        module.weight_hh_l0[3, 3] = 0.95
        module.weight_ih_l0[3] = 1
        module.bias_hh_l0[:3] = 5
    inputs[200] = -100
    spectrum = lyapunov_spectrum(module, inputs, qr_interval=qr_interval, dtype=dtype, warmup=20)
    assert_close(spectrum[0, :3].double(), full((3,), math.log(0.2)), 0.02)
    assert spectrum[0, 3] == EXPONENT_FLOOR


@pytest.mark.parametrize("dead", [0, 1, 2, 3])
def test_a_dead_vector_takes_nothing_from_those_behind_it(dead):
    vectors, alive = randn(2, 5, 4), torch.ones(2, 4, dtype=torch.bool)
    vectors[0, :, dead], alive[0, dead] = 0, False
    living = [j for j in range(4) if j != dead]
    expected = torch.linalg.qr(vectors[0][:, living]).R.diagonal().abs().log()
    frame, growth, _ = orthonormalise.eliminate(vectors, alive, math.inf)
    assert_close(growth[0, living] + torch.linalg.qr(frame[0][:, living]).R.diagonal().abs().log(), expected)
    for known in (alive, torch.ones_like(alive)):
        _, growth, _, alive_after, finite = orthonormalise.orthonormalise_householder(vectors, known)
        assert_close(growth[0, living], expected)
        assert alive_after[0].tolist() == [j != dead for j in range(4)]
        assert alive_after[1].all()
        assert finite.all()


def test_living_directions_do_not_feel_the_dead():
    module, inputs = naive.make("rnn-tanh", hidden=6), randn(23, 1, 3)
    with torch.no_grad():
        module.weight_hh_l0[:, :2] = 0
    expected = naive.exact_spectrum(naive.exact_step(module), inputs[:, 0], torch.zeros(6), num_exponents=4)
    assert_close(lyapunov_spectrum(module, inputs)[0, :4], expected, 1e-9)


# Networks that are not finite


@cells
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_that_are_not_a_number_give_no_number(cell, value, name):
    module = naive.make(cell)
    with torch.no_grad():
        getattr(module, name)[:] = value
    spectrum = lyapunov_spectrum(module, randn(9, 2, 3))
    assert spectrum.isnan().all()


@invertible_cells
@pytest.mark.parametrize("when", [0, 4, 22])
@intervals
def test_only_the_member_that_is_not_a_number_gives_no_number(cell, when, qr_interval):
    module, inputs = naive.make(cell), randn(23, 3, 3)
    expected = lyapunov_spectrum(module, inputs, qr_interval=qr_interval)
    inputs[when, 1] = math.nan
    spectrum = lyapunov_spectrum(module, inputs, qr_interval=qr_interval)
    assert spectrum[1].isnan().all()
    assert_close(spectrum[[0, 2]], expected[[0, 2]], ROUNDING)


@intervals
def test_only_the_member_that_explodes_gives_no_number(qr_interval):
    state = tensor([0.5], [2.0], [-0.5])
    spectrum = map_spectrum(lambda s, _: s**2 - 0.4, state, 30, qr_interval=qr_interval)
    assert spectrum.isfinite().squeeze(-1).tolist() == [True, False, True]
    assert spectrum[1].isnan()
    assert_close(spectrum[[0, 2]], map_spectrum(lambda s, _: s**2 - 0.4, state[[0, 2]], 30), 1e-11)


# Extremes


@intervals
@pytest.mark.parametrize("exponent", [-60.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("small_states")
def test_growth_that_no_number_holds_for_two_steps(qr_interval, exponent, dtype):
    spectrum = linear_spectrum(math.exp(exponent) * ROTATION, 50, qr_interval=qr_interval, dtype=dtype)
    assert_close(spectrum.double(), tensor(exponent, exponent), 1e-5 if dtype == torch.float32 else 1e-12)


@intervals
def test_growth_and_decay_that_no_number_holds_side_by_side(qr_interval):
    matrix = tensor(-60.0, 0.0, 60.0).exp().diag()
    spectrum = linear_spectrum(matrix, 50, qr_interval=qr_interval, warmup=2)
    assert_close(spectrum, tensor(60.0, 0.0, -60.0), 1e-11)


@pytest.mark.parametrize("exponent", [-88.0, -200.0, -700.0])
def test_exponent_below_the_floor_is_the_floor(exponent):
    assert torch.equal(linear_spectrum(tensor([math.exp(exponent)]), 20), tensor(EXPONENT_FLOOR))


@pytest.mark.parametrize("exponent", [-87.0, -50.0, 0.0, 50.0, 300.0])
def test_state_of_one_number(exponent):
    assert_close(linear_spectrum(tensor([math.exp(exponent)]), 20), tensor(exponent), 1e-11)


@invertible_cells
def test_hidden_size_of_one_and_a_single_step(cell):
    module, inputs = naive.make(cell, hidden=1), randn(1, 2, 3)
    state = naive.initial_state(module, 2)
    assert_close(lyapunov_spectrum(module, inputs, state), naive.module_spectrum(module, inputs, state))


@pytest.mark.parametrize("offset", [0.0, 1e-3])
def test_units_that_are_copies_of_each_other(offset):
    # Two rows of the Jacobian that are equal, or nearly so: one direction is dead, or nearly so.
    weight = randn(1, 4).expand(2, -1).clone()
    weight[1, 0] += offset
    matrix = torch.cat((weight, randn(2, 4)))
    spectrum = linear_spectrum(matrix, 12)
    assert_floor(spectrum, offset == 0)
