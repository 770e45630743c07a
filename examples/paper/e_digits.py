"""E: an LSTM reads the rows of digits, from initial weights between -p and p. Accuracy against the largest exponent.

    python examples/paper/e_digits.py    # 18 networks, two minutes on one core

The digits are scikit-learn's, of 8 rows. Exponents are those along the rows of 13 digits, one after the other, 104
steps: a digit alone is too short for them.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import study
import torch
from sklearn.datasets import load_digits
from study import Array, Data, Network, Run, Setting, parser, rank_correlation, read, runs, save, write_table
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum

# Units, ranges, learning rates, epochs, batch.
RANGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIZES = {
    "fast": (8, (0.1, 3.0), (1e-2,), 1, 128),
    "small": (64, RANGES, (1e-3, 1e-2, 3e-2), 10, 128),
    "full": (512, RANGES, (1e-3, 1e-2, 3e-2), 10, 128),
}
SEQUENCES, DIGITS = 15, 13


def digits() -> Data:
    """Return the rows of digits, .8 to train."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images).view(-1, 8, 8).float() / 16
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    parts = order.split([count := len(rows) * 8 // 10, len(rows) - count])
    targets = torch.tensor(labels)
    return Data(*(TensorDataset(rows[part], targets[part]) for part in parts), 8, 10)


def spectrum(network: Network, data: Data) -> tuple[Array, Array]:
    """Return the leading exponents along digits that were not learned, and their standard errors."""
    rows = data.validation.tensors[0][: SEQUENCES * DIGITS].view(SEQUENCES, -1, data.inputs)
    spectra: Tensor = lyapunov_spectrum(network.rnn, rows, warmup=24, num_exponents=8)
    return spectra.mean(0).numpy(), (spectra.std(0) / math.sqrt(SEQUENCES)).numpy()


def train(setting: Setting, data: Data, monitor: LyapunovMonitor, bar: "tqdm[Any]") -> tuple[Run, Network]:
    """Train as elsewhere, but measure before and after, along longer sequences."""
    study.L.seed_everything(0, verbose=False)
    start = spectrum(Network(setting, data), data)
    run, network = study.train(setting, data, monitor, bar)
    run[0].spectrum, run[0].stderr = start
    run[-1].spectrum, run[-1].stderr = spectrum(network, data)
    return run, network


def draw(done: dict[Setting, Run], path: Path) -> None:
    """Draw the accuracy after training against the exponent before and after it, and against p."""
    figure, (before, after, ranges) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    for rate in sorted({setting.learning_rate for setting in done}):
        some = {setting: run for setting, run in done.items() if setting.learning_rate == rate}
        accuracies = [run[-1].val_accuracy for run in some.values()]
        for axes, epoch in ((before, 0), (after, -1)):
            exponents = [run[epoch].spectrum[0] for run in some.values()]
            axes.plot(exponents, accuracies, "o", label=f"learning rate {rate:g}", alpha=0.8)
            axes.axvline(0, color="grey", lw=0.8, ls=":")
        ranges.plot([setting.spread for setting in some], accuracies, "o-", alpha=0.8)
    before.set(xlabel="largest exponent before training (nats per step)", ylabel="accuracy on digits not learned")
    after.set(xlabel="largest exponent after training (nats per step)")
    ranges.set(xlabel="p, initial weights between ± p", xscale="log")
    before.legend(fontsize=8)
    save(figure, path)


def correlations(done: dict[Setting, Run]) -> list[tuple[object, ...]]:
    """Return the rank correlations of accuracy with the exponents, their distance from zero, and simpler numbers."""
    accuracy = study.np.array([run[-1].val_accuracy for run in done.values()])
    start, end = (study.np.array([run[epoch].spectrum[0] for run in done.values()]) for epoch in (0, -1))
    numbers = {
        "p": study.np.array([setting.spread for setting in done]),
        "learning rate": study.np.array([setting.learning_rate for setting in done]),
        "loss after the first epoch": study.np.array([run[1].val_loss for run in done.values()]),
        "largest exponent before": start,
        "its distance from 0 before": abs(start),
        "largest exponent after": end,
        "its distance from 0 after": abs(end),
    }
    return [
        (name, rank_correlation(value, accuracy), *study.interval(value, accuracy)) for name, value in numbers.items()
    ]


def main() -> None:
    arguments = read(parser(__doc__))
    units, ranges, rates, epochs, batch_size = SIZES[arguments.size]
    settings = [Setting("LSTM", units, spread, rate, 0.0, epochs, batch_size) for rate in rates for spread in ranges]
    # The monitor is not asked: it would follow the 8 rows of one digit. It measures once, at the first batch.
    monitor = lambda: LyapunovMonitor(every_n_epochs=10**6, num_exponents=1, log_spectrum=False)  # noqa: E731
    done = runs(settings, digits, arguments.folder / "digits.csv", monitor, train)
    rows = [
        (
            setting.learning_rate,
            setting.spread,
            run[-1].val_accuracy,
            float(run[0].spectrum[0]),
            float(run[-1].spectrum[0]),
        )
        for setting, run in done.items()
    ]
    header = ("learning rate", "p", "accuracy", "largest exponent before", "after")
    write_table(arguments.folder / "digits_summary.csv", header, rows)
    header = ("number", "rank correlation with accuracy", "low", "high")
    write_table(arguments.folder / "digits_correlations.csv", header, correlations(done))
    draw(done, arguments.folder / "digits.png")


if __name__ == "__main__":
    main()
