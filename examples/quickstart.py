"""Train a character model on real text and watch its Lyapunov spectrum.

    python examples/quickstart.py               # the source of Python's standard library, about a minute on two cores
    python examples/quickstart.py --text FILE   # a text of your own
    python examples/quickstart.py --unstable    # a run that becomes unstable, and is stopped by the rule

Everything that concerns the monitor is in `main`: the callback, the stopping rule, and what they measured.
"""

import argparse
import logging
import math
import sysconfig
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor, kaplan_yorke_dimension

STEPS_PER_EPOCH, BATCH_SIZE, WINDOW = 30, 32, 100


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of a text, each with the same stretch one character later."""

    def __init__(self, characters: Tensor, count: int) -> None:
        self.starts = torch.linspace(0, len(characters) - WINDOW - 2, count).long()
        self.characters = characters

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.characters[self.starts[index] : self.starts[index] + WINDOW + 1]
        return window[:-1], window[1:]


class CharacterModel(L.LightningModule):
    """An embedding, a recurrent layer, and a distribution over the next character."""

    def __init__(self, vocabulary: int, hidden: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.embedding = nn.Embedding(vocabulary, 64)
        self.rnn = nn.GRU(64, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        characters, following = batch
        states, _ = self.rnn(self.embedding(characters))
        return F.cross_entropy(self.head(states).flatten(0, 1), following.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class Losses(L.Callback):
    """Keeps the losses of each epoch, to print when the progress bar is gone."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.epochs.append((trainer.global_step - 1, float(metrics["train_loss"]), float(metrics["val_loss"])))


def standard_library() -> str:
    """Return the source of Python's standard library, the top level of it."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


def encode(text: str) -> tuple[Tensor, int]:
    """Return the text as numbers, and how many different characters it has; the rare ones share one number."""
    code = {character: index for index, character in enumerate(sorted(set(text) & set(map(chr, range(10, 127)))))}
    return torch.tensor([code.get(character, len(code)) for character in text]), len(code) + 1


def print_table(losses: Losses, monitor: LyapunovMonitor) -> None:
    """Print what was learned, and what the dynamics were, epoch by epoch."""
    history = monitor.history["rnn"]
    dimensions = kaplan_yorke_dimension(history["spectrum"])
    print("\nepoch  train loss  val loss    λ1 ± error (nats/step)  dimension  gradient gain (decades in 100 steps)")
    for row, (step, spectrum, stderr) in enumerate(
        zip(history["step"], history["spectrum"], history["stderr"], strict=True)
    ):
        epoch = next((index for index, losses_at in enumerate(losses.epochs) if losses_at[0] == step), None)
        learned = (
            "start                      "
            if epoch is None
            else "{:5d}  {:10.3f}  {:8.3f}".format(epoch, *losses.epochs[epoch][1:])
        )
        more = "≥" if dimensions[row] == len(spectrum) else ""
        print(
            f"{learned}    {spectrum[0]:+8.3f} ± {stderr[0]:.3f}        {more + format(dimensions[row], '.1f'):>9}  "
            f"{spectrum[0] * WINDOW / math.log(10):+9.1f}"
        )


def sentence(exponents: list[float], rule: InstabilityStopping, epochs: int) -> str:
    """Say what the dynamics did."""
    first, last = exponents[0], exponents[-1]
    change = f"λ1 went from {first:+.3f} to {last:+.3f} nats per step"
    if reason := rule.stopping_reason_message:
        spared = f"{epochs - rule.stopped_epoch - 1} of {epochs} epochs were spared"
        return f"The dynamics became unstable: {change}; {spared}.\n{reason}"
    if max(first, last) < 0:
        memory = f"a perturbation now lasts 1/|λ1| = {-1 / last:.0f} steps, at first {-1 / first:.0f}"
        return f"The dynamics stayed stable: {change}; {memory}."
    return f"The dynamics stayed stable, at the edge of chaos: {change}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file to learn (default: Python's standard library)")
    parser.add_argument("--unstable", action="store_true", help="learn far too fast, and be stopped by the rule")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    L.seed_everything(0, verbose=False)
    text = arguments.text.read_text(encoding="utf-8", errors="ignore") if arguments.text else standard_library()
    characters, vocabulary = encode(text)
    training, validation = characters.tensor_split([int(0.9 * len(characters))])
    print(f"{len(training):,} characters to learn from, {len(validation):,} to validate, {vocabulary} different ones")

    monitor, rule, losses = LyapunovMonitor(), InstabilityStopping(verbose=False), Losses()
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        callbacks=[monitor, rule, losses],
        logger=TensorBoardLogger("runs", name="unstable" if arguments.unstable else "quickstart"),
        accelerator="cpu",
        limit_train_batches=STEPS_PER_EPOCH,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        CharacterModel(vocabulary, hidden=256, learning_rate=0.2 if arguments.unstable else 3e-3),
        DataLoader(Windows(training, STEPS_PER_EPOCH * BATCH_SIZE * arguments.epochs), BATCH_SIZE, shuffle=True),
        DataLoader(Windows(validation, 4 * BATCH_SIZE), BATCH_SIZE),
    )
    print_table(losses, monitor)
    print("\n" + sentence(monitor.history["rnn"]["spectrum"][:, 0].tolist(), rule, arguments.epochs))
    page = Path("runs", "unstable.html" if arguments.unstable else "quickstart.html").resolve()
    monitor.report(page)
    print(f"\nThe dashboard:  tensorboard --logdir {page.parent}\nThe same on one page:  {page}")


if __name__ == "__main__":
    main()
