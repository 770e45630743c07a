"""Networks that are not finite, dead, saturated or tiny: what is logged, and whether the run goes on."""

import math

import pytest
import torch
from helpers import Packed, Regressor, Still, failing_monitor, fit, keys_of, messages, published, series
from lightning.pytorch.callbacks import EarlyStopping
from torch.testing import assert_close

from lightning_lyapunov import EXPONENT_FLOOR, LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.callbacks.publish import METRICS
from lightning_lyapunov.functional import layer_growth
from lightning_lyapunov.layers.registry import as_layer

cells = pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
not_finite = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def watch(model, *callbacks, data=None, num_exponents=None, **options):
    """Train a model with a strict monitor; return the monitor and what was published."""
    monitor = LyapunovMonitor(strict=True, num_exponents=num_exponents, every_n_train_steps=1, metrics="all")
    trainer = fit(model, monitor, *callbacks, data=series(2) if data is None else data, **{"max_epochs": 1, **options})
    cells = list(monitor.history)
    assert set(published(trainer)) > keys_of(*cells)
    assert all(len(measurements["step"]) == trainer.global_step for measurements in monitor.history.values())
    return monitor, published(trainer)


def filled(model, value, name=""):
    """Fill the parameters of the layer whose names start with ``name``."""
    with torch.no_grad():
        for parameter_name, parameter in model.rnn.named_parameters():
            if parameter_name.startswith(name):
                parameter.fill_(value)
    return model


def spoilt(value, members=slice(None), steps=slice(None), num_batches=2):
    """Return data in which some numbers of the first batch are ``value``."""
    data = series(num_batches)
    inputs, _ = data.dataset.tensors
    inputs[:4][members, steps] = value
    return data


def assert_sum(spectrum, model, inputs, warmup):
    """Compare the sums: the function sorts the spectra before they are averaged over the sequences."""
    expected = lyapunov_spectrum(model.rnn, inputs, warmup=warmup).sum(1).mean()
    assert_close(spectrum.sum(), expected, rtol=1e-4, atol=1e-5)


def all_nan(values):
    """Return whether all values are NaN, except counts and places, and the largest of all, which is infinite."""
    counts = ("worst_layer", "num_sequences", "num_steps", "sequence_length")
    numbers = {key: value for key, value in values.items() if not key.endswith(counts) and key != "lyapunov/max"}
    return values["lyapunov/max"] == math.inf and all(value.isnan() for value in numbers.values())


def all_finite(values):
    return all(value.isfinite() for value in values.values())


# Not finite


@cells
@not_finite
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_a_weight_that_is_not_finite_makes_every_number_nan(cell, value, name):
    model = Still(cell)
    with torch.no_grad():
        getattr(model.rnn, f"{name}_l0")[0] = value
    _, values = watch(model)
    assert all_nan(values)


@cells
def test_the_layers_below_one_that_is_not_finite_keep_their_numbers(cell):
    _, values = watch(filled(Still(cell, num_layers=3), math.nan, "weight_hh_l1"))
    nan = {key for key, value in values.items() if value.isnan()}
    known = ("num_sequences", "num_steps", "sequence_length")
    broken = {f"lyapunov/rnn.{cell}/{name}" for cell in ("l1", "l2") for name in set(METRICS) - set(known)}
    assert nan == {"lyapunov/max_stderr"} | broken
    assert values["lyapunov/max"] == math.inf
    assert values["lyapunov/worst_layer"] == 1
    assert {key for key in values if "l0" in key}.isdisjoint(nan)


@cells
def test_inputs_that_are_not_a_number_make_every_number_nan_and_are_forgotten_in_the_next_batch(cell):
    model = Still(cell)
    monitor, values = watch(model, data=spoilt(math.nan, members=1, steps=3))
    first, second = monitor.history["rnn"]["spectrum"]
    assert first.isnan().all()
    _, (inputs, _) = series(2)
    assert_sum(second, model, inputs, warmup=6)
    assert all_finite(values)


@cells
@pytest.mark.parametrize("steps", [0, 3, slice(None)], ids=str)
def test_infinite_inputs_make_nan_of_the_numbers_exactly_if_they_do_of_the_outputs(cell, steps):
    model, data = Still(cell), spoilt(math.inf, steps=steps)
    monitor, _ = watch(model, data=data)
    (inputs, _), _ = data
    finite = model.rnn(inputs)[0].isfinite().all()
    first, second = monitor.history["rnn"]["spectrum"]
    assert first.isfinite().all() if finite else first.isnan().all()
    assert second.isfinite().all()


class StartsAt(Still):
    """Starts its layer in a given state."""

    start = 0.0

    def forward(self, inputs):
        state = torch.full((1, len(inputs), 5), self.start)
        return self.head(self.rnn(inputs, (state, state) if self.rnn.mode == "LSTM" else state)[0])


@cells
@not_finite
def test_a_state_that_is_not_finite_makes_every_number_nan(cell, value):
    model = StartsAt(cell)
    model.start = value
    _, values = watch(model)
    assert all_nan(values)


