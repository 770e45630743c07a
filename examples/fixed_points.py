"""How a network keeps a count: train a GRU on sentiment, and find the line of points on which it stores the verdict.

    python examples/fixed_points.py           # 20 seconds on one core
    python examples/fixed_points.py --fast    # half of the training, less exact

Words add to a verdict or subtract from it, most say nothing, and the network is to say the sum so far after each word.
`fixed_points` then finds where the trained network stays put while it reads words that say nothing: on a line, along
which the read-out changes (Maheswaranathan, Williams, Golub, Ganguli & Sussillo, Reverse engineering recurrent networks
for sentiment classification reveals line attractor dynamics, 2019). The picture is in `runs/fixed_points`.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import FixedPoints, LyapunovMonitor, fixed_points

LENGTH, WORDS, UNITS = 30, 30, 48
VALUES = torch.zeros(WORDS)  # what a word adds to the verdict
VALUES[:4], VALUES[4:8] = 1.0, -1.0
FOLDER = Path("runs/fixed_points")


class Sentiment(L.LightningModule):
    """Says after each word how the review sounds so far: 1 for five good words."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.gru, self.head = nn.GRU(WORDS, UNITS, batch_first=True), nn.Linear(UNITS, 1)
        nn.init.orthogonal_(self.gru.weight_hh_l0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (words,) = batch
        loss = F.mse_loss(self.head(self.gru(one_hot(words))[0]).squeeze(-1), verdicts(words))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), 5e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def reviews(count: int) -> Tensor:
    return torch.randint(WORDS, (count, LENGTH))


def one_hot(words: Tensor) -> Tensor:
    return F.one_hot(words, WORDS).float()


def verdicts(words: Tensor) -> Tensor:
    return VALUES[words].cumsum(-1) / 5


def neutral_word() -> Tensor:
    """Return the mean of the words that say nothing."""
    return (VALUES == 0).float() / (VALUES == 0).sum()


def train(steps: int) -> tuple[Sentiment, LyapunovMonitor, float]:
    model, monitor = Sentiment(steps), LyapunovMonitor(num_exponents=3, warmup=10)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[monitor],
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(reviews(64 * steps)), 64))
    return model, monitor, float(trainer.callback_metrics["loss"])


def find_line(model: Sentiment) -> tuple[Tensor, FixedPoints]:
    """Return states that the network visits, and the slow points next to some of them.

    A few steps take each to the line. Many would take all of them along it, to the few points that do not move at all.
    """
    with torch.no_grad():
        states = model.gru(one_hot(reviews(64)))[0][:, 5:].flatten(0, 1).double()
    starts = states[torch.randperm(len(states))[:256]].unsqueeze(0)
    options = {"max_speed": 5e-3, "unique_distance": 0.02}
    return states, fixed_points(model.gru, neutral_word(), starts, num_steps=5, **options)


def alignment(found: FixedPoints, readout: Tensor) -> Tensor:
    """Return the cosine between the read-out and the eigenvector of the largest eigenvalue at each point."""
    values, vectors = torch.linalg.eig(found.jacobians)
    slowest = vectors[torch.arange(len(found)), :, values.abs().argmax(-1)]
    return (slowest @ readout.to(slowest)).abs() / readout.norm()


def draw(states: Tensor, found: FixedPoints, readout: Tensor, path: Path) -> None:
    """Draw visited states and the points in the plane of the states' first two principal components."""
    from matplotlib import pyplot

    centre = states.mean(0)
    plane = torch.linalg.svd(states - centre, full_matrices=False).Vh[:2].T
    visited, points = (states - centre) @ plane, (found.points - centre) @ plane
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.scatter(*visited.T, s=3, color="0.8", label="states under input")
    limit = readout.abs().max()
    options = {"cmap": "coolwarm", "vmin": -limit, "vmax": limit, "edgecolor": "k", "linewidth": 0.4}
    colours = left.scatter(*points.T, s=30, c=readout, label="slow points", **options)
    figure.colorbar(colours, ax=left, label="read-out: the verdict")
    left.set(xlabel="first principal component", ylabel="second", title="A line of slow points")
    left.legend(loc="upper right", fontsize="small")
    eigenvalues = found.eigenvalues.flatten()
    right.add_patch(pyplot.Circle((0, 0), 1, fill=False, color="0.6"))
    right.plot(eigenvalues.real, eigenvalues.imag, ".", color="0.6", label="all")
    right.plot(found.eigenvalues[:, 0].real, found.eigenvalues[:, 0].imag, "r.", label="the largest of each point")
    right.set(
        xlabel="real", ylabel="imaginary", title="Eigenvalues", aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1)
    )
    right.legend(loc="upper left", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    fast = parser.parse_args().fast
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    L.seed_everything(0, verbose=False)

    model, monitor, loss = train(200 if fast else 400)
    states, found = find_line(model.eval())
    weight, bias = model.head.weight[0].detach().double(), model.head.bias.detach().double()
    readout, sizes = found.points @ weight + bias, found.eigenvalues.abs()
    exact = fixed_points(model.gru, neutral_word(), found.points.unsqueeze(0))
    history = monitor.history["gru"]
    exponent, stderr = history["spectrum"][-1, 0], history["stderr"][-1, 0]
    cosine = alignment(found, weight)
    print(f"loss {loss:.1e}: the verdict is off by {loss**0.5:.3f}, and a word counts 0.2")
    print(f"slow points: {len(found)}, which move by {found.speeds.max():.0e} in a step or less; at rest: {len(exact)}")
    print(f"their read-outs go from {readout.min():+.2f} to {readout.max():+.2f}")
    print(f"largest eigenvalue: {sizes[:, 0].min():.4f} to {sizes[:, 0].max():.4f}, the next: {sizes[:, 1].max():.2f}")
    print(f"its eigenvector and the read-out: cosine {cosine.min():.2f} to {cosine.max():.2f}")
    print(f"λ1 under input: {exponent:+.3f} ± {stderr:.3f} nats per step: it forgets in {1 / abs(exponent):.0f} words")
    draw(states, found, readout, FOLDER / "fixed_points.png")
    print(f"The picture: {(FOLDER / 'fixed_points.png').resolve()}")


if __name__ == "__main__":
    main()
