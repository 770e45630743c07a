"""Five recurrent networks in trouble, each beside the same network with the trouble remedied.

    python examples/remedies.py    # two minutes on one core

Each is shown a value, then 59 steps of noise, and says at the end what the value was. A loss of 1 is chance. The page
`reading_the_dashboard.md` tells what to see, with the figures of such a run. The curves are written to `runs/remedies`,
anew at every call, and a picture of them beside. The gain is in decades, over the 60 steps of a sequence.
"""

import argparse
import logging
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_lyapunov import GradientFlossing, InstabilityStopping, LyapunovMonitor

LENGTH, VALUES, UNITS, BATCH_SIZE, NOISE = 60, 2, 64, 32, 0.3
FOLDER = Path("runs/remedies")

relu_rnn = partial(nn.RNN, nonlinearity="relu")
momentum = partial(torch.optim.SGD, momentum=0.9)
adam = torch.optim.Adam


# What is done to a layer before it is trained


def leave(rnn: nn.RNNBase) -> None:
    """Keep the weights that PyTorch draws."""


def identity(rnn: nn.RNNBase) -> None:
    """Start where nothing grows or fades as long as a ReLU is open (Le, Jaitly and Hinton, 2015)."""
    nn.init.eye_(rnn.weight_hh_l0)
    nn.init.zeros_(rnn.bias_ih_l0)
    nn.init.zeros_(rnn.bias_hh_l0)


def strong(rnn: nn.RNNBase) -> None:
    """Draw weights three times as strong as the edge of chaos (Sompolinsky, Crisanti and Sommers, 1988)."""
    nn.init.normal_(rnn.weight_hh_l0, std=3 / math.sqrt(rnn.hidden_size))


def rescaled(rnn: nn.RNNBase) -> None:
    """Draw the strong weights, and scale them to a spectral radius of 1.2: the input tames what is above 1."""
    strong(rnn)
    with torch.no_grad():
        rnn.weight_hh_l0 *= 1.2 / torch.linalg.eigvals(rnn.weight_hh_l0).abs().max()


def orthogonal(rnn: nn.RNNBase) -> None:
    nn.init.orthogonal_(rnn.weight_hh_l0)


def keep(rnn: nn.RNNBase) -> None:
    """Open the gate that keeps the state: an LSTM's forget gate, a GRU's update gate, the second block of each."""
    with torch.no_grad():
        rnn.bias_ih_l0[rnn.hidden_size : 2 * rnn.hidden_size] = 3.0


# What is run


@dataclass(frozen=True)
class Run:
    """A layer, what is done to it, and how it learns."""

    group: str
    name: str
    layer: Callable[..., nn.RNNBase]
    prepare: Callable[[nn.RNNBase], None]
    optimizer: Callable[..., torch.optim.Optimizer]
    learning_rate: float
    clip: float | None = None
    stop: bool = True
    floss: bool = False


# The trouble comes first in each group, and a remedy changes one thing. The chaotic one goes on to its end, so that its
# loss can be compared.
RUNS = [
    Run("1-exploding", "rate-too-high", relu_rnn, identity, momentum, 3e-2),
    Run("1-exploding", "lower-rate", relu_rnn, identity, momentum, 1e-4),
    Run("1-exploding", "clipped", relu_rnn, identity, momentum, 3e-2, clip=0.1),
    Run("2-chaotic", "strong-weights", nn.RNN, strong, adam, 1e-3, clip=0.1, stop=False),
    Run("2-chaotic", "rescaled", nn.RNN, rescaled, adam, 1e-3, clip=0.1),
    Run("2-chaotic", "stopped", nn.RNN, strong, adam, 1e-3, clip=0.1),
    Run("2-chaotic", "strong-flossed", nn.RNN, strong, adam, 1e-3, clip=0.1, floss=True),
    Run("3-fading", "default-weights", nn.RNN, leave, adam, 1e-3, clip=0.1),
    Run("3-fading", "orthogonal", nn.RNN, orthogonal, adam, 1e-3, clip=0.1),
    Run("3-fading", "default-flossed", nn.RNN, leave, adam, 1e-3, clip=0.1, floss=True),
    Run("4-lstm", "default-biases", nn.LSTM, leave, adam, 3e-3, clip=0.1),
    Run("4-lstm", "forget-bias-3", nn.LSTM, keep, adam, 3e-3, clip=0.1),
    Run("4-lstm", "lstm-flossed", nn.LSTM, leave, adam, 3e-3, clip=0.1, floss=True),
    Run("5-gru", "default-biases", nn.GRU, leave, adam, 3e-3, clip=0.1),
    Run("5-gru", "update-bias-3", nn.GRU, keep, adam, 3e-3, clip=0.1),
    Run("5-gru", "gru-flossed", nn.GRU, leave, adam, 3e-3, clip=0.1, floss=True),
]


