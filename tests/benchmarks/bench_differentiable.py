"""What the graph of a spectrum costs: time and memory of `differentiable=True` beside the ordinary path.

    python tests/benchmarks/bench_differentiable.py [--repeats 5] [--threads 1]

Seconds are medians, in turn: of the ordinary path, and of a value and the gradient of all weights by the other one. The
memory is that of the tensors that the graph keeps until the backward pass; the ordinary path keeps none.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import torch
from torch import nn

from lightning_lyapunov import lyapunov_spectrum

INPUTS = 32


class Case(NamedTuple):
    layer: type[nn.RNNBase]
    units: int
    num_exponents: int | None
    batch: int = 8
    steps: int = 100


CASES = {
    "RNN-64, 16": Case(nn.RNN, 64, 16),
    "GRU-64, 16": Case(nn.GRU, 64, 16),
    "LSTM-64, 16": Case(nn.LSTM, 64, 16),
    "GRU-64, all": Case(nn.GRU, 64, None),
    "GRU-256, 16": Case(nn.GRU, 256, 16),
    "LSTM-256, 16": Case(nn.LSTM, 256, 16),
}
INTERVALS = (1, 8, "auto")


def differentiable(case: Case, module: nn.Module, inputs: torch.Tensor, interval: int | str) -> torch.Tensor:
    options = {"num_exponents": case.num_exponents, "qr_interval": interval}
    return lyapunov_spectrum(module, inputs, differentiable=True, **options)


def seconds(case: Case, module: nn.Module, inputs: torch.Tensor, interval: int | str | None) -> float:
    """Return the seconds of one call; ``interval`` None is the ordinary path."""
    start = time.perf_counter()
    if interval is None:
        lyapunov_spectrum(module, inputs, num_exponents=case.num_exponents)
    else:
        spectrum = differentiable(case, module, inputs, interval)
        torch.autograd.grad(spectrum.square().mean(), list(module.parameters()))
    return time.perf_counter() - start


def problem(case: Case) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return case.layer(INPUTS, case.units), torch.randn(case.steps, case.batch, INPUTS)


def megabytes(case: Case, module: nn.Module, inputs: torch.Tensor, interval: int | str) -> float:
    """Return the size of all tensors that the graph of a spectrum keeps."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        spectrum = differentiable(case, module, inputs, interval)
    assert spectrum.requires_grad
    return sum(kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ways = (None, *INTERVALS)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads; seconds and MB")
    print(f"{'case':14} {'ordinary':>16}" + "".join(f" {f'interval {interval}':>16}" for interval in INTERVALS))
    for name, case in CASES.items():
        module, inputs = problem(case)
        rounds = [[seconds(case, module, inputs, way) for way in ways] for _ in range(arguments.repeats + 1)][1:]
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        columns = [f"{times[0]:16.3f}"]
        for interval, taken in zip(INTERVALS, times[1:], strict=True):
            columns.append(f"{taken:8.3f} {megabytes(case, module, inputs, interval):7.0f}")
        print(f"{name:14} " + " ".join(columns), flush=True)


if __name__ == "__main__":
    main()
