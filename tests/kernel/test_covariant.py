"""Covariant vectors: constructed answers, a second algorithm, and what each step does to them."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_near, full, map_spectrum, randn, tensor
from reference import CELLS, initial_state, make
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_lyapunov import EXPONENT_FLOOR, covariant_lyapunov_vectors, jacobians, lyapunov_spectrum
from lightning_lyapunov.kernel import covariant
from lightning_lyapunov.kernel.propagation import generic_frame


def henon(s, _):
    return s @ tensor([0.0, 1.0], [0.3, 0.0]).T + tensor(1.0, 0.0) * (1 - 1.4 * s[:, :1] ** 2)


def lorenz(s):
    x, y, z = s.unbind(-1)
    return torch.stack((10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z), -1)


def lorenz_step(s, _, dt=0.01):
    k1 = lorenz(s)
    k2 = lorenz(s + dt / 2 * k1)
    k3 = lorenz(s + dt / 2 * k2)
    k4 = lorenz(s + dt * k3)
    return s + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def of_map(step, state, time, **options):
    return covariant_lyapunov_vectors(step, torch.zeros(time, len(state), 0), state, **options)


def states_of(step, state, time):
    """Return the states before each step."""
    states = [state]
    for _ in range(time - 1):
        states.append(step(states[-1], None))
    return torch.stack(states)


def by_intersection(matrices):
    """Return the covariant vectors before each of some steps, by another algorithm, for Jacobians of one sequence.

    The span of the first j of a frame from the past meets what is orthogonal to the first j - 1 of a frame that the
    transposed Jacobians carry back from the future in one line (Kuptsov & Parlitz, J. Nonlinear Sci. 22, 2012).
    """
    matrices = matrices.numpy()
    time, size = matrices.shape[:2]
    past, future = [generic_frame(size, size).numpy()], [generic_frame(size, size).numpy()]
    for matrix in matrices:
        past.append(np.linalg.qr(matrix @ past[-1])[0])
    for matrix in matrices[::-1]:
        future.append(np.linalg.qr(matrix.T @ future[-1])[0])
    found = np.empty_like(matrices)
    for t in range(time):
        before, after = past[t], future[time - t]
        for j in range(size):
            coefficients = np.linalg.svd(after[:, :j].T @ before[:, : j + 1])[2][-1]
            found[t, :, j] = before[:, : j + 1] @ coefficients
    return torch.from_numpy(found)


def parallel(one, other):
    """Return |cos| of the angles between vectors in the second dimension from the last."""
    return (one * other).sum(-2).abs()


def assert_covariant(found, matrices, tolerance=1e-11):
    """Assert that each Jacobian maps the vectors on those after it, with their signs, and grows them by the rates."""
    pushed, rates = matrices[: len(found.vectors) - 1] @ found.vectors[:-1], found.growth_rates[:-1]
    dead = rates == EXPONENT_FLOOR
    lengths = pushed.norm(dim=-2)
    assert_near(lengths.log().masked_fill(dead, EXPONENT_FLOOR), rates, tolerance)
    assert_near(pushed / lengths.masked_fill(dead, 1).unsqueeze(-2), found.vectors[1:], tolerance)


def test_a_constant_matrix_has_its_eigenvectors():
    basis = randn(5, 5)
    matrix = basis @ torch.diag(tensor(1.9, -1.2, 0.7, -0.4, 0.1)) @ basis.inverse()
    found = of_map(lambda s, _: s @ matrix.T, torch.zeros(1, 5), 200, warmup=80, cooldown=80)
    assert found.vectors.shape == (40, 1, 5, 5)
    assert_near(parallel(found.vectors, basis / basis.norm(dim=0)), torch.ones(40, 1, 5).double(), 1e-10)
    assert_near(found.growth_rates[:, 0].exp(), tensor(1.9, 1.2, 0.7, 0.4, 0.1).expand(40, 5), 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_each_step_maps_the_vectors_on_one_another(cell):
    torch.manual_seed(1)
    module, inputs = make(cell), randn(60, 2, 3)
    state = initial_state(module, 2)
    found = covariant_lyapunov_vectors(module, inputs, state, num_exponents=4, warmup=20, cooldown=20)
    assert found.vectors.shape[:2] == (20, 2)
    assert_covariant(found, jacobians(module, inputs, state)[20:40])
    assert_near(found.vectors.norm(dim=-2), (found.growth_rates > EXPONENT_FLOOR).double())


@pytest.mark.parametrize("cell", ["rnn-tanh", "gru"])
def test_a_second_algorithm_finds_the_same_vectors(cell):
    torch.manual_seed(0)
    module, inputs = make(cell, gain=2.0), randn(300, 1, 3)
    found = covariant_lyapunov_vectors(module, inputs, initial_state(module, 1) * 0, warmup=120, cooldown=120)
    expected = by_intersection(jacobians(module, inputs, initial_state(module, 1) * 0)[:, 0])[120:180]
    assert_near(parallel(found.vectors[:, 0], expected), torch.ones(60, 4).double(), 1e-6)


@pytest.mark.parametrize(
    "make_cell", [lambda: nn.GRUCell(3, 4), lambda: nn.LSTMCell(3, 4), lambda: nn.GRU(3, 4, num_layers=2)]
)
def test_every_kind_of_dynamics_is_taken(make_cell):
    torch.manual_seed(0)
    module, inputs = make_cell().double(), randn(40, 2, 3)
    found = covariant_lyapunov_vectors(module, inputs, num_exponents=3, warmup=10, cooldown=10)
    assert_covariant(found, jacobians(module, inputs)[10:30])
    assert_near(found.growth_rates[..., 0].mean(), lyapunov_spectrum(module, inputs)[:, 0].mean(), 0.1)


class Leaky(nn.Module):
    """A cell with a complex state beside a real one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, state):
        h, z = state
        return None, ((0.6 * h + self.linear(x)).tanh(), 0.9j * z + h.sum(-1, keepdim=True))


