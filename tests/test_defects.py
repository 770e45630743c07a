"""One test for each error that was found in other Lyapunov codes, which would change the numbers visibly.

Where an error is a wrong formula, the test computes with it too, to show that it would be noticed.
"""

import math

import pytest
import reference
import torch
from helpers import assert_near, linear_spectrum, randn, tensor
from torch import nn

from lightning_lyapunov import EXPONENT_FLOOR, kaplan_yorke_dimension, lyapunov_spectrum
from lightning_lyapunov.layers.registry import as_layer


def assert_differs(actual, wrong, by=0.01):
    assert (actual - wrong).abs().max() > by


def problem(cell, steps=12, batch=1, **options):
    """Return a module, inputs and a state, and the Jacobians of torch's forward of the first member."""
    module, inputs = reference.make(cell, **options), randn(steps, batch, 3)
    state = reference.initial_state(module, batch)
    return module, inputs, state, reference.jacobians(module, inputs[:, 0], reference.member(state, 0))


def test_defect_01_transposed_jacobians():
    """Multiplies the transposed Jacobians in forward time order."""
    module, inputs, state, matrices = problem("rnn-tanh", steps=60, gain=3.0)
    spectrum = lyapunov_spectrum(module, inputs, state)[0]
    product = torch.linalg.multi_dot(list(matrices.flip(0)))
    largest = torch.linalg.svdvals(product)[0].log() / 60
    # A frame in general position and the singular vectors differ by a constant angle: by 1 / steps.
    assert abs(spectrum[0] - largest) < 0.02
    transposed = torch.linalg.svdvals(torch.linalg.multi_dot(list(matrices.mT.flip(0))))[0].log() / 60
    assert_differs(largest, transposed, by=0.05)
    assert_near(spectrum, reference.spectrum(matrices), 1e-9)
    assert_near(spectrum.sum(), reference.spectrum(matrices.mT).sum(), 1e-9)


def test_defect_02_lstm_with_a_constant_cell():
    """The LSTM's Jacobian holds c constant: the spectrum of another map, with half the exponents."""
    module, inputs, state, matrices = problem("lstm")
    spectrum = lyapunov_spectrum(module, inputs, state)[0]
    assert_near(spectrum, reference.spectrum(matrices), 1e-9)
    wrong = reference.spectrum(matrices[:, :4, :4])
    assert len(spectrum) == 2 * len(wrong)
    assert_differs(spectrum[0], wrong[0], by=0.1)


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_defect_03_bias(cell, bias):
    """A GRU with bias raises."""
    module, inputs, state, matrices = problem(cell, steps=1, bias=bias)
    (driven,) = as_layer(module).drive(as_layer(module).read(inputs, state))
    frame = torch.eye(driven.recurrence.state_size).double()[None]
    with torch.no_grad():
        linearised = driven.recurrence.linearise(driven.state[None], driven.inputs)
        assert_near(driven.recurrence.push_forward(linearised, frame)[0], matrices[0], 1e-13)


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_defect_04_layers_are_not_parts_of_a_state(cell, num_layers):
    """A two-layer h is mistaken for (h, c)."""
    module, inputs, state, matrices = problem(cell, num_layers=num_layers)
    spectrum = lyapunov_spectrum(module, inputs, state)[0]
    assert len(spectrum) == matrices.shape[-1]
    determinants = matrices.slogdet().logabsdet
    if determinants.isfinite().all() and cell != "rnn-relu":
        assert_near(spectrum.sum(), determinants.mean(), 1e-7)


def test_defect_05_custom_cell():
    """Custom cells raise."""
    weight = randn(3, 3)

    def leaky(state, x):
        return 0.8 * state + 0.2 * torch.tanh(state @ weight.T + x)

    inputs, state = randn(10, 2, 3), randn(2, 3)
    spectrum, expected = lyapunov_spectrum(leaky, inputs, state), []
    for s, xs in zip(state, inputs.unbind(1), strict=True):
        matrices = []
        for x in xs:
            slope = torch.cosh(weight @ s + x) ** -2
            matrices.append(0.8 * torch.eye(3).double() + 0.2 * slope.diag() @ weight)
            s = leaky(s, x)
        expected.append(reference.spectrum(torch.stack(matrices)))
    assert_near(spectrum, torch.stack(expected), 1e-9)


