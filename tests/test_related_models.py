"""The models of `examples/related_models.py`: what their exponents must be, by theory or computed in a second way."""

import runpy

import pytest
import torch
from helpers import ROOT, assert_near

from lightning_lyapunov import lyapunov_spectrum

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "examples" / "related_models.py"))


def assert_same(of_monitor, of_sequences):
    """Assert that two spectra are the same, apart from where they are sorted: after averaging, or before."""
    assert_near(of_monitor.mean(), of_sequences.mean(), 1e-5)
    assert_near(of_monitor, of_sequences, 0.03)


def forecaster_run(example, make_cell, batches=4):
    return example["run"](lambda: example["Forecaster"](make_cell()), batches=batches)[0]


def test_the_linear_part_of_a_unitary_network_has_exponents_of_zero(example):
    result = forecaster_run(example, lambda: example["UnitaryCell"](None))
    assert result.spectra.shape[1] == example["UNITS"]  # 12 complex numbers
    assert_near(result.spectra, torch.zeros_like(result.spectra), 1e-5)


@pytest.mark.parametrize("bias", [0.1, -0.02])
def test_mod_relu_moves_them_in_the_direction_of_its_bias(example, bias):
    result = forecaster_run(example, lambda: example["UnitaryCell"](bias))
    leading = result.spectra[:, 0]
    assert (leading > 0.01).all() if bias > 0 else (leading < -0.005).all()
    # Sizes change by the same amount wherever they are: their directions neither grow nor fade on their own.
    assert not bias > 0 or (result.spectra[:, -1] > -1e-3).all()


def test_a_real_orthogonal_network_has_exponents_of_zero_until_units_are_shut(example):
    open_units = forecaster_run(example, lambda: example["OrthogonalCell"](2.0))
    assert_near(open_units.spectra, torch.zeros_like(open_units.spectra), 1e-5)
    shut = forecaster_run(example, lambda: example["OrthogonalCell"](-0.05))
    assert (shut.spectra <= 1e-5).all()
    assert (shut.spectra[:, -1] < -1).all()


def test_exponents_of_a_bilevel_problem_are_bounded_by_step_and_curvature(example):
    for step in (0.05, 0.2):
        result = forecaster_run(example, lambda step=step: example["BilevelCell"](step), batches=10)
        lowest, highest = result.model.cell.bounds()
        assert lowest < highest < 0
        assert (result.spectra[-1] >= lowest - 1e-5).all()
        assert (result.spectra[-1] <= highest + 1e-5).all()


def test_a_read_out_of_all_states_is_no_part_of_the_recurrence(example):
    result, windows = example["run"](example["NeuroView"], batches=10, warmup=0)
    last = windows[-example["SERIES"] :, :-1]
    assert_same(result.spectra[-1], lyapunov_spectrum(result.model.cell, last).mean(0))
    assert result.spectra[-1, 0] < -0.3
    # The loss sees the first step at once. Through the last state alone next to nothing of it comes back.
    inputs = last.clone().requires_grad_()
    states = result.model.cell(inputs)[0]
    weights = result.model.head.weight.view(example["WINDOW"], -1)
    through_all, through_last = (
        torch.autograd.grad(said.sum(), inputs, retain_graph=True)[0][:, 0].abs().mean()
        for said in (states * weights, states[:, -1] * weights[-1])
    )
    assert through_all > 1e4 * through_last


def test_a_batch_that_goes_on_is_measured_from_the_state_that_was_handed_on(example):
    errors = {}
    for hand_on in (True, False):
        result, second = example["stateful"](hand_on)
        assert bool(result.model.starts[1].any()) == hand_on
        assert_same(second["monitor"], second["without it"])
        errors[hand_on] = (second["monitor"].mean() - second["in one sequence"].mean()).abs()
    # The sum of all exponents has no transient of the frame: what is left is that of the state.
    assert errors[True] < 0.1 * errors[False]
    assert errors[False] > 0.05
