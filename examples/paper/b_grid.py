"""B: a grid of dropout and learning rate. What does the spectrum say of the final loss, beside simpler numbers?

    python examples/paper/b_grid.py                    # 30 LSTMs, a quarter of an hour on one core
    python examples/paper/b_grid.py --grid FILE.npz    # the same table from somebody else's grid

FILE holds `dropout` and `learning_rate` (networks), `val_loss` (networks, epochs), and for an early and the last epoch
`e<epoch>_mean` (networks, exponents), the exponents in bits per step: so are those of the paper's authors.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from study import BITS, Array, Run, Setting, characters, interval, parser, predicted, rank_correlation, read, runs, save
from study import write_table as write

from lightning_lyapunov import LyapunovMonitor

# Units, epochs, those between two measurements, batch, characters of the text, numbers of dropouts and of learning
# rates, highest rate. The paper ends at 0.01. Ten times that is added, where training becomes unstable.
SIZES = {
    "fast": (8, 2, 1, 20, 20_000, 2, 3, 1e-1),
    "small": (64, 9, 3, 50, 200_000, 5, 6, 1e-1),
    "full": (512, 15, 5, 100, None, 11, 10, 1e-2),
}
SETTINGS, EARLY = ("learning rate", "dropout"), "early validation loss"


@dataclass
class Grid:
    """Networks: two settings, the final loss, the early one, and early and late spectra in nats per step."""

    learning_rate: Array
    dropout: Array
    loss: Array
    early_loss: Array
    spectra: dict[int, Array]


def settings(size: str) -> list[Setting]:
    """Return the grid."""
    units, epochs, _, batch_size, _, dropouts, rates, highest = SIZES[size]
    pairs = product(
        np.linspace(0, 0.2, dropouts).round(4).tolist(), np.geomspace(1e-3, highest, rates).round(5).tolist()
    )
    return [Setting("LSTM", units, 0.08, rate, dropout, epochs, batch_size) for dropout, rate in pairs]


def trained(arguments: argparse.Namespace) -> dict[Setting, Run]:
    """Return the runs of the grid, from its table as far as that has them. The first measured epoch is early."""
    return runs(
        settings(arguments.size),
        lambda: characters(arguments.text, SIZES[arguments.size][4]),
        arguments.folder / "grid.csv",
        lambda: LyapunovMonitor(
            every_n_epochs=SIZES[arguments.size][2], num_exponents=None, num_sequences=10, log_spectrum=False
        ),
    )


def of_runs(done: dict[Setting, Run]) -> Grid:
    measured = [epoch.epoch for epoch in next(iter(done.values())) if len(epoch.spectrum) and epoch.epoch]
    early, late = measured[0], measured[-1]
    rate, dropout = np.array([(setting.learning_rate, setting.dropout) for setting in done]).T
    losses = np.array([[epoch.val_loss for epoch in run] for run in done.values()])
    spectra = {epoch: np.array([run[epoch].spectrum for run in done.values()]) for epoch in (early, late)}
    return Grid(rate, dropout, losses[:, late], losses[:, early], spectra)


def of_file(path: Path) -> Grid:
    with np.load(path) as file:
        epochs = sorted(int(name[1:-5]) for name in file.files if name.startswith("e") and name.endswith("_mean"))
        spectra = {epoch: file[f"e{epoch}_mean"].astype(float) * BITS for epoch in epochs}
        losses = file["val_loss"].astype(float)
        return Grid(file["learning_rate"], file["dropout"], losses[:, -1], losses[:, epochs[0] - 1], spectra)


# The table


def features(spectra: Array) -> dict[str, Array]:
    """Return what is read off a spectrum; 3 bits is the authors' limit, 0.1 nats a memory of ten steps."""
    return {
        "largest exponent": spectra.max(1),
        "mean exponent": spectra.mean(1),
        "variance over index": spectra.var(1),
        "share above -3 bits": (spectra > -3 * BITS).mean(1),
        "share within 0.1 nats of 0": (np.abs(spectra) < 0.1).mean(1),
    }


def single_numbers(grid: Grid) -> dict[str, Array]:
    read_off = {
        f"{name}, epoch {epoch}": value
        for epoch, spectra in grid.spectra.items()
        for name, value in features(spectra).items()
    }
    return {"learning rate": grid.learning_rate, "dropout": grid.dropout, EARLY: grid.early_loss, **read_off}


