"""Errors of the plain functions: they name the argument, what came, and what to write instead."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_lyapunov import jacobians, lyapunov_spectrum

functions = pytest.mark.parametrize("function", [lyapunov_spectrum, jacobians])

INPUTS = torch.zeros(5, 2, 3)  # (time, batch, input)
GRU, LSTM, CELL = nn.GRU(3, 4), nn.LSTM(3, 4, num_layers=2), nn.GRUCell(3, 4)


def same(state, inputs):
    return state


def refused(error, *parts):
    """Expect an error whose message holds these parts, in this order."""
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


# The dynamics


@functions
@pytest.mark.parametrize("dynamics", [None, [GRU], "gru"])
def test_dynamics_that_cannot_be_called(function, dynamics):
    what = "a recurrent module or a callable `step(state, input) -> state`"
    with refused(TypeError, "`dynamics`", what, f"not {type(dynamics).__name__}"):
        function(dynamics, INPUTS)


@functions
@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
def test_module_that_is_not_recurrent(function, module):
    with refused(TypeError, type(module).__name__, "no recurrent layer", "`step(state, input) -> state`"):
        function(module, INPUTS)


@functions
def test_module_that_is_not_recurrent_is_named_as_the_argument(function):
    with refused(TypeError, "`dynamics`"):
        function(nn.Linear(3, 4), INPUTS)


@functions
@pytest.mark.parametrize("returned", [torch.zeros(2, 1), torch.zeros(4), (torch.zeros(2, 4),), None])
def test_callable_that_returns_no_state(function, returned):
    what = str(tuple(returned.shape)) if isinstance(returned, torch.Tensor) else type(returned).__name__
    with refused(ValueError, "`dynamics` must return a state of shape (2, 4)", what):
        function(lambda s, x: returned, INPUTS, torch.zeros(2, 4))


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_callable_that_returns_too_few_digits(function, dtype):
    with refused(ValueError, "`dynamics` must return a state in float32 or float64", str(dtype), ".to(state.dtype)"):
        function(lambda s, x: s.to(dtype), INPUTS, torch.zeros(2, 4))


@functions
def test_callable_that_fails(function):
    with refused(ValueError, "`dynamics` fails", "(2, 4)", "(2, 3)", "torch.float32", "(2x4 and 5x5)"):
        function(lambda s, x: s @ torch.zeros(5, 5), INPUTS, torch.zeros(2, 4))


def test_jacobians_of_two_directions():
    with refused(ValueError, "`dynamics` is bidirectional", "Pass each direction by itself"):
        jacobians(nn.GRU(3, 4, bidirectional=True), INPUTS)


# The inputs


@functions
@pytest.mark.parametrize("dynamics", [GRU, LSTM, CELL, same], ids=["gru", "lstm", "cell", "callable"])
@pytest.mark.parametrize("inputs", [None, [1.0, 2.0], 3])
def test_inputs_that_are_no_tensor(function, dynamics, inputs):
    with refused(TypeError, "`inputs` must be a tensor", f"not {type(inputs).__name__}"):
        function(dynamics, inputs, torch.zeros(2, 4) if dynamics is same else None)


@functions
@pytest.mark.parametrize("dynamics", [GRU, LSTM, CELL, same], ids=["gru", "lstm", "cell", "callable"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_inputs_of_integers(function, dynamics, dtype):
    with refused(TypeError, "`inputs` must be of a floating point dtype", f"not {dtype}", "model_spectra(model, ids)"):
        function(dynamics, INPUTS.to(dtype), torch.zeros(2, 4) if dynamics is same else None)


@functions
@pytest.mark.parametrize("module", [GRU, LSTM, CELL], ids=["gru", "lstm", "cell"])
def test_inputs_of_the_wrong_size(function, module):
    with refused(ValueError, "`inputs` must have 3 features", "(5, 2, 7)"):
        function(module, torch.zeros(5, 2, 7))


@functions
def test_packed_inputs_of_the_wrong_size(function):
    with refused(ValueError, "`inputs` must have 3 features", "(10, 7)"):
        function(GRU, pack_padded_sequence(torch.zeros(5, 2, 7), torch.tensor([5, 5])))


@functions
@pytest.mark.parametrize("shape", [(3,), (1, 5, 2, 3)])
def test_inputs_of_the_wrong_rank(function, shape):
    with refused(ValueError, "`inputs` must be (time, batch, input)", "(time, input)", str(shape)):
        function(GRU, torch.zeros(shape))


@functions
@pytest.mark.parametrize("shape", [(2, 3), (1, 5, 2, 3)])
def test_inputs_of_the_wrong_rank_for_a_cell(function, shape):
    with refused(ValueError, "`inputs` must be (time, batch, input)", str(shape)):
        function(CELL, torch.zeros(shape))


@functions
@pytest.mark.parametrize(
    ("inputs", "state"), [((2, 3), (2, 4)), ((5, 2, 3), (4,)), ((5, 2, 3), (3, 4)), ((5, 2, 3), (1, 2, 4))]
)
def test_inputs_and_state_of_the_wrong_rank_for_a_callable(function, inputs, state):
    shapes = "`inputs` must be (time, batch, input) and `state` (batch, state)", str(inputs), str(state)
    with refused(ValueError, *shapes, f"`inputs=torch.zeros(time, {state[0]}, 0)`"):
        function(same, torch.zeros(inputs), torch.zeros(state))


@pytest.mark.parametrize("dynamics", [GRU, CELL, same], ids=["gru", "cell", "callable"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 2), (5, 0)])
def test_inputs_without_steps_or_sequences(dynamics, steps, batch):
    state = torch.zeros(batch, 4) if dynamics is same else None
    with refused(ValueError, "`inputs` holds no steps or no sequences", f"({steps}, {batch})"):
        lyapunov_spectrum(dynamics, torch.zeros(steps, batch, 3), state)


@pytest.mark.parametrize("dynamics", [GRU, CELL, same], ids=["gru", "cell", "callable"])
def test_jacobians_of_no_step(dynamics):
    with refused(ValueError, "`inputs` holds no steps"):
        jacobians(dynamics, torch.zeros(0, 2, 3), torch.zeros(2, 4) if dynamics is same else None)


# The state


@functions
def test_callable_without_a_state(function):
    with refused(ValueError, "`state` is required for a callable", "(batch, state)"):
        function(same, INPUTS)


@functions
@pytest.mark.parametrize("dynamics", [GRU, CELL, same], ids=["gru", "cell", "callable"])
@pytest.mark.parametrize("state", [3, [1.0]])
def test_state_that_is_no_tensor(function, dynamics, state):
    with refused(TypeError, "`state` must be a tensor", f"not {type(state).__name__}"):
        function(dynamics, INPUTS, state)


@functions
@pytest.mark.parametrize("state", [3, torch.zeros(2, 2, 4), (torch.zeros(2, 2, 4),)], ids=["number", "tensor", "one"])
def test_state_of_an_lstm_that_is_no_pair(function, state):
    with refused(ValueError, "`state` must be a pair", "(2, 2, 4)", type(state).__name__):
        function(LSTM, INPUTS, state)


@functions
@pytest.mark.parametrize("dynamics", [GRU, CELL, same], ids=["gru", "cell", "callable"])
def test_state_of_integers(function, dynamics):
    state = torch.zeros((1, 2, 4) if dynamics is GRU else (2, 4), dtype=torch.int64)
    with refused(TypeError, "`state` must be of a floating point dtype", "not torch.int64", "Write `state.float()`"):
        function(dynamics, INPUTS, state)


@functions
@pytest.mark.parametrize("shape", [(2, 4), (1, 3, 4), (1, 2, 5), (2, 2, 4)])
def test_state_of_the_wrong_shape(function, shape):
    with refused(ValueError, "`state` must be", "(1, 2, 4)", str(shape)):
        function(GRU, INPUTS, torch.zeros(shape))


@functions
def test_state_of_the_wrong_shape_for_a_cell(function):
    with refused(ValueError, "`state` must be", "(2, 4)", "(2, 5)"):
        function(CELL, INPUTS, torch.zeros(2, 5))


@functions
def test_cell_state_of_the_wrong_shape(function):
    with refused(ValueError, "`state` must be a pair", "(2, 2, 4)", "(2, 2, 5)"):
        function(LSTM, INPUTS, (torch.zeros(2, 2, 4), torch.zeros(2, 2, 5)))


@functions
def test_state_of_the_wrong_shape_for_an_unbatched_sequence(function):
    with refused(ValueError, "`state` must be", "(1, 4)", "(1, 1, 4)"):
        function(GRU, INPUTS[:, 0], torch.zeros(1, 1, 4))


@functions
@pytest.mark.parametrize("module", [GRU, LSTM], ids=["gru", "lstm"])
@pytest.mark.parametrize("state", [3, (1.0, 2.0)])
def test_state_that_is_no_tensor_for_an_unbatched_sequence(function, module, state):
    with refused((TypeError, ValueError), "`state` must be"):
        function(module, INPUTS[:, 0], state)


def test_state_of_nothing():
    with refused(ValueError, "`state`", "(2, 0)"):
        lyapunov_spectrum(same, INPUTS, torch.zeros(2, 0))


# The options


@pytest.mark.parametrize("num_exponents", [0, -1, 17, 2.0, True, "all"])
def test_num_exponents_out_of_range(num_exponents):
    with refused(ValueError, f"`num_exponents={num_exponents}` must be from 1 to 16", "None for all"):
        lyapunov_spectrum(LSTM, INPUTS, num_exponents=num_exponents)


@pytest.mark.parametrize("warmup", [5, 9])
def test_warmup_that_leaves_nothing(warmup):
    message = f"`warmup={warmup}` leaves nothing to average", "5 steps", "Lower `warmup` or pass longer `inputs`"
    with refused(ValueError, *message):
        lyapunov_spectrum(GRU, INPUTS, warmup=warmup)


def test_warmup_that_leaves_nothing_of_the_shortest_sequence():
    with refused(ValueError, "`warmup=3` leaves nothing to average", "3 steps at least"):
        lyapunov_spectrum(GRU, pack_padded_sequence(INPUTS, torch.tensor([5, 3])), warmup=3)


@pytest.mark.parametrize("warmup", [-1, 1.0, None, True])
def test_warmup_that_is_no_number_of_steps(warmup):
    with refused(ValueError, f"`warmup={warmup}` must be a number of steps, 0 or more"):
        lyapunov_spectrum(GRU, INPUTS, warmup=warmup)


@pytest.mark.parametrize("qr_interval", [0, -2, 2.5, None, True, "never"])
def test_qr_interval_that_is_no_number_of_steps(qr_interval):
    with refused(ValueError, f"`qr_interval={qr_interval!r}`", '"auto" or a number of steps, 1 or more'):
        lyapunov_spectrum(GRU, INPUTS, qr_interval=qr_interval)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64, "float32"])
def test_dtype_that_is_not_precise_enough(dtype):
    with refused(ValueError, "`dtype` must be torch.float32, torch.float64 or None", f"not {dtype}"):
        lyapunov_spectrum(GRU, INPUTS, dtype=dtype)
