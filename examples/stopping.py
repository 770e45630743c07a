"""Compare stopping rules on a task: train a small sweep once, then replay each rule on what was recorded.

    python examples/stopping.py          # 45 runs, two to three minutes on one core
    python examples/stopping.py --fast   # 12 short runs

The runs are written to `runs/stopping`, one line each: a sweep that was cut short goes on where it ended, and another
rule costs no training. To check a task of your own, change `sequences` and `Recall`; to check a rule of your own, add
it to `RULES`. In the table, "saved" is the share of their epochs that a rule saves in the worse half of the runs, and
"stopped" is how many runs of the best quarter it stops.
"""

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_lyapunov import LyapunovMonitor
from lightning_lyapunov.confidence import student_t_quantile

FOLDER = Path("runs/stopping")
LENGTH, VALUES, UNITS, BATCH_SIZE, NOISE = 30, 2, 32, 32, 0.3


# The task and the sweep


@dataclass(frozen=True)
class Setting:
    """What differs from run to run: the recurrent weights are drawn with a standard deviation of gain / sqrt(units)."""

    cell: str
    learning_rate: float
    gain: float
    epochs: int


def settings(fast: bool) -> list[Setting]:
    """Return the sweep."""
    rates = (3e-3, 1e-1) if fast else (1e-3, 3e-3, 1e-2, 1e-1, 3e-1)
    gains, epochs = ((1.0, 4.0), 4) if fast else ((0.5, 1.0, 4.0), 8)
    return [Setting(*values, epochs) for values in product(("RNN", "GRU", "LSTM"), rates, gains)]


def sequences(num_batches: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return sequences of a value and then noise."""
    inputs = torch.randn(num_batches * BATCH_SIZE, LENGTH, VALUES, generator=torch.Generator().manual_seed(seed))
    inputs[:, 1:] *= NOISE
    return DataLoader(TensorDataset(inputs), BATCH_SIZE)


class Recall(L.LightningModule):
    """Says at the end of a sequence what its first input was. A loss of 1 is chance."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.rnn: nn.RNNBase = getattr(nn, setting.cell)(VALUES, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, VALUES)
        nn.init.normal_(self.rnn.weight_hh_l0, std=setting.gain / math.sqrt(UNITS))

    def loss(self, inputs: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.rnn(inputs)[0][:, -1]), inputs[:, 0])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.setting.learning_rate)


# What is recorded


@dataclass
class Trace:
    """A run: a value for each epoch. The first exponent is that after the first batch, before the first epoch ended."""

    setting: Setting
    exponents: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        return self.val_losses[-1] if math.isfinite(self.val_losses[-1]) else math.inf

    def bound(self, side: int) -> list[float]:
        """Return the upper (1) or lower (-1) bounds of the exponents with 95 % confidence, as the rule takes them."""
        quantile = student_t_quantile(0.95, 15)  # 16 sequences
        return [value + side * quantile * error for value, error in zip(self.exponents, self.errors, strict=True)]


class Record(L.Callback):
    """Notes the losses of each epoch."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trace.train_losses.append(float(trainer.callback_metrics["train_loss"]))
        self.trace.val_losses.append(float(trainer.callback_metrics["val_loss"]))


def train(setting: Setting) -> Trace:
    """Train to the end, without any rule."""
    L.seed_everything(0, verbose=False)
    trace, monitor = Trace(setting), LyapunovMonitor(warmup=10, log_spectrum=False)
    trainer = L.Trainer(
        max_epochs=setting.epochs,
        callbacks=[monitor, Record(trace)],
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Recall(setting), sequences(10, seed=1), sequences(4, seed=2))
    history = monitor.history["rnn"]
    trace.exponents, trace.errors = history["spectrum"][:, 0].tolist(), history["stderr"][:, 0].tolist()
    return trace


def recorded(path: Path) -> dict[Setting, Trace]:
    """Return the runs of a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    traces = [Trace(Setting(**row.pop("setting")), **row) for row in map(json.loads, lines)]
    return {trace.setting: trace for trace in traces}


