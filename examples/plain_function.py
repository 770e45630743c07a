"""The plain function, without Lightning: an untrained and a trained network, a map and a flow of the textbooks.

python examples/plain_function.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_lyapunov import kaplan_yorke_dimension, lyapunov_spectrum


def show(name: str, spectra: Tensor, expected: str = "") -> None:
    """Print the largest three exponents of a set of sequences, with their standard errors, and the dimension."""
    mean, stderr = spectra.mean(0), spectra.std(0) / len(spectra) ** 0.5
    exponents = "  ".join(f"{value:+.4f} ± {error:.4f}" for value, error in zip(mean[:3], stderr[:3], strict=True))
    print(f"{name:28} {exponents:54} dimension {kaplan_yorke_dimension(mean):5.2f}   {expected}")


def networks() -> None:
    """A GRU that learns to forecast a sum of waves, before and after."""
    time = torch.arange(400).view(-1, 1, 1)
    frequencies, phases = torch.rand(2, 32, 3)
    waves = torch.sin(time * (0.05 + 0.3 * frequencies) + 6.28 * phases).mean(-1, keepdim=True)
    gru, head = nn.GRU(1, 48), nn.Linear(48, 1)
    show("GRU, untrained", lyapunov_spectrum(gru, waves[:, :16], num_exponents=3, warmup=100))

    optimizer = torch.optim.Adam([*gru.parameters(), *head.parameters()], 5e-3)
    for _ in (progress := tqdm(range(200), desc="learning", mininterval=1)):
        loss = F.mse_loss(head(gru(waves[:-1])[0]), waves[1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gru.parameters(), 1)
        optimizer.step()
    progress.close()
    show(f"GRU, trained (loss {loss:.0e})", lyapunov_spectrum(gru, waves[:, :16], num_exponents=3, warmup=100))


def henon() -> None:
    """The Henon map: a callable `step(state, input)`, with inputs that are empty."""

    def step(state: Tensor, _: Tensor) -> Tensor:
        x, y = state.unbind(-1)
        return torch.stack((1 - 1.4 * x.square() + y, 0.3 * x), -1)

    state = 0.1 * torch.rand(16, 2, dtype=torch.float64)
    spectra = lyapunov_spectrum(step, torch.zeros(2000, 16, 0), state, warmup=100)
    show("Hénon map", spectra, "Sprott: +0.4192, -1.6232, dimension 1.26")


def roessler() -> None:
    """Rössler's flow: its map over a step of time, by Runge and Kutta's method, and the exponents divided by it."""
    dt, substeps = 0.1, 2  # one substep of 0.1 would be off by 3 % in the last exponent

    def velocity(state: Tensor) -> Tensor:
        x, y, z = state.unbind(-1)
        return torch.stack((-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)), -1)

    def step(state: Tensor, _: Tensor) -> Tensor:
        h = dt / substeps
        for _ in range(substeps):
            k1 = velocity(state)
            k2 = velocity(state + h / 2 * k1)
            k3 = velocity(state + h / 2 * k2)
            k4 = velocity(state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state

    state = torch.rand(32, 3, dtype=torch.float64)
    spectra = lyapunov_spectrum(step, torch.zeros(1500, 32, 0), state, warmup=500) / dt
    show("Rössler flow, per unit time", spectra, "Sprott: +0.0714, 0, -5.3943, dimension 2.01")


if __name__ == "__main__":
    torch.manual_seed(0)
    networks()
    henon()
    roessler()
