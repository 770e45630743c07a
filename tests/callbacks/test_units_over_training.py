"""Which units carry the growth, over a training."""

import io

import numpy as np
import pytest
import torch
from helpers import Regressor, fit, series
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lyapunov import LyapunovMonitor, covariant_lyapunov_vectors, unit_shares
from lightning_lyapunov.callbacks.run import Run
from lightning_lyapunov.reporting.pictures import units_picture

UNITS, PLANTED = 24, [3, 8, 17, 20]


def planted(cell="RNN", **options):
    """Return a model in which four units are unstable among themselves, and the others fade."""
    torch.manual_seed(0)
    model = Regressor(cell, UNITS, lr=0.0, **options)
    with torch.no_grad():
        for name, weight in model.rnn.named_parameters():
            if name.startswith("weight_ih"):
                weight.mul_(0.3)  # so that no unit is saturated
            if name.startswith("weight_hh"):
                weight.mul_(0.1)
                for block in weight.split(UNITS):
                    block[np.ix_(PLANTED, PLANTED)] = 2 * nn.init.orthogonal_(torch.empty(4, 4))
    return model


def events_of(model, monitor, folder, **options):
    logger = TensorBoardLogger(folder)
    fit(model, monitor, data=series(2, time=40), max_epochs=1, logger=logger, **options)
    return EventAccumulator(logger.log_dir, {"images": 0, "tensors": 0}).Reload()


def texts(events):
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors("lyapunov/units/text_summary")]


def test_the_planted_block_is_named_and_drawn(tmp_path):
    monitor = LyapunovMonitor(log_units=True, every_n_train_steps=1)
    events = events_of(planted(), monitor, tmp_path)
    assert monitor.estimates["lyapunov/max"].value > 0
    for text in texts(events):
        named = text.split("units ")[1].split(" carry")[0].split(", ")
        assert set(map(str, PLANTED)) < set(named)
    (*_, last) = events.Images("lyapunov/rnn/unit_shares")
    picture = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
    rows = picture[58:462, 440, 0]
    darkness = [255 - int(rows[int((unit + 0.5) / UNITS * len(rows))]) for unit in range(UNITS)]
    assert set(np.argsort(darkness)[-4:].tolist()) == set(PLANTED)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_the_shares_are_those_of_the_leading_covariant_vector(cell, monkeypatch):
    seen, model = [], planted(cell)
    measure = Run.measure

    def keep(run, *args, **kwargs):
        measure(run, *args, **kwargs)
        seen.append(run.measurement.unit_shares["rnn"])

    monkeypatch.setattr(Run, "measure", keep)
    data = series(1, time=40)
    fit(model, LyapunovMonitor(log_units=True, strict=True), data=data, max_epochs=1)
    inputs = next(iter(data))[0]
    vectors, _ = covariant_lyapunov_vectors(model.rnn, inputs, num_exponents=1, warmup=20)
    expected = unit_shares(vectors, num_tensors=2 if cell == "LSTM" else 1)
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-4, atol=1e-6)
    assert len(seen[0]) == UNITS


def test_each_cell_has_its_picture_and_the_worst_its_text(tmp_path):
    events = events_of(planted(num_layers=2), LyapunovMonitor(log_units=True), tmp_path)
    assert {tag for tag in events.Tags()["images"] if tag.endswith("unit_shares")} == {
        "lyapunov/rnn.l0/unit_shares",
        "lyapunov/rnn.l1/unit_shares",
    }
    assert all(text.startswith("`rnn.l") for text in texts(events))


def test_nothing_of_it_is_logged_unasked(tmp_path):
    tags = events_of(planted(), LyapunovMonitor(), tmp_path).Tags()
    assert not [tag for tag in (*tags["images"], *tags["tensors"]) if "unit" in tag]


def test_a_network_that_is_not_finite_has_no_units(tmp_path):
    model = planted()
    nn.init.constant_(model.rnn.weight_hh_l0, torch.nan)
    events = events_of(model, LyapunovMonitor(log_units=True, strict=True), tmp_path)
    assert len(events.Images("lyapunov/rnn/unit_shares")) == 2


@pytest.mark.parametrize("shares", [np.full((1, 3), 1 / 3), np.full((5, 3), np.nan), np.eye(200)])
def test_any_shares_can_be_drawn(shares):
    assert units_picture(np.arange(len(shares)), shares, "units").shape == (560, 800, 3)
