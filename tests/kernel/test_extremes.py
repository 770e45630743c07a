"""Dead directions, networks that are not finite, and growth beyond the range of a float."""

import math

import pytest
import reference
import torch
from helpers import INTERVALS, ROUNDING, assert_near, full, linear_spectrum, map_spectrum, randn, tensor
from reference import CELLS
from torch import nn

from lightning_lyapunov import EXPONENT_FLOOR, lyapunov_spectrum

ROTATION = tensor([0.6, -0.8], [0.8, 0.6])
cells = pytest.mark.parametrize("cell", CELLS)
invertible_cells = pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm"])
intervals = pytest.mark.parametrize("qr_interval", INTERVALS)


# Dead directions: minus infinity, reported as the floor


def test_floor_is_the_smallest_factor_of_single_precision():
    assert math.exp(EXPONENT_FLOOR) == pytest.approx(torch.finfo(torch.float32).tiny)


def assert_floor(spectra, number):
    """Assert that exactly so many of the exponents are the floor, exactly."""
    assert ((spectra == EXPONENT_FLOOR).sum(-1) == number).all(), spectra


@intervals
def test_dead_units_are_dead_directions(qr_interval):
    module = reference.make("rnn-relu", hidden=6)
    with torch.no_grad():
        module.bias_ih_l0[:2], module.bias_ih_l0[2:] = -1e3, 1e3
        module.weight_hh_l0.mul_(0.1)
    assert_floor(lyapunov_spectrum(module, randn(23, 2, 3), qr_interval=qr_interval), 2)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize("gain", [0.3, 1.5, 4.0])
def test_what_a_low_rank_weight_wipes_out_is_dead(rank, steps, gain):
    module = reference.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0.copy_(gain * randn(6, rank) @ randn(rank, 6) / 6)
    inputs = randn(steps, 3, 3)
    for qr_interval in INTERVALS:
        assert_floor(lyapunov_spectrum(module, inputs, qr_interval=qr_interval), 6 - rank)


