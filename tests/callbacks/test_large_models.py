"""Models with many cells: operations are counted, not seconds."""

import sys
from itertools import pairwise

import pytest
import torch
from helpers import FEATURES, At, Regressor, assert_equal, fit, series
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_lyapunov import LyapunovMonitor
from lightning_lyapunov.layers.discovery import find_layers
from lightning_lyapunov.measuring.summaries import CellSamples, CellSummaries, summarised
from lightning_lyapunov.metrics import LyapunovSummary
from lightning_lyapunov.reporting import budget
from lightning_lyapunov.reporting.budget import MAX_PICTURED_CELLS, NUM_WORST_CELLS, PictureBudget, worst_cells


class Layers(Regressor):
    """Many small layers side by side."""

    def __init__(self, count: int) -> None:
        super().__init__("RNN", 2, lr=0.0)
        self.layers = nn.ModuleList(nn.RNN(FEATURES, 2, batch_first=True) for _ in range(count))

    def forward(self, inputs):
        return super().forward(inputs) + sum(layer(inputs)[0].mean() for layer in self.layers)


def random_samples(samples, count, segments=1):
    return CellSamples(torch.randn(samples, count).double(), torch.randint(1, 50, (samples,)), segments)


def test_the_metrics_of_many_cells_are_those_of_each_alone():
    samples = {
        "a": random_samples(4, 3),
        "b": random_samples(16, 3, segments=8),
        "c": random_samples(1, 1),
        "nothing": CellSamples(torch.empty(0, 3), torch.empty(0)),
        "failed": CellSamples(torch.full((1, 3), torch.nan), torch.full((1,), torch.nan)),
        "one": random_samples(5, 1),
        "two": random_samples(2, 2),
    }
    together = summarised(samples)
    assert list(together) == list(samples)
    for cell, (spectrum, *rest) in samples.items():
        alone = LyapunovSummary(spectrum.shape[1])
        alone.update(spectrum, *rest)
        assert_equal(together[cell], alone.compute())


@pytest.mark.parametrize("layers", [1, 30])
def test_a_measurement_computes_the_metrics_of_all_cells_once(layers, monkeypatch):
    computed, estimates = [], CellSummaries.estimates
    monkeypatch.setattr(CellSummaries, "estimates", lambda self: computed.append(self.moments.shape) or estimates(self))
    fit(Regressor("RNN", 2, num_layers=layers), LyapunovMonitor(), max_epochs=1)
    assert computed == [(layers, *computed[0][1:])] * 2