def test_a_cell_with_a_state_of_several_tensors_is_taken():
    module, inputs, state = Leaky(), torch.randn(60, 2, 3), (torch.zeros(2, 2), torch.zeros(2, 1) * 1j)
    found = covariant_lyapunov_vectors(module, inputs, state, warmup=20, cooldown=20)
    assert found.vectors.dtype == torch.float64
    assert found.vectors.shape == (20, 2, 4, 4)
    assert_near(found.growth_rates[..., :2].sum(-1), full((20, 2), 2 * math.log(0.9)), 1e-6)


def test_the_vectors_of_henon_map_are_covariant_and_grow_by_the_exponents():
    state = states_of(henon, 0.1 * torch.rand(4, 2).double(), 101)[-1]
    found = of_map(henon, state, 1100, warmup=50, cooldown=50)
    x = states_of(henon, state, 1050)[50:, :, 0]
    matrices = torch.stack((torch.stack((-2.8 * x, torch.ones_like(x)), -1), tensor(0.3, 0.0).expand(*x.shape, 2)), -2)
    assert_covariant(found, matrices)
    expected = by_intersection(matrices[:, 0])[60:900]
    assert_near(parallel(found.vectors[60:900, 0], expected), torch.ones(840, 2).double(), 1e-9)
    assert_near(found.growth_rates.mean((0, 1)), tensor(0.4192, -1.6232), 0.02)
    # log |det J| is ln 0.3 at every step: the rates, and the change of the area between the two.
    area = (1 - parallel(*found.vectors.split(1, -1)).square()).log().squeeze(-1) / 2
    sums = found.growth_rates[:-1].sum(-1) + area.diff(dim=0)
    assert_near(sums, torch.full_like(sums, math.log(0.3)), 1e-7)