def sweep(wanted: list[Setting], path: Path) -> list[Trace]:
    """Return the traces of all settings; what the file has not got is trained, and added to it."""
    done = recorded(path)
    print(f"{sum(setting in done for setting in wanted)} of {len(wanted)} runs are in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for setting in tqdm([setting for setting in wanted if setting not in done], desc="runs"):
            done[setting] = train(setting)
            file.write(json.dumps(asdict(done[setting])) + "\n")
            file.flush()
    return [done[setting] for setting in wanted]


# The rules: each returns for each run the epochs that it is trained for


Rule = Callable[[list[Trace]], list[int]]


def in_a_row(patience: int, *sides: Callable[[Trace], Iterator[bool]]) -> Rule:
    """Stop after so many measurements in a row on one side, or at one that is not finite."""

    def epochs(trace: Trace) -> int:
        counts = [0] * len(sides)
        for epoch, (exponent, *on) in enumerate(zip(trace.exponents, *(side(trace) for side in sides), strict=True)):
            counts = [count + 1 if here else 0 for count, here in zip(counts, on, strict=True)]
            if not math.isfinite(exponent) or max(counts, default=0) >= patience:
                return epoch
        return trace.setting.epochs

    return lambda traces: [epochs(trace) for trace in traces]


def above(threshold: float) -> Callable[[Trace], Iterator[bool]]:
    return lambda trace: (low > threshold for low in trace.bound(-1))


def below(threshold: float) -> Callable[[Trace], Iterator[bool]]:
    return lambda trace: (high < threshold for high in trace.bound(1))


def no_better(patience: int) -> Rule:
    """Stop as Lightning's `EarlyStopping("val_loss")`."""

    def epochs(trace: Trace) -> int:
        best, waited = math.inf, 0
        for epoch, loss in enumerate(trace.val_losses, 1):
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            if waited >= patience or not math.isfinite(loss):
                return epoch
        return trace.setting.epochs

    return lambda traces: [epochs(trace) for trace in traces]


def grown(factor: float) -> Rule:
    """Stop when the training loss is so many times that of the first epoch."""

    def epochs(trace: Trace) -> int:
        rising = (not loss <= factor * trace.train_losses[0] for loss in trace.train_losses)
        return next((epoch for epoch, is_high in enumerate(rising, 1) if is_high), trace.setting.epochs)

    return lambda traces: [epochs(trace) for trace in traces]


def halving(epoch: int) -> Rule:
    """Go on after an epoch with the better half of the runs."""

    def rule(traces: list[Trace]) -> list[int]:
        losses = [loss if math.isfinite(loss := trace.val_losses[epoch - 1]) else math.inf for trace in traces]
        middle = sorted(losses)[len(losses) // 2]
        return [trace.setting.epochs if loss < middle else epoch for trace, loss in zip(traces, losses, strict=True)]

    return rule


TWO_DECADES = 2 * math.log(10) / LENGTH
RULES: dict[str, Rule] = {
    "NaN alone": in_a_row(1),
    "InstabilityStopping()": in_a_row(2, above(TWO_DECADES)),
    "InstabilityStopping(lower_threshold=-1.0)": in_a_row(2, above(TWO_DECADES), below(-1.0)),
    "InstabilityStopping(threshold=0.0)": in_a_row(2, above(0.0)),
    "EarlyStopping, patience 5": no_better(5),
    "EarlyStopping, patience 3": no_better(3),
    "training loss above 1.5 x its start": grown(1.5),
    "the better half after 2 epochs": halving(2),
}


def table(traces: list[Trace]) -> str:
    """Return the rules with what they save and what they stop."""
    ranked = sorted(range(len(traces)), key=lambda index: traces[index].final_loss)
    best, worse = ranked[: len(ranked) // 4], ranked[len(ranked) // 2 :]
    lines = [f"{'rule':42} {'saved':>6}  stopped of the best {len(best)}"]
    for name, rule in RULES.items():
        left = [trace.setting.epochs - epochs for trace, epochs in zip(traces, rule(traces), strict=True)]
        saved = sum(left[index] for index in worse) / sum(traces[index].setting.epochs for index in worse)
        lines.append(f"{name:42} {saved:>6.0%}  {sum(left[index] > 0 for index in best)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smaller sweep of shorter runs")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    traces = sweep(settings(arguments.fast), FOLDER / "traces.jsonl")
    losses = sorted(trace.final_loss for trace in traces)
    print(f"\nfinal losses, where 1 is chance: best {losses[0]:.3f}, median {losses[len(losses) // 2]:.3f}")
    print(table(traces))


if __name__ == "__main__":
    main()