@intervals
@pytest.mark.parametrize("columns", [[0], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_units_that_nothing_listens_to_are_dead_directions(qr_interval, columns):
    module = reference.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0[:, columns] = 0
    assert_floor(lyapunov_spectrum(module, randn(23, 2, 3), qr_interval=qr_interval), len(columns))


@intervals
@pytest.mark.parametrize("steps", [1, 2, 5, 6, 20])
def test_chain_of_units_forgets_one_direction_per_step(qr_interval, steps):
    module = reference.make("rnn-tanh", hidden=6)
    with torch.no_grad():
        module.weight_hh_l0.tril_(-1)
    assert_floor(lyapunov_spectrum(module, randn(steps, 2, 3), qr_interval=qr_interval), min(steps, 6))


@intervals
def test_direction_wiped_out_during_the_warmup_stays_dead(qr_interval):
    inputs = torch.ones(20, 1, 2).double()
    inputs[3, 0, 1] = 0
    state = torch.zeros(1, 2).double()
    spectrum = lyapunov_spectrum(lambda s, x: x * s, inputs, state, warmup=10, qr_interval=qr_interval)
    assert_near(spectrum, tensor([0.0, EXPONENT_FLOOR]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@intervals
@pytest.mark.usefixtures("small_states")
def test_dead_directions_are_as_many_in_any_precision(dtype, qr_interval):
    module = reference.make("rnn-tanh", hidden=6)
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
    assert_near(spectrum[0, :3].double(), full((3,), math.log(0.2)), 0.02)
    assert spectrum[0, 3] == EXPONENT_FLOOR


def test_living_directions_do_not_feel_the_dead():
    module, inputs = reference.make("rnn-tanh", hidden=6), randn(23, 1, 3)
    with torch.no_grad():
        module.weight_hh_l0[:, :2] = 0
    expected = reference.exact_spectrum(reference.exact_step(module), inputs[:, 0], torch.zeros(6), num_exponents=4)
    assert_near(lyapunov_spectrum(module, inputs)[0, :4], expected, 1e-9)


# Networks that are not finite


@cells
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_that_are_not_a_number_give_no_number(cell, value, name):
    module = reference.make(cell)
    with torch.no_grad():
        getattr(module, name)[:] = value
    spectrum = lyapunov_spectrum(module, randn(9, 2, 3))
    assert spectrum.isnan().all()


@invertible_cells
@pytest.mark.parametrize("when", [0, 4, 22])
@intervals
def test_only_the_member_that_is_not_a_number_gives_no_number(cell, when, qr_interval):
    module, inputs = reference.make(cell), randn(23, 3, 3)
    expected = lyapunov_spectrum(module, inputs, qr_interval=qr_interval)
    inputs[when, 1] = math.nan
    spectrum = lyapunov_spectrum(module, inputs, qr_interval=qr_interval)
    assert spectrum[1].isnan().all()
    assert_near(spectrum[[0, 2]], expected[[0, 2]], ROUNDING)


@intervals
def test_only_the_member_that_explodes_gives_no_number(qr_interval):
    state = tensor([0.5], [2.0], [-0.5])
    spectrum = map_spectrum(lambda s, _: s**2 - 0.4, state, 30, qr_interval=qr_interval)
    assert spectrum.isfinite().squeeze(-1).tolist() == [True, False, True]
    assert spectrum[1].isnan()
    assert_near(spectrum[[0, 2]], map_spectrum(lambda s, _: s**2 - 0.4, state[[0, 2]], 30), 1e-11)


# Extremes


@pytest.mark.slow
@intervals
@pytest.mark.parametrize("exponent", [-60.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("small_states")
def test_growth_that_no_number_holds_for_two_steps(qr_interval, exponent, dtype):
    spectrum = linear_spectrum(math.exp(exponent) * ROTATION, 50, qr_interval=qr_interval, dtype=dtype)
    assert_near(spectrum.double(), tensor(exponent, exponent), 1e-5 if dtype == torch.float32 else 1e-12)


@intervals
def test_growth_and_decay_that_no_number_holds_side_by_side(qr_interval):
    matrix = tensor(-60.0, 0.0, 60.0).exp().diag()
    spectrum = linear_spectrum(matrix, 50, qr_interval=qr_interval, warmup=2)
    assert_near(spectrum, tensor(60.0, 0.0, -60.0), 1e-11)


@pytest.mark.parametrize("exponent", [-88.0, -200.0, -700.0])
def test_exponent_below_the_floor_is_the_floor(exponent):
    assert torch.equal(linear_spectrum(tensor([math.exp(exponent)]), 20), tensor(EXPONENT_FLOOR))


@pytest.mark.parametrize("exponent", [-87.0, -50.0, 0.0, 50.0, 300.0])
def test_state_of_one_number(exponent):
    assert_near(linear_spectrum(tensor([math.exp(exponent)]), 20), tensor(exponent), 1e-11)


@invertible_cells
def test_hidden_size_of_one_and_a_single_step(cell):
    module, inputs = reference.make(cell, hidden=1), randn(1, 2, 3)
    state = reference.initial_state(module, 2)
    assert_near(lyapunov_spectrum(module, inputs, state), reference.module_spectrum(module, inputs, state))


@pytest.mark.parametrize("offset", [0.0, 1e-3])
def test_units_that_are_copies_of_each_other(offset):
    # Two rows of the Jacobian that are equal, or nearly so: one direction is dead, or nearly so.
    weight = randn(1, 4).expand(2, -1).clone()
    weight[1, 0] += offset
    matrix = torch.cat((weight, randn(2, 4)))
    spectrum = linear_spectrum(matrix, 12)
    assert_floor(spectrum, offset == 0)


@pytest.mark.parametrize("before", [20, 30, 35, 50])
@pytest.mark.parametrize("qr_interval", [1, 8, "auto"])
def test_a_step_that_wipes_out_all_but_one_direction_leaves_that_one(before, qr_interval):
    """The first direction had turned into the one that is wiped out, to the last digit; another one survives."""
    factors = torch.ones(before + 25, 1, 1).double()
    factors[before] = 0.0

    def step(state, factor):
        first, second = state.unbind(-1)
        return torch.stack((2 * factor[..., 0] * first + 0.3 * second, 0.5 * second), -1)

    spectrum = lyapunov_spectrum(step, factors, torch.ones(1, 2).double(), qr_interval=qr_interval)
    # By hand: half as large in each step before, then as it comes, then twice as large. The rest is a transient.
    expected = (24 - before) * math.log(2) / len(factors)
    assert spectrum[0, 0] == pytest.approx(expected, abs=4 / len(factors))
    assert spectrum[0, 1] < -80
