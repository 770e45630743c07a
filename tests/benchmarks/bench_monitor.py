"""What the monitor costs in a whole run, and what its defaults buy: the bias and the error of a measurement.

    python tests/benchmarks/bench_monitor.py overhead [--device cuda] [--pairs 5] [--steps 500]
    python tests/benchmarks/bench_monitor.py windows [--device cuda]
    python tests/benchmarks/bench_monitor.py large [--device cuda]
    python tests/benchmarks/bench_monitor.py measurement [--device cuda]

`overhead` trains a character LSTM (256 units, batch 64, windows of 100) for an epoch, with and without the monitor in
turn. `windows` measures the largest exponent of initialised and trained networks as the monitor does, in windows from a
state of zeros and averaged over 16 sequences, and compares it with a run of 10,000 steps of the same network. `large`
compares the growth in one large layer with the products of 16 vectors and its weight alone, and a measurement of models
with many cells, with TensorBoard, with a training step. `measurement` compares a measurement of four usual layers, with
TensorBoard and its share of the pictures, with a training step of the same model.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from unittest.mock import patch

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import LyapunovMonitor
from lightning_lyapunov.functional import layer_growth
from lightning_lyapunov.layers.registry import as_layer
from lightning_lyapunov.reporting.budget import PictureBudget

CHARACTERS, WINDOW, BATCH = 96, 100, 64


class CharacterModel(L.LightningModule):
    def __init__(self, rnn: nn.RNNBase | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 64)
        self.rnn = rnn or nn.LSTM(64, 256, batch_first=True)
        self.head = nn.Linear(self.rnn.hidden_size, CHARACTERS)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (characters,) = batch
        states, _ = self.rnn(self.embedding(characters[:, :-1]))
        return F.cross_entropy(self.head(states).flatten(0, 1), characters[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Clock(LyapunovMonitor):
    """The monitor, with the time that its measurements take."""

    seconds = 0.0

    def _measure(self, *arguments: object) -> None:
        start = time.perf_counter()
        super()._measure(*arguments)
        self.seconds += time.perf_counter() - start


def epoch_seconds(steps: int, device: str, monitor: LyapunovMonitor | None) -> float:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randint(CHARACTERS, (steps * BATCH, WINDOW + 1))), BATCH)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor] if monitor else [],
    )
    model = CharacterModel()
    start = time.perf_counter()
    trainer.fit(model, data)
    return time.perf_counter() - start


def overhead(steps: int, pairs: int, device: str) -> None:
    epoch_seconds(5, device, LyapunovMonitor())
    differences = []
    for _ in range(pairs):
        monitor = Clock()
        without, with_it = epoch_seconds(steps, device, None), epoch_seconds(steps, device, monitor)
        differences.append((with_it - without) / without)
        print(
            f"without {without:8.2f} s, with {with_it:8.2f} s: {differences[-1]:+.2%}; "
            f"in measurements {monitor.seconds:.3f} s, {monitor.seconds / with_it:.2%}",
            flush=True,
        )
    print(f"median of {pairs} pairs: {statistics.median(differences):+.2%} of an epoch of {steps} steps")


def network(kind: type[nn.RNNBase], learn: bool) -> nn.RNNBase:
    """Return a layer as it is initialised, or trained to give back its inputs of five steps before."""
    torch.manual_seed(0)
    module, head = kind(8, 64), nn.Linear(64, 8)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 3e-3)
    for _ in range(300 if learn else 0):
        inputs = torch.randn(50, 32, 8)
        loss = (head(module(inputs)[0])[5:] - inputs[:-5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return module


def largest(module: nn.RNNBase, steps: int, batch: int, warmup: int, device: str) -> tuple[float, float, float]:
    """Return the largest exponent over groups of at most 16 sequences, its standard error, and the seconds it took."""
    layer, inputs = as_layer(module), torch.randn(steps, batch, 8, device=device)
    start = time.perf_counter()
    ((_, growth),) = layer_growth(
        layer, layer.read(inputs), num_exponents=16, warmup=warmup, qr_interval="auto", dtype=torch.float32
    )
    seconds = time.perf_counter() - start
    groups = (growth.total[0] / (steps - warmup)).unflatten(0, (-1, min(16, batch)))
    error = groups[..., 0].std(1) / groups.shape[1] ** 0.5
    return float(groups.mean(1).amax(-1).mean()), float(error.mean()), seconds


def windows(device: str) -> None:
    print("λ1 in windows: bias against 10,000 steps, standard error of 16 sequences; nats per step")
    print(f"{'network':14} {'λ1':>9} {'steps':>6}" + "".join(f" {f'warmup {w}':>18}" for w in (0, 10, 20, 50)))
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        for learn in (False, True):
            module = network(kind, learn).to(device)
            truth, _, _ = largest(module, 10_000, 8, 500, device)
            for steps in (30, 50, 100, 250):
                columns = ""
                for warmup in (0, 10, 20, 50):
                    if warmup < steps:
                        value, error, _ = largest(module, steps, 512, warmup, device)
                        columns += f"   {value - truth:+.4f} ± {error:.4f}"
                    else:
                        columns += " " * 19
                seconds = statistics.median(largest(module, steps, 16, 0, device)[2] for _ in range(5))
                name = f"{kind.__name__}, {'trained' if learn else 'initial'}"
                print(f"{name:14} {truth:+9.4f} {steps:6}{columns}   {1e3 * seconds:6.1f} ms", flush=True)


def large_layers(device: str) -> None:
    print(
        "16 exponents, 16 sequences, 50 steps: CPU seconds of the products alone and of a measurement, and their ratio"
    )
    for kind, units in (
        (nn.GRU, 512),
        (nn.LSTM, 512),
        (nn.LSTM, 1024),
        (nn.RNN, 2048),
        (nn.LSTM, 2048),
        (nn.RNN, 4096),
    ):
        module = kind(32, units).to(device)
        layer, inputs = as_layer(module), torch.randn(50, 16, 32, device=device)
        weight, vectors = module.weight_hh_l0.detach(), torch.randn(256, units, device=device)
        pairs = []
        for _ in range(3):
            times = [time.process_time()]
            for _ in range(50):
                F.linear(vectors, weight)
            times.append(time.process_time())
            options = {"num_exponents": 16, "warmup": 25, "qr_interval": "auto", "dtype": torch.float32}
            layer_growth(layer, layer.read(inputs), **options)
            times.append(time.process_time())
            pairs.append((times[1] - times[0], times[2] - times[1]))
        products, measurement = (min(column) for column in zip(*pairs, strict=True))
        print(f"{kind.__name__}-{units:5} {products:8.2f} {measurement:8.2f} {measurement / products:6.2f}", flush=True)


class ManyCells(L.LightningModule):
    """A stack of layers, or layers side by side."""

    def __init__(self, stacked: int, beside: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.RNN(8, 8, stacked, batch_first=True) for _ in range(beside))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return sum(layer(batch[0])[0].square().mean() for layer in self.layers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def batch_seconds(
    model: L.LightningModule, data: DataLoader, device: str, monitor: LyapunovMonitor | None = None
) -> list[float]:
    """Return the CPU seconds of each batch, with TensorBoard; the last is with the end of the run."""
    marks: list[float] = []
    clock = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_start=lambda *_: marks.append(time.process_time()),
        on_train_end=lambda *_: marks.append(time.process_time()),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[monitor, clock] if monitor else [clock],
        )
        trainer.fit(model, data)
    return [after - before for before, after in pairwise(marks)]


def many_cells(device: str) -> None:
    print("with TensorBoard: CPU seconds of a training step, and of a measurement without and with pictures")
    data = DataLoader(TensorDataset(torch.randn(12 * 16, 20, 8)), 16)
    for stacked, beside in ((100, 1), (1, 100), (1, 1000)):
        step = statistics.median(batch_seconds(ManyCells(stacked, beside), data, device)[1:])
        columns = f"{step:8.3f}"
        for pictures in (False, True):
            with patch.object(PictureBudget, "is_due", lambda *_, due=pictures: due):
                seconds = batch_seconds(
                    ManyCells(stacked, beside), data, device, LyapunovMonitor(every_n_train_steps=1)
                )
            columns += f" {statistics.median(seconds[1:-1]) - step:8.3f}"
        print(f"{beside:5} layers of {stacked:3} {columns}", flush=True)


def measurement_and_step(
    model: L.LightningModule, data: DataLoader, device: str, *, pictures: bool
) -> tuple[float, float]:
    """Return the mean CPU seconds of a measurement after the first and the median of a training step, of one run."""
    seconds = batch_seconds(model, data, device, LyapunovMonitor(every_n_train_steps=4, log_spectrum=pictures))
    measured = seconds[3::4]
    step = statistics.median(second for number, second in enumerate(seconds) if number and number % 4 != 3)
    return statistics.mean(measured) - step, step


def measurement(device: str) -> None:
    print("with TensorBoard, every 4 of 60 steps: CPU seconds of a training step and of a measurement, and in steps:")
    print("all of it, and without pictures; medians of 5 runs")
    data = DataLoader(TensorDataset(torch.randint(CHARACTERS, (60 * BATCH, WINDOW + 1))), BATCH)
    for name, kind, units, num_layers in (
        ("LSTM-256", nn.LSTM, 256, 1),
        ("GRU-256", nn.GRU, 256, 1),
        ("GRU-128x2", nn.GRU, 128, 2),
        ("RNN-64", nn.RNN, 64, 1),
    ):
        rows = []
        for _ in range(5):
            model = CharacterModel(kind(64, units, num_layers, batch_first=True))
            whole, step = measurement_and_step(model, data, device, pictures=True)
            bare, same = measurement_and_step(model, data, device, pictures=False)
            rows.append((step, whole, whole / step, bare / same))
        step, whole, ratio, bare = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:10} {step:8.3f} {whole:8.3f} {ratio:6.2f} {bare:6.2f}", flush=True)


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "windows", "large", "measurement"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    if arguments.what == "overhead":
        overhead(arguments.steps, arguments.pairs, arguments.device)
    elif arguments.what == "windows":
        windows(arguments.device)
    elif arguments.what == "measurement":
        measurement(arguments.device)
    else:
        many_cells(arguments.device)
        large_layers(arguments.device)


if __name__ == "__main__":
    main()
