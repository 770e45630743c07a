"""C: initial weights between -p and p, LSTM and GRU of several sizes. Is the best p where the exponent crosses zero?

    python examples/paper/c_ranges.py    # 28 networks, five minutes on one core

A network of the paper's 512 units and p = 0.24 is as strong as one of 64 units and p = 0.68: p √units counts. So
smaller networks have larger p.
"""

import math
from itertools import groupby, product
from pathlib import Path

import matplotlib.pyplot as plt
from study import Run, Setting, characters, parser, read, runs, save, write_table

from lightning_lyapunov import LyapunovMonitor

# Units, ranges, learning rate, epochs, batch, characters of the text.
SIZES = {
    "fast": ((4, 8), (0.1, 3.0), 1e-2, 2, 20, 20_000),
    "small": ((32, 64), (0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56), 1e-2, 3, 50, 200_000),
    "full": ((64, 128, 256, 512), (0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.64, 1.28), 2e-3, 15, 128, None),
}


def crossing(ranges: list[float], exponents: list[float]) -> float:
    """Return the range at which the exponent first crosses zero from below, NaN if it does not; linear in log p."""
    for index in range(len(ranges) - 1):
        low, high = exponents[index : index + 2]
        if low < 0 <= high:
            return math.exp(math.log(ranges[index]) + low / (low - high) * math.log(ranges[index + 1] / ranges[index]))
    return math.nan


def curves(done: dict[Setting, Run]) -> dict[tuple[str, int], list[tuple[Setting, Run]]]:
    """Return the runs of each cell and size, by range."""
    return {key: list(pairs) for key, pairs in groupby(done.items(), lambda pair: (pair[0].cell, pair[0].units))}


def summary(pairs: list[tuple[Setting, Run]]) -> tuple[float, ...]:
    """Return the best range, its loss and exponents before and after, and where the exponents cross zero."""
    ranges = [setting.spread for setting, _ in pairs]
    best, run = min(pairs, key=lambda pair: pair[1][-1].val_loss)
    starts, ends = ([float(run[epoch].spectrum[0]) for _, run in pairs] for epoch in (0, -1))
    measured = float(run[0].spectrum[0]), float(run[-1].spectrum[0])
    return best.spread, run[-1].val_loss, *measured, crossing(ranges, starts), crossing(ranges, ends)


def draw(done: dict[Setting, Run], path: Path) -> None:
    """Draw exponents and loss against p; a dot is the best p, a vertical line where the first exponent crosses zero."""
    figure, rows = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    for row, cell in zip(rows, ("LSTM", "GRU"), strict=True):
        sizes = {units: pairs for (name, units), pairs in curves(done).items() if name == cell}
        for number, (units, pairs) in enumerate(sizes.items()):
            colour, ranges = f"C{number}", [setting.spread for setting, _ in pairs]
            best, _, start, _, zero, _ = summary(pairs)
            row[0].plot(ranges, [run[0].spectrum[0] for _, run in pairs], color=colour, label=f"{units} units")
            row[0].plot(ranges, [run[-1].spectrum[0] for _, run in pairs], color=colour, ls="--")
            row[0].plot([best], [start], "o", color=colour)
            losses = [run[-1].val_loss for _, run in pairs]
            row[1].plot(ranges, losses, color=colour, label=f"{units} units")
            row[1].plot([best], [min(losses)], "o", color=colour)
            for axes in row:
                axes.axvline(zero, color=colour, lw=0.8, ls=":")
        row[0].axhline(0, color="grey", lw=0.8)
        row[0].set(ylabel="largest exponent (nats per step)", title=f"{cell}: at the first batch, dashed: at the end")
        row[1].set(ylabel="validation loss at the end", title=f"{cell}: dot, the best p; dotted, zero at the start")
        row[1].set_yscale("log")
        row[1].yaxis.set_major_formatter("{x:g}")
        row[1].yaxis.set_minor_formatter("{x:g}")
        for axes in row:
            axes.set(xscale="log", xlabel="p, initial weights between ± p")
            axes.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    arguments = read(parser(__doc__))
    sizes, ranges, rate, epochs, batch_size, count = SIZES[arguments.size]
    settings = [
        Setting(cell, units, spread, rate, 0.1, epochs, batch_size)
        for cell, units, spread in product(("LSTM", "GRU"), sizes, ranges)
    ]
    done = runs(
        settings,
        lambda: characters(arguments.text, count),
        arguments.folder / "ranges.csv",
        lambda: LyapunovMonitor(every_n_epochs=epochs, num_exponents=8, num_sequences=10, log_spectrum=False),
    )
    header = ("cell", "units", "best p", "its loss", "its exponent at the start", "at the end")
    rows = [(*key, *summary(pairs)) for key, pairs in curves(done).items()]
    write_table(arguments.folder / "ranges_summary.csv", (*header, "zero at the start", "zero at the end"), rows)
    draw(done, arguments.folder / "ranges.png")


if __name__ == "__main__":
    main()
