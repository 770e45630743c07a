"""Weights that are sharded over processes: all processes gather them, or all refuse them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import FEATURES, failing_monitor, keys_of, run_cell
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from processes import (
    IdleMonitor,
    RankModel,
    assert_all_know_the_same,
    fit_alone,
    fit_distributed,
    in_processes,
    joint_batches,
    shorter,
    spoilt,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, jacobians, lyapunov_spectrum, register_layer
from lightning_lyapunov.callbacks import measurement
from lightning_lyapunov.layers.sharding import gathered
from lightning_lyapunov.measuring import layers

HIDDEN = 5

pytestmark = in_processes


class _Forked:
    """Starts the processes by fork, and returns no weights from them."""

    def _configure_launcher(self):
        self._launcher = _MultiProcessingLauncher(self, start_method="fork")
        self._launcher._collect_rank_zero_results = lambda *_: SimpleNamespace(trainer_results=None)
        self._launcher._recover_results_in_main_process = lambda *_: None


class ModelParallel(_Forked, ModelParallelStrategy):
    pass


class FSDP1(_Forked, FSDPStrategy):
    """FSDP on the CPU, which Lightning does not allow."""

    def _setup_model(self, model):
        options = {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu"), **self.kwargs}
        return FullyShardedDataParallel(model, **options)


def sharded(model, num_processes, folder, *, tensor=1, **options):
    """Train with sharded layers; groups of ``tensor`` processes see the same data."""
    strategy = partial(ModelParallel, num_processes // tensor, tensor, save_distributed_checkpoint=False)
    return fit_distributed(model, num_processes, folder, strategy=strategy, **options)


class Sharded(RankModel):
    """Shards its weights if there are several processes."""

    def __init__(self, shard, change=None, **options):
        super().__init__(change, **options)
        self.shard = shard

    def configure_model(self):
        if self.device_mesh is not None:
            self.shard(self, self.device_mesh)

    def on_train_batch_end(self, *_):
        # The model's own hook comes after those of the callbacks.
        spread = self.device_mesh is not None
        assert all(isinstance(weight, DTensor) == spread for weight in self.rnn.parameters())


def whole_model(model, mesh):
    fully_shard(model, mesh=mesh["data_parallel"])


def each_layer(model, mesh):
    fully_shard(model.rnn, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def both_layers_of_a_cell(model, mesh):
    fully_shard(model.rnn.up, mesh=mesh["data_parallel"])
    each_layer(model, mesh)


LSTM = {"cell": "LSTM", "num_layers": 2, "bidirectional": True}


def assert_right(model, num_processes, folder, *, tensor=1, modules=None):
    """Check the values of all processes against those of one that holds the model and sees all sequences."""
    monitor = LyapunovMonitor(modules, every_n_train_steps=1, warmup=2, strict=True)
    results = sharded(model(), num_processes, folder, tensor=tensor, monitor=monitor)
    assert_all_know_the_same(results)
    # The processes of a tensor-parallel group see the same.
    batches = joint_batches(results[::tensor])
    assert len(batches[0].unique(dim=0)) == 4 * num_processes // tensor
    assert_close(results[0]["values"], fit_alone(model(), batches, modules=modules), rtol=1e-5, atol=1e-6)
    assert results[0]["values"][-1]["lyapunov/max"].isfinite()


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("shard", [whole_model, each_layer])
def test_a_sharded_layer_has_the_values_of_the_whole_one(shard, num_processes, tmp_path):
    assert_right(partial(Sharded, shard), num_processes, tmp_path)


@pytest.mark.parametrize("shard", [whole_model, each_layer])
def test_all_cells_of_a_sharded_stack_have_the_values_of_the_whole_one(shard, tmp_path):
    assert_right(partial(Sharded, shard, **LSTM), 2, tmp_path)


class Parametrised(Sharded):
    """Its weight is computed from other tensors, which are sharded."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        parametrizations.weight_norm(self.rnn, "weight_hh_l0")


@pytest.mark.parametrize("shard", [whole_model, each_layer])
def test_a_sharded_weight_behind_a_parametrisation_is_the_whole_one(shard, tmp_path):
    assert_right(partial(Parametrised, shard), 2, tmp_path)


# Custom cells


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES + HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, inputs, state):
        return self.down(self.up(torch.cat((inputs, state), -1)).tanh()).tanh()


class Looped(Sharded):
    """A cell, called step by step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rnn = Cell()

    def forward(self, inputs):
        return self.head(run_cell(self.rnn, inputs, inputs.new_zeros(len(inputs), HIDDEN)))


assert_right_for_a_cell = partial(assert_right, modules="rnn")


@pytest.mark.parametrize("shard", [whole_model, each_layer, both_layers_of_a_cell])
def test_a_sharded_cell_of_the_users_has_the_values_of_the_whole_one(shard, tmp_path):
    assert_right_for_a_cell(partial(Looped, shard), 2, tmp_path)


def in_parts(model, mesh):
    """Share the products of the cell between processes."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model.rnn, mesh["tensor_parallel"], plan)


