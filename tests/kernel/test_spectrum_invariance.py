"""Options and layouts that must not change a spectrum."""

import math
from unittest import mock

import pytest
import reference
import torch
from helpers import INTERVALS, ROUNDING, assert_near, members, randn
from hypothesis import given
from hypothesis import strategies as st
from reference import CELLS
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_lyapunov import EXPONENT_FLOOR, jacobians, lyapunov_spectrum
from lightning_lyapunov.kernel import interval
from lightning_lyapunov.kernel.propagation import generic_frame, log_growth
from lightning_lyapunov.layers.registry import as_layer

cells = pytest.mark.parametrize("cell", CELLS)
invertible_cells = pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm"])
intervals = pytest.mark.parametrize("qr_interval", INTERVALS)


@cells
@intervals
@pytest.mark.parametrize("steps", [1, 23])
def test_qr_interval_changes_nothing(cell, qr_interval, steps):
    module, inputs = reference.make(cell, hidden=8), randn(steps, 2, 3)
    expected = lyapunov_spectrum(module, inputs, qr_interval=1)
    assert_near(lyapunov_spectrum(module, inputs, qr_interval=qr_interval), expected, ROUNDING)
    leading = lyapunov_spectrum(module, inputs, qr_interval=qr_interval, num_exponents=3)
    assert_near(leading, lyapunov_spectrum(module, inputs, qr_interval=1, num_exponents=3), ROUNDING)


@intervals
@pytest.mark.parametrize("warmup", [1, 10, 22])
def test_qr_interval_changes_nothing_after_a_warmup(qr_interval, warmup):
    module, inputs = reference.make("lstm"), randn(23, 2, 3)
    expected = lyapunov_spectrum(module, inputs, qr_interval=1, warmup=warmup)
    assert_near(lyapunov_spectrum(module, inputs, qr_interval=qr_interval, warmup=warmup), expected, ROUNDING)


def total_growth(module, inputs, state=None, **options):
    """Return the summed growth of each vector of the frame, unsorted."""
    layer = as_layer(module)
    sequences = layer.read(inputs, state)
    (driven,) = layer.drive(sequences)
    options = {"num_exponents": driven.recurrence.state_size} | options
    with torch.no_grad():
        return log_growth(driven.recurrence, driven.inputs, driven.state, sequences.lengths, **options)


@cells
def test_leading_vectors_grow_as_they_do_among_all(cell):
    module, inputs = reference.make(cell), randn(23, 2, 3)
    everything = total_growth(module, inputs).total
    for k in range(1, everything.shape[-1]):
        assert_near(total_growth(module, inputs, num_exponents=k).total, everything[..., :k], ROUNDING)


def test_leading_vectors_of_the_frame_are_those_of_a_larger_one():
    frame = generic_frame(6, 6)
    assert_near(frame.T @ frame, torch.eye(6).double(), 1e-14)
    assert_near(generic_frame(6, 2), frame[:, :2], 1e-14)


def test_leading_exponents_are_the_first_of_all():
    module, inputs = reference.make("gru", hidden=6), randn(300, 2, 3)
    everything = lyapunov_spectrum(module, inputs, warmup=200)
    for k in range(1, 7):
        assert_near(lyapunov_spectrum(module, inputs, warmup=200, num_exponents=k), everything[:, :k], ROUNDING)


@pytest.mark.slow
@cells
@intervals
def test_batch_is_its_members(cell, qr_interval):
    module, inputs = reference.make(cell, num_layers=2), randn(23, 3, 3)
    alone = [lyapunov_spectrum(module, inputs[:, i : i + 1], qr_interval=qr_interval) for i in range(3)]
    assert_near(lyapunov_spectrum(module, inputs, qr_interval=qr_interval), torch.cat(alone), ROUNDING)


@pytest.mark.slow
@cells
@intervals
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both-ways"])
def test_ragged_batch_is_its_members(cell, qr_interval, bidirectional):
    module = reference.make(cell, num_layers=2, bidirectional=bidirectional)
    inputs, lengths = randn(23, 4, 3), [7, 23, 5, 23]
    state, options = reference.initial_state(module, 4), {"qr_interval": qr_interval, "warmup": 3}
    packed = pack_padded_sequence(inputs, torch.tensor(lengths), enforce_sorted=False)
    spectra = lyapunov_spectrum(module, packed, state, **options)
    for i, length in enumerate(lengths):
        alone = lyapunov_spectrum(module, inputs[:length, [i]], members(state, [i]), **options)
        assert_near(spectra[[i]], alone, ROUNDING)


