"""The overview, the advice in words, and the page about a run."""

import base64
import io
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import At, Dial, Regressor, TwoLayers, fit, keys_of, published, series
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.callbacks.publish import DEFAULT_METRICS, METRICS
from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.reporting.advice import advice_for, headline
from lightning_lyapunov.reporting.canvas import GROWS, SHRINKS, colour_limit, colours
from lightning_lyapunov.reporting.overview import overview_picture

# The picture


def history(*largest, steps=range(0, 100, 10)):
    """Return measurements of cells whose largest exponents stay the same, and the rest is a nat lower."""
    steps = np.array(steps)
    spectra = {f"rnn.l{i}": value - np.arange(4)[None] + 0 * steps[:, None] for i, value in enumerate(largest)}
    return {
        name: {"step": steps, "spectrum": spectrum, "stderr": np.full(spectrum.shape, 0.01)}
        for name, spectrum in spectra.items()
    }


def count(picture, colour):
    return int((picture == np.array(colour)).all(-1).sum())


UNSTABLE = (250, 221, 217)


@pytest.mark.parametrize("num_cells", [1, 2, 12])
@pytest.mark.parametrize("tone", ["grows", "forgets", ""])
def test_the_overview_shows_the_worst_cell_in_its_colour_and_the_others_in_grey(num_cells, tone):
    cells = history(*np.linspace(0.2, -0.2, num_cells))
    picture = overview_picture(cells, "rnn.l0", "what it means", tone=tone, length=60)
    upper = picture[52:254, 150:610]
    assert picture.shape == (560, 800, 3)
    assert picture.dtype == np.uint8
    colour = {"grows": GROWS, "forgets": SHRINKS, "": (40, 40, 40)}[tone]
    assert count(upper, colour) > 1_500
    assert (count(upper, (150, 150, 150)) > 300) == (num_cells > 1)


@pytest.mark.parametrize("largest", [-0.4, -0.1, 0.0, 0.05, 0.3, 3.0])
def test_what_is_unstable_is_named_where_it_is_shaded(largest):
    upper = overview_picture(history(largest), "rnn.l0", "", length=60)[52:254, 150:610]
    assert (count(upper, UNSTABLE) > 0) == (count(upper, (205, 120, 115)) > 50)


def test_each_cell_has_its_band():
    cells = history(0.3, -0.3)
    narrow, wide = (overview_picture(cells, "rnn.l0", "", quantiles={"rnn.l1": q}, length=60) for q in (1.0, 5.0))
    for colour, grows in (((226, 226, 226), True), ((200, 200, 200), False)):
        pixels = [count(picture[52:254, 150:610], colour) for picture in (narrow, wide)]
        assert min(pixels) > 300
        assert (pixels[1] > 3 * pixels[0]) == grows


@pytest.mark.parametrize(("length", "shaded"), [(1000, True), (60, True), (4, False), (math.nan, False)])
def test_what_is_unstable_is_shaded_where_it_is_near(length, shaded):
    picture = overview_picture(history(0.2), "rnn.l0", "", length=length)
    assert (count(picture, UNSTABLE) > 5_000) == shaded


@pytest.mark.parametrize("value", [math.nan, -87.4, 0.0, 30.0, -1e-9])
@pytest.mark.parametrize("num_steps", [1, 2, 500])
def test_any_history_can_be_drawn(value, num_steps):
    cells = history(value, 0.1, steps=range(num_steps))
    cells["rnn.l0"]["stderr"][:] = math.nan
    cells["rnn.l1"]["step"] = cells["rnn.l1"]["step"] + 1  # measured at other steps
    assert overview_picture(cells, "rnn.l0", "", length=60).any()


def test_both_parts_share_the_axis_of_steps():
    picture = overview_picture(history(0.2, steps=(0, 3, 50, 60)), "rnn.l0", "", tone="grows", length=60)
    dots = (picture[52:254, 150:610] == np.array(GROWS)).all(-1).sum(0) > 10  # taller than the line
    marks = (picture[491, 150:610] == 40).all(-1)

    def middles(columns):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], columns.astype(int), [0]))))
        return (edges[::2] + edges[1::2]) / 2

    assert len(middles(marks)) == 4
    assert np.abs(middles(dots) - middles(marks)).max() <= 2


def test_what_is_within_an_e_fold_over_the_sequences_is_pale_however_small_the_rest_is():
    spectra = np.array([[0.03, 0.01, -0.03]])
    pale = colours(np.array([[1 / 60, -1 / 60]]), colour_limit(spectra, 60.0))
    assert (pale.min(-1) > 160).all()
    assert colours(np.array([[0.03]]), colour_limit(spectra))[0, 0].tolist() == list(GROWS)


# The advice


