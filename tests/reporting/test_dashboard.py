"""Pictures of spectra, the layout of charts, and the calls to a logger's experiment."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_lyapunov import EXPONENT_FLOOR
from lightning_lyapunov.reporting.loggers import Overview, log_spectra, lyapunov_layout
from lightning_lyapunov.reporting.pictures import current_spectrum_picture, spectrum_picture

WHITE, RED, BLUE = [255, 255, 255], [178, 24, 43], [33, 84, 163]


def picture_of(spectra):
    spectra = np.asarray(spectra, dtype=np.float32)
    return spectrum_picture(np.arange(len(spectra)), spectra, "title")


def centre(picture):
    """The pixel in the middle, which the heat map covers."""
    height, width, _ = picture.shape
    return picture[height // 2, width // 2].tolist()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (500, 1), (3, 16), (500, 1024)], ids=str)
def test_any_number_of_measurements_and_exponents_is_an_rgb_picture_of_one_size(shape):
    picture = picture_of(np.random.default_rng(0).normal(size=shape))
    assert picture.shape == picture_of([[0.0]]).shape
    assert picture.shape[2] == 3
    assert picture.dtype == np.uint8


def test_zero_is_white():
    assert centre(picture_of(np.zeros((2, 3)))) == WHITE


@pytest.mark.parametrize("value", [1e-2, 1.0, 50.0])
def test_growth_is_red(value):
    red, green, blue = centre(picture_of([[value]]))
    assert red > green + 100
    assert red > blue + 100


@pytest.mark.parametrize("value", [-1e-2, -1.0, -50.0])
def test_contraction_is_blue(value):
    red, green, blue = centre(picture_of([[value]]))
    assert blue > green + 50
    assert blue > red + 100


@pytest.mark.parametrize("value", [EXPONENT_FLOOR, -math.inf, math.nan, math.inf])
def test_what_has_no_size_is_grey(value):
    red, green, blue = centre(picture_of([[value]]))
    assert red == green == blue < 200


def test_nothing_to_scale_by_is_drawn_all_the_same():
    assert centre(picture_of(np.full((3, 4), math.nan))) == centre(picture_of([[math.nan]]))


def test_the_largest_exponent_is_on_top():
    picture = picture_of([[1.0, -1.0]])
    above, below = picture[150, 400].astype(int), picture[300, 400].astype(int)
    assert above[0] > above[2]
    assert below[0] < below[2]


def test_training_goes_to_the_right():
    picture = picture_of([[1.0], [-1.0]])
    before, after = picture[200, 200].astype(int), picture[200, 600].astype(int)
    assert before[0] > before[2]
    assert after[0] < after[2]


def test_a_weak_instability_shows_beside_strong_contraction():
    red, _, blue = centre(picture_of([[-2.0, 0.05, -2.0]]))
    assert red > blue + 20


def test_a_floor_does_not_wash_out_the_rest():
    assert centre(picture_of([[EXPONENT_FLOOR, 0.5, EXPONENT_FLOOR]])) == centre(picture_of([[0.5]]))


# The current spectrum


def current_picture_of(spectrum, half_width=0.1):
    spectrum = np.asarray(spectrum, dtype=np.float32)
    return current_spectrum_picture(spectrum, np.broadcast_to(np.float32(half_width), spectrum.shape), "title")


def rows_of(picture, colour, column):
    """The rows of the plot in which a column of pixels has a colour."""
    return np.flatnonzero((picture[60:460, column] == colour).all(-1)) + 60


BAND, INK = (200, 200, 200), (40, 40, 40)
MIDDLE = 465  # the column of the middle exponent


@pytest.mark.parametrize("count", [1, 2, 16, 1024])
def test_the_current_spectrum_is_a_picture_of_the_same_size(count):
    picture = current_picture_of(np.linspace(0.5, -1, count))
    assert picture.shape == picture_of([[0.0]]).shape
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("value", [0.5, -0.5])
def test_a_dot_has_the_colour_of_its_sign(value):
    picture = current_picture_of([value], half_width=0)
    red, _, blue = max(picture[60:460, MIDDLE].tolist(), key=lambda colour: max(colour) - min(colour))
    assert (red > blue) == (value > 0)


def test_growth_is_above_the_line_of_zero_and_contraction_below():
    picture = current_picture_of([0.5, 0.0, -0.5], half_width=math.nan)
    zero = rows_of(picture, INK, 200).mean()
    reds, blues = ((picture[60:460, 175:755] == colour).all(-1).nonzero()[0].mean() + 60 for colour in (RED, BLUE))
    assert reds < zero < blues


def test_the_band_is_as_high_as_the_error_says():
    heights = []
    for error in (0.2, 0.4):
        picture = current_picture_of([1.0, 1.0, 1.0], half_width=error)
        zero = rows_of(picture, INK, 200).mean()
        band = rows_of(picture, BAND, MIDDLE + 30)
        heights.append((band.max() - band.min()) / (zero - (band.max() + band.min()) / 2))
    assert heights == pytest.approx([0.4, 0.8], rel=0.05)


def test_a_single_exponent_has_a_band():
    assert len(rows_of(current_picture_of([1.0], half_width=0.3), BAND, MIDDLE)) > 50


@pytest.mark.parametrize("half_width", [math.nan, math.inf])
def test_no_band_is_drawn_where_the_error_is_unknown(half_width):
    picture = current_picture_of([0.5, -0.5], half_width)
    assert not (picture[60:460, 175:755] == BAND).all(-1).any()
    assert (picture != current_picture_of([0.5, -0.5], 0)).any()  # which says so


@pytest.mark.parametrize("value", [EXPONENT_FLOOR, -math.inf, math.nan, math.inf])
def test_what_has_no_size_is_left_out_and_counted(value):
    picture, whole = current_picture_of([0.5, -0.5, value, value]), current_picture_of([0.5, -0.5])
    assert (rows_of(picture, INK, 200) == rows_of(whole, INK, 200)).all()
    assert (picture[60:450, 480:750] == WHITE).all(-1).mean() > 0.9
    assert (picture[500:] != whole[500:]).any()


def test_a_spectrum_of_nothing_is_drawn_all_the_same():
    assert len(rows_of(current_picture_of([math.nan, EXPONENT_FLOOR]), INK, MIDDLE))


@pytest.mark.parametrize("draw", [current_picture_of, lambda spectrum: picture_of([spectrum])])
def test_what_is_drawn_outlasts_the_pixels_that_tensorboard_leaves_out(draw):
    picture = draw([0.5, -0.5])
    for start in range(3):
        columns = picture[:, np.linspace(start, 797 + start, 340).astype(int)]
        rows = columns[np.linspace(start, 557 + start, 238).astype(int)]
        frame = (rows == INK).all(-1)
        assert (frame.sum(0) > 160).sum() >= 2
        assert (frame.sum(1) > 150).sum() >= 2


@pytest.mark.parametrize(
    "draw", [spectrum_picture, lambda _, spectra, title: current_spectrum_picture(*spectra, title)]
)
def test_a_long_title_is_within_the_picture(draw):
    for title in ("Lyapunov exponents of model.encoder.lstm.l0_reverse, 95 % band", "a layer with a name " * 6):
        picture = draw(np.arange(2), np.array([[0.5, -0.5], [0.1, 0.1]]), title)
        assert (picture[:50, -8:] == WHITE).all()


# The layout


def test_each_line_of_the_layout_is_one_tag():
    logged = [f"lyapunov/{layer}/{name}" for layer in ("rnn.l0", "rnn.l1", "rnnxl0") for name in ("max", "max_stderr")]
    (charts,) = lyapunov_layout(iter(["rnn.l0", "rnn.l1"])).values()
    found = [[tag for tag in logged if re.match(line, tag)] for _, lines in charts.values() for line in lines]
    assert found == [[f"lyapunov/rnn.{cell}/{name}"] for name in ("max", "max_stderr") for cell in ("l0", "l1")]


def test_the_layout_shows_the_band_that_is_logged():
    experiment = Experiment()
    log_spectra(SimpleNamespace(experiment=experiment), history([0.5, -1.0]), 3, band=True)
    (charts,) = lyapunov_layout(["lstm"], band=True).values()
    (tags,) = [tags for kind, tags in charts.values() if kind == "Margin"]
    assert tags == ["lyapunov/lstm/max", *experiment.scalars]


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_all_that_the_layout_names_was_logged_with_the_prefix_of_the_logger(prefix, tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    log_spectra(logger, history([0.5, -1.0]), 3, band=True, overview=Overview("lstm", "stable"))
    logger.log_metrics({"lyapunov/lstm/max": 0.5, "lyapunov/lstm/max_stderr": 0.1}, step=3)
    logger.finalize("success")
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    logged = [*tags["scalars"], *tags["histograms"], *tags["images"], *tags["tensors"]]
    assert len(logged) == 9
    assert all(tag.startswith("mine-lyapunov" if prefix else "lyapunov") for tag in logged)
    (charts,) = lyapunov_layout(["lstm"], band=True, prefix=prefix).values()
    assert len(charts) == 3
    for kind, lines in charts.values():
        for line in lines:
            assert [tag for tag in tags["scalars"] if (tag == line if kind == "Margin" else re.match(line, tag))]


def test_tensorboard_takes_the_layout_with_that_of_the_user(tmp_path):
    mine = {"losses": {"both": ["Multiline", ["train_loss", "val_loss"]]}}
    writer = SummaryWriter(tmp_path)
    writer.add_custom_scalars(mine | lyapunov_layout(["encoder", "decoder"], band=True))
    writer.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["losses", "Lyapunov exponents"]
    assert [chart.WhichOneof("content") for chart in layout.category[1].chart] == ["multiline"] * 2 + ["margin"] * 2


# What a logger is shown


class Experiment:
    """Keeps what it is asked to show."""

    def __init__(self):
        self.histograms, self.images, self.scalars, self.texts = {}, {}, {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = (value, step)

    def add_text(self, tag, text, step):
        self.texts[tag] = (text, step)

    def add_histogram(self, tag, values, step):
        self.histograms[tag] = (np.asarray(values).tolist(), step)

    def add_image(self, tag, picture, step, dataformats):
        self.images[tag] = (picture, step, dataformats)


def history(*spectra):
    spectra = torch.tensor(spectra)
    return {"lstm": {"step": torch.arange(len(spectra)), "spectrum": spectra, "stderr": torch.zeros_like(spectra)}}


def test_the_last_spectrum_is_the_histogram_and_all_of_them_the_picture():
    experiment, measured = Experiment(), history([0.5, -1.0], [0.25, -2.0])
    log_spectra(SimpleNamespace(experiment=experiment), measured, 7)
    assert experiment.histograms == {"lyapunov/lstm/spectrum": ([0.25, -2.0], 7)}
    picture, step, dataformats = experiment.images["lyapunov/lstm/spectrum_over_training"]
    assert picture.ndim == 3
    assert (step, dataformats) == (7, "HWC")


def test_histograms_hold_neither_floors_nor_nan():
    experiment = Experiment()
    log_spectra(SimpleNamespace(experiment=experiment), history([0.5, -1.0, EXPONENT_FLOOR, math.nan]), 0)
    assert experiment.histograms["lyapunov/lstm/spectrum"] == ([0.5, -1.0], 0)


def test_no_histogram_is_made_of_nothing():
    experiment = Experiment()
    log_spectra(SimpleNamespace(experiment=experiment), history([EXPONENT_FLOOR, EXPONENT_FLOOR]), 0)
    assert not experiment.histograms
    assert experiment.images


def test_the_current_spectrum_is_drawn_with_its_band():
    experiment, measured = Experiment(), history([0.5, -1.0], [0.25, -2.0])
    measured["lstm"]["stderr"][-1] = torch.tensor([0.1, 0.2])
    log_spectra(SimpleNamespace(experiment=experiment), measured, 7, quantiles={"lstm": 2.0})
    picture, step, dataformats = experiment.images["lyapunov/lstm/spectrum_now"]
    expected = current_spectrum_picture(
        np.array([0.25, -2.0]), np.array([0.2, 0.4]), "Lyapunov exponents of lstm, 95 % band"
    )
    assert (picture == expected).all()
    assert (step, dataformats) == (7, "HWC")


@pytest.mark.parametrize(("quantiles", "quantile"), [({"lstm": 2.5}, 2.5), ({"other": 2.5}, 1.96), (None, 1.96)])
def test_the_band_is_of_the_largest_exponent(quantiles, quantile):
    experiment, measured = Experiment(), history([0.5, -1.0])
    measured["lstm"]["stderr"][-1] = torch.tensor([0.1, 0.2])
    log_spectra(SimpleNamespace(experiment=experiment), measured, 7, quantiles=quantiles, band=True)
    assert experiment.scalars == {
        "lyapunov_band/lstm/lower": (pytest.approx(0.5 - 0.1 * quantile), 7),
        "lyapunov_band/lstm/upper": (pytest.approx(0.5 + 0.1 * quantile), 7),
    }


@pytest.mark.parametrize(("worst", "texts"), [("lstm", {"lyapunov/worst_layer": ("`lstm`", 7)}), (None, {})])
def test_the_worst_layer_is_named(worst, texts):
    experiment = Experiment()
    log_spectra(SimpleNamespace(experiment=experiment), history([0.5]), 7, overview=worst and Overview(worst, "stable"))
    assert experiment.texts == texts


def test_no_scalar_is_logged_unasked():
    experiment = Experiment()
    log_spectra(SimpleNamespace(experiment=experiment), history([0.5]), 0)
    assert not experiment.scalars


@pytest.mark.parametrize(
    "logger",
    [SimpleNamespace(experiment=object()), SimpleNamespace(experiment=None), object()],
    ids=["shows nothing", "none", "has no experiment"],
)
def test_an_unknown_logger_is_left_alone_and_told_of(logger):
    assert log_spectra(logger, history([0.5]), 0) is False


@pytest.mark.parametrize(
    "logger",
    [SimpleNamespace(experiment=SimpleNamespace(metrics_file_path="")), SimpleNamespace(experiment=Experiment())],
    ids=["numbers only", "pictures"],
)
def test_a_known_logger_is_nothing_to_tell_of(logger):
    assert log_spectra(logger, history([0.5]), 0) is True


@pytest.mark.parametrize(("prefix", "put_before"), [("", ""), ("mine", "mine-"), (None, "")])
def test_an_older_mlflow_gets_a_file_for_each_step(prefix, put_before):
    files = []
    experiment = SimpleNamespace(log_image=lambda run_id, image, artifact_file: files.append((run_id, artifact_file)))
    logger = SimpleNamespace(experiment=experiment, run_id="run", _prefix=prefix)
    assert log_spectra(logger, history([0.5]), 7)
    assert files == [
        ("run", f"{put_before}lyapunov/lstm/{name}/00000007.png") for name in ("spectrum_over_training", "spectrum_now")
    ]