def rectifier(rate, **options):
    """All exponents of the layer are ``rate``."""
    model = filled(Still("RNN", nonlinearity="relu", **options), 0.1)
    model.rnn.weight_hh_l0.data = math.exp(rate) * torch.eye(5)
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_states_beyond_single_precision_still_have_their_exponent(precision):
    # e^(20 * 12) is infinite for the network in float32 and bf16, and the trajectory is float64's.
    model = rectifier(20.0)
    monitor, values = watch(model, precision=precision)
    expected = model.rnn.weight_hh_l0[0, 0].double().log().float().item()
    assert_close(monitor.history["rnn"]["spectrum"], torch.full((2, 5), expected), rtol=1e-5, atol=0)
    assert all_finite(values)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_states_beyond_every_precision_make_every_number_nan(precision):
    _, values = watch(rectifier(80.0), precision=precision)
    assert all_nan(values)


@cells
def test_weights_that_the_training_blows_up_end_as_nan_and_the_run_goes_on(cell):
    model = Regressor(cell, lr=1e30)
    monitor, values = watch(model, max_epochs=3)
    assert not all(parameter.isfinite().all() for parameter in model.parameters())
    assert all_nan(values)
    assert len(monitor.history["rnn"]["step"]) == 6


# Dead, saturated, singular

ZERO = {"RNN": [EXPONENT_FLOOR] * 5, "GRU": [-math.log(2)] * 5, "LSTM": [-math.log(2)] * 5 + [EXPONENT_FLOOR] * 5}


@pytest.mark.parametrize(("cell", "spectrum"), ZERO.items())
def test_weights_of_zero_leave_the_gates_at_one_half(cell, spectrum):
    monitor, values = watch(filled(Still(cell), 0.0))
    assert_close(monitor.history["rnn"]["spectrum"], torch.tensor([spectrum] * 2))
    assert all_finite(values)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_saturated_tanh_is_dead(sign):
    monitor, values = watch(filled(Still("RNN"), sign * 1e4, "bias_ih"))
    assert_close(monitor.history["rnn"]["spectrum"], torch.full((2, 5), EXPONENT_FLOOR))
    assert all_finite(values)
    assert values["lyapunov/rnn/log10_gradient_gain"] < -200


def latched(cell):
    """Open the gates so that the state, or the cell of an LSTM, is kept."""
    model = filled(filled(Still(cell), 0.0, "weight_hh"), 1e4, "bias_ih")
    if cell == "LSTM":
        model.rnn.bias_ih_l0.data[:5] = -1e4  # the input gate is shut
    return model


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_state_that_is_kept_has_exponents_of_zero(cell):
    monitor, values = watch(latched(cell))
    spectrum = monitor.history["rnn"]["spectrum"]
    assert_close(spectrum[:, :5], torch.zeros(2, 5), rtol=0, atol=1e-6)
    assert_close(spectrum[:, 5:], torch.full_like(spectrum[:, 5:], EXPONENT_FLOOR))
    assert all_finite(values)
    assert values["lyapunov/max_stderr"] < 1e-6


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_state_that_is_kept_has_no_direction_that_grows(cell):
    _, values = watch(latched(cell))
    assert values["lyapunov/rnn/num_positive"] == 0


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_jacobian_has_as_many_dead_directions_as_its_weight(rank):
    model = Still("RNN")
    model.rnn.weight_hh_l0.data[:, rank:] = 0
    monitor, values = watch(model)
    dead = (monitor.history["rnn"]["spectrum"] - EXPONENT_FLOOR).abs() < 1e-3
    assert dead.sum(1).tolist() == [5 - rank] * 2
    assert all_finite(values)


@pytest.mark.parametrize("rate", [-60.0, -90.0, -300.0])
def test_what_fades_faster_than_single_precision_is_at_the_floor(rate):
    monitor, values = watch(rectifier(rate))
    assert_close(monitor.history["rnn"]["spectrum"], torch.full((2, 5), max(rate, EXPONENT_FLOOR)))
    assert all_finite(values)


# Tiny networks and short sequences


