"""How the cost of a spectrum grows with units, exponents, steps and sequences: a table and a picture.

    python tests/benchmarks/bench_cost.py [--device cuda] [--repeats 3] [--plot examples/cost.png]

The layer is a GRU. The floor is the batched products with the frame alone, in float32.
"""

import argparse
from typing import Any

import torch
from bench_spectrum import floor, medians
from torch import nn

from lightning_lyapunov import lyapunov_spectrum

UNITS = (32, 64, 128, 256, 512, 1024, 2048)
STEPS = (25, 50, 100, 200, 400, 800)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)


def cost(units: int, steps: int, batch: int, num_exponents: int, repeats: int, device: str) -> tuple[float, float]:
    """Return the seconds of the package and of the floor."""
    torch.manual_seed(0)
    module, inputs = nn.GRU(32, units).to(device), torch.randn(steps, batch, 32, device=device)
    functions = {
        "package": lambda: lyapunov_spectrum(module, inputs, num_exponents=num_exponents),
        "floor": floor(units, units, batch, steps, num_exponents, {"device": device}),
    }
    times = medians(functions, repeats, device)
    return times["package"], times["floor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", help="draw the figures into this file")
    arguments = parser.parse_args()
    repeats, device = arguments.repeats, arguments.device

    print("milliseconds for a step of one sequence (and multiples of the floor), 4 sequences, 32 steps")
    by_units: dict[str, list[tuple[float, float]]] = {"16 exponents": [], "all exponents": []}
    for units in UNITS:
        for name, count in (("16 exponents", 16), ("all exponents", units)):
            own, bottom = cost(units, 32, 4, count, repeats if units < 1024 else 0, device)
            by_units[name].append((own / 128 * 1e3, bottom / 128 * 1e3))
            print(f"GRU-{units:<5} {name:14} {own / 128 * 1e3:10.4f} ({own / bottom:.1f})", flush=True)
    print("seconds, GRU-256, 16 exponents")
    by_steps = [cost(256, steps, 16, 16, repeats, device)[0] for steps in STEPS]
    for steps, seconds in zip(STEPS, by_steps, strict=True):
        print(f"{steps:5} steps of 16 sequences {seconds:8.3f}")
    by_sequences = [cost(256, 100, sequences, 16, repeats, device)[0] for sequences in SEQUENCES]
    for sequences, seconds in zip(SEQUENCES, by_sequences, strict=True):
        print(f"100 steps of {sequences:3} sequences {seconds:8.3f}")
    if arguments.plot:
        draw(arguments.plot, by_units, by_steps, by_sequences)


def draw(path: str, by_units: dict[str, list[tuple[float, float]]], by_steps: list[float], by_sequences: Any) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, times), colour in zip(by_units.items(), ("tab:blue", "tab:red"), strict=True):
        own, bottom = zip(*times, strict=True)
        left.loglog(UNITS, own, "o-", color=colour, label=name)
        left.loglog(UNITS, bottom, ":", color=colour, label=f"{name}, the products alone")
    left.set(xlabel="units of the GRU", ylabel="ms for a step of one sequence", title="Units and exponents")
    right.loglog(STEPS, by_steps, "o-", color="tab:green", label="steps, of 16 sequences")
    right.loglog(SEQUENCES, by_sequences, "s-", color="tab:purple", label="sequences, of 100 steps")
    right.set(xlabel="steps, sequences", ylabel="s", title="GRU-256, 16 exponents")
    left.set_xticks(UNITS, [str(units) for units in UNITS])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
