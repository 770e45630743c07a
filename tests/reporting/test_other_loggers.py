"""W&B, MLflow and unknown loggers, several loggers, and no logger."""

import json
import math
import struct
import sys
import time
import warnings

import numpy as np
import pytest
from helpers import Regressor, SilentLogger, fit, messages
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lyapunov import LyapunovMonitor

PICTURES = {"lyapunov/_overview", "lyapunov/rnn/spectrum_over_training", "lyapunov/rnn/spectrum_now"}
STEPS = [0, 2, 5]


def fit_quietly(logger, monitor=None, **options):
    """Train; return the monitor, and what was warned of by or about this package."""
    monitor = monitor or LyapunovMonitor(strict=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Regressor(), monitor, logger=logger, **options)
    return monitor, messages(caught, "picture")


# W&B


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    """A logger that writes to the disk only, and a function that reads the rows of its history."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(project="test", offline=True, save_dir=tmp_path)
    yield logger, lambda: wandb_rows(wandb, tmp_path)
    wandb.finish()


def wandb_rows(wandb, folder):
    """Return what was logged, one dictionary for each call, read from the file that would be uploaded."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    records, deadline = [], time.monotonic() + 30
    # Another process writes the file, and may not be done when `finish` returns.
    while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
        time.sleep(0.05)
        records = [Record.FromString(data) for data in leveldb_records(next(folder.rglob("run-*.wandb")))]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.history.item
    ]


def leveldb_records(path):
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB, in which a record may be in several pieces."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, piece = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if piece in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_keeps_every_number_at_our_step(wandb_logger):
    logger, read = wandb_logger
    monitor, _ = fit_quietly(logger, log_every_n_steps=1)
    largest = [(row["trainer/global_step"], row["lyapunov/rnn/max"]) for row in read() if "lyapunov/rnn/max" in row]
    assert [step for step, _ in largest] == STEPS
    np.testing.assert_allclose([value for _, value in largest], monitor.history["rnn"]["spectrum"][:, 0], rtol=1e-6)


@pytest.mark.slow
def test_wandb_shows_each_picture_at_our_step(wandb_logger):
    logger, read = wandb_logger
    fit_quietly(logger)
    rows = read()
    for tag in PICTURES:
        shown = [(row["trainer/global_step"], row[f"{tag}/count"]) for row in rows if f"{tag}/count" in row]
        assert shown == [(step, 1) for step in STEPS]


@pytest.mark.slow
def test_wandb_drops_nothing_for_its_own_step(wandb_logger):
    logger, read = wandb_logger
    fit_quietly(logger, LyapunovMonitor(every_n_train_steps=1, strict=True), log_every_n_steps=1)
    rows = read()
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own))
    assert [row["trainer/global_step"] for row in rows if "loss" in row] == list(range(6))
    assert [row["trainer/global_step"] for row in rows if "lyapunov/max" in row] == list(range(6))


@pytest.mark.slow
def test_wandb_puts_the_prefix_before_numbers_and_pictures(wandb_logger):
    logger, read = wandb_logger
    logger._prefix = "mine"
    fit_quietly(logger)
    keys = {key for row in read() for key in row}
    assert keys >= {"mine-lyapunov/max"} | {f"mine-{tag}/count" for tag in PICTURES}


# MLflow


@pytest.fixture
def mlflow_logger(tmp_path, monkeypatch):
    """A logger that keeps everything in files."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("mlflow")
    return MLFlowLogger("test", save_dir=str(tmp_path / "mlruns"))


def mlflow_pictures(logger):
    """Return the tag and step of each picture of full size."""
    names = [artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id, "images")]
    parts = [name.removeprefix("images/").split("+") for name in names if name.endswith(".png")]
    return sorted((tag.replace("~", "/"), int(step)) for tag, _, step, *_ in parts)


@pytest.mark.slow
def test_mlflow_puts_the_prefix_before_numbers_and_pictures(mlflow_logger):
    mlflow_logger._prefix = "mine"
    fit_quietly(mlflow_logger)
    run = mlflow_logger.experiment.get_run(mlflow_logger.run_id)
    assert "mine-lyapunov/max" in run.data.metrics
    assert {tag for tag, _ in mlflow_pictures(mlflow_logger)} == {f"mine-{tag}" for tag in PICTURES}


@pytest.mark.slow
def test_mlflow_keeps_every_number_at_our_step(mlflow_logger):
    monitor, _ = fit_quietly(mlflow_logger)
    kept = mlflow_logger.experiment.get_metric_history(mlflow_logger.run_id, "lyapunov/rnn/max")
    assert [metric.step for metric in kept] == STEPS
    np.testing.assert_allclose([metric.value for metric in kept], monitor.history["rnn"]["spectrum"][:, 0], rtol=1e-6)


@pytest.mark.slow
def test_mlflow_shows_each_picture_at_our_step(mlflow_logger):
    fit_quietly(mlflow_logger)
    assert mlflow_pictures(mlflow_logger) == sorted((tag, step) for tag in PICTURES for step in STEPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MLFlow only allows:RuntimeWarning")
def test_mlflow_takes_a_layer_of_any_name(mlflow_logger):
    model = Regressor()
    model.add_module("rnn: ü", model.rnn)
    monitor = LyapunovMonitor("rnn: ü", strict=True)
    fit(model, monitor, logger=mlflow_logger)
    assert {tag for tag, _ in mlflow_pictures(mlflow_logger)} == {tag.replace("rnn", "rnn ") for tag in PICTURES}


# Loggers that take no pictures


class Unknown(SilentLogger):
    """Takes numbers, and is not known to the package."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        self.steps += [step] * ("lyapunov/max" in metrics)


