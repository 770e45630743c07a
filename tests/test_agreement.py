"""The default options, compared with float64 and a QR decomposition at every step, on typical networks."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_lyapunov import EXPONENT_FLOOR, jacobians, lyapunov_spectrum
from lightning_lyapunov.kernel.propagation import generic_frame, log_growth

INPUTS = 8
# In nats per step, for every exponent above the floor.
TOLERANCE = 1e-4
kinds = pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM], ids=lambda kind: kind.__name__)


def reference(matrices: Tensor) -> Tensor:
    """Return the exponents of Jacobians, ``(time, batch, state, state)`` in float64, with a QR decomposition of each.

    The rows of what is decomposed are sorted by size, without which Householder's method is not exact in each row.
    """
    frame = generic_frame(matrices.shape[-1], matrices.shape[-1]).expand(matrices.shape[1], -1, -1)
    total = torch.zeros(matrices.shape[1:3], dtype=torch.float64)
    for matrix in matrices:
        pushed = matrix @ frame
        order = pushed.norm(dim=-1).argsort(-1, descending=True).unsqueeze(-1).expand_as(pushed)
        sorted_frame, factor = torch.linalg.qr(pushed.gather(-2, order))
        frame = torch.empty_like(pushed).scatter(-2, order, sorted_frame)
        total += factor.diagonal(dim1=-2, dim2=-1).abs().log()
    return (total / len(matrices)).clamp(min=EXPONENT_FLOOR).sort(-1, descending=True).values


def trained(module: nn.Module) -> nn.Module:
    """Train a layer to give back its inputs of three steps before."""
    head = nn.Linear(module.hidden_size, INPUTS)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 1e-2)
    for _ in range(60):
        inputs = torch.randn(30, 16, INPUTS)
        loss = (head(module(inputs)[0])[3:] - inputs[:-3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.9, "it has learned nothing"
    return module


def scaled(module: nn.Module, gain: float) -> nn.Module:
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(gain)
    return module


NETWORKS = {
    "initialised": lambda kind, size: kind(INPUTS, size),
    "trained": lambda kind, size: trained(kind(INPUTS, size)),
    "gain 2": lambda kind, size: scaled(kind(INPUTS, size), 2),
    "gain 4": lambda kind, size: scaled(kind(INPUTS, size), 4),
}


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("size", [16, 80])  # followed in float64 from the start, and in float32 where that does
@pytest.mark.parametrize("network", NETWORKS)
def test_the_defaults_agree_with_float64_and_a_decomposition_at_every_step(kind, size, network):
    module = NETWORKS[network](kind, size)
    inputs = torch.randn(60, 3, INPUTS)
    expected, actual = reference(jacobians(module, inputs)), lyapunov_spectrum(module, inputs).double()
    assert actual.dtype == torch.float64
    assert (expected > EXPONENT_FLOOR).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spread", [5.0, 20.0, 60.0])
def test_the_defaults_agree_on_a_spectrum_that_spreads_over_many_nats(spread):
    # Rotations between factors from 1 to e^-spread: a network whose directions fade at very different rates.
    module = nn.RNN(INPUTS, 24, nonlinearity="relu")
    factors = torch.linspace(0, -spread, 24).exp()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.linalg.qr(torch.randn(24, 24)).Q * factors.unsqueeze(-1) / 2)
        module.bias_hh_l0.fill_(5.0)  # in the linear part of the cell
        module.weight_ih_l0.mul_(0.1)
    inputs = torch.randn(60, 3, INPUTS)
    expected = reference(jacobians(module, inputs))
    assert (expected[:, 0] - expected[:, -1] > spread / 2).all()
    torch.testing.assert_close(lyapunov_spectrum(module, inputs).double(), expected, rtol=0, atol=TOLERANCE)


class Diagonal:
    """Constant directions that fade at rates given as the input; it notes the steps of each product."""

    state_size = 8

    def __init__(self) -> None:
        self.stretches: list[int] = []

    def linearised_trajectory(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return state.expand(len(inputs), *state.shape), (inputs,)

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        (inputs,) = linearised
        self.stretches.append(len(inputs))
        return frame * inputs.sum(0).exp().unsqueeze(-1).to(frame.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_interval_backs_off_when_the_spread_grows_within_a_run(dtype):
    near, far = torch.linspace(0, -0.2, 8), torch.linspace(0, -6.0, 8)
    inputs = torch.cat((near.expand(64, 1, 8), far.expand(64, 1, 8), near.expand(64, 1, 8))).double()

    def growth(cell: Diagonal, **options: object) -> Tensor:
        return log_growth(
            cell, inputs, torch.zeros(1, 8).double(), torch.tensor([192]), num_exponents=8, **options
        ).total

    cell = Diagonal()
    difference = growth(cell, dtype=dtype) - growth(Diagonal(), qr_interval=1, dtype=torch.float64)
    assert difference.abs().max() / 192 < TOLERANCE
    # Taken again in halves, and grown again: what was pushed in vain is in the list, too.
    assert max(cell.stretches[:10]) == 32
    assert sum(after == before // 2 for before, after in pairwise(cell.stretches)) >= 3
    assert cell.stretches.count(3 if dtype == torch.float32 else 1) >= 20
    assert max(cell.stretches[-5:]) >= 16
    assert sum(cell.stretches) > 192


MEASURE_PEAK = """
import resource, sys, torch
from lightning_lyapunov import lyapunov_spectrum
torch.set_num_threads(1)
module, steps = torch.nn.GRU(1, 64), int(sys.argv[1])
inputs = torch.randn(steps, 8, 1)
lyapunov_spectrum(module, inputs[:64], num_exponents=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lyapunov_spectrum(module, inputs, num_exponents=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps_beyond_the_inputs():
    def peak(steps):
        command = [sys.executable, "-c", MEASURE_PEAK, str(steps)]
        return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # The states alone, kept, would take 8 x 64 x 8 bytes a step.
    assert peak(8000) - peak(500) < 0.25 * 7500 * 8 * 64 * 8
