"""A sweep with Optuna that drops a trial at its first batch if the network will hardly learn what lies 40 steps back.

    python examples/sweep.py               # 16 trials, about a minute
    python examples/sweep.py --trials 40

A trial draws the scale of the recurrent weights and the learning rate of a tanh network. It must say at the end of a
sequence what its first input was. The monitor measures at the first batch, and Optuna's `ThresholdPruner` drops what
grows by more than four decades over the sequence, or fades by more than ten. To judge this, the trials that were
dropped are trained all the same, afterwards. TensorBoard's tab HPARAMS shows λ1 and the loss of every trial.

The limits were chosen with seed 0, where 6 of 16 trials were dropped, of which 2 would have learned; 8 of the 10 others
did. With seed 1 it was 10 of 16, of which 2 would have learned; 5 of the 6 others did.
"""

import argparse
import logging
import math
import warnings
from pathlib import Path

import lightning as L
import optuna
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import LyapunovMonitor

DELAY, UNITS, BATCHES, BATCH_SIZE = 40, 48, 200, 32
LOWEST, HIGHEST = -10.0, 4.0  # decades
LEARNED = 0.5  # of a loss of 1, that of chance
FOLDER = Path("runs")


class Recall(L.LightningModule):
    """Says at the end of a sequence what its first input was."""

    def __init__(self, scale: float, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rnn, self.head = nn.RNN(1, UNITS, batch_first=True), nn.Linear(UNITS, 1)
        nn.init.normal_(self.rnn.weight_hh_l0, std=scale / math.sqrt(UNITS))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        states, _ = self.rnn(inputs)
        loss = (self.head(states[:, -1]) - inputs[:, 0]).square().mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams["learning_rate"])


class PruneAtFirstBatch(L.Callback):
    """Tells a trial how a gradient grows over a sequence, in decades, and ends it if Optuna says so."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            self.trial.report(float(trainer.callback_metrics["lyapunov/rnn/log10_gradient_gain"]), step=1)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def sequences() -> DataLoader[tuple[Tensor, ...]]:
    inputs = 0.3 * torch.randn(BATCHES * BATCH_SIZE, DELAY, 1)
    inputs[:, 0] = torch.randn(len(inputs), 1)
    return DataLoader(TensorDataset(inputs), BATCH_SIZE)


def train(name: str, scale: float, learning_rate: float, *callbacks: L.Callback) -> float:
    """Train one network; return its mean loss over the last tenth of the batches."""
    L.seed_everything(0, verbose=False)
    model = Recall(scale, learning_rate)
    # The metrics of the tab HPARAMS are named before the run, and TensorBoard shows their last values.
    logger = TensorBoardLogger(FOLDER, name="sweep", version=name, default_hp_metric=False)
    logger.log_hyperparams(dict(model.hparams), {"lyapunov/max": math.nan, "loss": math.nan})
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[LyapunovMonitor(max_steps=DELAY, warmup=10, log_spectrum=False), *callbacks],
        logger=logger,
        gradient_clip_val=0.1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, sequences())
    last = model.losses[-BATCHES // 10 :]
    return sum(last) / len(last)


def objective(trial: optuna.Trial) -> float:
    scale = trial.suggest_float("scale", 0.3, 4.0, log=True)
    learning_rate = trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True)
    return train(f"trial_{trial.number}", scale, learning_rate, PruneAtFirstBatch(trial))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")

    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(arguments.seed),
        pruner=optuna.pruners.ThresholdPruner(LOWEST, HIGHEST),
    )
    study.optimize(objective, arguments.trials, show_progress_bar=True)
    print(f"\n{'trial':>5}  {'scale':>5}  {'rate':>7}  {'decades at the first batch':>26}  {'loss':>5}")
    learned = {True: 0, False: 0}
    for trial in study.trials:
        was_pruned = trial.state == optuna.trial.TrialState.PRUNED
        loss = train(f"dropped_{trial.number}", **trial.params) if was_pruned else float(trial.value or math.nan)
        learned[was_pruned] += loss < LEARNED
        note = "  (dropped, and trained only to see)" if was_pruned else ""
        scale, rate = trial.params["scale"], trial.params["learning_rate"]
        print(f"{trial.number:5d}  {scale:5.2f}  {rate:7.1e}  {trial.intermediate_values[1]:+26.1f}  {loss:5.2f}{note}")
    num_pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(
        f"\nDropped at the first of {BATCHES} batches: {num_pruned} of {arguments.trials} trials, of which "
        f"{learned[True]} would have learned. Of the {arguments.trials - num_pruned} others {learned[False]} did."
        f"\nThe dashboard:  tensorboard --logdir {FOLDER.resolve()}"
    )


if __name__ == "__main__":
    main()