class CometLogger(Unknown):
    """Like Comet's: its experiment has its own calls for pictures, which the package does not know."""

    class CometExperiment:
        __slots__ = ()

        def log_image(self, image_data, name=None, overwrite=False, image_format="png", step=None):
            raise AssertionError("called without knowing how")

        def log_metrics(self, dic, prefix=None, step=None, epoch=None):
            raise AssertionError("called beside the logger")

    @property
    def experiment(self):
        return self.CometExperiment()


def test_csv_gets_its_numbers_without_a_word(tmp_path):
    _, warned = fit_quietly(CSVLogger(tmp_path))
    assert not warned


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("unknown", [Unknown, CometLogger])
def test_a_logger_that_is_not_known_to_take_pictures_is_said_once_and_is_no_error(unknown, strict):
    logger = unknown()
    _, warned = fit_quietly(logger, LyapunovMonitor(strict=strict, log_band=True))
    assert logger.steps == STEPS
    assert len(warned) == 1
    assert unknown.__name__ in warned[0]


def test_nothing_is_said_of_pictures_that_nobody_wants():
    _, warned = fit_quietly(Unknown(), LyapunovMonitor(log_spectrum=False))
    assert not warned


# Several loggers, and the band


@pytest.mark.slow
def test_each_of_several_loggers_gets_all_that_it_can_take(tmp_path, wandb_logger, mlflow_logger):
    wandb_logger, read = wandb_logger
    loggers = [Unknown(), TensorBoardLogger(tmp_path), wandb_logger, CSVLogger(tmp_path, "csv"), mlflow_logger]
    _, warned = fit_quietly(loggers)
    assert len(warned) == 1
    assert loggers[0].steps == STEPS
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert set(events.Tags()["images"]) == PICTURES
    assert {key for row in read() for key in row} >= {f"{tag}/count" for tag in PICTURES}
    assert "lyapunov/rnn/max" in (tmp_path / "csv/version_0/metrics.csv").read_text()
    assert {tag for tag, _ in mlflow_pictures(mlflow_logger)} == PICTURES


def test_one_logger_that_fails_takes_nothing_from_the_next(tmp_path):
    class Failing(TensorBoardLogger):
        @property
        def experiment(self):
            experiment = super().experiment
            experiment.add_image = lambda *args, **kwargs: 1 / 0
            return experiment

    loggers = [Failing(tmp_path, "failing"), TensorBoardLogger(tmp_path, "works")]
    _, warned = fit_quietly(loggers, LyapunovMonitor())
    assert len(warned) == 1
    assert "Failing" in warned[0]
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert set(events.Tags()["images"]) == PICTURES


def test_without_a_package_that_draws_there_are_numbers_and_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    logger = TensorBoardLogger(tmp_path)
    _, warned = fit_quietly(logger, LyapunovMonitor())
    assert len(warned) == 1
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Scalars("lyapunov/max")) == len(STEPS)


@pytest.mark.parametrize("options", [{"logger": False}, {"barebones": True}], ids=str)
def test_without_a_logger_nothing_is_drawn(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    _, warned = fit_quietly(options.pop("logger", None), LyapunovMonitor(), **options)
    assert not warned


@pytest.mark.parametrize("logger", [Unknown, CSVLogger, TensorBoardLogger])
def test_a_fast_run_leaves_every_logger_alone(logger, tmp_path):
    logger = logger() if logger is Unknown else logger(tmp_path)
    _, warned = fit_quietly(logger, fast_dev_run=True)
    assert not warned
    assert not list(tmp_path.iterdir())


def test_the_band_is_logged_on_request(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "plain"), TensorBoardLogger(tmp_path, "banded")]
    _, banded = [
        fit_quietly(logger, LyapunovMonitor(strict=True, log_band=flag))[0].history["rnn"]
        for logger, flag in zip(loggers, (False, True), strict=True)
    ]
    plain, events = (EventAccumulator(logger.log_dir).Reload() for logger in loggers)
    assert not [tag for tag in plain.Tags()["scalars"] if "band" in tag]
    lower, upper = (
        np.array([event.value for event in events.Scalars(f"lyapunov_band/rnn/{side}")]) for side in ("lower", "upper")
    )
    np.testing.assert_allclose((lower + upper) / 2, banded["spectrum"][:, 0], rtol=1e-5)
    assert (upper - lower >= 2 * 1.95 * banded["stderr"][:, 0].numpy()).all()
    assert not math.isnan(lower[0])
