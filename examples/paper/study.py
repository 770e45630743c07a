"""What the scripts of this folder share: data, model, the runs with their table, and rank correlations.

Networks are trained once: `runs` reads those that a CSV file holds, trains the others, and adds them. A row is an epoch
of a run. Spectra are in nats per step.
"""

import argparse
import csv
import io
import logging
import math
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_lyapunov import LyapunovMonitor

mpl.use("agg")

Array = np.ndarray[Any, np.dtype[Any]]
LENGTH, BITS = 100, math.log(2)


# What is asked for on the command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all scripts have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = options.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_true", help="seconds: to see that it works")
    size.add_argument("--full", action="store_true", help="the sizes of the paper: for a GPU")
    options.add_argument("--folder", type=Path, default=Path("runs/paper"), help="where tables and figures are")
    options.add_argument("--text", type=Path, help="what to learn; by default the source of the standard library")
    return options


def read(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what was written, with `size`; small and fast runs have a folder each."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    arguments = options.parse_args()
    arguments.size = "fast" if arguments.fast else "full" if arguments.full else "small"
    if arguments.size != "small":
        arguments.folder /= arguments.size
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return arguments


# Data


def standard_library() -> str:
    """Return the source of Python's standard library, the top level of it."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


@dataclass
class Data:
    """Sequences to learn and to validate with, and the numbers of inputs and outputs."""

    training: TensorDataset
    validation: TensorDataset
    inputs: int
    outputs: int


def characters(path: Path | None, count: int | None) -> Data:
    """Return a text in stretches of 100 characters, .8 to train and .1 to validate; rare characters share a number."""
    text = (path.read_text(encoding="utf-8") if path else standard_library())[:count]
    code = {character: index for index, character in enumerate(sorted(set(text) & set(map(chr, range(10, 127)))))}
    numbers = torch.tensor([code.get(character, len(code)) for character in text])
    stretches = torch.stack((numbers[:-1], numbers[1:])).unfold(1, LENGTH, LENGTH).movedim(1, 0)
    training, validation, _ = stretches.split(
        [part := len(stretches) * 8 // 10, part // 8, len(stretches) - part - part // 8]
    )
    parts = (TensorDataset(F.one_hot(part[:, 0], len(code) + 1).byte(), part[:, 1]) for part in (training, validation))
    return Data(*parts, len(code) + 1, len(code) + 1)


# The model, and how it is trained


@dataclass(frozen=True)
class Setting:
    """What differs from run to run: all weights are drawn uniformly from ± spread."""

    cell: str
    units: int
    spread: float
    learning_rate: float
    dropout: float
    epochs: int
    batch_size: int

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


class Network(L.LightningModule):
    """One recurrent layer without biases, dropout, and a distribution over characters or, at the end, over classes."""

    def __init__(self, setting: Setting, data: Data) -> None:
        super().__init__()
        self.setting = setting
        self.rnn: nn.RNNBase = getattr(nn, setting.cell)(data.inputs, setting.units, batch_first=True, bias=False)
        self.dropout, self.head = nn.Dropout(setting.dropout), nn.Linear(setting.units, data.outputs)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -setting.spread, setting.spread)

    def loss(self, batch: list[Tensor], name: str) -> Tensor:
        inputs, targets = batch
        states = self.rnn(inputs.float())[0]
        logits = self.head(self.dropout(states if targets.ndim == 2 else states[:, -1:])).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten())
        accuracy = (logits.argmax(-1) == targets.flatten()).float().mean()
        self.log_dict({f"{name}_loss": loss, f"{name}_accuracy": accuracy}, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch, "val")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), self.setting.learning_rate)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.95 ** max(0, epoch - 9))
        return {"optimizer": optimizer, "lr_scheduler": decay}


@dataclass
class Epoch:
    """A row of a table: epoch 0 is that after the first batch. What was not measured is empty."""

    epoch: int
    train_loss: float = math.nan
    val_loss: float = math.nan
    val_accuracy: float = math.nan
    spectrum: Array = field(default_factory=lambda: np.empty(0))
    stderr: Array = field(default_factory=lambda: np.empty(0))


Run = list[Epoch]


class Record(L.Callback):
    """Notes the losses of each epoch, and moves the progress bar."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self.bar, self.run = bar, [Epoch(0)]
        self.ends = [0]  # the steps that the monitor names

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "val_loss", "val_accuracy")}
        self.run.append(Epoch(trainer.current_epoch + 1, **values))
        self.ends.append(trainer.global_step - 1)
        self.bar.update()
        self.bar.set_postfix(val_loss=f"{values['val_loss']:.3f}")