@pytest.mark.slow
def test_the_flow_of_lorenz_system_is_a_covariant_vector_whose_exponent_is_zero():
    state = states_of(lorenz_step, torch.randn(32, 3).double() + tensor(0, 0, 25), 2000)[-1]
    found = of_map(lorenz_step, state, 3000, warmup=1000, cooldown=1000)
    states = states_of(lorenz_step, state, 2000)[1000:]
    flow = lorenz(states) / lorenz(states).norm(dim=-1, keepdim=True)
    cosines = (found.vectors[..., 1] * flow).sum(-1).abs()
    # The integrator's map moves the flow by its own error, and where two vectors nearly meet the frame's is larger.
    assert_near(cosines, torch.ones_like(cosines), 1e-4)
    rates = found.growth_rates.mean((0, 1)) / 0.01
    assert_near(rates, tensor(0.9056, 0.0, -14.5722), 0.15)
    assert abs(rates[1].item()) < 0.02
    assert_near(rates.sum(), tensor(-13.6667)[0], 0.1)
    matrices = jacobians(lorenz_step, torch.zeros(3000, 32, 0), state)
    assert_covariant(found, matrices[1000:2000], 1e-10)
    # The angles by the other algorithm; what is left of the transients of 1,000 steps is exp(-9).
    expected = by_intersection(matrices[:, 0])[1000:2000]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        ours = parallel(found.vectors[:, 0, :, [i]], found.vectors[:, 0, :, [j]]).acos()
        assert_near(ours, parallel(expected[:, :, [i]], expected[:, :, [j]]).acos(), 1e-3)


def test_averages_of_the_rates_are_the_exponents():
    torch.manual_seed(0)
    module, inputs = make("gru", 6, gain=3.0), randn(1100, 4, 3)
    found = covariant_lyapunov_vectors(module, inputs, warmup=50, cooldown=50)
    spectrum = lyapunov_spectrum(module, inputs[:1050], warmup=50)
    assert_near(found.growth_rates.mean((0, 1)), spectrum.mean(0), 5e-3)
    assert_near(found.growth_rates.mean(0)[:, 0], spectrum[:, 0], 1e-10)


def test_vectors_of_equal_exponents_span_the_right_plane():
    basis = randn(3, 3)
    for block in (tensor([0.9, 0.0], [0.0, 0.9]), 0.9 * tensor([0.6, -0.8], [0.8, 0.6])):
        matrix = basis @ torch.block_diag(block, tensor([0.3])) @ basis.inverse()
        found = of_map(lambda s, _, matrix=matrix: s @ matrix.T, torch.zeros(1, 3), 120, warmup=50, cooldown=50)
        assert_covariant(found, matrix.expand(20, 1, 3, 3))
        normal = torch.linalg.cross(basis[:, 0], basis[:, 1])
        assert_near((found.vectors[..., :2] * normal.unsqueeze(-1)).sum(-2), torch.zeros(20, 1, 2).double(), 1e-9)
        assert_near(parallel(found.vectors[:, 0, :, 2:], basis[:, 2:] / basis[:, 2].norm()), full((20, 1), 1), 1e-9)
        assert_near(found.growth_rates[..., :2].sum(-1), full((20, 1), 2 * math.log(0.9)), 0.1)


def test_a_direction_that_is_wiped_out_is_zero_and_at_the_floor():
    matrix = randn(4, 2) @ randn(2, 4)
    found = of_map(lambda s, _: s @ matrix.T, torch.zeros(1, 4), 60, warmup=20, cooldown=20)
    assert_covariant(found, matrix.expand(20, 1, 4, 4))
    assert (found.vectors[..., 2:] == 0).all()
    assert (found.growth_rates[..., 2:] == EXPONENT_FLOOR).all()


def test_what_is_wiped_out_in_one_step_is_zero_in_all():
    def step(state, x):  # the fastest direction is closed where x is 0
        return state * torch.cat((2 * x, 0.5 * torch.ones_like(x)), -1) @ tensor([1.0, 0.0], [0.3, 1.0])

    inputs = torch.ones(40, 1, 1).double()
    inputs[8] = 0
    found = covariant_lyapunov_vectors(step, inputs, tensor([1.0, 1.0]), warmup=4, cooldown=10)
    assert (found.growth_rates[..., 1] == EXPONENT_FLOOR).all()
    assert (found.vectors[..., 1] == 0).all()
    leading = found._replace(vectors=found.vectors[..., :1], growth_rates=found.growth_rates[..., :1])
    assert_covariant(leading, jacobians(step, inputs, tensor([1.0, 1.0]))[4:30])


def test_a_sequence_that_is_not_finite_is_nan_and_the_others_are_not():
    state = tensor([0.1, 0.1], [1e9, 0.0])
    found = of_map(henon, state, 60, warmup=10, cooldown=10)
    assert found.vectors[:, 0].isfinite().all()
    assert found.growth_rates[:, 0].isfinite().all()
    assert found.vectors[:, 1].isnan().all()
    assert found.growth_rates[:, 1].isnan().all()


