"""Two and four processes: all publish the same values, and none waits for another for ever."""

import random
from functools import partial

import pytest
import torch
from helpers import FEATURES, failing_monitor, keys_of, series
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from processes import (
    IdleMonitor,
    RankModel,
    assert_all_know_the_same,
    ddp,
    fit_alone,
    fit_distributed,
    in_processes,
    joint_batches,
    shorter,
    spoilt,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor

worlds = pytest.mark.parametrize("num_processes", [2, 4])
pytestmark = in_processes


@worlds
@pytest.mark.parametrize("layout", [{}, {"cell": "LSTM", "num_layers": 2, "bidirectional": True}], ids=str)
def test_every_process_has_the_values_of_one_that_sees_all_sequences(layout, num_processes, tmp_path):
    results = fit_distributed(RankModel(**layout), num_processes, tmp_path)
    assert_all_know_the_same(results)
    batches = joint_batches(results)
    assert len(batches) == 2
    assert len(batches[0].unique(dim=0)) == 4 * num_processes
    expected = fit_alone(RankModel(**layout), batches)
    assert_close(results[0]["values"], expected, rtol=1e-5, atol=1e-6)


@worlds
def test_a_smaller_batch_of_shorter_sequences_counts_as_much_as_it_holds(num_processes, tmp_path):
    results = fit_distributed(RankModel(shorter, hidden_size=1), num_processes, tmp_path)
    assert_all_know_the_same(results)
    # By hand: growth over steps, both summed over all processes.
    for batch, values in enumerate(results[0]["values"]):
        growth = steps = 0.0
        for result in results:
            inputs = result["inputs"][batch]
            counted = len(inputs) * (inputs.shape[1] - 2)
            (own,) = fit_alone(RankModel(hidden_size=1), [inputs])
            growth, steps = growth + counted * own["lyapunov/max"].item(), steps + counted
        assert values["lyapunov/max"].item() == pytest.approx(growth / steps, rel=1e-5)


class Sometimes(RankModel):
    """Has a second layer that not every process calls."""

    def __init__(self, callers):
        super().__init__()
        self.other, self.callers = nn.GRU(FEATURES, 4, batch_first=True), callers

    def forward(self, inputs):
        extra = self.other(inputs)[0].mean(-1, keepdim=True) if self.global_rank in self.callers else 0
        return super().forward(inputs) + extra


unused = partial(ddp, find_unused_parameters=True)


@worlds
def test_a_layer_that_one_process_does_not_call_is_measured_on_the_others(num_processes, tmp_path):
    callers = list(range(1, num_processes))
    results = fit_distributed(Sometimes(callers), num_processes, tmp_path, strategy=unused)
    assert_all_know_the_same(results)
    assert set(results[0]["values"][0]) == keys_of("rnn", "other")
    expected = fit_alone(Sometimes([0]), joint_batches(results[1:]), modules="other")
    for values, alone_values in zip(results[0]["values"], expected, strict=True):
        for key in keys_of("other") - keys_of():
            assert_close(values[key], alone_values[key], rtol=1e-5, atol=1e-6)


def test_a_layer_that_no_process_calls_keeps_its_keys_and_nobody_waits(tmp_path):
    results = fit_distributed(Sometimes([]), 2, tmp_path, strategy=unused)
    assert_all_know_the_same(results)
    values = results[0]["values"][-1]
    assert set(values) == keys_of("rnn", "other")
    assert values["lyapunov/other/max"].isnan()
    assert values["lyapunov/max"] == values["lyapunov/rnn/max"]


@worlds
def test_one_process_that_is_not_finite_makes_nan_of_all_and_all_stop(num_processes, tmp_path):
    stop = EarlyStopping("lyapunov/max", patience=10**6)
    results = fit_distributed(RankModel(spoilt), num_processes, tmp_path, stop, max_epochs=3)
    assert_all_know_the_same(results)
    last = results[0]["values"][-1]
    counts = {"lyapunov/rnn/sequence_length"}
    assert {key for key, value in last.items() if not value.isnan()} == {
        "lyapunov/worst_layer",
        "lyapunov/max",
    } | counts
    assert last["lyapunov/max"] == torch.inf
    assert [result["epochs"] for result in results] == [1] * num_processes


# InstabilityStopping


class SaveCheckpoint(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/run.ckpt")


def saturating(change):
    """Exponents are log 1.5 for inputs near zero, and about -1.7 for those of ``calm``."""
    model = RankModel(change, cell="RNN")
    for parameter in model.rnn.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(model.rnn.weight_ih_l0)
    model.rnn.weight_hh_l0.data = 1.5 * torch.eye(model.rnn.hidden_size)
    return model


def calm(tensor, rank):
    return 0.2 * tensor


def one_unstable(tensor, rank):
    # Not zero, because sequences with the same inputs count once.
    return 1e-9 * tensor if rank == 1 else calm(tensor, rank)


def decided(model, rule, folder, *callbacks, rule_first=False, num_processes=2, **options):
    """Train, for six batches in each process if nothing else is said, and return what all have decided."""
    monitor = LyapunovMonitor(every_n_train_steps=1, warmup=2, strict=True)
    first, second = (rule, monitor) if rule_first else (monitor, rule)
    options = {"data": series(6 * num_processes), **options}
    results = fit_distributed(model, num_processes, folder, second, *callbacks, monitor=first, **options)
    decision, *others = [result["decisions"] for result in results]
    assert others == [decision] * (num_processes - 1)
    return decision[0]


@worlds
@pytest.mark.parametrize("rule_first", [False, True])
def test_one_process_that_is_unstable_stops_all_at_one_step_for_one_reason(rule_first, num_processes, tmp_path):
    rule, model = InstabilityStopping(-1.3, patience=2, confidence=0.5), saturating(one_unstable)
    decision = decided(model, rule, tmp_path, rule_first=rule_first, num_processes=num_processes)
    # A rule before the monitor sees each measurement a batch later.
    assert decision["step"] == 2 + rule_first
    assert (decision["count"], decision["reason"]) == (2, "DIVERGENCE_THRESHOLD")
    assert "Training stops at step 1: the largest Lyapunov exponent of `rnn`" in decision["message"]
    assert "above -1.3" in decision["message"]


def test_processes_that_are_all_stable_go_on_to_the_end(tmp_path):
    decision = decided(saturating(calm), InstabilityStopping(-1.3, confidence=0.5), tmp_path)
    assert (decision["step"], decision["reason"], decision["message"]) == (6, "NOT_STOPPED", None)


def test_what_one_process_would_stop_for_is_judged_over_all_of_them(tmp_path):
    """The exponents of one process are clearly above the threshold, those of both are not."""
    decision = decided(saturating(one_unstable), InstabilityStopping(0.3), tmp_path)
    assert (decision["step"], decision["reason"]) == (6, "NOT_STOPPED")


@worlds
def test_one_process_that_is_not_finite_stops_all_at_once(num_processes, tmp_path):
    decision = decided(saturating(spoilt), InstabilityStopping(patience=5), tmp_path, num_processes=num_processes)
    assert (decision["step"], decision["reason"]) == (1, "NON_FINITE_METRIC")


def test_a_layer_that_one_process_alone_calls_stops_all(tmp_path):
    rule = InstabilityStopping(-50.0, monitor="lyapunov/other/max")
    decision = decided(Sometimes([1]), rule, tmp_path, strategy=unused)
    assert decision["step"] == 2
    assert "`other`" in decision["message"]


def test_the_count_of_all_processes_goes_on_after_a_resume(tmp_path):
    options = {"data": series(2), "default_root_dir": tmp_path}
    rule = InstabilityStopping(-1.3, patience=3, confidence=0.5)
    assert decided(saturating(one_unstable), rule, tmp_path, SaveCheckpoint(), **options)["count"] == 1
    rule = InstabilityStopping(-1.3, patience=3, confidence=0.5)
    options |= {"ckpt_path": tmp_path / "run.ckpt", "max_epochs": 6}
    decision = decided(saturating(one_unstable), rule, tmp_path, **options)
    # One batch in each epoch: one before the break and two after it.
    assert (decision["step"], decision["count"]) == (3, 3)


def test_one_process_whose_measurement_fails_makes_nan_of_all_and_nobody_waits(tmp_path):
    monitor = failing_monitor(lambda _: torch.distributed.get_rank() == 1, every_n_train_steps=1)
    results = fit_distributed(RankModel(), 2, tmp_path, monitor=monitor)
    assert_all_know_the_same(results)
    assert results[0]["values"][-1]["lyapunov/rnn/max"].isnan()


class Moving(RankModel):
    def on_after_backward(self):
        pass


@pytest.mark.parametrize("strategy", [ddp, unused], ids=["all parameters used", "find_unused_parameters"])
def test_the_weights_of_several_processes_are_bitwise_those_without_the_monitor(strategy, tmp_path):
    results = []
    for monitor in (IdleMonitor(), LyapunovMonitor(every_n_train_steps=1, strict=True)):
        results.append(fit_distributed(Moving(), 2, tmp_path, monitor=monitor, strategy=strategy, max_epochs=2))
    without, monitored = results
    assert not without[0]["values"][0]
    assert_all_know_the_same(monitored)
    assert_close(monitored[0]["weights"], without[0]["weights"], rtol=0, atol=0)
    assert not torch.equal(monitored[0]["weights"]["rnn.weight_hh_l0"], Moving().rnn.weight_hh_l0)


def test_data_that_one_process_has_less_of_does_not_let_the_others_wait(tmp_path):
    """Every process ends its epoch with a shorter batch and measures there."""
    inputs = torch.rand(10, 12, FEATURES)
    data = DataLoader(TensorDataset(inputs, inputs[..., :1]), 4)
    results = fit_distributed(RankModel(), 2, tmp_path, monitor=LyapunovMonitor(), data=data, max_epochs=2)
    assert_all_know_the_same(results)
    assert results[0]["history"]["rnn"]["step"].tolist() == [0, 1, 3]


def test_no_process_adds_up_what_another_does_not_beside_loggers(tmp_path, monkeypatch):
    """The first process has loggers, pictures and a progress to write; what it shares, all share."""
    shared = []

    def watched(name, collective):
        def call(*args, **kwargs):
            shared.append(name)
            return collective(*args, **kwargs)

        return call

    for name in ("all_gather", "all_reduce", "reduce", "gather", "broadcast", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(torch.distributed, name, watched(name, getattr(torch.distributed, name)))

    class SaveShared(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(shared, f"{tmp_path}/shared{trainer.global_rank}.pt")

    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    assert_all_know_the_same(
        fit_distributed(RankModel(), 2, tmp_path, InstabilityStopping(threshold=9.0), SaveShared(), logger=loggers)
    )
    first, second = (torch.load(f"{tmp_path}/shared{rank}.pt") for rank in range(2))
    assert first == second
    assert {"all_gather", "all_reduce"} <= set(first)
    events = EventAccumulator(str(next(tmp_path.glob("board/*")))).Reload()
    assert events.Tags()["images"]


class UnlikeClock:
    """A clock with random steps, which differ between ranks."""

    def __init__(self, rank=None):
        self.rank, self.now, self.draw = rank, 0.0, None

    def __call__(self):
        if self.draw is None:
            rank = torch.distributed.get_rank() if self.rank is None else self.rank
            self.draw = random.Random(rank)
        self.now += self.draw.random()
        return self.now


SHARES = {
    "every step": ({"every_n_train_steps": 1}, 2),
    "every second step": ({"every_n_train_steps": 2}, 2),
    "every epoch": ({"every_n_epochs": 1}, 2),
    "both, four processes": ({"every_n_epochs": 1, "every_n_train_steps": 3}, 4),
}


@pytest.mark.parametrize(("schedule", "num_processes"), SHARES.values(), ids=SHARES)
def test_processes_whose_clocks_differ_measure_on_the_same_batches(schedule, num_processes, tmp_path, monkeypatch):
    def steps_by(clock):
        monkeypatch.setattr("lightning_lyapunov.callbacks.overhead.perf_counter", clock)
        monitor = LyapunovMonitor(max_overhead=0.6, warmup=2, strict=True, **schedule)
        run = {"monitor": monitor, "data": series(8 * num_processes), "max_epochs": 3}
        results = fit_distributed(RankModel(), num_processes, tmp_path, **run)
        assert_all_know_the_same(results)
        assert all(len(values) == len(results[0]["values"][0]) for values in results[0]["values"])
        return results[0]["history"]["rnn"]["step"].tolist()

    expected = [steps_by(UnlikeClock(rank)) for rank in range(2)]
    assert steps_by(UnlikeClock()) == expected[0]
    # Or it would be no test: by their own clocks they would not have agreed.
    assert any(steps != expected[0] for steps in expected)