def in_parts_and_sharded(model, mesh):
    in_parts(model, mesh)
    each_layer(model, mesh)


def test_a_tensor_parallel_cell_has_the_values_of_the_whole_one_and_counts_once(tmp_path):
    assert_right_for_a_cell(partial(Looped, in_parts), 2, tmp_path, tensor=2)


def test_a_tensor_parallel_cell_that_is_sharded_too_has_the_values_of_the_whole_one(tmp_path):
    assert_right_for_a_cell(partial(Looped, in_parts_and_sharded), 4, tmp_path, tensor=2)


class Spread(Looped):
    """Its cell is called with distributed tensors, too."""

    def forward(self, inputs):
        if self.device_mesh is None:
            return super().forward(inputs)
        mesh = self.device_mesh["tensor_parallel"]
        return super().forward(distribute_tensor(inputs, mesh, [Replicate()])).full_tensor()


def of_spread_states(model, mesh):
    mesh = mesh["tensor_parallel"]
    spread = {"input_layouts": Replicate(), "output_layouts": Replicate(), "use_local_output": False}
    plan = {"up": ColwiseParallel(**spread), "down": ColwiseParallel(**spread)}
    parallelize_module(model.rnn, mesh, plan)
    distribute_module(model.head, mesh)


def test_a_cell_that_is_called_with_spread_tensors_has_the_values_of_the_whole_one(tmp_path):
    assert_right_for_a_cell(partial(Spread, of_spread_states), 2, tmp_path, tensor=2)