def test_a_shorter_sequence_of_a_packed_batch_is_that_sequence_alone():
    torch.manual_seed(0)
    module, inputs, lengths = nn.GRU(3, 4).double(), randn(50, 3, 3), [31, 50, 44]
    packed = pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    found = covariant_lyapunov_vectors(module, packed, warmup=10, cooldown=5)
    for member, length in enumerate(lengths):
        alone = covariant_lyapunov_vectors(module, inputs[:length, [member]], warmup=10, cooldown=5)
        assert_near(found.vectors[: length - 15, [member]], alone.vectors, 1e-11)
        assert_near(found.growth_rates[: length - 15, [member]], alone.growth_rates, 1e-11)
        assert found.vectors[length - 15 :, member].isnan().all()


def test_the_scale_of_a_step_changes_rates_and_no_vector():
    matrix = randn(3, 3)
    plain, tiny = (
        of_map(lambda s, _, scale=scale: scale * s @ matrix.T, torch.zeros(1, 3), 60, warmup=20, cooldown=20)
        for scale in (1.0, 1e-180)
    )
    assert_near(tiny.vectors, plain.vectors, 1e-9)
    assert_near(tiny.growth_rates, plain.growth_rates + math.log(1e-180), 1e-9)


def test_frames_of_few_steps_are_kept_and_computed_twice(monkeypatch):
    def found():
        return covariant_lyapunov_vectors(module, inputs, num_exponents=3, warmup=100, cooldown=50)

    torch.manual_seed(0)
    module, inputs = nn.GRU(3, 4).double(), randn(400, 1, 3)
    at_once, lengths, factorise = found(), [], covariant._factorise

    def watched(recurrence, inputs, running, carried):
        lengths.append(len(inputs))
        return factorise(recurrence, inputs, running, carried)

    monkeypatch.setattr(covariant, "_factorise", watched)
    monkeypatch.setattr(covariant, "_SMALL_ELEMENTS", 0)
    in_blocks = found()
    assert set(lengths) == {20}  # the square root of the steps: 20 blocks are kept, and 20 steps of one
    assert len(lengths) == 20 + 14  # the last is at hand, the first five are warm-up
    assert_near(in_blocks.vectors, at_once.vectors, 1e-12)
    assert_near(in_blocks.growth_rates, at_once.growth_rates, 1e-12)


def test_inputs_that_do_not_fit_are_named():
    state = tensor([0.1, 0.1])
    for options in ({"warmup": 30, "cooldown": 30}, {"cooldown": 60}, {"cooldown": -1}, {"cooldown": 1.5}):
        with pytest.raises(ValueError, match=r"`cooldown=.* the sequences have 60 steps"):
            of_map(henon, state, 60, **options)
    with pytest.raises(ValueError, match="bidirectional"):
        covariant_lyapunov_vectors(nn.GRU(2, 3, bidirectional=True), torch.randn(20, 1, 2))
    with pytest.raises(ValueError, match="`num_exponents=3`"):
        of_map(henon, state, 60, num_exponents=3)


@pytest.mark.slow
def test_clvlib_agrees():
    clvlib = pytest.importorskip("clvlib.pytorch")
    clvlib_backwards = pytest.importorskip("clvlib.pytorch.clv")._clvs
    state = states_of(henon, tensor([0.1, 0.1]), 100)[-1]

    def jacobian(t, s):
        return torch.stack((torch.stack((-2.8 * s[0], s[0] * 0 + 1)), tensor(0.3, 0.0)))

    time = torch.arange(601).double()
    exponents, _, frames, factors, *_ = clvlib.lyap_analysis_from_ic(
        lambda t, s: henon(s[None], None)[0], jacobian, state[0], time, stepper="discrete"
    )
    # 0.1.5 takes the factor of the step before in place of that of each step: here each gets its own.
    vectors, _ = clvlib_backwards(frames[:-1], factors[1:])
    found = of_map(henon, state, 600, warmup=100, cooldown=100)
    assert_near(parallel(found.vectors[:, 0], vectors[100:500]), torch.ones(400, 2).double(), 1e-9)
    assert_near(map_spectrum(henon, state, 600)[0], exponents, 5e-3)
