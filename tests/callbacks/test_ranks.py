"""Two processes with unlike data: none waits for the other longer than without the monitor."""

from datetime import timedelta

import pytest
import torch
import torch.multiprocessing
from helpers import FEATURES, Callback, Regressor, failing_monitor, fit, keys_of, make_trainer, published
from processes import IdleMonitor, RankModel, ddp, fit_distributed, in_processes, in_time
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_lyapunov import LyapunovMonitor

pytestmark = in_processes


class OfRank(Dataset):
    """Sequences that differ between ranks."""

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(100 * torch.distributed.get_rank() + index)
        inputs = torch.rand(12, FEATURES, generator=generator)
        return inputs, inputs.cumsum(0).mean(-1, keepdim=True)


class Lengths(Sampler):
    """As many samples as are given for a rank."""

    def __init__(self, *lengths):
        self.lengths = lengths

    def __len__(self):
        return self.lengths[torch.distributed.get_rank()]

    def __iter__(self):
        return iter(range(len(self)))


class Stream(IterableDataset):
    def __init__(self, *lengths):
        self.lengths = lengths

    def __iter__(self):
        return (OfRank()[index] for index in range(self.lengths[torch.distributed.get_rank()]))


def sized(*lengths):
    return DataLoader(OfRank(), 4, sampler=Lengths(*lengths))


def stream(*lengths):
    return DataLoader(Stream(*lengths), 4)


class Moving(RankModel):
    def on_after_backward(self):
        pass


class Apart(Moving):
    """Takes its steps without the other rank."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        with self.trainer.strategy.model.no_sync():
            self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


class TwoSteps(Apart):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(RankModel.training_step(self, batch, batch_idx))
            optimizer.step()


by_steps = {"max_epochs": -1, "max_steps": 14, "use_distributed_sampler": False}
RUNS = {
    "12 and 16 samples": (Moving, lambda: sized(12, 16), {}),
    "16 and 12 samples": (Moving, lambda: sized(16, 12), {}),
    "an unlike stream": (Moving, lambda: stream(12, 16), {}),
    "a stream that is longer on rank 0": (Moving, lambda: stream(28, 4), {}),
    "an unlike stream, every second epoch": (Moving, lambda: stream(8, 16), {"every_n_epochs": 2}),
    "a budget": (Moving, lambda: sized(12, 16), {"max_overhead": 0.5, "every_n_train_steps": 1}),
    "two steps in a batch": (TwoSteps, lambda: sized(12, 16), {}),
}


@pytest.mark.parametrize(("model", "data", "options"), RUNS.values(), ids=RUNS)
def test_ranks_whose_epochs_differ_end_as_without_the_monitor(model, data, options, tmp_path):
    control, run = (
        fit_distributed(model(), 2, tmp_path, monitor=monitor, data=data(), **by_steps)
        for monitor in (IdleMonitor(), LyapunovMonitor(warmup=2, strict=True, **options))
    )
    assert_close([r["weights"] for r in run], [r["weights"] for r in control], rtol=0, atol=0)
    assert not control[0]["history"]
    steps = [result["history"]["rnn"]["step"].tolist() for result in run]
    assert steps[0] == steps[1]
    assert len(steps[0]) >= 2
    assert_close(run[0]["history"], run[1]["history"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [(24, 12), (12, 24)])
def test_a_rank_that_leaves_does_not_end_the_others(lengths, tmp_path):
    options = {"max_epochs": 1, "use_distributed_sampler": False}
    control, run = (
        fit_distributed(Apart(), 2, tmp_path, monitor=monitor, data=stream(*lengths), **options)
        for monitor in (IdleMonitor(), LyapunovMonitor(warmup=2))
    )
    assert_close([r["weights"] for r in run], [r["weights"] for r in control], rtol=0, atol=0)
    assert all(len(result["history"]["rnn"]["step"]) >= 1 for result in run)


class Evaluated(Regressor):
    def __init__(self):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def test_step(self, batch, batch_idx):
        self(batch[0])


class SaveEvaluation(Callback):
    def __init__(self, folder):
        self.folder = folder

    def teardown(self, trainer, pl_module, stage):
        torch.save(dict(published(trainer)), f"{self.folder}/{trainer.global_rank}.pt")


def evaluated(verb, data, folder, *callbacks):
    strategy = ddp(process_group_backend="gloo", timeout=timedelta(seconds=30))
    options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    with in_time():
        getattr(make_trainer(*callbacks, SaveEvaluation(folder), **options), verb)(Evaluated(), data, verbose=False)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("lengths", [(0, 12), (12, 0), (4, 12), (0, 0)], ids=str)
@pytest.mark.parametrize("kind", [sized, stream])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_rank_without_a_batch_takes_part(verb, kind, lengths, tmp_path):
    assert evaluated(verb, kind(*lengths), tmp_path) == [{}, {}]
    first, second = evaluated(verb, kind(*lengths), tmp_path, LyapunovMonitor(warmup=2, strict=True, metrics="all"))
    assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert set(first) > keys_of("rnn")
    assert first["lyapunov/rnn/max"].isfinite() == bool(sum(lengths))
    assert first["lyapunov/rnn/num_sequences"] == sum(min(length, 4) for length in lengths)


def test_an_error_of_one_rank_that_is_to_be_raised_lets_nobody_wait(tmp_path):
    monitor = failing_monitor(lambda _: torch.distributed.get_rank() == 1, strict=True)
    with pytest.raises(Exception, match="no convergence in measurement 0"):
        fit_distributed(RankModel(), 2, tmp_path, monitor=monitor)


def fit_in_a_group_of_others(rank, folder):
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=10), rank=rank, world_size=2
    )
    if rank == 0:
        monitor = LyapunovMonitor(warmup=2, strict=True)
        fit(Regressor(), monitor)
        torch.save(monitor.history, f"{folder}/history.pt")
    torch.distributed.barrier()


def test_a_run_of_one_rank_uses_no_process_group_of_somebody_else(tmp_path):
    with in_time():
        torch.multiprocessing.start_processes(fit_in_a_group_of_others, (tmp_path,), nprocs=2, start_method="fork")
    assert len(torch.load(tmp_path / "history.pt")["rnn"]["step"]) == 3