def estimate(value, stderr=0.01, num_sequences=16, length=60.0):
    return Estimate(value, stderr, num_sequences, "rnn", 10, length)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "not finite"),
        (0.226, "5.9 decades over the 60 steps"),
        (-87.3, "after one step"),
        (-0.5, "lasts 2 of the 60 steps"),
        (-0.3, "lasts 3.3 of the 60 steps"),
        (0.047, None),
        (0.0, None),
        (-0.1, None),
    ],
)
def test_what_is_wrong_is_said_and_nothing_else(value, said):
    advice = advice_for(estimate(value))
    assert advice is None if said is None else said in advice


@pytest.mark.parametrize("value", [0.08, -0.195])
def test_an_interval_that_holds_the_limit_gets_no_advice(value):
    assert advice_for(estimate(value, 0.001)) is not None
    assert advice_for(estimate(value, 0.05)) is None
    assert advice_for(estimate(value, math.nan, 1)) is None


@pytest.mark.parametrize(
    ("kind", "word"), [("RNN", "orthogonal_"), ("LSTM", "forget gate"), ("GRU", "update gate"), ("", "keep the state")]
)
def test_the_remedy_is_that_of_the_kind_of_layer(kind, word):
    assert word in advice_for(estimate(-0.5), kind)


def test_a_network_whose_exponent_has_risen_does_not_forget():
    assert advice_for(estimate(-0.3), first=estimate(-0.5)) is None
    assert advice_for(estimate(-0.49), first=estimate(-0.5)) is not None
    assert advice_for(estimate(-0.5), first=estimate(-0.3)) is not None
    assert "unstable" in advice_for(estimate(0.3), first=estimate(-0.5))


def test_a_short_sequence_forgets_nothing():
    assert advice_for(estimate(-0.5, length=8.0)) is None
    assert headline(estimate(-0.5, length=8.0)) == ("stable: -1.7 decades in 8 steps", "")


def recall(cell, change, **options):
    model = Regressor(cell, 32, **options)
    with torch.no_grad():
        change(model.rnn)
    return model


def open_gate(rnn):
    rnn.bias_ih_l0[32:64] = 3.0


KNOWN = {
    "default RNN": ("RNN", lambda rnn: None, "orthogonal_"),
    "default LSTM": ("LSTM", lambda rnn: None, "forget gate"),
    "default GRU": ("GRU", lambda rnn: None, "update gate"),
    "chaotic RNN": ("RNN", lambda rnn: rnn.weight_hh_l0.normal_(std=3 / 32**0.5), "scale the recurrent weights down"),
    "broken RNN": ("RNN", lambda rnn: rnn.weight_hh_l0.fill_(math.nan), "not finite"),
    "orthogonal RNN": ("RNN", lambda rnn: nn.init.orthogonal_(rnn.weight_hh_l0), None),
    "open LSTM": ("LSTM", open_gate, None),
    "open GRU": ("GRU", open_gate, None),
}


