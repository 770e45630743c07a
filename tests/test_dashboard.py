"""What the picture of a spectrum shows, and what a logger's experiment is asked to show."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_lyapunov import FLOOR
from lightning_lyapunov.dashboard import log_spectra, spectrum_picture

WHITE = [255, 255, 255]


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


@pytest.mark.parametrize("value", [FLOOR, -math.inf, math.nan, math.inf])
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
    assert centre(picture_of([[FLOOR, 0.5, FLOOR]])) == centre(picture_of([[0.5]]))


class Experiment:
    """Keeps what it is asked to show."""

    def __init__(self):
        self.histograms, self.images = {}, {}

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
    log_spectra(SimpleNamespace(experiment=experiment), history([0.5, -1.0, FLOOR, math.nan]), 0)
    assert experiment.histograms["lyapunov/lstm/spectrum"] == ([0.5, -1.0], 0)


def test_no_histogram_is_made_of_nothing():
    experiment = Experiment()
    log_spectra(SimpleNamespace(experiment=experiment), history([FLOOR, FLOOR]), 0)
    assert not experiment.histograms
    assert experiment.images


@pytest.mark.parametrize("logger", [SimpleNamespace(experiment=object()), SimpleNamespace(experiment=None)])
def test_an_experiment_that_shows_neither_is_left_alone(logger):
    log_spectra(logger, history([0.5]), 0)


def test_a_logger_without_an_experiment_is_left_alone():
    log_spectra(object(), history([0.5]), 0)
