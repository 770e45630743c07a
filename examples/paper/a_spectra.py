"""A: the whole spectrum of a character LSTM and a GRU while they train.

python examples/paper/a_spectra.py    # three minutes on one core
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from study import Epoch, Run, Setting, characters, parser, read, runs, save, write_table

from lightning_lyapunov import LyapunovMonitor

# Units, epochs, batch, characters of the text, exponents.
SIZES = {"fast": (8, 4, 20, 20_000, None), "small": (64, 12, 50, 200_000, None), "full": (512, 12, 100, None, None)}


def draw_spectra(axes: Axes, run: Run) -> None:
    """Draw value against index, the colour is the epoch, with a band of 1.96 standard errors."""
    measured = [epoch for epoch in run if len(epoch.spectrum)]
    for epoch in measured:
        colour, index = plt.cm.viridis(epoch.epoch / run[-1].epoch), np.arange(1, len(epoch.spectrum) + 1)
        axes.plot(index, epoch.spectrum, color=colour, label=f"epoch {epoch.epoch}")
        band = 1.96 * epoch.stderr
        axes.fill_between(index, epoch.spectrum - band, epoch.spectrum + band, color=colour, alpha=0.25, lw=0)
    axes.axhline(0, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="index of the exponent", ylabel="exponent (nats per step)")
    axes.legend(fontsize=8)


def draw_losses(axes: Axes, run: Run) -> None:
    """Draw the losses of each epoch, and the largest exponent on an axis of its own."""
    epochs = [epoch.epoch for epoch in run[1:]]
    axes.plot(epochs, [epoch.train_loss for epoch in run[1:]], label="training loss", color="tab:blue")
    axes.plot(epochs, [epoch.val_loss for epoch in run[1:]], label="validation loss", color="tab:orange")
    axes.set(xlabel="epoch", ylabel="loss (nats per character)")
    axes.legend(fontsize=8, loc=(0.6, 0.3))
    measured, right = [epoch for epoch in run if len(epoch.spectrum)], axes.twinx()
    largest, errors = zip(*((epoch.spectrum[0], 1.96 * epoch.stderr[0]) for epoch in measured), strict=True)
    right.errorbar([epoch.epoch for epoch in measured], largest, errors, color="black", marker="o", ms=3, capsize=2)
    right.set_ylabel("largest exponent, black (nats per step)")


def draw(done: dict[Setting, Run], path: Path) -> None:
    figure, rows = plt.subplots(len(done), 2, figsize=(10, 3.6 * len(done)), layout="constrained")
    for (left, right), (setting, run) in zip(rows, done.items(), strict=True):
        draw_spectra(left, run)
        draw_losses(right, run)
        left.set_title(f"{setting.cell}, {setting.units} units: {len(run[-1].spectrum)} exponents")
        right.set_title("its losses and its largest exponent")
    save(figure, path)


def values(epoch: Epoch) -> tuple[float, ...]:
    """Return the largest exponent and its error, mean and variance over the index, and the share above -0.1."""
    spectrum = epoch.spectrum
    numbers = spectrum[0], epoch.stderr[0], spectrum.mean(), spectrum.var(), (spectrum > -0.1).mean()
    return tuple(map(float, numbers))


def main() -> None:
    arguments = read(parser(__doc__))
    units, epochs, batch_size, count, exponents = SIZES[arguments.size]
    settings = [Setting(cell, units, 0.08, 1e-2, 0.0, epochs, batch_size) for cell in ("LSTM", "GRU")]
    done = runs(
        settings,
        lambda: characters(arguments.text, count),
        arguments.folder / "spectra.csv",
        lambda: LyapunovMonitor(every_n_epochs=2, num_exponents=exponents, num_sequences=10, log_spectrum=False),
    )
    rows = [
        (setting.cell, epoch.epoch, epoch.val_loss, *values(epoch))
        for setting, run in done.items()
        for epoch in run
        if len(epoch.spectrum)
    ]
    header = ("cell", "epoch", "val_loss", "largest", "stderr", "mean", "variance", "share_above_-0.1")
    write_table(arguments.folder / "spectra_summary.csv", header, rows)
    draw(done, arguments.folder / "spectra.png")


if __name__ == "__main__":
    main()
