"""What the conventions of the authors' code do to the numbers, on the networks of the grid.

    python examples/paper/conventions.py    # after b_grid.py, a minute

The code of the paper measures an LSTM with c held constant (h only), multiplies the transposed Jacobians in the order
of time, and counts in bits. Here the same Jacobians are multiplied in each way.
"""

from collections.abc import Callable
from pathlib import Path

import b_grid
import matplotlib.pyplot as plt
import torch
from b_grid import Grid
from study import BITS, Array, Network, Setting, characters, interval, np, parser, rank_correlation, read
from study import write_table as write
from torch import Tensor
from tqdm import tqdm

from lightning_lyapunov import jacobians, lyapunov_spectrum

SEQUENCES, WARMUP = 4, 20
# The state is (h, c), h first.
CONVENTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "(h, c)": lambda matrices, units: matrices,
    "(h, c), transposed": lambda matrices, units: matrices.mT,
    "h only": lambda matrices, units: matrices[..., :units, :units],
    "h only, transposed": lambda matrices, units: matrices[..., :units, :units].mT,
}


def product_spectrum(matrices: Tensor) -> Array:
    """Return the exponents of a product of matrices (time, batch, n, n), the mean of the batch: a linear map."""
    size = matrices.shape[-1]
    step = lambda state, entries: (entries.view(-1, size, size) @ state.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    state = matrices.new_zeros(matrices.shape[1], size)
    return lyapunov_spectrum(step, matrices.flatten(-2), state, warmup=WARMUP).mean(0).numpy()


def spectra(network: Network, inputs: Tensor) -> dict[str, Array]:
    """Return the spectrum of a network in each convention, in nats per step."""
    matrices = jacobians(network.rnn, inputs)
    units = network.setting.units
    return {name: product_spectrum(part(matrices, units)) for name, part in CONVENTIONS.items()}


def measured(settings: list[Setting], folder: Path, text: Path | None, count: int | None) -> dict[str, Array]:
    """Return the spectra of all networks, (networks, exponents), from a file as far as that has them."""
    path = folder / "conventions.npz"
    found = dict(np.load(path)) if path.exists() else {}
    if any(len(found.get(name, ())) != len(settings) for name in CONVENTIONS):
        data = characters(text, count)
        rows: list[dict[str, Array]] = []
        for setting in tqdm(settings, desc="networks"):
            network = Network(setting, data)
            network.load_state_dict(torch.load(folder / "networks" / f"{setting.name}.pt"))
            rows.append(spectra(network, data.validation.tensors[0][:SEQUENCES].float()))
        found = {name: np.array([row[name] for row in rows]).astype(np.float32) for name in CONVENTIONS}
        np.savez_compressed(path, **found)
    return found


def table(found: dict[str, Array], grid: Grid) -> list[tuple[object, ...]]:
    """Return the mean exponents of all networks, and what each convention says of the loss."""
    reference, rows = found["(h, c)"], []
    for name, values in found.items():
        largest = values[:, 0].astype(float)
        means = float(largest.mean()), float(largest.mean() / BITS), float(values.mean())
        agreement = rank_correlation(largest, reference[:, 0])
        with_loss = rank_correlation(largest, grid.loss), *interval(largest, grid.loss)
        rows.append((name, values.shape[1], *means, agreement, *with_loss, rank_correlation(values.mean(1), grid.loss)))
    return rows


def draw(found: dict[str, Array], grid: Grid, path: Path) -> None:
    """Draw the spectra of the best network, and the largest exponents of all against their losses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, values) in enumerate(found.items()):
        style = {"color": f"C{number // 2}", "alpha": 0.5 if number % 2 else 1.0}
        best = values[grid.loss.argmin()]
        left.plot(np.arange(1, len(best) + 1), best, ls="--" if number % 2 else "-", label=name, **style)
        right.plot(values[:, 0], grid.loss, "x" if number % 2 else "o", label=name, **style)
    left.set(xlabel="index of the exponent", ylabel="exponent (nats per step)", title="the network of the lowest loss")
    right.set(
        xlabel="largest exponent (nats per step)", ylabel="final validation loss", title="all networks of the grid"
    )
    left.axhline(0, color="grey", lw=0.8, ls=":")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    arguments = read(parser(__doc__))
    settings = b_grid.settings(arguments.size)
    runs = b_grid.trained(arguments)
    grid = b_grid.of_runs(runs)
    found = measured(settings, arguments.folder, arguments.text, b_grid.SIZES[arguments.size][4])
    header = ("convention", "exponents", "largest", "in bits", "mean", "rank correlation with (h, c)", "with the loss")
    header = (*header, "low", "high", "mean exponent with the loss")
    write(arguments.folder / "conventions.csv", header, table(found, grid))
    draw(found, grid, arguments.folder / "conventions.png")


if __name__ == "__main__":
    main()
