"""A forecaster in a closed loop: learn Lorenz-63 from data, and ask the network, not the data, how chaotic it is.

    python examples/closed_loop.py

The network learns to forecast one step. Then its output becomes its next input, so that it is a dynamical system by
itself, a plain callable for `lyapunov_spectrum`. A forecaster whose exponents are those of the system has learned its
dynamics, and not only its next value.
"""

import argparse

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_lyapunov import kaplan_yorke_dimension, lyapunov_spectrum

DT = 0.05
TRUTH = torch.tensor([0.90563, 0.0, -14.57219])  # per unit time: Sprott, Chaos and Time-Series Analysis (2003)


def lorenz(x: Tensor) -> Tensor:
    x, y, z = x.unbind(-1)
    return torch.stack((10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z), -1)


def integrate(x: Tensor, steps: int, substeps: int = 10) -> Tensor:
    """Return the states every DT, `(steps, ...)`, by Runge and Kutta's method."""
    states, h = [], DT / substeps
    for _ in range(steps):
        for _ in range(substeps):
            k1 = lorenz(x)
            k2 = lorenz(x + h / 2 * k1)
            k3 = lorenz(x + h / 2 * k2)
            k4 = lorenz(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return torch.stack(states)


class Forecaster(nn.Module):
    """Adds to a state what a small network says of it."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3)
        )

    def forward(self, state: Tensor) -> Tensor:
        return state + self.change(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4000)
    iterations = parser.parse_args().iterations
    torch.manual_seed(0)

    # Some start off the attractor: how fast they fall onto it is what the third exponent says.
    start = 15 * torch.randn(1024, 3, dtype=torch.float64) + torch.tensor([0.0, 0.0, 25.0], dtype=torch.float64)
    data = integrate(start, 60)
    mean, scale = data[20:].mean((0, 1)), data[20:].std((0, 1))
    normalised = ((data - mean) / scale).float()
    now, after = normalised[:-1].flatten(0, 1), normalised[1:].flatten(0, 1)

    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, iterations)
    progress = tqdm(range(iterations), desc="learning", mininterval=1)
    for iteration in progress:
        batch = torch.randint(len(now), (2048,))
        loss = (model(now[batch]) - after[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if iteration % 100 == 0:
            progress.set_postfix(error=f"{loss.sqrt():.1e}")

    # A callable is called in the dtype asked for; a chaotic trajectory deserves float64.
    model.double()
    steps, sequences = 2000, 16
    state = normalised[-1, :sequences].double()
    spectra = lyapunov_spectrum(
        lambda s, _: model(s), torch.zeros(steps, sequences, 0), state, warmup=200, dtype=torch.float64
    )
    spectra = spectra / DT
    mean_spectrum, stderr = spectra.mean(0), spectra.std(0) / sequences**0.5
    print("\nexponent (per unit time)   the network          Lorenz-63      error")
    for index, (value, error, truth) in enumerate(zip(mean_spectrum, stderr, TRUTH, strict=True)):
        print(f"λ{index + 1:<22} {value:+8.3f} ± {error:.3f}      {truth:+8.3f}     {value - truth:+7.3f}")
    print(
        f"\nKaplan-Yorke dimension: {kaplan_yorke_dimension(mean_spectrum):.3f} (Lorenz-63: 2.062). One-step error: "
        f"{loss.sqrt():.1e} of the data's spread."
    )


if __name__ == "__main__":
    main()