@cells
@pytest.mark.parametrize("time", [1, 2, 3, 12])
@pytest.mark.parametrize("hidden_size", [1, 2])
def test_the_smallest_networks_and_sequences_are_finite(cell, time, hidden_size):
    model, data = Still(cell, hidden_size), series(2, time=time)
    monitor, values = watch(model, data=data)
    for (inputs, _), spectrum in zip(data, monitor.history["rnn"]["spectrum"], strict=True):
        assert_sum(spectrum, model, inputs, warmup=time // 2)
    assert all_finite(values)


@cells
@pytest.mark.parametrize("time", [1, 2])
def test_one_sequence_of_one_step_has_a_value_and_no_error(cell, time):
    _, values = watch(Still(cell), data=series(1, batch_size=1, time=time))
    nan = {key for key, value in values.items() if value.isnan()}
    assert nan == {"lyapunov/max_stderr", "lyapunov/rnn/max_stderr"}


@cells
def test_one_sequence_of_two_steps_that_count_has_an_error_too(cell):
    _, values = watch(Still(cell), data=series(1, batch_size=1, time=3))
    assert all_finite(values)


class Short(Still, Packed):
    """Some sequences end before the warm-up does."""

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


@cells
@pytest.mark.parametrize("lengths", [(1, 12, 3, 2), (6, 12, 6, 6)])
def test_each_sequence_is_warmed_up_for_half_of_its_own_length(cell, lengths):
    model, data = Short(cell), series(1)
    model.lengths = torch.tensor(lengths)
    monitor, values = watch(model, data=data)
    ((inputs, _),) = data
    layer, total = as_layer(model.rnn), 0.0
    for member, length in enumerate(lengths):
        options = {"num_exponents": None, "warmup": length // 2, "qr_interval": 1, "dtype": torch.float64}
        ((_, growth),) = layer_growth(layer, layer.read(inputs[[member], :length]), **options)
        total = total + growth.total[0, 0]
    expected = total / sum(length - length // 2 for length in lengths)
    assert_close(
        monitor.history["rnn"]["spectrum"][0].double(), expected.sort(descending=True).values, rtol=1e-4, atol=1e-5
    )
    assert values["lyapunov/max"].isfinite()
    assert values["lyapunov/rnn/max_stderr"].isfinite()


@cells
def test_sequences_of_one_step_each_all_count(cell):
    model, data = Short(cell), series(1)
    model.lengths = torch.ones(4, dtype=torch.long)
    monitor, values = watch(model, data=data)
    ((inputs, _),) = data
    assert_sum(monitor.history["rnn"]["spectrum"][0], model, inputs[:, :1], warmup=0)
    assert all_finite(values)


# Early stopping


class BreaksDown(Still):
    """Fills its layer with a value from an epoch on."""

    def __init__(self, value, epoch=2, name="weight_hh_l0", **options):
        super().__init__("RNN", **options)
        self.value, self.epoch, self.name = value, epoch, name

    def on_train_epoch_start(self):
        if self.current_epoch >= self.epoch:
            filled(self, self.value, self.name)


def stopped_after(model, *monitors, monitor="lyapunov/max", **options):
    """Return after how many of six epochs early stopping ends the run."""
    stop = EarlyStopping(monitor, patience=10**6, **options)
    trainer = fit(
        model, *(monitors or [LyapunovMonitor(strict=True, metrics="all")]), stop, data=series(2), max_epochs=6
    )
    assert trainer.current_epoch == 6 or not trainer.callback_metrics[monitor].isfinite()
    return trainer.current_epoch


@pytest.mark.parametrize("epoch", [0, 2])
@not_finite
def test_a_network_that_is_not_finite_stops_in_that_epoch(value, epoch):
    assert stopped_after(BreaksDown(value, epoch)) == epoch + 1


@pytest.mark.parametrize("monitor", ["lyapunov/max", "lyapunov/rnn.l1/max", "lyapunov/rnn.l1/num_positive"])
def test_one_layer_that_is_not_finite_stops_a_run(monitor):
    assert stopped_after(BreaksDown(math.nan, name="weight_hh_l1", num_layers=2), monitor=monitor) == 3


def test_the_layer_below_the_one_that_is_not_finite_stops_nothing():
    model = BreaksDown(math.nan, name="weight_hh_l1", num_layers=2)
    assert stopped_after(model, monitor="lyapunov/rnn.l0/max") == 6


def test_a_network_that_is_not_finite_trains_on_if_that_is_not_checked():
    assert stopped_after(BreaksDown(math.nan), check_finite=False) == 6


def test_a_dead_network_is_finite_and_trains_on():
    assert stopped_after(BreaksDown(0.0)) == 6


@pytest.mark.filterwarnings("ignore:.*could not be measured")
@pytest.mark.parametrize(
    "fails",
    [lambda number: number >= 3, lambda number: number == 2, lambda number: number == 0, lambda number: True],
    ids=["from the fourth on", "the third", "the first", "each"],
)
def test_measurements_that_fail_stop_no_run(fails):
    # Before a first value there is only NaN, for which an `EarlyStopping` waits if it is told to, as the warning says.
    assert stopped_after(Still("GRU"), failing_monitor(fails), check_finite=not fails(1)) == 6


@pytest.mark.filterwarnings("ignore:.*could not be measured")
def test_a_measurement_that_fails_leaves_nan_in_the_history_of_that_step_alone():
    monitor = failing_monitor(lambda number: number == 2, every_n_train_steps=1)
    trainer = fit(Still("GRU"), monitor, data=series(2))
    assert monitor.history["rnn"]["spectrum"].isnan().all(1).tolist() == [False, False, True, False]
    assert all_finite(published(trainer))


def test_a_network_that_is_not_finite_is_no_failure_and_no_warning(recwarn):
    fit(filled(Still("GRU"), math.nan), LyapunovMonitor(), data=series(2))
    assert not messages(recwarn, "yapunov")