def predictions(grid: Grid) -> dict[str, Array]:
    """Return the final loss as it is predicted for networks that were left out of the fit."""
    rate, dropout = np.log(grid.learning_rate), grid.dropout
    rate, dropout = rate - rate.mean(), dropout - dropout.mean()
    known = [part[:, None] for part in (rate, dropout, rate**2, dropout**2, rate * dropout)]
    early = [grid.early_loss[:, None]]
    spectra = {f"spectrum of epoch {epoch}": [spectrum] for epoch, spectrum in grid.spectra.items()}
    first = next(iter(spectra))
    blocks = {
        "settings": known,
        "settings, early loss": known + early,
        **spectra,
        f"settings, early loss, {first}": known + early + spectra[first],
    }
    return {f"fit to {name}": predicted(block, grid.loss) for name, block in blocks.items()}


def bends(grid: Grid) -> list[Array]:
    """Return how far the settings are from the middle of the grid, because the best may be inside of it."""
    return [abs(part - part.mean()) for part in (np.log(grid.learning_rate), grid.dropout)]


def correlations(grid: Grid, draws: int = 1000) -> list[tuple[object, ...]]:
    """Return for each number its rank correlation with the final loss and the partial ones, with intervals."""
    rows: list[tuple[object, ...]] = []
    settings = {"learning rate": grid.learning_rate, "dropout": grid.dropout}
    for name, value in {**single_numbers(grid), **predictions(grid)}.items():
        row = (name, rank_correlation(value, grid.loss), *interval(value, grid.loss, draws=draws))
        if name in settings or name.startswith("fit to settings"):
            rows.append((*row, *("",) * 4))
            continue
        given = [*settings.values(), *bends(grid)]
        with_early = () if name == EARLY else (*given, grid.early_loss)
        last = (rank_correlation(value, grid.loss, with_early), *interval(value, grid.loss, with_early, draws))
        rows.append((*row, rank_correlation(value, grid.loss, given), *(last if with_early else ("",) * 3)))
    return rows


HEADER = (
    *("number", "rank correlation", "low", "high"),
    *("given settings", "given settings and early loss", "its low", "its high"),
)


# The figure


def draw_map(axes: Axes, grid: Grid, values: Array, title: str) -> None:
    """Draw a value for each network."""
    rates, dropouts = np.unique(grid.learning_rate), np.unique(grid.dropout)
    table = np.full((len(dropouts), len(rates)), np.nan)
    table[np.searchsorted(dropouts, grid.dropout), np.searchsorted(rates, grid.learning_rate)] = values
    high = np.percentile(values[np.isfinite(values)], 90)  # a run that failed would take all colours
    image = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmax=high)
    axes.set_xticks(range(len(rates)), [f"{rate:.2g}" for rate in rates], rotation=90, fontsize=8)
    axes.set_yticks(range(len(dropouts)), [f"{dropout:.2f}" for dropout in dropouts], fontsize=8)
    axes.set(xlabel="learning rate", ylabel="dropout", title=title)
    axes.figure.colorbar(image, ax=axes, extend="max")


def draw_correlations(axes: Axes, rows: list[tuple[object, ...]]) -> None:
    """Draw each rank correlation with its interval: grey without the spectrum, blue with it."""
    for place, (name, value, low, high, *_) in enumerate(reversed(rows)):
        colour = "tab:blue" if "epoch" in str(name) else "black"
        axes.plot([low, high], [place, place], color=colour, lw=2)
        axes.plot([value], [place], "o", color=colour, ms=4)
    axes.set_yticks(range(len(rows)), [str(row[0]) for row in reversed(rows)], fontsize=8)
    axes.axvline(0, color="grey", lw=0.8, ls=":")
    axes.set(xlim=(-1.02, 1.02), xlabel="rank correlation with the final validation loss")
    axes.set_title("black: without the spectrum, blue: from it", fontsize=10)


def draw(grid: Grid, rows: list[tuple[object, ...]], path: Path) -> None:
    figure = plt.figure(figsize=(12, 6.5), layout="constrained")
    (left, right) = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    above, below = left.subplots(2, 1)
    last, spectra = max(grid.spectra.items())
    draw_map(above, grid, grid.loss, "final validation loss")
    draw_map(below, grid, spectra.max(1), f"largest exponent, epoch {last} (nats per step)")
    draw_correlations(right.subplots(), rows)
    save(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--grid", type=Path, help="a grid that was trained elsewhere")
    arguments = read(options)
    grid = of_file(arguments.grid) if arguments.grid else of_runs(trained(arguments))
    rows = correlations(grid, draws=50 if arguments.fast else 1000)
    name = f"grid_{arguments.grid.stem}" if arguments.grid else "grid"
    write(arguments.folder / f"{name}_correlations.csv", HEADER, rows)
    draw(grid, rows, arguments.folder / f"{name}.png")


if __name__ == "__main__":
    main()