def train(setting: Setting, data: Data, monitor: LyapunovMonitor, bar: "tqdm[Any]") -> tuple[Run, Network]:
    """Train a network to the end. Return its epochs, with the spectra of those that the monitor measured."""
    L.seed_everything(0, verbose=False)
    record, network = Record(bar), Network(setting, data)
    trainer = L.Trainer(
        max_epochs=setting.epochs,
        callbacks=[monitor, record],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    batches = DataLoader(data.training, setting.batch_size, shuffle=True, drop_last=True)
    trainer.fit(network, batches, DataLoader(data.validation, setting.batch_size))
    history = monitor.history["rnn"]
    for step, spectrum, stderr in zip(*(history[key] for key in ("step", "spectrum", "stderr")), strict=True):
        epoch = record.run[record.ends.index(int(step))]
        epoch.spectrum, epoch.stderr = spectrum.numpy(), stderr.numpy()
    return record.run, network.cpu()


# The table of runs


def numbers(text: str) -> Array:
    return np.array([float(number) for number in text.split()])


def recorded(path: Path) -> dict[Setting, Run]:
    """Return the runs of a table that came to their end."""
    runs: dict[Setting, Run] = {}
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    for row in rows:
        words = [str if entry.type is str else int if entry.type is int else float for entry in fields(Setting)]
        setting = Setting(*(kind(row[entry.name]) for kind, entry in zip(words, fields(Setting), strict=True)))
        losses = [float(row[name]) for name in ("train_loss", "val_loss", "val_accuracy")]
        epoch = Epoch(int(row["epoch"]), *losses, numbers(row["spectrum"]), numbers(row["stderr"]))
        runs[setting] = [*(runs.get(setting, []) if epoch.epoch else []), epoch]
    return {setting: run for setting, run in runs.items() if run[-1].epoch == setting.epochs}


def add(path: Path, setting: Setting, run: Run) -> None:
    """Add a run to a table."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow([entry.name for kind in (Setting, Epoch) for entry in fields(kind)])
        for epoch in run:
            losses = [f"{value:.5g}" for value in (epoch.train_loss, epoch.val_loss, epoch.val_accuracy)]
            spectrum, stderr = (f"{value:.4g}" for value in epoch.spectrum), (f"{value:.2g}" for value in epoch.stderr)
            row = [*asdict(setting).values(), epoch.epoch, *losses, " ".join(spectrum), " ".join(stderr)]
            writer.writerow(row)


def runs(
    settings: Sequence[Setting],
    data: Callable[[], Data],
    path: Path,
    monitor: Callable[[], LyapunovMonitor],
    train: Callable[[Setting, Data, LyapunovMonitor, "tqdm[Any]"], tuple[Run, Network]] = train,
) -> dict[Setting, Run]:
    """Return the runs of all settings; what the table has not got is trained, and added to it.

    The weights of the trained networks are written beside the table, to `networks`.
    """
    done = recorded(path)
    missing = [setting for setting in settings if setting not in done]
    print(f"{len(settings) - len(missing)} of {len(settings)} runs are in {path}")
    if missing:
        (path.parent / "networks").mkdir(exist_ok=True)
        loaded = data()
        with tqdm(total=sum(setting.epochs for setting in missing), unit="epoch") as bar:
            for setting in missing:
                bar.set_description(setting.name)
                done[setting], network = train(setting, loaded, monitor(), bar)
                torch.save(network.state_dict(), path.parent / "networks" / f"{setting.name}.pt")
                add(path, setting, done[setting])
    return {setting: done[setting] for setting in settings}


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table of results, and print it."""
    words = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *words])
    widths = [max(map(len, column)) for column in zip(header, *words, strict=True)]
    for row in [header, *words]:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG of 128 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


# Rank correlations


def ranks(values: Array) -> Array:
    """Return the ranks of values from 1, equal ones with their mean; NaN, a run that diverged, is the largest."""
    values = np.nan_to_num(np.asarray(values, dtype=float), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def rank_correlation(x: Array, y: Array, given: Sequence[Array] = ()) -> float:
    """Return Spearman's correlation, or the partial one: that of what is left of the ranks after a linear fit."""
    controls = np.stack([np.ones(len(x)), *map(ranks, given)], 1)
    left = [rank - controls @ np.linalg.lstsq(controls, rank, rcond=None)[0] for rank in (ranks(x), ranks(y))]
    scale = math.sqrt((left[0] @ left[0]) * (left[1] @ left[1]))
    return float(left[0] @ left[1] / scale) if scale > 1e-9 * len(x) ** 3 else math.nan


def interval(x: Array, y: Array, given: Sequence[Array] = (), draws: int = 1000) -> tuple[float, float]:
    """Return the 95 % interval of a rank correlation, partial or not, from resampled networks; NaN if it has none."""
    picks = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    values = [rank_correlation(x[pick], y[pick], [control[pick] for control in given]) for pick in picks]
    finite = [value for value in values if math.isfinite(value)]
    low, high = np.percentile(finite, [2.5, 97.5]) if finite else (math.nan, math.nan)
    return float(low), float(high)


def predicted(blocks: Sequence[Array], target: Array, folds: int = 10, repeats: int = 10) -> Array:
    """Return the ranks of a target as a ridge regression predicts them, each network by fits to the other folds.

    Each block, a feature or a whole spectrum, has the same weight. The penalty is chosen by generalised
    cross-validation within the fit. Folds are drawn several times; the predictions are the means.
    """
    scaled = [(block - block.mean(0)) / np.where(block.std(0) > 1e-9, block.std(0), 1) for block in blocks]
    features = np.concatenate([block / math.sqrt(block.shape[1]) for block in scaled], 1)
    kernel, goal, guess = features @ features.T, ranks(target), np.zeros(len(target))
    generator = np.random.default_rng(0)
    for _ in range(repeats):
        fold = generator.permutation(len(target)) % folds
        for held in (fold == number for number in range(min(folds, len(target)))):
            weights, centre = ridge(kernel[np.ix_(~held, ~held)], goal[~held])
            guess[held] += (centre + kernel[np.ix_(held, ~held)] @ weights) / repeats
    return guess


def ridge(kernel: Array, goal: Array) -> tuple[Array, float]:
    """Return the weights of networks and the mean of a ridge regression, of the penalty with the lowest score."""
    centre = float(goal.mean())
    values, vectors = np.linalg.eigh(kernel)
    values, projected = values.clip(0), vectors.T @ (goal - centre)

    def score(penalty: float) -> float:
        left = penalty / (values + penalty)
        return float(((left * projected) ** 2).sum() / max(left.sum(), 1e-9) ** 2)

    return vectors @ (projected / (values + min(np.logspace(-3, 2, 11), key=score))), centre
