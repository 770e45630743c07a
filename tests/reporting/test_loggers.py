"""The exact calls that loggers receive, and what TensorBoard and CSV files contain."""

import csv
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import Regressor, SilentLogger, fit, keys_of, series
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lyapunov import LyapunovMonitor

KEYS = keys_of("rnn")
SPECTRUM = "lyapunov/rnn/spectrum"
OVERVIEW = "lyapunov/_overview"
PICTURE, NOW = "lyapunov/rnn/spectrum_over_training", "lyapunov/rnn/spectrum_now"


class RecordingLogger(SilentLogger):
    """Keeps its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, metrics))

    def ours(self):
        return [(step, metrics) for step, metrics in self.calls if any("lyapunov" in key for key in metrics)]


class Showing(RecordingLogger):
    """A logger whose experiment takes histograms and images."""

    def __init__(self):
        super().__init__()
        self.shown = []

    @property
    def experiment(self):
        return self

    def add_histogram(self, tag, values, step):
        self.shown.append((tag, step))

    def add_image(self, tag, picture, step, dataformats):
        self.shown.append((tag, step))


class Logging(Regressor):
    """Logs a number of its own in every batch, and one at the end of every epoch."""

    def training_step(self, batch, batch_idx):
        self.log("batch", float(batch_idx), on_step=True, on_epoch=False)
        self.log("epoch", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_a_logger_gets_all_numbers_in_one_call_for_each_measurement():
    logger = Showing()
    fit(Regressor(), LyapunovMonitor(), logger=logger)
    assert [step for step, _ in logger.ours()] == [0, 2, 5]
    assert all(set(metrics) == KEYS for _, metrics in logger.ours())
    assert all(type(value) is float for _, metrics in logger.ours() for value in metrics.values())


def test_a_logger_gets_what_callbacks_get():
    logger = Showing()
    trainer = fit(Regressor(), LyapunovMonitor(), logger=logger)
    _, last = logger.ours()[-1]
    assert last == pytest.approx({key: trainer.callback_metrics[key].item() for key in KEYS})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_the_step_is_that_of_a_value_logged_in_the_same_batch(options):
    logger, monitor = Showing(), LyapunovMonitor(every_n_train_steps=1)
    fit(Logging(), monitor, logger=logger, log_every_n_steps=1, data=series(4), **options)
    theirs = [step for step, metrics in logger.calls if "batch" in metrics]
    ours = [step for step, _ in logger.ours()]
    assert len(theirs) == 8 // options.get("accumulate_grad_batches", 1)
    assert sorted(set(ours)) == theirs


@pytest.mark.parametrize("options", [{}, {"max_steps": 5}], ids=["whole epochs", "a cut epoch"])
def test_the_step_at_the_end_of_an_epoch_is_that_of_its_mean_values(options):
    logger = Showing()
    fit(Logging(), LyapunovMonitor(), logger=logger, **options)
    theirs = [step for step, metrics in logger.calls if "epoch" in metrics]
    assert [step for step, _ in logger.ours()][1:] == theirs


def test_our_schedule_is_not_that_of_the_trainer():
    logger = Showing()
    fit(Regressor(), LyapunovMonitor(every_n_train_steps=2), logger=logger, log_every_n_steps=100)
    assert [step for step, _ in logger.ours()] == [0, 1, 3, 5]


def test_every_measurement_is_shown_once():
    logger = Showing()
    fit(Regressor(), LyapunovMonitor(), logger=logger)
    assert logger.shown == [(tag, step) for step in (0, 2, 5) for tag in (OVERVIEW, SPECTRUM, PICTURE, NOW)]


def test_nothing_is_shown_on_request():
    logger = Showing()
    fit(Regressor(), LyapunovMonitor(log_spectrum=False), logger=logger)
    assert logger.ours()
    assert not logger.shown


def test_a_logger_that_shows_nothing_gets_its_numbers():
    logger = RecordingLogger()
    fit(Regressor(), LyapunovMonitor(), logger=logger)
    assert [step for step, _ in logger.ours()] == [0, 2, 5]


def test_all_loggers_get_the_same():
    loggers = [Showing(), RecordingLogger(), Showing()]
    fit(Regressor(), LyapunovMonitor(), logger=loggers)
    assert loggers[0].ours() == loggers[1].ours() == loggers[2].ours()
    assert len(loggers[0].ours()) == 3
    assert loggers[0].shown == loggers[2].shown


def test_tensorboard_shows_scalars_histograms_and_a_picture(tmp_path):
    monitor = LyapunovMonitor()
    trainer = fit(Regressor(), monitor, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.log_dir, {"scalars": 0, "histograms": 0, "images": 0}).Reload()
    tags = events.Tags()
    assert {tag for tag in tags["scalars"] if "lyapunov" in tag} == KEYS
    assert tags["histograms"] == [SPECTRUM]
    assert tags["images"] == [OVERVIEW, PICTURE, NOW]
    for kept in (events.Scalars("lyapunov/max"), events.Histograms(SPECTRUM), events.Images(PICTURE)):
        assert [event.step for event in kept] == monitor.history["rnn"]["step"].tolist() == [0, 2, 5]


@pytest.mark.parametrize("worst", [0, 1])
def test_tensorboard_names_the_worst_layer(worst, tmp_path):
    model = Regressor("RNN", num_layers=2, lr=0.0)
    torch.nn.init.zeros_(getattr(model.rnn, f"weight_hh_l{1 - worst}"))
    trainer = fit(model, LyapunovMonitor(), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.log_dir, {"tensors": 0}).Reload()
    named = events.Tensors("lyapunov/worst_layer/text_summary")
    assert [(event.step, event.tensor_proto.string_val[0].decode()) for event in named] == [
        (step, f"`rnn.l{worst}`") for step in (0, 2, 5)
    ]
    assert [event.value for event in events.Scalars("lyapunov/worst_layer")] == [worst] * 3


def test_tensorboard_holds_the_numbers_of_the_history(tmp_path):
    monitor = LyapunovMonitor()
    trainer = fit(Regressor(), monitor, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.log_dir, {"histograms": 0}).Reload()
    spectra = monitor.history["rnn"]["spectrum"].numpy()
    largest = [event.value for event in events.Scalars("lyapunov/rnn/max")]
    totals = [event.histogram_value.sum for event in events.Histograms(SPECTRUM)]
    np.testing.assert_allclose(largest, spectra[:, 0], rtol=1e-6)
    np.testing.assert_allclose(totals, spectra.sum(1), rtol=1e-5)


@pytest.mark.parametrize("num_exponents", [1, 2, None])
def test_tensorboard_takes_any_number_of_exponents(num_exponents, tmp_path):
    trainer = fit(Regressor(), LyapunovMonitor(num_exponents=num_exponents), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.log_dir).Reload()
    assert len(events.Images(PICTURE)) == 3


def test_tensorboard_takes_a_network_that_is_not_finite(tmp_path):
    model = Regressor()
    torch.nn.init.constant_(model.rnn.weight_hh_l0, torch.nan)
    trainer = fit(model, LyapunovMonitor(), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.log_dir).Reload()
    assert np.isposinf([event.value for event in events.Scalars("lyapunov/max")]).all()
    assert np.isnan([event.value for event in events.Scalars("lyapunov/rnn/max")]).all()
    assert SPECTRUM not in events.Tags()["histograms"]


def test_each_cell_has_its_picture(tmp_path):
    trainer = fit(Regressor(num_layers=2), LyapunovMonitor(), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.log_dir).Reload()
    assert events.Tags()["images"] == [OVERVIEW] + [
        f"lyapunov/rnn.{cell}/{name}" for cell in ("l0", "l1") for name in ("spectrum_over_training", "spectrum_now")
    ]


def test_csv_holds_the_numbers_of_the_history(tmp_path):
    monitor = LyapunovMonitor()
    trainer = fit(Regressor(), monitor, logger=CSVLogger(tmp_path))
    columns = defaultdict(dict)
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if "lyapunov" in key and value:
                    columns[key][int(row["step"])] = float(value)
    measured = monitor.history["rnn"]
    assert set(columns) == KEYS
    assert all(list(column) == measured["step"].tolist() for column in columns.values())
    largest = list(columns["lyapunov/rnn/max"].values())
    np.testing.assert_allclose(largest, measured["spectrum"][:, 0], rtol=1e-6)


@pytest.mark.parametrize("logger", [True, None, "fast"], ids=["default", "none", "fast_dev_run"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loggers_that_lightning_makes_itself_are_taken(logger, tmp_path):
    options = {"fast_dev_run": True} if logger == "fast" else {"logger": logger, "default_root_dir": tmp_path}
    monitor = LyapunovMonitor(strict=True)
    fit(Regressor(), monitor, **options)
    assert monitor.history["rnn"]["spectrum"].isfinite().all()