@pytest.mark.parametrize(("cell", "change", "word"), KNOWN.values(), ids=KNOWN)
def test_networks_of_known_trouble_get_their_remedy(cell, change, word, tmp_path):
    torch.manual_seed(0)
    monitor = LyapunovMonitor()
    logger = TensorBoardLogger(tmp_path)
    fit(recall(cell, change, lr=0.0), monitor, data=series(2, batch_size=16, time=60), max_epochs=1, logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    if word is None:
        assert monitor.advice() == []
    else:
        (advice,) = monitor.advice()
        assert word in advice
        assert advice.startswith("`rnn`: λ1 = ")
    assert any("lyapunov/advice" in tag for tag in tags["tensors"]) == (word is not None)


def test_the_advice_is_said_at_the_end_of_a_fit(caplog):
    with caplog.at_level("INFO"):
        fit(recall("RNN", lambda rnn: rnn.weight_hh_l0.fill_(math.nan)), LyapunovMonitor(), max_epochs=1)
    assert sum("at the end of the fit:\n`rnn`: λ1 = +nan" in message for message in caplog.messages) == 1


# Which numbers


def test_the_default_metrics_are_few_and_all_are_there_on_request():
    assert set(published(fit(Regressor(), LyapunovMonitor()))) == keys_of("rnn")
    some = published(fit(Regressor(), LyapunovMonitor(metrics=["mean", "max"])))
    assert {key for key in some if "/rnn/" in key} == {"lyapunov/rnn/max", "lyapunov/rnn/mean"}
    everything = published(fit(Regressor(), LyapunovMonitor(metrics="all")))
    assert {key for key in everything if "/rnn/" in key} == {f"lyapunov/rnn/{name}" for name in METRICS}
    assert set(DEFAULT_METRICS) < set(METRICS)


@pytest.mark.parametrize("metrics", ["memory", ["max", "min"]])
def test_an_unknown_metric_is_refused_with_the_names(metrics):
    with pytest.raises(ValueError, match="or some of max, max_stderr, mean"):
        LyapunovMonitor(metrics=metrics)


def test_the_layer_that_grows_most_and_the_one_that_forgets_most_have_a_number_each():
    monitor, rule = LyapunovMonitor(), InstabilityStopping(monitor="lyapunov/smallest_max", lower_threshold=-50.0)
    values = published(fit(TwoLayers(), monitor, rule))
    both = [values[f"lyapunov/{layer}/max"] for layer in ("rnn", "sometimes")]
    assert values["lyapunov/max"] == max(both)
    assert values["lyapunov/smallest_max"] == min(both) == pytest.approx(monitor.estimates["lyapunov/smallest_max"][0])


def test_the_worst_layer_changes_only_beyond_the_errors():
    from lightning_lyapunov.callbacks.publish import Publisher
    from lightning_lyapunov.reporting.history import History

    publisher = Publisher(History(), warn=print)

    def named(first, second, stderr):
        publisher._measured = {
            f"lyapunov/{layer}/max": Estimate(value, stderr, 16, layer, 0, 60.0)
            for layer, value in (("a", first), ("b", second))
        }
        return publisher._judge_all(["a", "b"])["worst_layer"]

    assert [named(*values) for values in ((0.1, 0.0, 0.01), (0.1, 0.11, 0.01), (0.1, 0.2, 0.01))] == [0, 0, 1]
    assert named(math.nan, 0.2, 0.01) == 0


def test_rows_of_a_table_carry_the_epoch(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Regressor(), LyapunovMonitor(every_n_train_steps=1), logger=logger, max_epochs=2)
    logger.save()
    rows = [row for row in logger.experiment.metrics if "lyapunov/max" in row]
    table = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "epoch" in table[0].split(",")
    assert rows == []  # all are written
    column = table[0].split(",").index("epoch")
    assert all(line.split(",")[column] for line in table[1:])


# The progress bar


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("model", [Regressor, TwoLayers])
def test_the_progress_bar_shows_the_largest_exponent(bar, model):
    if bar is RichProgressBar:
        pytest.importorskip("rich")
    shown = []
    monitor = LyapunovMonitor(prog_bar=True)
    look = At("on_train_batch_end", lambda trainer: shown.append(trainer.progress_bar_metrics.get("λ1")))
    fit(model(), monitor, bar(), look, enable_progress_bar=True)
    assert len(shown) == 6
    assert all(re.match(r"^[+-]\d+\.\d{3}" + (r" \(\w+\)$" if model is TwoLayers else "$"), text) for text in shown)


def test_without_being_asked_the_bar_stays_as_it_is():
    shown = []
    look = At("on_train_batch_end", lambda trainer: shown.append("λ1" in trainer.progress_bar_metrics))
    fit(Regressor(), LyapunovMonitor(), look)
    assert not any(shown)


# The page about a run


def test_the_page_needs_no_network_and_shows_every_cell(tmp_path):
    monitor, path = LyapunovMonitor(), tmp_path / "run.html"
    fit(Regressor(num_layers=2), monitor)
    monitor.report(path)
    page = path.read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert len(pictures) == 1 + 2 * 2
    assert [Image.open(io.BytesIO(base64.b64decode(one))).width for one in pictures] == [800] * 5
    assert not re.search(r"https?://", page)
    assert all(name in page for name in ("rnn.l0", "rnn.l1", "every_n_epochs", "Nothing."))
    places = [page.index(word) for word in ("overview", "Spectra", "Settings")]
    assert places == sorted(places)


def test_a_page_of_nothing_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Nothing has been measured"):
        LyapunovMonitor().report(tmp_path / "run.html")
    with pytest.raises(ValueError, match=r"must end in \.html"):
        LyapunovMonitor().report("run.pdf")


def test_a_dial_that_grows_is_named_in_the_overview_of_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Dial([0.5]), LyapunovMonitor(warmup=2), logger=logger, max_epochs=1, data=series(time=30))
    images = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    assert sorted(images.Tags()["images"])[0] == "lyapunov/_overview"
    last = images.Images("lyapunov/_overview")[-1]
    picture = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
    assert count(picture[:45], GROWS) > 300


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_the_page_shows_its_pictures_in_a_browser(tmp_path):
    monitor = LyapunovMonitor(warmup=2)
    fit(Dial([0.5]), monitor, max_epochs=1, data=series(time=30))
    monitor.report(tmp_path / "run.html")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile",
    ]
    shot = [f"--screenshot={tmp_path}/page.png", "--window-size=1000,2600", f"file://{tmp_path}/run.html"]
    subprocess.run(["chromium", *options, *shot], check=True, capture_output=True, timeout=60)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert count(page, UNSTABLE) > 5_000  # of the overview
    assert count(page, GROWS) > 5_000  # of the curve, and of the spectrum over training