@pytest.mark.parametrize("qr_interval", [2, 3, 7, 16, 100])
@pytest.mark.parametrize("num_exponents", [1, 2, 4])
def test_defect_06_last_block(qr_interval, num_exponents):
    """With a QR interval > 1 the last block is dropped but still divided by T; crashes for k < hidden."""
    module, inputs, state, matrices = problem("gru", steps=23)
    options = {"qr_interval": qr_interval, "num_exponents": num_exponents}
    spectrum = lyapunov_spectrum(module, inputs, state, **options)[0]
    assert_near(spectrum, reference.spectrum(matrices, num_exponents), 1e-8)
    rates = reference.growth_rates(matrices, num_exponents)
    assert_differs(rates.mean(0), rates[: 23 // qr_interval * qr_interval].sum(0) / 23)


@pytest.mark.parametrize("growth", [0.5, -0.5])
def test_defect_07_warmup_without_a_qr(growth):
    """The warm-up multiplies the frame without ever re-orthonormalising it."""
    matrix = torch.matrix_exp(tensor([growth, 2.0], [0.0, growth - 1.0]))
    spectrum = linear_spectrum(matrix, 1010, warmup=1000, dtype=torch.float32)
    # 500 nats: float32 ends at 88.
    assert_near(spectrum.double(), tensor(growth, growth - 1.0), 1e-5)


def test_defect_07_warmup_inputs_are_used_once():
    """Warm-up inputs are used twice."""
    module, inputs, state, matrices = problem("gru", steps=20)
    assert_near(lyapunov_spectrum(module, inputs, state, warmup=8)[0], reference.spectrum(matrices, warmup=8), 1e-9)
    twice = reference.jacobians(module, inputs[:, 0], module(inputs[:8], state)[1].detach()[:, 0].flatten())
    assert_differs(reference.spectrum(matrices, warmup=8), reference.spectrum(twice))


@pytest.mark.parametrize("qr_interval", [1, 2, "auto"])
def test_defect_08_sign_of_zero(qr_interval):
    """``sign(0) = 0`` wipes out a column: the directions that are left must not feel the dead one."""
    matrix = tensor([0.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 2.0])
    spectrum = linear_spectrum(matrix, 80, warmup=60, qr_interval=qr_interval)
    assert_near(spectrum, tensor(math.log(2), -math.log(2), EXPONENT_FLOOR), 1e-9)


def test_defect_10_gru_through_the_update_gate():
    """The analytic Jacobian of the GRU misses what the state does through the update gate."""
    module, inputs, state, matrices = problem("gru")
    assert_near(lyapunov_spectrum(module, inputs, state)[0], reference.spectrum(matrices), 1e-9)

    wrong, h = [], state[0, 0]
    with torch.no_grad():
        for x, matrix in zip(inputs[:, 0], matrices, strict=True):
            (r_x, z_x, n_x), (r_h, z_h, n_h) = (
                torch.nn.functional.linear(x, module.weight_ih_l0, module.bias_ih_l0).chunk(3),
                torch.nn.functional.linear(h, module.weight_hh_l0, module.bias_hh_l0).chunk(3),
            )
            z, n = (z_x + z_h).sigmoid(), (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
            wrong.append(matrix - (h * z * (1 - z)).diag() @ module.weight_hh_l0[4:8])
            h = (1 - z) * n + z * h
    assert_differs(reference.spectrum(matrices), reference.spectrum(torch.stack(wrong)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defect_11_floor(dtype):
    """Clamps log r at -27.6 without saying so."""
    spectrum = linear_spectrum(tensor(-80.0, -30.0, -40.0).exp().diag(), 30, warmup=5, dtype=dtype)
    assert_near(spectrum.double(), tensor(-30.0, -40.0, -80.0), 1e-4)
    dead = linear_spectrum(tensor(1.0, 0.0, 0.0).diag(), 30, dtype=dtype)
    assert (dead == EXPONENT_FLOOR).sum() == 2


def test_defect_12_slope_at_the_wrong_argument():
    """sech^2 taken at the wrong argument."""
    module, inputs, state, matrices = problem("rnn-tanh")
    assert_near(lyapunov_spectrum(module, inputs, state)[0], reference.spectrum(matrices), 1e-9)
    after = module(inputs, state)[0].detach()[:, 0]
    wrong = torch.cosh(after).pow(-2).unsqueeze(-1) * module.weight_hh_l0.detach()
    assert_differs(reference.spectrum(matrices), reference.spectrum(wrong))


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_defect_12_sum_instead_of_mean(steps):
    """Never divides by the number of steps."""
    assert_near(linear_spectrum(3 * torch.eye(2).double(), steps), tensor(math.log(3), math.log(3)), 1e-12)


def test_defect_13_jacobians_are_averaged_over_the_batch():
    """Averages the Jacobian over the batch before the product."""
    module, inputs, state, _ = problem("rnn-tanh", batch=3)
    spectra = lyapunov_spectrum(module, inputs, state)
    members = [reference.jacobians(module, inputs[:, i], reference.member(state, i)) for i in range(3)]
    matrices = torch.stack(members, 1)
    assert_near(spectra, torch.stack([reference.spectrum(matrices[:, i]) for i in range(3)]), 1e-9)
    assert_differs(spectra.mean(0), reference.spectrum(matrices.mean(1)))


def test_defect_14_jacobians_between_two_qrs_are_skipped():
    """Skips the Jacobians between two QRs."""
    module, inputs, state, matrices = problem("gru", steps=20)
    assert_near(lyapunov_spectrum(module, inputs, state, qr_interval=2)[0], reference.spectrum(matrices), 1e-9)
    assert_differs(reference.spectrum(matrices), reference.spectrum(matrices[1::2]))


def test_defect_15_dead_direction_is_not_neutral():
    """Reports a dead direction as 0."""
    module = nn.RNN(3, 4, nonlinearity="relu").double()
    nn.init.constant_(module.bias_hh_l0, -1e3)
    assert (lyapunov_spectrum(module, randn(5, 2, 3)) == EXPONENT_FLOOR).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0, 1])
def test_defect_16_number_of_steps(steps, warmup):
    """Index off by one, divides by t - 1."""
    inputs = torch.arange(1.0, steps + warmup + 1).double().view(-1, 1, 1)
    spectrum = lyapunov_spectrum(lambda s, x: x * s, inputs, torch.ones(1, 1).double(), warmup=warmup)
    assert_near(spectrum, inputs[warmup:].log().mean().view(1, 1), 1e-13)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_defect_17_frame_starts_at_the_identity(order):
    """The frame starts at the identity: ``diag(0.5, 0.9, 2)`` and one exponent give ln 0.5."""
    matrix = tensor(0.5, 0.9, 2.0)[list(order)].diag()
    assert_near(linear_spectrum(matrix, 100, num_exponents=1, warmup=60), tensor(math.log(2)), 1e-9)
    # Without a warm-up the alignment of the frame is counted too, once: it is not in general position if that is much.
    assert_near(linear_spectrum(matrix, 100, num_exponents=1), tensor(math.log(2)), 0.05)


def test_defect_17_alignment_is_averaged_in():
    """The alignment of the frame is averaged in, which warm-up is there to leave out."""
    matrix = tensor([2.0, 50.0], [0.0, 0.5])
    assert_near(linear_spectrum(matrix, 25, warmup=20), tensor(math.log(2), -math.log(2)), 1e-9)
    assert_differs(linear_spectrum(matrix, 5), tensor(math.log(2), -math.log(2)), by=0.1)


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("qr_interval", [1, 2, "auto"])
def test_defect_18_zero_column(column, qr_interval):
    """A Householder QR divides 0 by 0 on a zero column."""
    matrix = randn(3, 3)
    matrix[:, column] = 0
    spectrum = linear_spectrum(matrix, 20, qr_interval=qr_interval)
    assert spectrum.isfinite().all()
    assert (spectrum == EXPONENT_FLOOR).sum() == 1


# Sprott, Chaos and Time-Series Analysis (2003), table of exponents: Henon's map, Lorenz's and Roessler's system.
@pytest.mark.parametrize(
    ("spectrum", "dimension", "total"),
    [
        ((0.419217, -1.623190), 1.258267, math.log(0.3)),
        ((0.90563, 0.0, -14.57219), 2.06215, -(10 + 1 + 8 / 3)),
    ],
)
def test_defect_19_reference_values_agree_with_one_another(spectrum, dimension, total):
    """Compares with wrong targets: a dimension, spectra off by 20 %."""
    assert sum(spectrum) == pytest.approx(total, abs=2e-4)
    assert kaplan_yorke_dimension(tensor(*spectrum)).item() == pytest.approx(dimension, abs=1e-5)