class Leaky(nn.Module):
    """Called with a whole sequence."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def step(self, inputs, state):
        return 0.9 * state + self.linear(torch.cat((inputs, state), -1)).tanh()

    def forward(self, inputs):
        return run_cell(self.step, inputs, inputs.new_zeros(len(inputs), HIDDEN))


register_layer(
    Leaky, step=Leaky.step, read_call=lambda _, inputs: (inputs.transpose(0, 1), inputs.new_zeros(len(inputs), HIDDEN))
)


class Registered(Sharded):
    def __init__(self, *args):
        super().__init__(*args)
        self.rnn = Leaky()

    def forward(self, inputs):
        return self.head(self.rnn(inputs))


def test_a_sharded_layer_that_was_registered_has_the_values_of_the_whole_one(tmp_path):
    assert_right(partial(Registered, each_layer), 2, tmp_path)


# No process waits for another


class Sometimes(Sharded):
    """Has a second layer that the first process does not call, though its parameters take part in the step."""

    def __init__(self, shard):
        super().__init__(shard)
        self.other = nn.GRU(FEATURES, 4, batch_first=True)

    def forward(self, inputs):
        if self.global_rank or self.device_mesh is None:
            extra = self.other(inputs)[0].mean(-1, keepdim=True)
        else:
            extra = 0 * sum(weight.sum() for weight in self.other.parameters())
        return super().forward(inputs) + extra


@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_sharded_layer_that_one_process_does_not_call_is_measured_on_the_others(num_processes, tmp_path):
    results = sharded(Sometimes(whole_model), num_processes, tmp_path)
    assert_all_know_the_same(results)
    expected = fit_alone(Sometimes(whole_model), joint_batches(results[1:]), modules="other")
    assert set(results[0]["values"][0]) == keys_of("rnn", "other")
    for values, alone_values in zip(results[0]["values"], expected, strict=True):
        for key in keys_of("other") - keys_of():
            assert_close(values[key], alone_values[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shard", [whole_model, each_layer])
def test_a_process_with_a_smaller_batch_waits_for_nobody(shard, tmp_path):
    results = sharded(Sharded(shard, shorter), 2, tmp_path)
    assert_all_know_the_same(results)
    assert results[0]["values"][-1]["lyapunov/max"].isfinite()


def test_a_process_that_is_not_finite_makes_nan_of_all(tmp_path):
    results = sharded(Sharded(each_layer, spoilt), 2, tmp_path)
    assert_all_know_the_same(results)
    # The layer to blame has its number.
    counts = ("worst_layer", "num_sequences", "num_steps", "sequence_length")
    values = {key: value for key, value in results[0]["values"][-1].items() if not key.endswith(counts)}
    assert values.pop("lyapunov/max") == torch.inf
    assert all(value.isnan() for value in values.values())


@pytest.mark.parametrize("what", ["layer_growth", "working_dtype"])
def test_a_process_whose_measurement_fails_makes_nan_of_all(what, tmp_path, monkeypatch):
    def fails_on_one(*args):
        if torch.distributed.get_rank() == 1:
            raise torch.linalg.LinAlgError("no convergence")
        return working_dtype(*args)

    working_dtype = layers.working_dtype
    if what == "layer_growth":
        monitor = failing_monitor(lambda _: torch.distributed.get_rank() == 1, every_n_train_steps=1)
    else:
        monkeypatch.setattr(layers, "working_dtype", fails_on_one)
        monitor = LyapunovMonitor(every_n_train_steps=1)
    results = sharded(Sharded(each_layer, **LSTM), 2, tmp_path, monitor=monitor)
    assert_all_know_the_same(results)
    assert results[0]["values"][-1]["lyapunov/rnn.l1/max"].isnan()


def test_a_process_that_cannot_read_a_call_makes_nan_of_all(tmp_path, monkeypatch):
    follow = measurement.follow

    def fails_on_one(*args):
        if torch.distributed.get_rank() == 1:
            raise ValueError("unreadable")
        return follow(*args)

    monkeypatch.setattr(measurement, "follow", fails_on_one)
    monitor = LyapunovMonitor(every_n_train_steps=1)
    results = sharded(Sharded(each_layer), 2, tmp_path, monitor=monitor)
    assert_all_know_the_same(results)
    assert results[0]["values"][-1]["lyapunov/max"].isnan()


@pytest.mark.parametrize("shard", [whole_model, each_layer])
def test_sharded_weights_are_bitwise_those_without_the_monitor(shard, tmp_path):
    class Training(Sharded):
        def on_after_backward(self):
            pass

    results = []
    for monitor in (IdleMonitor(), LyapunovMonitor(every_n_train_steps=1, strict=True)):
        model = Training(shard)
        results.append(sharded(model, 2, tmp_path, monitor=monitor, max_epochs=2))
    without, monitored = results
    assert not without[0]["values"][0]
    assert_all_know_the_same(monitored)
    assert_close(monitored[0]["weights"], without[0]["weights"], rtol=0, atol=0)
    assert not torch.equal(monitored[0]["weights"]["rnn.weight_hh_l0"], Training(shard).rnn.weight_hh_l0)


# FSDP's first version


class Refused(LyapunovMonitor):
    """Saves the error of each process, and does nothing else."""

    def __init__(self, folder, modules):
        super().__init__(modules)
        self.folder = folder

    def on_fit_start(self, trainer, pl_module):
        with pytest.raises(ValueError, match="cannot be watched") as refusal:
            super().on_fit_start(trainer, pl_module)
        torch.save(str(refusal.value), f"{self.folder}/refusal{trainer.global_rank}.pt")


def layers_by_themselves(module, recurse, **_):
    return recurse or isinstance(module, (nn.GRU, nn.Linear))


@pytest.mark.parametrize("policy", [None, layers_by_themselves], ids=["whole model", "each layer"])
@pytest.mark.parametrize("original", [True, False], ids=["use_orig_params", "flat parameters"])
@pytest.mark.parametrize("model", [RankModel, partial(Looped, None)], ids=["GRU", "cell"])
def test_all_processes_refuse_the_flat_parameters_of_the_first_fsdp(model, original, policy, tmp_path):
    strategy = partial(FSDP1, use_orig_params=original, auto_wrap_policy=policy)
    fit_distributed(model(), 2, tmp_path, monitor=Refused(tmp_path, "rnn"), strategy=strategy)
    first, second = (torch.load(f"{tmp_path}/refusal{rank}.pt") for rank in range(2))
    assert first == second
    assert "are sharded, and `" in first
    assert "Shard them with `fully_shard`" in first


def test_what_the_first_fsdp_keeps_whole_is_measured(tmp_path):
    results = fit_distributed(RankModel(), 2, tmp_path, strategy=partial(FSDP1, sharding_strategy="NO_SHARD"))
    assert_all_know_the_same(results)
    assert_close(results[0]["values"], fit_alone(RankModel(), joint_batches(results)), rtol=1e-5, atol=1e-6)


# One process


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_the_plain_functions_gather_weights_and_leave_them_spread(mesh):
    gru, inputs = nn.GRU(FEATURES, HIDDEN), torch.randn(9, 2, FEATURES)
    spectrum, matrices = lyapunov_spectrum(gru, inputs), jacobians(gru, inputs)
    fully_shard(gru, mesh=mesh)
    weights = dict(gru.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    assert_close(lyapunov_spectrum(gru, inputs), spectrum, rtol=0, atol=0)
    assert_close(jacobians(gru, inputs), matrices, rtol=0, atol=0)
    assert all(weight is weights[name] for name, weight in gru.named_parameters())


def test_buffers_are_gathered_and_all_is_as_before_after_an_error(mesh):
    norm = distribute_module(nn.BatchNorm1d(3), mesh)
    before = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    assert isinstance(norm.running_mean, DTensor)
    with pytest.raises(ZeroDivisionError), gathered(norm):
        1 / sum(isinstance(value, DTensor) for value in (*norm.parameters(), *norm.buffers()))
    assert all(before[name] is value for name, value in (*norm.named_parameters(), *norm.named_buffers()))


def test_nothing_is_touched_where_nothing_is_spread():
    gru = nn.GRU(FEATURES, HIDDEN)
    weights = list(gru.parameters())
    with gathered(gru):
        assert all(weight is now for weight, now in zip(weights, gru.parameters(), strict=True))
