"""Training in several processes, and in one process for comparison."""

import math
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import At, Still, fit, published, series
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.layers.sharding import full_tensor

_SECONDS = 60

# The marks of a module of such tests.
in_processes = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
]


@contextmanager
def in_time() -> Iterator[None]:
    """Fail, and kill the processes, if these wait for one another for ever."""

    def give_up(*_: Any) -> None:
        for process in multiprocessing.active_children():
            process.kill()
        raise TimeoutError("the processes wait for one another")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(2 * _SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


class RankModel(Still):
    """Trains without changing its weights; ``change`` modifies the batch of each rank."""

    def __init__(self, change: Any = None, **options: Any) -> None:
        super().__init__(**{"cell": "GRU", **options})
        self.change, self.seen = change, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.change is not None:
            batch = [self.change(part, self.global_rank) for part in batch]
        self.seen.append(batch[0])
        return super().training_step(batch, batch_idx)


def shorter(values: Tensor, rank: int) -> Tensor:
    """Reduce the batch of all ranks but the first to one sequence of seven steps."""
    return values if rank == 0 else values[:1, :7]


def spoilt(values: Tensor, rank: int) -> Tensor:
    """Replace the batch of the second rank by NaN."""
    return values * math.nan if rank == 1 else values


class IdleMonitor(LyapunovMonitor):
    """Measures nothing."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass


class SaveResults(Callback):
    """Save what each process has published after each batch, its inputs and its weights."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.values = folder, []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append({key: value.clone() for key, value in published(trainer).items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, LyapunovMonitor))
        results = {
            "values": self.values,
            "history": monitor.history,
            "inputs": pl_module.seen,
            "weights": {name: full_tensor(weight) for name, weight in pl_module.state_dict().items()},
            "epochs": trainer.current_epoch,
            "decisions": [
                {
                    "step": trainer.global_step,
                    "epoch": rule.stopped_epoch,
                    "count": rule.wait_count,
                    "reason": rule.stopping_reason.name,
                    "message": rule.stopping_reason_message,
                }
                for rule in trainer.callbacks
                if isinstance(rule, InstabilityStopping)
            ],
        }
        torch.save(results, f"{self.folder}/{trainer.global_rank}.pt")


def ddp(**options: Any) -> DDPStrategy:
    return DDPStrategy(start_method="fork", **options)


def fit_distributed(
    model: Any,
    num_processes: int,
    folder: Any,
    *callbacks: Any,
    monitor: Any = None,
    strategy: Any = ddp,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train in several processes and return what each of them has saved."""
    strategy = strategy(process_group_backend="gloo", timeout=timedelta(seconds=_SECONDS))
    monitor = LyapunovMonitor(every_n_train_steps=1, warmup=2, strict=True) if monitor is None else monitor
    options = {"data": series(2 * num_processes), "max_epochs": 1, **options}
    with in_time():
        fit(model, monitor, *callbacks, SaveResults(folder), devices=num_processes, strategy=strategy, **options)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(num_processes)]


def fit_alone(model: Any, batches: list[Tensor], **options: Any) -> list[dict[str, Tensor]]:
    """Train on these batches in one process and return the values after each."""
    monitor = LyapunovMonitor(every_n_train_steps=1, warmup=2, strict=True, num_sequences=10**6, **options)
    values: list[dict[str, Tensor]] = []
    keep = At("on_train_batch_end", lambda trainer: values.append(published(trainer)))
    data = DataLoader([(inputs, inputs[..., :1]) for inputs in batches], batch_size=None)
    fit(model, monitor, keep, data=data, max_epochs=1)
    return values


def joint_batches(results: list[dict[str, Any]]) -> list[Tensor]:
    """Join the batches of several processes."""
    return [torch.cat(parts) for parts in zip(*(result["inputs"] for result in results), strict=True)]


def assert_all_know_the_same(results: list[dict[str, Any]]) -> None:
    first, *others = results
    for other in others:
        assert [list(values) for values in other["values"]] == [list(values) for values in first["values"]]
        for name in ("values", "history", "weights"):
            assert_close(other[name], first[name], rtol=0, atol=0, equal_nan=True)
