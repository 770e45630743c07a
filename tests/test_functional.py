"""The plain functions take torch's formulas only where these give what the module's own forward gives."""

import pytest
import torch
from helpers import assert_near, randn
from reference import spectrum
from torch import nn

from lightning_lyapunov import jacobians, lyapunov_spectrum, register_layer

TIME, BATCH, SIZE, HIDDEN, WARMUP = 30, 3, 2, 4, 10


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Forget the classes that a test registers."""
    monkeypatch.setattr("lightning_lyapunov.layers.registry._registered", {})


def loop(step, inputs, *state):
    """Return the Jacobians of a naive loop, ``(time, batch, state, state)``; ``step(x, *state)`` returns the state."""
    sizes, everything = [part.shape[-1] for part in state], []
    for member in range(inputs.shape[1]):
        flat, matrices = torch.cat([part[member] for part in state]), []
        for x in inputs[:, [member]]:

            def flat_step(flat, x=x):
                return torch.cat(step(x, *flat.unsqueeze(0).split(sizes, 1)), 1)[0]

            matrices.append(torch.autograd.functional.jacobian(flat_step, flat))
            flat = flat_step(flat).detach()
        everything.append(torch.stack(matrices))
    return torch.stack(everything, 1)


def assert_followed(module, matrices, inputs, state):
    """Assert that the plain functions give what the loop gives."""
    # The rounding errors of the smallest exponents are larger.
    expected = torch.stack([spectrum(one, warmup=WARMUP) for one in matrices.unbind(1)])[:, :HIDDEN]
    assert_near(lyapunov_spectrum(module, inputs, state, warmup=WARMUP)[:, :HIDDEN], expected, 1e-7)
    assert_near(jacobians(module, inputs, state), matrices, 1e-9)


class LeakyGRUCell(nn.GRUCell):
    def forward(self, input, hx=None):
        return 0.5 * hx + 0.5 * super().forward(input, 1.5 * hx)


class BentRNNCell(nn.RNNCell):
    def forward(self, input, hx=None):
        return torch.sin(1.3 * super().forward(input, hx))


class PeepholeLSTMCell(nn.LSTMCell):
    def forward(self, input, hx=None):
        h, c = hx
        i, f, g, o = (input @ self.weight_ih.T + h @ self.weight_hh.T + c.repeat(1, 4)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def with_forward_of_its_own():
    """Return a cell whose forward is replaced on the object, as by a patch."""
    cell = nn.GRUCell(SIZE, HIDDEN)
    cell.forward = lambda input, hx: nn.GRUCell.forward(cell, input, hx).square() - 0.5
    return cell


@pytest.mark.parametrize(
    "make", [lambda: LeakyGRUCell(SIZE, HIDDEN), lambda: BentRNNCell(SIZE, HIDDEN), with_forward_of_its_own]
)
def test_the_own_forward_of_a_cell_is_what_is_followed(make):
    cell, inputs, state = make().double(), randn(TIME, BATCH, SIZE), randn(BATCH, HIDDEN)
    assert_followed(cell, loop(lambda x, h: (cell(x, h),), inputs, state), inputs, state)


def test_the_own_forward_of_a_cell_with_two_states_is_what_is_followed():
    cell, inputs = PeepholeLSTMCell(SIZE, HIDDEN).double(), randn(TIME, BATCH, SIZE)
    state = randn(BATCH, HIDDEN), randn(BATCH, HIDDEN)
    assert_followed(cell, loop(lambda x, *state: cell(x, state), inputs, *state), inputs, state)


def test_a_cell_with_its_own_forward_needs_its_first_state():
    with pytest.raises(ValueError, match="`state` is required for LeakyGRUCell"):
        lyapunov_spectrum(LeakyGRUCell(SIZE, HIDDEN), torch.randn(TIME, BATCH, SIZE))


class Passing(nn.LSTM):
    """A forward of its own that changes nothing of the recurrence."""

    def forward(self, input, hx=None):
        return super().forward(input.clone(), hx)


class Residual(nn.GRU):
    """Hands on a state that is not torch's."""

    def forward(self, input, hx=None):
        h, outputs = hx[0], []
        for x in input:
            h = 0.7 * h + 0.3 * super().forward(x[None], h[None])[0][0]
            outputs.append(h)
        return torch.stack(outputs), h[None]


class Seldom(nn.LSTM):
    """Does something else in every seventh step."""

    def forward(self, input, hx=None):
        outputs = []
        for t, x in enumerate(input):
            y, hx = super().forward(x[None], hx)
            outputs.append(y)
            hx = (hx[0] * 0.5, hx[1]) if t % 7 == 6 else hx
        return torch.cat(outputs), hx


class Required(nn.LSTM):
    """Takes an argument that torch's does not."""

    def forward(self, input, lengths):
        return super().forward(input)


def test_torchs_formulas_are_used_where_a_forward_of_its_own_does_the_same():
    torch.manual_seed(0)
    layer, plain = Passing(SIZE, HIDDEN).double(), nn.LSTM(SIZE, HIDDEN).double()
    layer.load_state_dict(plain.state_dict())
    inputs = randn(TIME, BATCH, SIZE)
    assert_near(lyapunov_spectrum(layer, inputs), lyapunov_spectrum(plain, inputs))
    assert_near(jacobians(layer, inputs), jacobians(plain, inputs))


@pytest.mark.parametrize("function", [lyapunov_spectrum, jacobians])
@pytest.mark.parametrize(("kind", "parts"), [(Residual, 1), (Seldom, 2)])
def test_a_layer_whose_forward_is_another_is_refused(kind, parts, function):
    state = tuple(torch.randn(1, BATCH, HIDDEN) for _ in range(parts))
    with pytest.raises(ValueError, match=rf"forward of {kind.__name__} is not torch's .*register_layer"):
        function(kind(SIZE, HIDDEN), torch.randn(TIME, BATCH, SIZE), state if parts > 1 else state[0])


@pytest.mark.parametrize("function", [lyapunov_spectrum, jacobians])
def test_a_layer_that_is_called_otherwise_is_refused(function):
    with pytest.raises(ValueError, match=r"forward of Required.*lengths.*register_layer"):
        function(Required(SIZE, HIDDEN), torch.randn(TIME, BATCH, SIZE))


def test_a_layer_whose_forward_is_another_is_followed_when_it_is_registered():
    register_layer(
        Residual,
        step=lambda module, x, h: module(x[None], h[None])[1][0],
        read_call=lambda module, inputs, state: (inputs, state[0]),
    )
    layer, inputs, state = Residual(SIZE, HIDDEN).double(), randn(TIME, BATCH, SIZE), randn(1, BATCH, HIDDEN)
    assert_followed(layer, loop(lambda x, h: (layer(x[None], h[None])[1][0],), inputs, state[0]), inputs, state)
