"""Random input gives the spectrum of the reference implementation, or an error that names the argument."""

import math
import re

import numpy as np
import pytest
import reference
import torch
from helpers import Regressor, Still, fit, keys_of, published, series
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_lyapunov import EXPONENT_FLOOR, LyapunovMonitor, lyapunov_spectrum

pytestmark = pytest.mark.slow

KINDS = {"rnn-tanh": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


# The reference, for each cell of a stack


def one_cell(module, suffix):
    """Return one cell of a stack as a module of its own, in float64."""
    weight = getattr(module, f"weight_ih_{suffix}")
    options = {"nonlinearity": module.nonlinearity} if module.mode.startswith("RNN") else {}
    cell = getattr(nn, module.mode.split("_")[0])(weight.shape[1], module.hidden_size, bias=module.bias, **options)
    names = [name.removesuffix("_l0") for name, _ in cell.named_parameters()]
    cell.load_state_dict({f"{name}_l0": getattr(module, f"{name}_{suffix}").detach().double() for name in names})
    return cell.double()


def cell_spectra(module, inputs, state, num_exponents, warmup):
    """Return the exponents of each cell along a sequence ``(time, input)``, from a state ``(cells, size)`` or two."""
    found = []
    inputs = inputs.detach().double()
    for layer in range(module.num_layers):
        outputs = []
        for direction in ("", "_reverse")[: 1 + module.bidirectional]:
            cell, index = one_cell(module, f"l{layer}{direction}"), len(found)
            parts = state if isinstance(state, tuple) else (state,)
            first = torch.cat([part[index].detach().double() for part in parts])
            driving = inputs.flip(0) if direction else inputs
            count = min(num_exponents or len(first), len(first))
            found.append(reference.spectrum(reference.jacobians(cell, driving, first), count, warmup))
            output = cell(driving, reference.unflatten(cell, first))[0].detach()
            outputs.append(output.flip(0) if direction else output)
        inputs = torch.cat(outputs, -1)
    return torch.cat(found)


def assert_spectrum(actual, expected, dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert (actual.diff() <= 0).all()
    assert (actual >= EXPONENT_FLOOR).all()
    # The reference loses, in a direction that a step shrinks by e^-20 beside another, as many digits.
    expected = expected.clamp(min=EXPONENT_FLOOR)
    tolerance = 1e-5 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# Good input

dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)


def promoted(dtype):
    return torch.promote_types(dtype, torch.float32)


@st.composite
def intervals(draw):
    return draw(st.sampled_from(["auto", 1, 2, 3, 1000]))


@st.composite
def calls(draw):
    """Draw a module, what it is called with, options, and the sequences and states that these are."""
    torch.manual_seed(draw(seeds))
    layout = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    cell = draw(st.sampled_from(["rnn-tanh", "gru", "lstm"]))
    module = reference.make(cell, draw(st.integers(1, 4)), draw(st.sampled_from([0.5, 1.0, 1.5])), **layout)
    module = module.to(draw(dtypes))
    kind = draw(st.sampled_from(["batch", "unbatched", "packed", "packed and sorted"]))
    batch = 1 if kind == "unbatched" else draw(st.integers(1, 4))
    lengths = [draw(st.integers(1, 9))] * batch
    if kind.startswith("packed"):
        lengths = [draw(st.integers(1, 9)) for _ in range(batch)]
    if kind == "packed and sorted":
        lengths.sort(reverse=True)
    inputs = torch.randn(max(lengths), batch, 3, dtype=torch.float64).to(module_dtype(module))
    cells = module.num_layers * (1 + module.bidirectional)
    state = tuple(torch.randn(cells, batch, module.hidden_size).to(inputs) for _ in range(1 + (cell == "lstm")))
    if not draw(st.booleans()):
        state = tuple(torch.zeros_like(part) for part in state)
        given_state = None
    elif kind == "unbatched":
        given_state = tuple(part[:, 0] for part in state)
    else:
        given_state = state
    if given_state is not None and cell != "lstm":
        (given_state,) = given_state
    sequences = [
        (inputs[:length, i], tuple(part[:, i] for part in state) if cell == "lstm" else state[0][:, i])
        for i, length in enumerate(lengths)
    ]
    if kind == "unbatched":
        passed = inputs[:, 0]
    elif kind == "batch":
        passed = inputs.transpose(0, 1) if module.batch_first else inputs
        passed = passed.contiguous() if draw(st.booleans()) else passed.clone().requires_grad_()
    else:
        padded = inputs.transpose(0, 1) if module.batch_first else inputs
        is_sorted = kind == "packed and sorted"
        passed = pack_padded_sequence(padded, torch.tensor(lengths), module.batch_first, enforce_sorted=is_sorted)
    total = cells * module.hidden_size * len(state)
    options = {
        "num_exponents": draw(st.none() | st.integers(1, total)),
        "warmup": draw(st.integers(0, min(lengths) - 1)),
        "qr_interval": draw(intervals()),
        "dtype": draw(st.sampled_from([None, torch.float32, torch.float64])),
    }
    event(kind)
    return module, (passed, given_state), options, sequences


def module_dtype(module):
    return next(module.parameters()).dtype


@given(calls())
def test_every_layout_of_a_layer_has_the_spectrum_of_the_reference(call):
    module, arguments, options, sequences = call
    spectra = lyapunov_spectrum(module, *arguments, **options)
    assert len(spectra) == len(sequences)
    dtype = options["dtype"] or promoted(module_dtype(module))
    for spectrum, sequence in zip(spectra, sequences, strict=True):
        expected = cell_spectra(module, *sequence, options["num_exponents"], options["warmup"])
        expected = expected.sort(descending=True).values[: options["num_exponents"]]
        assert_spectrum(spectrum, expected, dtype)


@st.composite
def cell_calls(draw):
    """Draw a cell of torch or a plain callable of the same weights, and what it is called with."""
    torch.manual_seed(draw(seeds))
    cell = draw(st.sampled_from(list(KINDS)))
    layer = reference.make(
        cell, draw(st.integers(1, 4)), draw(st.sampled_from([0.5, 1.0, 1.5])), bias=draw(st.booleans())
    )
    module = KINDS[cell](3, layer.hidden_size, bias=layer.bias).double()
    module.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    steps, batch = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    inputs = torch.randn(steps, batch, 3, dtype=torch.float64)
    state = torch.randn(batch, state_size(layer), dtype=torch.float64)
    options = {
        "num_exponents": draw(st.none() | st.integers(1, state.shape[1])),
        "warmup": draw(st.integers(0, steps - 1)),
        "qr_interval": draw(intervals()),
        "dtype": draw(st.sampled_from([None, torch.float32, torch.float64])),
    }

    def step(state, inputs):
        dtype, parts = state.dtype, state.double().chunk(1 + (cell == "lstm"), -1)
        after = module(inputs.double(), parts if cell == "lstm" else parts[0])
        return torch.cat(after if cell == "lstm" else (after,), -1).to(dtype)

    if draw(st.booleans()):
        return layer, (step, inputs, state), options
    parts = state.chunk(2, -1) if cell == "lstm" else state
    return layer, (module, inputs, parts), options


def state_size(layer):
    return layer.hidden_size * (1 + (layer.mode == "LSTM"))


@given(cell_calls())
def test_every_cell_and_callable_has_the_spectrum_of_the_reference(call):
    layer, (dynamics, inputs, state), options = call
    spectra = lyapunov_spectrum(dynamics, inputs, state, **options)
    flat = torch.cat(state, -1) if isinstance(state, tuple) else state
    assert spectra.shape == (inputs.shape[1], options["num_exponents"] or flat.shape[1])
    for i, spectrum in enumerate(spectra):
        matrices = reference.jacobians(layer, inputs[:, i], flat[i])
        expected = reference.spectrum(matrices, options["num_exponents"], options["warmup"])
        assert_spectrum(spectrum, expected, options["dtype"] or torch.float64)


# Bad input

ARGUMENTS = ("dynamics", "inputs", "state", "num_exponents", "warmup", "qr_interval", "dtype")
OPTIONS = ("modules", "every_n_epochs", "every_n_train_steps", "num_sequences", "max_steps", *ARGUMENTS[3:])


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(10**18, 10**20),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.sampled_from(
        [(), [], {}, set(), object(), torch.float16, torch.int64, "auto", np.int64(2), np.zeros((2, 3)), len]
    ),
    st.lists(st.integers(0, 2), max_size=3),
    st.tuples(st.none(), st.none()),
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
any_dtype = st.sampled_from(DTYPES)


@st.composite
def tensors(draw):
    """Draw a tensor of any rank up to 4, sizes from 0, any dtype, and at times numbers that are none."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=4))
    value = draw(st.sampled_from([0.0, 1.0, -2.5, math.nan, math.inf, 1e30]))
    return torch.full(shape, value).to(draw(any_dtype)) if math.isfinite(value) else torch.full(shape, value)


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    size, dtype = draw(st.sampled_from([2, 3])), draw(any_dtype)
    return pack_padded_sequence(
        torch.ones(max(lengths), len(lengths), size).to(dtype), torch.tensor(lengths), False, False
    )


def fails(state, inputs):
    raise RuntimeError("out of order")


SEQUENCES, STATE = torch.ones(5, 2, 3), torch.linspace(-1, 1, 8).reshape(2, 4)
LAYERS = {
    "gru": (nn.GRU(3, 4), SEQUENCES, None),
    "gru from a state": (nn.GRU(3, 4), SEQUENCES, STATE.unsqueeze(0)),
    "lstm": (nn.LSTM(3, 4, num_layers=2, batch_first=True), SEQUENCES, (torch.ones(4, 5, 4).chunk(2))),
    "projected": (nn.LSTM(3, 4, proj_size=2), SEQUENCES, (STATE[None, :, :2], STATE[None])),
    "both ways": (nn.RNN(3, 2, bidirectional=True), SEQUENCES[:, 0], torch.ones(2, 2)),
    "bf16": (nn.GRU(3, 4).bfloat16(), SEQUENCES.bfloat16(), None),
    "cell": (nn.GRUCell(3, 4), SEQUENCES, STATE),
    "lstm cell": (nn.LSTMCell(3, 4), SEQUENCES, (STATE, STATE)),
    "module": (nn.Bilinear(3, 4, 4), SEQUENCES, STATE),
    "linear": (nn.Linear(3, 4), SEQUENCES, STATE),
    "class": (nn.GRU, SEQUENCES, STATE),
}
STEPS = {
    "mixes": lambda state, inputs: torch.tanh(state.flip(-1)) + inputs.sum(-1, keepdim=True),
    "keeps": lambda state, inputs: state,
    "multiplies": lambda state, inputs: state @ torch.ones(4, 4, dtype=state.dtype),
    "in single precision": lambda state, inputs: state @ torch.ones(4, 4),
    "in place": lambda state, inputs: state.mul_(0.5),
    "over its input": lambda state, inputs: torch.tanh(state + inputs.mul_(0.5).sum(-1, keepdim=True)),
    "without a derivative": lambda state, inputs: state.detach().sign(),
    "branches": lambda state, inputs: 2 * state if state.sum() > 0 else 0.5 * state,
    "of two inputs": lambda state, inputs: state * inputs[:, :1] * inputs[:, 1:2],
    "grows": lambda state, inputs: torch.cat((state, state), -1),
    "sums": lambda state, inputs: state.sum(),
    "of integers": lambda state, inputs: state.long(),
    "of one argument": lambda state: state,
    "of no argument": lambda: None,
    "gives two": lambda state, inputs: (state, inputs),
    "gives nothing": lambda state, inputs: None,
    "beyond the end": lambda state, inputs: state[:, [9]],
    "fails": fails,
}
CALLS = LAYERS | {name: (step, SEQUENCES, STATE) for name, step in STEPS.items()}
anything = tensors() | packings() | junk
WRONG = {
    "dynamics": tensors() | junk,
    "inputs": anything,
    "state": anything | st.tuples(tensors(), tensors()) | st.tuples(tensors()),
    **dict.fromkeys(ARGUMENTS[3:], junk),
}
NEARLY = [
    *(lambda value, dtype=dtype: value.to(dtype) for dtype in DTYPES),
    *(lambda value, factor=factor: factor * value for factor in (math.nan, math.inf, -math.inf, 1e30, 1e-30, 0.0)),
    *(lambda value, place=place: value[place] for place in ([], 0, slice(0), slice(1), (slice(None), slice(0)), ...)),
    *(lambda value, size=size: value[..., :size] for size in (0, 1)),
    lambda value: value.unsqueeze(0),
    lambda value: value.transpose(0, 1),
    lambda value: value.clone().requires_grad_(),
    lambda value: value.to_sparse(),
    lambda value: value.to("meta"),
    lambda value: value.numpy(),
    lambda value: value.tolist(),
    lambda value: [value],
    lambda value: (value, value),
    nn.Parameter,
]


@st.composite
def hostile_calls(draw):
    """Draw a call of which up to three arguments are anything."""
    name = draw(st.sampled_from(list(CALLS)))
    arguments = dict(zip(ARGUMENTS, CALLS[name], strict=False))
    for argument in draw(st.permutations(ARGUMENTS))[: draw(st.sampled_from([1, 1, 1, 2, 3]))]:
        value = arguments.get(argument)
        if isinstance(value, torch.Tensor | tuple) and draw(st.booleans()):
            arguments[argument] = torch.utils._pytree.tree_map(draw(st.sampled_from(NEARLY)), value)
        elif argument in ARGUMENTS[3:6] and draw(st.booleans()):
            arguments[argument] = draw(st.integers(0, 9))
        else:
            arguments[argument] = draw(WRONG[argument])
    event(name)
    return arguments


def outcome(arguments, function, **options):
    """Return what comes, and whether the error, if one comes instead, names one of the arguments."""
    try:
        return function(**options), True
    except (ValueError, TypeError) as error:
        names = "|".join(arguments)
        return error, re.search(rf"`({names})(=[^`]*)?`", str(error)) is not None


@settings(max_examples=8 * settings.default.max_examples)
@given(hostile_calls())
def test_bad_input_gets_an_error_that_names_an_argument(call):
    before = torch.get_rng_state()
    spectra, named = outcome(ARGUMENTS, lyapunov_spectrum, **call)
    assert named, repr(spectra)
    if isinstance(spectra, torch.Tensor):
        event("a spectrum")
        assert spectra.dtype in (torch.float32, torch.float64)
        assert spectra.ndim == 2
        assert (spectra.isnan() | (spectra >= EXPONENT_FLOOR)).all()
        assert ((spectra.diff() <= 0) | spectra.isnan().any(-1, keepdim=True)).all()
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=8 * settings.default.max_examples)
@given(st.dictionaries(st.sampled_from((*OPTIONS, "log_spectrum", "strict")), st.integers(1, 200) | junk, max_size=3))
def test_a_monitor_with_bad_options_is_refused_by_their_names(options):
    monitor, named = outcome(OPTIONS, LyapunovMonitor, **options)
    assert named, repr(monitor)
    if isinstance(monitor, LyapunovMonitor):
        event("a monitor")
        kept = vars(monitor)
        for name in ("num_sequences", "max_steps"):
            assert type(kept[name]) is int
            assert kept[name] >= 1
        assert kept["warmup"] is None or 0 <= kept["warmup"] < kept["max_steps"]
        assert isinstance(monitor.state_key, str)


def fit_with(modules):
    monitor = LyapunovMonitor(modules)
    fit(Regressor(), monitor, max_steps=1)
    return monitor


names = st.sampled_from(["rnn", "head", "", "rnn.l0", "x"])


@given(names | st.lists(names, max_size=3) | junk)
def test_a_fit_with_bad_names_is_refused_by_them(modules):
    monitor, named = outcome(["modules"], fit_with, modules=modules)
    assert named, repr(monitor)
    if isinstance(monitor, LyapunovMonitor):
        event("a fit")
        assert list(monitor.history) == ["rnn"]


# A fit


@st.composite
def trainings(draw):
    """Draw a model, data, and options of the monitor and the trainer."""
    cell = draw(st.sampled_from(["RNN", "GRU", "LSTM"]))
    layout = {"num_layers": draw(st.integers(1, 2)), "bidirectional": draw(st.booleans()), "bias": draw(st.booleans())}
    model = Still(cell, draw(st.integers(1, 4)), **layout)
    data = {"batch_size": draw(st.integers(1, 5)), "time": draw(st.integers(1, 12))}
    max_steps = draw(st.integers(1, 15))
    options = {
        "every_n_epochs": draw(st.none() | st.integers(1, 3)),
        "every_n_train_steps": draw(st.none() | st.integers(1, 5)),
        "num_sequences": draw(st.integers(1, 6)),
        "max_steps": max_steps,
        "num_exponents": draw(st.none() | st.integers(1, 9)),
        "warmup": draw(st.integers(0, max_steps - 1)),
        "qr_interval": draw(intervals()),
        "dtype": draw(st.sampled_from([None, torch.float32, torch.float64])),
    }
    return model, data, options, draw(st.sampled_from(["32-true", "bf16-true", "64-true"]))


@given(trainings())
def test_every_training_logs_the_spectrum_of_the_reference(training):
    model, data, options, precision = training
    data, monitor = series(1, **data), LyapunovMonitor(strict=True, **options)
    values = published(fit(model, monitor, data=data, max_steps=1, precision=precision))
    assert set(values) == keys_of(*monitor.history)

    inputs = data.dataset.tensors[0].to(module_dtype(model.rnn))
    count = min(len(inputs), options["num_sequences"])
    sequences = [inputs[i * len(inputs) // count, : options["max_steps"]] for i in range(count)]
    warmup = min(options["warmup"], len(sequences[0]) // 2)
    rnn = model.rnn
    states = torch.zeros(rnn.num_layers * (1 + rnn.bidirectional), rnn.hidden_size)
    state = (states, states) if rnn.mode == "LSTM" else states
    # The sums: the mean over sequences is sorted, not their spectra.
    measured = sum(measurements["spectrum"][0].sum() for measurements in monitor.history.values())
    expected = [cell_spectra(rnn, sequence, state, options["num_exponents"], warmup).sum() for sequence in sequences]
    torch.testing.assert_close(measured.double(), torch.stack(expected).mean(), rtol=1e-3, atol=1e-3)
    assert all(value.isfinite() for key, value in values.items() if "stderr" not in key)
