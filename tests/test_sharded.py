"""Weights spread over processes: gathered by all of them together, or refused by all of them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from models import FEATURES
from test_callback import keys_of
from test_distributed import Still, alone, assert_all_know_the_same, distributed, shorter, spoilt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import lightning_lyapunov.callback
from lightning_lyapunov import LyapunovMonitor, jacobians, lyapunov_spectrum, register_layer
from lightning_lyapunov.sharding import gathered

HIDDEN = 5

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.filterwarnings("ignore"),
]
worlds = pytest.mark.parametrize("num_processes", [2, 4])


class _Forked:
    """Starts the processes by a fork, which a test can do, and brings no weights back from them."""

    def _configure_launcher(self):
        self._launcher = _MultiProcessingLauncher(self, start_method="fork")
        self._launcher._collect_rank_zero_results = lambda *_: SimpleNamespace(trainer_results=None)
        self._launcher._recover_results_in_main_process = lambda *_: None


class ModelParallel(_Forked, ModelParallelStrategy):
    pass


class FSDP1(_Forked, FSDPStrategy):
    """Lightning lets the strategy itself run on GPUs only."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def model_parallel(data=-1, tensor=1, **options):
    """Return the strategy; by default all processes see different data."""
    return ModelParallel(data, tensor, save_distributed_checkpoint=False, **options)


class Sharded(Still):
    """Spreads its weights over the processes where there are several."""

    def __init__(self, shard, mine=None, **options):
        super().__init__(mine, **options)
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


shardings = pytest.mark.parametrize("shard", [whole_model, each_layer])


@worlds
@shardings
@pytest.mark.parametrize("layout", [{}, {"cell": "LSTM", "num_layers": 2, "bidirectional": True}], ids=str)
def test_a_sharded_layer_has_the_values_of_the_whole_one(layout, shard, num_processes, tmp_path):
    assert_right(partial(Sharded, shard, **layout), num_processes, tmp_path)


def assert_right(model, num_processes, folder, tensor=1, **options):
    """Check the values of all processes against those of one that holds the model and sees all sequences."""
    strategy = partial(model_parallel, num_processes // tensor, tensor)
    results = distributed(model(), num_processes, folder, strategy=strategy, **options)
    assert_all_know_the_same(results)
    # The processes of a tensor-parallel group see the same.
    batches = [torch.cat(parts) for parts in zip(*(result["inputs"] for result in results[::tensor]), strict=True)]
    assert len(batches[0].unique(dim=0)) == 4 * num_processes // tensor
    assert_close(results[0]["values"], alone(model(), batches), rtol=1e-5, atol=1e-6)
    assert results[0]["values"][-1]["lyapunov/max"].isfinite()
