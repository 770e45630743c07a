"""What the conventions of the authors' code do to the numbers, on the networks of the grid.

    python examples/paper/conventions.py    # after b_grid.py, a minute

The code of the paper measures an LSTM with c held constant (h only), multiplies the transposed Jacobians in the order
of time, and counts in bits. Here the same Jacobians are multiplied in each way.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import b_grid
import matplotlib.pyplot as plt
import torch
from b_grid import Grid
from study import BITS, Array, Network, Setting, characters, interval, np, numbers, parser, rank_correlation, read, save
from study import write_table as write
from torch import Tensor
from tqdm import tqdm

from lightning_lyapunov import jacobians, lyapunov_spectrum

SEQUENCES, WARMUP, EXPONENTS = 2, 20, 8
# The state is (h, c), h first.
CONVENTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "(h, c)": lambda matrices, units: matrices,
    "(h, c), transposed": lambda matrices, units: matrices.mT,
    "h only": lambda matrices, units: matrices[..., :units, :units],
    "h only, transposed": lambda matrices, units: matrices[..., :units, :units].mT,
}


def product_spectrum(matrices: Tensor, count: int | None = None) -> Array:
    """Return the leading exponents of the product of matrices (time, batch, n, n), the mean of the batch."""
    size = matrices.shape[-1]

    def step(state: Tensor, entries: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", entries.view(-1, size, size), state)

    state = matrices.new_zeros(matrices.shape[1], size)
    spectrum = lyapunov_spectrum(step, matrices.flatten(-2), state, warmup=WARMUP, num_exponents=count)
    return spectrum.mean(0).numpy()


def leading_and_mean(matrices: Tensor) -> Array:
    """Return the leading exponents and then the mean of all, which is that of log|det|."""
    mean = torch.linalg.slogdet(matrices[WARMUP:]).logabsdet.mean() / matrices.shape[-1]
    return np.append(product_spectrum(matrices, min(EXPONENTS, matrices.shape[-1])), mean)


def spectra(network: Network, inputs: Tensor) -> dict[str, Array]:
    """Return the leading exponents and the mean of a network in each convention, in nats per step."""
    matrices = jacobians(network.rnn, inputs)
    units = network.setting.units
    return {name: leading_and_mean(part(matrices, units)) for name, part in CONVENTIONS.items()}


def measured(settings: list[Setting], folder: Path, text: Path | None, count: int | None) -> dict[str, Array]:
    """Return the spectra of all networks, (networks, exponents and the mean), from a table as far as that has them."""
    path = folder / "conventions.csv"
    found: dict[tuple[str, str], Array] = {}
    if path.exists():
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        found = {(row["network"], row["convention"]): numbers(row["leading, mean"]) for row in rows}
    missing = [setting for setting in settings if (setting.name, next(reversed(CONVENTIONS))) not in found]
    data = characters(text, count) if missing else None
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not found:
            writer.writerow(("network", "convention", "leading, mean"))
        for setting in tqdm(missing, desc="networks"):
            network = Network(setting, data)
            network.load_state_dict(torch.load(folder / "networks" / f"{setting.name}.pt"))
            for name, values in spectra(network, data.validation.tensors[0][:SEQUENCES].float()).items():
                found[setting.name, name] = values
                writer.writerow((setting.name, name, " ".join(f"{value:.4g}" for value in values)))
            file.flush()
    return {name: np.array([found[setting.name, name] for setting in settings]) for name in CONVENTIONS}


def table(found: dict[str, Array], grid: Grid) -> list[tuple[object, ...]]:
    """Return the mean exponents of all networks, and what each convention says of the loss."""
    reference, rows = found["(h, c)"][:, 0], []
    for name, values in found.items():
        largest, mean = values[:, 0], values[:, -1]
        levels = float(largest.mean()), float(largest.mean() / BITS), float(mean.mean())
        agreement = rank_correlation(largest, reference)
        with_loss = rank_correlation(largest, grid.loss), *interval(largest, grid.loss)
        given = [grid.learning_rate, grid.dropout, *b_grid.bends(grid), grid.early_loss]
        partial = rank_correlation(largest, grid.loss, given), *interval(largest, grid.loss, given, 200)
        with_rate = rank_correlation(largest, grid.learning_rate)
        rows.append(
            (name, *levels, agreement, *with_loss, *partial, with_rate, rank_correlation(mean, grid.loss)),
        )
    return rows


def draw(found: dict[str, Array], grid: Grid, path: Path) -> None:
    """Draw the spectra of the best network, and the largest exponents of all against their losses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, values) in enumerate(found.items()):
        style = {"color": f"C{number // 2}", "alpha": 0.5 if number % 2 else 1.0}
        best = values[grid.loss.argmin(), :-1]
        left.plot(np.arange(1, len(best) + 1), best, ls="--" if number % 2 else "-", label=name, **style)
        right.plot(values[:, 0], grid.loss, "x" if number % 2 else "o", ms=7 if number % 2 else 4, label=name, **style)
    left.set(
        xlabel="index of the exponent",
        ylabel="exponent (nats per step)",
        title="leading exponents, the network of the lowest loss",
    )
    right.set(
        xlabel="largest exponent (nats per step)", ylabel="final validation loss", title="all networks of the grid"
    )
    left.axhline(0, color="grey", lw=0.8, ls=":")
    left.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    arguments = read(parser(__doc__))
    settings = b_grid.settings(arguments.size)
    runs = b_grid.trained(arguments)
    grid = b_grid.of_runs(runs)
    found = measured(settings, arguments.folder, arguments.text, b_grid.SIZES[arguments.size][4])
    header = (
        *("convention", "largest", "in bits", "mean", "rank correlation with (h, c)", "with the loss", "low", "high"),
        *("given settings and early loss", "its low", "its high", "with the learning rate", "mean with the loss"),
    )
    write(arguments.folder / "conventions_summary.csv", header, table(found, grid))
    draw(found, grid, arguments.folder / "conventions.png")


if __name__ == "__main__":
    main()