def calls_in(function):
    """Return how many Python functions are entered, or generators resumed, in a call."""
    entered = []
    sys.setprofile(lambda frame, event, argument: entered.append(1) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(entered)


def test_finding_layers_compares_no_two_of_them():
    few, many = Layers(100), Layers(400)
    assert calls_in(lambda: find_layers(many)) < 5 * calls_in(lambda: find_layers(few))


# Pictures


class Shown:
    """Counts what a TensorBoard writer is given."""

    def __init__(self, logger):
        self.images, self.histograms, self.texts = [], [], []
        writer = logger.experiment
        writer.add_image = lambda tag, picture, step, **_: self.images.append((step, tag))
        writer.add_histogram = lambda tag, values, step: self.histograms.append((step, tag))
        writer.add_text = lambda tag, text, step: self.texts.append(step)

    def drawn_at(self):
        return sorted({step for step, _ in self.images})


@pytest.fixture
def logger(tmp_path):
    return TensorBoardLogger(tmp_path)


def drawn_of(steps, seconds=0.0, cost=0.0):
    """Return which steps are drawn, ``seconds`` apart, if a drawing takes ``cost`` seconds."""
    now = 0.0
    pictures, drawn = PictureBudget(lambda: now), []
    for step in steps:
        now += seconds
        if pictures.is_due(step):
            drawn.append(step)
            with pictures.drawing(step):
                now += cost
    return drawn


@pytest.mark.parametrize(("count", "drawings"), [(20, 11), (1_000, 28), (100_000, 49)])
@pytest.mark.parametrize("every", [1, 500])
def test_the_number_of_drawings_grows_with_the_logarithm_of_the_run(every, count, drawings):
    drawn = drawn_of(range(0, count * every, every))
    assert abs(len(drawn) - drawings) <= 1
    # What is shown is never older than a fifth of the run, beyond the one measurement in between.
    assert all(later <= 1.25 * earlier + every for earlier, later in pairwise(drawn))


@pytest.mark.parametrize("cost", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("seconds", [0.05, 1.0, 20.0])
def test_drawing_takes_one_percent_of_the_time_of_a_run(seconds, cost, monkeypatch):
    monkeypatch.undo()  # see `conftest.py`
    count = 1_000
    drawn = drawn_of(range(count), seconds, cost)
    assert drawn[0] == 0
    assert (len(drawn) - 1) * cost <= 0.01 * (count * seconds + len(drawn) * cost)
    # Where a drawing is cheap beside what lies between, no picture is left out for its time.
    assert (drawn == drawn_of(range(count))) == (seconds >= 99 * cost)


def test_a_resumed_run_draws_at_its_first_measurement():
    assert drawn_of(range(10_000, 16_000, 100)) == [10_000, 12_500, 15_700]


def test_pictures_of_a_run_are_bounded_and_the_last_measurement_has_one(logger):
    shown, monitor = Shown(logger), LyapunovMonitor(every_n_train_steps=1, max_steps=2, warmup=0)
    data = series(60, batch_size=2, time=2)
    fit(Regressor("RNN", 1, lr=0.0), monitor, data=data, max_epochs=1, logger=logger)
    assert shown.drawn_at() == [*drawn_of(range(60)), 59]
    assert len(shown.images) == 3 * len(shown.drawn_at())
    # What is small comes at every measurement, and only once.
    assert [step for step, _ in shown.histograms] == shown.texts == list(range(60))


def test_a_slow_drawing_is_not_soon_repeated_but_at_the_end(logger, monkeypatch):
    monkeypatch.setattr(budget, "_MAX_TIME_SHARE", 1e-9)
    shown, monitor = Shown(logger), LyapunovMonitor(every_n_train_steps=1, max_steps=2, warmup=0)
    fit(Regressor("RNN", 1, lr=0.0), monitor, data=series(12, time=2), max_epochs=1, logger=logger)
    assert shown.drawn_at() == [0, 11]


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_the_last_measurement_before_an_error_has_its_picture(error, logger):
    def end(trainer):
        if trainer.global_step == 14:
            raise error

    shown, monitor = Shown(logger), LyapunovMonitor(every_n_train_steps=1, max_steps=2, warmup=0)
    with pytest.raises((StopError, KeyboardInterrupt, SystemExit)):
        fit(Regressor(), At("on_train_batch_start", end), monitor, data=series(20, time=2), logger=logger)
    assert shown.drawn_at()[-1] == 13
    assert len(shown.images) == 3 * len(shown.drawn_at())


def test_of_many_cells_the_worst_are_drawn(logger):
    model, shown, monitor = Regressor("RNN", 2, num_layers=30, lr=0.0), Shown(logger), LyapunovMonitor()
    with torch.no_grad():
        for number in (3, 17, 29):
            getattr(model.rnn, f"weight_hh_l{number}").copy_(3 * torch.eye(2))
    trainer = fit(model, monitor, max_epochs=1, logger=logger)
    last = [tag.split("/")[1] for step, tag in shown.images if step == 2 and tag.endswith("now")]
    by_size = sorted(monitor.history, key=lambda cell: -monitor.history[cell]["spectrum"][-1, 0])
    assert set(last) == set(by_size[:NUM_WORST_CELLS])
    assert len(shown.histograms) == (len(shown.images) - 2) / 2 == 2 * NUM_WORST_CELLS
    # The numbers of all of them are there.
    assert sum(key.startswith("lyapunov/rnn.l") and key.endswith("/max") for key in trainer.callback_metrics) == 30


def test_the_worst_cells_keep_their_order_and_what_is_not_finite_comes_first():
    cells = [f"l{number}" for number in range(20)]
    largest = {cell: float(number % 10) for number, cell in enumerate(cells[:-1])} | {"l5": float("nan")}
    assert worst_cells(cells, largest) == ["l5", "l8", "l9", "l18"]
    assert worst_cells(cells[:MAX_PICTURED_CELLS], {}) == cells[:MAX_PICTURED_CELLS]


def test_a_value_that_callbacks_keep_keeps_no_other():
    trainer = fit(Regressor("RNN", 2, num_layers=30), LyapunovMonitor(metrics="all"), max_epochs=1)
    values = [value for key, value in trainer.callback_metrics.items() if key.startswith("lyapunov/")]
    assert len(values) > 300
    assert all(value.untyped_storage().nbytes() == 4 for value in values)
