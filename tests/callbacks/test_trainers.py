"""Options of the trainer, other stages and packages, compiled layers, several monitors and processes."""

import copy

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers import Regressor, TwoLayers, fit, hooks_of, keys_of, make_trainer, published, regressor, series, steps_of
from lightning.pytorch import Callback
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum


def test_several_monitors_watch_at_several_times():
    rare, often = LyapunovMonitor("rnn"), LyapunovMonitor("sometimes", every_n_train_steps=1)
    trainer = fit(TwoLayers(), rare, often, max_epochs=1, data=series(5))
    assert steps_of(rare) == [0, 4]
    assert steps_of(often) == [0, 1, 2, 3, 4]
    assert set(published(trainer)) == keys_of("rnn") | keys_of("sometimes")


TRAINERS = {
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run=3": {"fast_dev_run": 3},
    "logger=False": {"logger": False},
    "barebones": {"barebones": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "detect_anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_any_trainer_can_have_a_monitor(cell, options):
    monitor = LyapunovMonitor(strict=True)
    trainer = fit(Regressor(cell), monitor, **options)
    values = published(trainer)
    assert set(values) == keys_of("rnn")
    assert all(value.isfinite() for value in values.values())
    assert monitor.history["rnn"]["spectrum"].dtype == torch.float32
    torch.use_deterministic_algorithms(False)


def test_low_precision_changes_the_weights_and_not_the_arithmetic():
    """The exponents in bf16 are, to float32's accuracy, those of the rounded weights and inputs."""
    monitor, model = LyapunovMonitor(num_exponents=1, warmup=0), Regressor("GRU", lr=0.0)
    fit(model, monitor, max_steps=1, data=series(1), precision="bf16-true")
    (inputs, _) = next(iter(series(1)))
    rounded = copy.deepcopy(model.rnn).bfloat16().float()
    expected = lyapunov_spectrum(rounded, inputs.bfloat16().float(), num_exponents=1).mean(0)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected, rtol=1e-4, atol=1e-5)


def test_a_second_fit_goes_on_where_the_first_ended():
    monitor, model = LyapunovMonitor(), Regressor()
    trainer = make_trainer(monitor)
    trainer.fit(model, series())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, series())
    assert steps_of(monitor) == [0, 2, 5, 6, 8, 11]
    assert not hooks_of(model)


def test_prediction_measures_nothing():
    monitor = LyapunovMonitor()
    make_trainer(monitor).predict(Regressor(), [batch[0] for batch in series()])
    assert monitor.history == {}


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_validate_and_test_measure_once_and_log(stage, cell):
    class Tested(Regressor):
        test_step = Regressor.validation_step

    # The first batch of `series` is all that is seen, so the plain function gives the same.
    model, monitor = Tested(cell), LyapunovMonitor(warmup=2, dtype=torch.float64, strict=True)
    trainer = make_trainer(monitor)
    getattr(trainer, stage)(model, series(), verbose=False)
    expected = lyapunov_spectrum(model.rnn, next(iter(series()))[0], warmup=2, dtype=torch.float64).mean(0)
    torch.testing.assert_close(monitor.history["rnn"]["spectrum"][0].double(), expected[:16], rtol=0, atol=1e-6)
    assert monitor.history["rnn"]["step"].tolist() == [0]
    assert trainer.callback_metrics["lyapunov/max"] == pytest.approx(float(expected[0]), abs=1e-6)
    assert not hooks_of(model)


@pytest.mark.parametrize("pl", [lightning.pytorch, pytorch_lightning], ids=["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_run_it(pl, tmp_path):
    monitor = LyapunovMonitor()
    stop = pl.callbacks.EarlyStopping("lyapunov/max", divergence_threshold=-99.0, patience=10**6)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="lyapunov/max")
    options = {"pl": pl, "max_epochs": 3, "enable_checkpointing": True}
    trainer = fit(regressor(pl)(), stop, keep, monitor, **options)
    assert trainer.current_epoch == 1
    assert set(published(trainer)) == keys_of("rnn")
    assert keep.best_model_score == trainer.callback_metrics["lyapunov/max"]


def test_a_compiled_layer_keeps_its_name():
    model = Regressor()
    model.rnn = torch.compile(model.rnn, backend="eager")
    model.rnn.bidirectional = False
    assert set(published(fit(model, LyapunovMonitor(), max_epochs=1))) == keys_of("rnn")


class SaveInputs(Callback):
    """Save what each process has published, and its inputs."""

    def __init__(self, folder):
        self.folder, self.inputs = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.inputs.append(batch[0])

    def on_train_end(self, trainer, pl_module):
        torch.save({"values": published(trainer), "inputs": self.inputs}, f"{self.folder}/{trainer.global_rank}.pt")


@pytest.mark.slow
def test_every_process_publishes_the_value_over_all_of_them(tmp_path):
    model = Regressor(lr=0.0)
    options = {"devices": 2, "strategy": "ddp_spawn", "max_epochs": 1, "data": series(4, shuffle=False)}
    fit(model, LyapunovMonitor(num_exponents=1, warmup=0), SaveInputs(tmp_path), **options)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(first["values"]) == keys_of("rnn")
    assert_close(first["values"], second["values"], rtol=0, atol=0)
    inputs = torch.cat((first["inputs"][-1], second["inputs"][-1]))
    assert not torch.equal(*inputs.chunk(2))
    expected = lyapunov_spectrum(model.rnn, inputs, num_exponents=1).mean()
    assert_close(first["values"]["lyapunov/max"], expected, rtol=1e-4, atol=1e-5)