def test_what_follows_a_sequence_is_not_read():
    inputs, lengths, module = randn(9, 2, 3), torch.tensor([4, 9]), reference.make("gru")
    expected = total_growth(module, pack_padded_sequence(inputs, lengths, enforce_sorted=False))
    inputs[4:, 0] = torch.nan
    layer = as_layer(module)
    sequences = layer.read(inputs)._replace(lengths=lengths)
    with torch.no_grad():
        (driven,) = layer.drive(sequences)
        growth = log_growth(driven.recurrence, inputs, driven.state, lengths, num_exponents=4)
    assert_near(growth.total, expected.total)
    assert growth.steps.tolist() == [[4, 9]]


def permuted(module, order):
    """Return the same one-layer network, its hidden units in another order."""
    other = type(module)(module.input_size, module.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            blocks = parameter.unflatten(0, (-1, module.hidden_size))[:, order]
            blocks = blocks[..., order] if name.startswith("weight_hh") else blocks
            getattr(other, name).copy_(blocks.flatten(0, 1))
    return other


@pytest.mark.slow
@invertible_cells
def test_order_of_the_units_does_not_matter(cell):
    module, inputs, order = reference.make(cell, hidden=3, gain=1.0), randn(1500, 1, 3), torch.tensor([2, 0, 1])
    spectrum = lyapunov_spectrum(module, inputs, warmup=500)
    other = lyapunov_spectrum(permuted(module, order), inputs, warmup=500)
    assert_near(other.sum(), spectrum.sum(), 1e-10)
    assert_near(other, spectrum, 2e-3)  # the frame is another one to these units, and is forgotten as 1 / steps


@pytest.mark.slow
@invertible_cells
@intervals
@pytest.mark.usefixtures("small_states")
def test_single_precision_agrees_with_double(cell, qr_interval):
    module, inputs = reference.make(cell, hidden=8, num_layers=2).float(), torch.randn(60, 2, 3)
    single = lyapunov_spectrum(module, inputs, qr_interval=qr_interval, warmup=5)
    double = lyapunov_spectrum(module.double(), inputs.double(), qr_interval=qr_interval, warmup=5)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    # Frames may lean by e^8, and a direction's growth then has that many times float32's rounding error.
    assert_near(single.double(), double, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_products(dtype):
    module, inputs = reference.make("gru").float(), torch.randn(60, 2, 3)
    assert lyapunov_spectrum(module, inputs, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    module, inputs = reference.make("gru").to(dtype), torch.randn(20, 2, 3).to(dtype)
    spectrum = lyapunov_spectrum(module, inputs)
    assert spectrum.dtype == torch.float32
    assert_near(spectrum.double(), lyapunov_spectrum(module.double(), inputs.double()), 1e-4)


def test_autocast_changes_nothing():
    module, inputs = reference.make("gru").float(), torch.randn(20, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lyapunov_spectrum(module, inputs), expected)


def test_no_gradient_is_recorded_and_no_random_number_drawn():
    module, inputs, before = reference.make("lstm"), randn(20, 2, 3), torch.get_rng_state()
    spectrum = lyapunov_spectrum(module, inputs.requires_grad_())
    assert not spectrum.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_mode_changes_nothing():
    module, inputs = reference.make("lstm"), randn(20, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    with torch.inference_mode():
        assert torch.equal(lyapunov_spectrum(module, inputs), expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_dropout_is_not_measured(cell):
    module, inputs = reference.make(cell, num_layers=2, dropout=0.5).train(), randn(20, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    module.dropout = 0.0
    assert torch.equal(lyapunov_spectrum(module, inputs), expected)


@cells
@intervals
@pytest.mark.parametrize("warmup", [1, 8, 22])
def test_warmup_is_going_on(cell, qr_interval, warmup):
    module, inputs = reference.make(cell), randn(23, 2, 3)
    whole, start = total_growth(module, inputs), total_growth(module, inputs[:warmup])
    rest = total_growth(module, inputs, warmup=warmup, qr_interval=qr_interval)
    assert rest.steps.tolist() == [[23 - warmup] * 2]
    # A direction that was wiped out stays so: -inf - -inf.
    alive = start.total.isfinite()
    assert_near(rest.total[alive], (whole.total - start.total)[alive], 1e-6)
    assert (rest.total[~alive] == -math.inf).all()


@pytest.mark.parametrize("segments", [1, 2, 5, 15])
def test_segments_share_the_steps_and_the_growth(segments):
    module, lengths = reference.make("gru"), torch.tensor([23, 12])
    packed = pack_padded_sequence(randn(23, 2, 3), lengths)
    whole, parts = total_growth(module, packed, warmup=4), total_growth(module, packed, warmup=4, segments=segments)
    assert parts.total.shape == (segments, 2, 4)
    assert torch.equal(parts.steps.sum(0), lengths - 4)
    assert (parts.steps[:, 0].max() - parts.steps[:, 0].min()) <= 1
    assert_near(parts.total.sum(0), whole.total[0], 1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("small_states")
@pytest.mark.parametrize("gain", [0.5, 4.0])
def test_long_warmup_in_single_precision(gain):
    module, inputs = reference.make("rnn-tanh", hidden=8, gain=gain).float(), 0.3 * torch.randn(1100, 2, 3)
    single = lyapunov_spectrum(module, inputs, warmup=1000)
    double = lyapunov_spectrum(module.double(), inputs.double(), warmup=1000)
    assert (double.abs().amax(-1) * 1000 > 88).all()  # more than float32 holds, e^88 or e^-88
    assert_near(single.double(), double, 1e-3)


@st.composite
def problems(draw):
    """Draw a module, inputs of shape (time, batch, input), a state or none, and options."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    cell = draw(st.sampled_from(["rnn-tanh", "gru", "lstm"]))
    layout = {"bias": draw(st.booleans()), "num_layers": draw(st.integers(1, 3)), "bidirectional": draw(st.booleans())}
    module = reference.make(cell, draw(st.integers(1, 6)), draw(st.sampled_from([0.1, 1.0, 3.0])), **layout)
    module = module.to(draw(st.sampled_from([torch.float32, torch.float64])))
    steps, batch = draw(st.integers(1, 25)), draw(st.integers(1, 3))
    inputs = randn(steps, batch, 3).to(module.weight_hh_l0.dtype)
    state = reference.initial_state(module, batch) if draw(st.booleans()) else None
    warmup, interval = draw(st.integers(0, steps - 1)), draw(st.sampled_from([1, 2, 5, 40, "auto"]))
    return module, inputs, state, {"warmup": warmup, "qr_interval": interval}


@given(problems())
def test_spectrum_is_finite_sorted_and_of_the_promised_shape(problem):
    module, inputs, state, options = problem
    spectrum = lyapunov_spectrum(module, inputs, state, **options)
    cells = module.num_layers * (1 + module.bidirectional)
    assert spectrum.shape == (inputs.shape[1], cells * module.hidden_size * (1 + (module.mode == "LSTM")))
    assert spectrum.dtype == module.weight_hh_l0.dtype
    assert (spectrum >= EXPONENT_FLOOR).all()
    assert (spectrum.diff() <= 0).all()


@pytest.mark.slow
@given(problems())
def test_no_option_but_warmup_changes_the_numbers(problem):
    module, inputs, state, options = problem
    expected = lyapunov_spectrum(module.double(), inputs.double(), state, warmup=options["warmup"], qr_interval=1)
    assert_near(lyapunov_spectrum(module, inputs.double(), state, **options), expected, 1e-6)
    for small_states in (interval._SMALL_STATE, {}):
        with mock.patch.object(interval, "_SMALL_STATE", small_states):
            single = lyapunov_spectrum(module, inputs.double(), state, dtype=torch.float32, **options)
        assert_near(single.double(), expected, 1e-3)


@pytest.mark.slow
@given(problems(), st.data())
def test_members_do_not_meet(problem, data):
    module, inputs, state, options = problem
    i = data.draw(st.integers(0, inputs.shape[1] - 1))
    first = None if state is None else members(state, [i])
    alone = lyapunov_spectrum(module, inputs[:, [i]], first, dtype=torch.float64, **options)
    assert_near(lyapunov_spectrum(module, inputs, state, dtype=torch.float64, **options)[[i]], alone, 1e-6)


@pytest.mark.slow
@given(problems())
def test_sum_is_the_mean_log_determinant_whatever_the_options(problem):
    module, inputs, state, options = problem
    if module.bidirectional:
        return
    matrices = jacobians(module, inputs, state)[options["warmup"] :]
    determinants = matrices.slogdet().logabsdet.mean(0)
    spectrum = lyapunov_spectrum(module, inputs, state, dtype=torch.float64, **options)
    assert_near(spectrum.sum(-1), determinants, 1e-6)