class Recall(L.LightningModule):
    """Says at the end of a sequence what its first input was."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.rnn = run.layer(VALUES, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, VALUES)
        run.prepare(self.rnn)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        states, _ = self.rnn(inputs)
        loss = F.mse_loss(self.head(states[:, -1]), inputs[:, 0])
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.run.optimizer(self.parameters(), self.run.learning_rate)


@dataclass(frozen=True)
class Result:
    """What was measured: the loss of each batch, the largest exponent and its error at some, the gain at the end."""

    run: Run
    losses: list[float]
    steps: Tensor
    exponents: Tensor
    stderr: Tensor
    log10_gradient_gain: float
    stopped: bool

    def row(self) -> str:
        first, last = (f"{self.exponents[index]:+.3f} ± {self.stderr[index]:.3f}" for index in (0, -1))
        recent = self.losses[-30:]
        stopped = f"at step {self.steps[-1]}" if self.stopped else "no"
        return (
            f"{self.run.group:12} {self.run.name:16} {first:>15} {last:>18} {self.log10_gradient_gain:>+10.1f}"
            f" {sum(recent) / len(recent):>9.3f}  {stopped}"
        )


def remembering(num_batches: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return sequences of a value and then noise, each to be seen once: the loss is that on new ones."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_batches * BATCH_SIZE, LENGTH, VALUES, generator=generator)
    inputs[:, 1:] *= NOISE
    return DataLoader(TensorDataset(inputs), BATCH_SIZE)


def train(run: Run, data: DataLoader[tuple[Tensor, ...]], seed: int) -> Result:
    L.seed_everything(seed, verbose=False)
    model = Recall(run)
    # The sequences are short: 20 steps of warm-up leave 40 to average.
    monitor = LyapunovMonitor(every_n_train_steps=20, warmup=20)
    rule = InstabilityStopping(verbose=False)
    callbacks = [*([GradientFlossing()] if run.floss else []), monitor, *([rule] if run.stop else [])]
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        logger=TensorBoardLogger(FOLDER, name=run.group, version=run.name),
        gradient_clip_val=run.clip,
        accelerator="cpu",
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    history = monitor.history["rnn"]
    return Result(
        run=run,
        losses=model.losses,
        steps=history["step"],
        exponents=history["spectrum"][:, 0],
        stderr=history["stderr"][:, 0],
        log10_gradient_gain=float(trainer.callback_metrics["lyapunov/rnn/log10_gradient_gain"]),
        stopped=bool(rule.stopping_reason_message),
    )


def draw_group(above: Any, below: Any, results: list[Result]) -> None:
    """Draw the largest exponent above and the loss below; a cross is where the rule stopped a run."""
    for result, colour in zip(results, ("tab:red", "tab:blue", "tab:green", "tab:purple"), strict=False):
        above.plot(result.steps, result.exponents, color=colour, label=result.run.name)
        if result.stopped:
            last = result.exponents.isfinite().nonzero()[-1]
            above.plot(result.steps[last], result.exponents[last], "X", color=colour)
        losses = torch.tensor(result.losses).unfold(0, 10, 10).mean(-1)
        below.plot(range(5, 5 + 10 * len(losses), 10), losses, color=colour)
    above.axhline(0, color="0.6", linewidth=1)
    below.axhline(1, color="0.6", linewidth=1)
    above.set(title=results[0].run.group, ylim=(-0.8, 0.4))
    below.set(xlabel="training step", ylim=(0, 1.5))
    above.legend(loc="lower right", fontsize="small")


def draw(results: list[Result], path: Path) -> None:
    """Draw a column for each group, the trouble in red."""
    from matplotlib import pyplot

    groups = [list(members) for _, members in groupby(results, key=lambda result: result.run.group)]
    figure, axes = pyplot.subplots(2, len(groups), figsize=(14, 6), sharex=True, sharey="row", layout="constrained")
    for (above, below), members in zip(axes.T, groups, strict=True):
        draw_group(above, below, members)
    axes[0, 0].set_ylabel("largest exponent, nats per step")
    axes[1, 0].set_ylabel("loss; 1 is chance")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="batches to learn from, in each run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # TensorBoard would join the curves of two calls.
    shutil.rmtree(FOLDER, ignore_errors=True)

    data = remembering(arguments.steps)
    results = [train(run, data, arguments.seed) for run in tqdm(RUNS, desc="runs")]
    draw(results, FOLDER / "remedies.png")
    print(f"\n{'':29} {'λ1: first':>15} {'last (nats/step)':>18} {'gain':>10} {'loss':>9}  stopped")
    print("\n".join(result.row() for result in results))
    print(f"\nThe picture:    {(FOLDER / 'remedies.png').resolve()}")
    print(f"The dashboard:  tensorboard --logdir {FOLDER.resolve()}")


if __name__ == "__main__":
    main()
