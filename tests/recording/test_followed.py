"""The monitor follows what a model itself does with a layer, or says what to write: compared with a loop in float64."""

import copy
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import FEATURES, fit, messages
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lyapunov import LyapunovMonitor, register_layer
from lightning_lyapunov.kernel.propagation import generic_frame

TIME, BATCH, HIDDEN, COUNT = 40, 6, 5, 3
INPUTS = torch.randn(BATCH, TIME, FEATURES, generator=torch.Generator().manual_seed(1))
MATRIX = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2)) / 2


class Net(LightningModule):
    """Trains without changing its weights; what it does is a function of it and a batch."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run, self.head = run, nn.Linear(1, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def training_step(self, batch, batch_idx):
        return self.head(self.run(self, batch).square().mean().view(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def train(net, *callbacks, inputs=INPUTS):
    """Take one training step on one batch."""
    fit(net, *callbacks, data=DataLoader(inputs, len(inputs)), max_steps=1)


def measured(net, name="cell", inputs=INPUTS, key="spectrum", **options):
    """Return what the monitor measures in one training step; an error is raised."""
    monitor = LyapunovMonitor(name, num_exponents=COUNT, strict=True, **options)
    train(net, monitor, inputs=inputs)
    return monitor.history[name][key][-1]


def refusal(net, recwarn, name="cell"):
    """Return the only warning of a layer that is not measured."""
    monitor = LyapunovMonitor(name, num_exponents=COUNT)
    train(net, monitor)
    assert monitor.history[name]["spectrum"].isnan().all()
    (message,) = messages(recwarn, f"`{name}`")
    return message


def twin(module):
    """Return a copy in float64 and evaluation mode, without hooks."""
    module = copy.deepcopy(module).double().eval()
    module._forward_hooks.clear()
    return module


def growth(step, inputs, state, *, skip=0):
    """Return the summed growth of one member and the number of steps.

    ``step(x, t, *state)`` returns the parts of the next state; the inputs are ``(time, ...)``. The first ``skip`` steps
    lead to the first state.
    """
    shapes = [part.shape for part in state]
    sizes = [part.numel() for part in state]

    def flat_step(flat, t):
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return torch.cat([part.flatten() for part in step(inputs[t : t + 1].double(), t, *parts)])

    flat = torch.cat([part.flatten() for part in state]).double()
    frame, total = generic_frame(len(flat), COUNT), torch.zeros(COUNT).double()
    warmup = min(50, (len(inputs) - skip) // 2)
    for t in range(len(inputs)):
        flat.requires_grad_()
        after = flat_step(flat, t)
        (jacobian,) = torch.autograd.grad(after, flat, torch.eye(len(flat)).double(), is_grads_batched=True)
        flat = after.detach()
        if t >= skip:
            frame, r = torch.linalg.qr(jacobian @ frame)
        if t >= skip + warmup:
            total += r.diagonal().abs().log()
    return total, len(inputs) - skip - warmup


def average(growths):
    """Return the mean spectrum of sequences, weighted by their steps."""
    totals, steps = zip(*growths, strict=True)
    return (sum(totals) / sum(steps)).sort(descending=True).values


def reference(step, *state, inputs=INPUTS, skip=0):
    """Return the mean spectrum of the members of a batch; by default from one state of zeros."""
    state = state or (torch.zeros(1, HIDDEN),)
    return average([growth(step, member, state, skip=skip) for member in inputs])


def assert_spectrum(actual, expected, tolerance=1e-3):
    assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance)


def zeros(inputs):
    return inputs.new_zeros(len(inputs), HIDDEN)


def loop(net, inputs):
    """Call a cell as ``(input, state)``."""
    state = zeros(inputs)
    for x in inputs.unbind(1):
        state = net.cell(x, state)
    return state


def one(step):
    """Return a step of a state of one part for the reference."""
    return lambda x, t, h: (step(x, h),)


class Tanh(nn.Module):
    """A plain cell, ``(input, state) -> state``."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.linear.weight.data.mul_(2)

    def forward(self, x, h):
        return self.linear(torch.cat((x, h), -1)).tanh()


# A forward of its own in a subclass of torch's


class BentGRUCell(nn.GRUCell):
    def forward(self, input, hidden):
        xz, xr, xn = (input @ self.weight_ih.T + self.bias_ih).chunk(3, 1)
        wz, wr, wn = self.weight_hh.chunk(3)
        z, r = (xz + hidden @ wz.T).sigmoid(), (xr + hidden @ wr.T).sigmoid()
        return F.leaky_relu(z * hidden + (1 - z) * (xn + (r * hidden) @ wn.T).tanh() - 0.3, 0.5)


class SineCell(nn.RNNCellBase):
    nonlinearity = "tanh"  # torch's formula would be another one

    def __init__(self):
        super().__init__(FEATURES, HIDDEN, True, num_chunks=1)

    def forward(self, input, hx):
        return torch.sin(F.linear(input, self.weight_ih, self.bias_ih) + 2 * F.linear(hx, self.weight_hh, self.bias_hh))


class PairCell(nn.RNNCellBase):
    def __init__(self):
        super().__init__(FEATURES, HIDDEN, True, num_chunks=4)

    def forward(self, input, hx):
        h, c = hx
        drive = F.linear(input, self.weight_ih, self.bias_ih) + 2 * F.linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = drive.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class NormLSTM(nn.LSTM):
    """Takes whole sequences from zeros, whatever it is given."""

    def forward(self, input, hx=None):
        h = c = zeros(input)
        outputs = []
        for x in input.unbind(1):
            h, c = self.step(x, h, c)
            outputs.append(h)
        return torch.stack(outputs, 1), (h[None], c[None])

    def step(self, x, h, c):
        i, f, g, o = (x @ self.weight_ih_l0.T + h @ self.weight_hh_l0.T + self.bias_ih_l0).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * F.layer_norm(c, c.shape[1:]).tanh(), c


@pytest.mark.parametrize("make", [lambda: BentGRUCell(FEATURES, HIDDEN), SineCell])
def test_the_own_forward_of_a_cell_is_followed(make):
    net = Net(loop, cell=make())
    assert_spectrum(measured(net), reference(one(twin(net.cell))))


def test_the_own_forward_of_a_cell_with_two_states_is_followed():
    def run(net, inputs):
        state = zeros(inputs), zeros(inputs)
        for x in inputs.unbind(1):
            state = net.cell(x, state)
        return state[0]

    net = Net(run, cell=PairCell())
    cell, zero = twin(net.cell), torch.zeros(1, HIDDEN)
    assert_spectrum(measured(net), reference(lambda x, t, *state: cell(x, state), zero, zero))


def test_the_own_forward_of_a_layer_that_ignores_its_state_is_followed():
    net = Net(lambda net, inputs: net.cell(inputs)[0], cell=NormLSTM(FEATURES, HIDDEN, batch_first=True))
    lstm, zero = twin(net.cell), torch.zeros(1, HIDDEN)
    # From what the second step hands on to what the last but one does. The memory comes first.
    step = lambda x, t, c, h: lstm.step(x, h, c)[::-1]  # noqa: E731
    assert_spectrum(measured(net), reference(step, zero, zero, inputs=INPUTS[:, :-1], skip=2))


# The state, wherever it stands


class Core(nn.Module):
    """A state of two parts. Heirs take and return it in their own way; ``use`` calls them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, 3 * HIDDEN)
        self.linear.weight.data.mul_(1.5)

    def step(self, x, h, c):
        gate, new, out = self.linear(torch.cat((x, h), -1)).chunk(3, -1)
        c = 0.9 * gate.sigmoid() * c + new.tanh()
        return out.sigmoid() * c.tanh() + 0.2 * h, c


class StateLast(Core):
    def forward(self, x, state):
        return self.step(x, *state)

    def use(self, x, t, h, c):
        return self(x, (h, c))


class StateFirst(Core):
    def forward(self, state, x):
        return self.step(x, *state)

    def use(self, x, t, h, c):
        return self((h, c), x)


class Three(Core):
    def forward(self, x, h, c):
        return self.step(x, h, c)

    def use(self, x, t, h, c):
        return self(x, h, c)


class Spiking(Core):
    def forward(self, x, syn, mem):
        syn, mem = self.step(x, syn, mem)
        return torch.relu(mem), syn, mem

    def use(self, x, t, h, c):
        return self(x, h, c)[1:]


class DictOut(Core):
    def forward(self, x, h, c):
        h, c = self.step(x, h, c)
        return {"output": 2 * h, "hidden": h, "memory": c}

    def use(self, x, t, h, c):
        returned = self(x, h, c)
        return returned["hidden"], returned["memory"]


@dataclass
class Memory:
    h: torch.Tensor
    c: torch.Tensor


class DataclassOut(Core):
    def forward(self, x, h, c):
        return Memory(*self.step(x, h, c))

    def use(self, x, t, h, c):
        memory = self(x, h, c)
        return memory.h, memory.c


class DataclassBoth(Core):
    def forward(self, x, memory):
        return Memory(*self.step(x, memory.h, memory.c))

    def use(self, x, t, h, c):
        memory = self(x, Memory(h, c))
        return memory.h, memory.c


class ListIn(Core):
    def forward(self, x, state):
        h, c = state
        return self.step(x, h, c)

    def use(self, x, t, h, c):
        return self(x, [h, c])


class NoneAmong(Core):
    def forward(self, x, state):
        _, h, _, c = state
        h, c = self.step(x, h, c)
        return h + 1, [None, h, None, c]

    def use(self, x, t, h, c):
        _, state = self(x, [None, h, None, c])
        return state[1], state[3]


class Keywords(Core):
    def forward(self, *, cell, inputs, hidden):
        return self.step(inputs, hidden, cell)

    def use(self, x, t, h, c):
        return self(inputs=x, hidden=h, cell=c)


class Gap(Core):
    """The time since the last step comes with the batch."""

    def forward(self, x, h, c, gap):
        return self.step(x, h * torch.exp(-gap), c)

    def use(self, x, t, h, c):
        return self(x, h, c, x[:, :1].abs())


class Mask(Core):
    """A mask of booleans, one for each member."""

    def forward(self, x, h, c, mask):
        return self.step(x, h.where(mask.unsqueeze(-1), 0.5 * h), c)

    def use(self, x, t, h, c):
        return self(x, h, c, x[:, 0] > 0)


class Matrix(Core):
    """A constant matrix."""

    def forward(self, x, matrix, h, c):
        return self.step(x, h @ matrix, c)

    def use(self, x, t, h, c):
        return self(x, MATRIX.to(x), h, c)


class Duration(Core):
    """A number of Python's that is another in every call."""

    def forward(self, x, h, c, dt=1.0):
        new, memory = self.step(x, h, c)
        return h + dt * (new - h), memory

    def use(self, x, t, h, c):
        return self(x, h, c, dt=0.3 + 0.1 * (t % 5))


class Counted(Core):
    """The number of the step."""

    def forward(self, x, t, h, c):
        return self.step(x, h, c / (1 + t % 3))

    def use(self, x, t, h, c):
        return self(x, t, h, c)


FORMS = [
    StateLast,
    StateFirst,
    Three,
    Spiking,
    DictOut,
    DataclassOut,
    DataclassBoth,
    ListIn,
    NoneAmong,
    Keywords,
    Gap,
    Mask,
    Matrix,
    Duration,
    Counted,
]


def use(net, inputs):
    h, c = zeros(inputs), zeros(inputs)
    for t, x in enumerate(inputs.unbind(1)):
        h, c = net.cell.use(x, t, h, c)
    return h


@pytest.mark.parametrize("form", FORMS)
def test_the_state_is_found_wherever_it_stands(form):
    net = Net(use, cell=form())
    zero, step = torch.zeros(1, HIDDEN), twin(net.cell).use
    assert_spectrum(measured(net), reference(step, zero, zero))


class Layers(nn.Module):
    """Two layers, ``(batch, input)`` and ``(layers, batch, hidden)``."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(FEATURES, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)])

    def forward(self, x, state):
        states = []
        for cell, h in zip(self.cells, state, strict=True):
            x = cell(x, h)
            states.append(x)
        return x, torch.stack(states)


@pytest.mark.parametrize("batch", [BATCH, 2])  # with two members it looks like the layers
def test_the_batch_of_a_state_may_be_its_second_dimension(batch):
    def run(net, inputs):
        state = inputs.new_zeros(2, len(inputs), HIDDEN)
        for x in inputs.unbind(1):
            out, state = net.cell(x, state)
        return out

    net, inputs = Net(run, cell=Layers()), INPUTS[:batch]
    cell = twin(net.cell)
    expected = reference(lambda x, t, state: (cell(x, state)[1],), torch.zeros(2, 1, HIDDEN), inputs=inputs)
    assert_spectrum(measured(net, inputs=inputs), expected)


# The first state


class Makes(Tanh):
    """Makes its own first state."""

    def forward(self, x, h=None):
        return super().forward(x, x.new_full((len(x), HIDDEN), 0.3) if h is None else h)


class Broadcasts(Tanh):
    def forward(self, x, h):
        return super().forward(x, h.expand(len(x), -1))


@pytest.mark.parametrize(
    ("cell", "first"),
    [(Makes, lambda _: None), (Broadcasts, lambda net: net.first), (Broadcasts, lambda net: net.first[0])],
    ids=["None", "a parameter (1, hidden)", "a parameter (hidden,)"],
)
def test_the_first_state_may_have_another_form(cell, first):
    def run(net, inputs):
        h = first(net)
        for x in inputs.unbind(1):
            h = net.cell(x, h)
        return h

    net = Net(run, cell=cell())
    net.first = nn.Parameter(torch.full((1, HIDDEN), 0.3))
    start = torch.full((1, HIDDEN), 0.3)
    assert_spectrum(measured(net), reference(one(twin(net.cell)), start, skip=1))


def test_a_first_state_that_is_stacked_may_come_back_as_a_tuple():
    def run(net, inputs):
        state = inputs.new_zeros(2, len(inputs), HIDDEN)
        for x in inputs.unbind(1):
            state = net.cell(x, state)
        return state[0]

    net = Net(run, cell=ListIn())
    cell, zero = twin(net.cell), torch.zeros(1, HIDDEN)
    assert_spectrum(measured(net), reference(lambda x, t, h, c: cell.step(x, h, c), zero, zero, skip=1))


# A state without a batch


class Ring(nn.Module):
    """Nodes of a ring: ``(node, input)``, the edges, and the state of all nodes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + 2, 2)
        self.linear.weight.data.mul_(2)

    def forward(self, x, edges, weight=None, h=None):
        both = torch.cat((x, h), -1)
        return self.linear(both.index_add(0, edges[1], 0.5 * both[edges[0]])).tanh()


NODES = 7
EDGES = torch.stack((torch.arange(NODES), (torch.arange(NODES) + 1) % NODES))
GRAPH = torch.randn(1, TIME, NODES, FEATURES, generator=torch.Generator().manual_seed(3))


def around(net, inputs):
    h = inputs.new_zeros(NODES, 2)
    for x in inputs[0]:
        h = net.cell(x, EDGES, None, h)
    return h


def test_the_nodes_of_a_graph_are_one_state():
    net = Net(around, cell=Ring())
    cell = twin(net.cell)
    expected = reference(lambda x, t, h: (cell(x[0], EDGES, None, h),), torch.zeros(NODES, 2), inputs=GRAPH)
    assert_spectrum(measured(net, inputs=GRAPH), expected)


# What a module keeps


class Keeps(nn.Module):
    """Keeps its state to itself."""

    def __init__(self):
        super().__init__()
        self.linear, self.mem = nn.Linear(FEATURES + HIDDEN, HIDDEN), None
        self.linear.weight.data.mul_(2)

    def forward(self, x):
        self.mem = self.step(x, x.new_zeros(len(x), HIDDEN) if self.mem is None else self.mem)
        return torch.relu(self.mem)

    def step(self, x, h):
        return self.linear(torch.cat((x, h), -1)).tanh()


class KeepsBuffer(Keeps):
    def __init__(self):
        super().__init__()
        del self.mem
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, x):
        if not len(self.mem):
            self.mem = x.new_zeros(len(x), HIDDEN)
        self.mem = self.step(x, self.mem)
        return torch.relu(self.mem)


@pytest.mark.parametrize("cell", [Keeps, KeepsBuffer])
def test_a_state_that_a_module_keeps_is_found(cell):
    def run(net, inputs):
        net.cell.mem = None if cell is Keeps else torch.zeros(0)
        return sum(net.cell(x) for x in inputs.unbind(1))

    net = Net(run, cell=cell())
    actual = measured(net)
    net.cell.mem = torch.zeros(0)
    assert_spectrum(actual, reference(one(twin(net.cell).step), skip=1))


class Resets(Keeps):
    """Keeps a second tensor, in which most calls change nothing: whether its units were reset."""

    def __init__(self, is_state):
        super().__init__()
        self.reset, self.is_state = None, is_state

    def forward(self, x):
        last = x.new_zeros(len(x), HIDDEN) if self.reset is None else self.reset
        mem = x.new_zeros(len(x), HIDDEN) if self.mem is None else self.mem
        self.mem, self.reset = self.step(x, mem, last)
        return torch.relu(self.mem)

    def step(self, x, h, reset):
        if self.is_state:
            h = h * (1 - 0.9 * reset)
        h = super().step(x, h)
        return h, (h - 0.99).relu()


@pytest.mark.parametrize("inputs", [INPUTS, INPUTS[:, :-1]], ids=["", "one step less"])
@pytest.mark.parametrize("is_state", [False, True])
def test_what_a_module_keeps_may_seldom_change(is_state, inputs):
    def run(net, inputs):
        net.cell.mem = net.cell.reset = None
        return sum(net.cell(x) for x in inputs[:, 1:].unbind(1))

    inputs = torch.cat((inputs[:, :1], 0.3 * inputs[:, :1], 4 * inputs[:, 1:10], 0.3 * inputs[:, 10:]), 1)
    net = Net(run, cell=Resets(is_state))
    actual = measured(net, inputs=inputs)
    net.cell.mem = net.cell.reset = torch.zeros(0)
    cell = twin(net.cell)
    zero = torch.zeros(1, HIDDEN)
    if is_state:
        expected = reference(lambda x, t, h, r: cell.step(x, h, r), zero, zero, inputs=inputs[:, 1:], skip=1)
    else:
        expected = reference(lambda x, t, h: cell.step(x, h, 0)[:1], zero, inputs=inputs[:, 1:], skip=1)
    assert_spectrum(actual, expected)


class Normalised(Tanh):
    """The statistics of a normalisation change in every call, and are no state."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x, h):
        return super().forward(self.norm(x), h)


class NormalisedState(Tanh):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x, h):
        return self.norm(self.linear(torch.cat((x, h), -1))).tanh()


@pytest.mark.parametrize("cell", [Normalised, NormalisedState])
def test_the_statistics_of_a_normalisation_are_no_state(cell):
    net = Net(loop, cell=cell())
    assert_spectrum(measured(net), reference(one(twin(net.cell))))


# Whole layers


class Scan(nn.Module):
    """A layer of one's own, called with whole sequences."""

    batch_first = True

    def __init__(self):
        super().__init__()
        self.cell = Tanh()

    def scan(self, inputs, h):
        outputs = []
        axis = 1 if self.batch_first else 0
        for x in inputs.unbind(axis):
            h = self.cell(x, h)
            outputs.append(h)
        return torch.stack(outputs, axis), h

    def first(self, inputs):
        return inputs.new_zeros(inputs.shape[0 if self.batch_first else 1], HIDDEN)


class StateInOut(Scan):
    def forward(self, inputs, state):
        return self.scan(inputs, state)


class StateOptional(Scan):
    def forward(self, inputs, state=None):
        return self.scan(inputs, self.first(inputs) if state is None else state)


class NoState(Scan):
    def forward(self, inputs):
        return self.scan(inputs, self.first(inputs))[0]


class Twice(NoState):
    """Its output is another function of the state."""

    def forward(self, inputs):
        return self.scan(inputs, self.first(inputs))[0].square() + 1


def halves(net, inputs, state):
    axis = 1 if net.cell.batch_first else 0
    first, second = inputs.chunk(2, axis)
    _, state = net.cell(first, state)
    return net.cell(second, state)[0]


WHOLE = {
    "state in and out": (StateInOut, lambda net, x: net.cell(x, net.cell.first(x))[0], 0, None),
    "state in and out, two halves": (StateInOut, lambda net, x: halves(net, x, net.cell.first(x)), 0, None),
    "state given by keyword": (StateOptional, lambda net, x: net.cell(x, state=net.cell.first(x))[0], 0, None),
    "no state given": (StateOptional, lambda net, x: net.cell(x)[0], 1, None),
    "state=None": (StateOptional, lambda net, x: net.cell(x, None)[0], 1, None),
    "state=None, two halves": (StateOptional, lambda net, x: halves(net, x, None), 1, None),
    "no state at all": (NoState, lambda net, x: net.cell(x), 2, -1),
    "no state at all, another output": (Twice, lambda net, x: net.cell(x), 2, -1),
}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_a_layer_that_takes_whole_sequences_is_followed(case, batch_first):
    cell, run, skip, stop = case
    net = Net(lambda net, inputs: run(net, inputs if batch_first else inputs.transpose(0, 1)), cell=cell())
    net.cell.batch_first = batch_first
    expected = reference(one(twin(net.cell.cell)), inputs=INPUTS[:, :stop], skip=skip)
    assert_spectrum(measured(net), expected)


class Around(nn.Module):
    """Torch's layer with something before and after it."""

    def __init__(self):
        super().__init__()
        self.before, self.gru, self.after = (
            nn.Linear(FEATURES, FEATURES),
            nn.GRU(FEATURES, HIDDEN, batch_first=True),
            nn.Linear(HIDDEN, 2),
        )

    def forward(self, inputs, state=None):
        outputs, state = self.gru(self.before(inputs), state)
        return self.after(outputs), state


def test_a_module_around_a_layer_of_torch_is_followed():
    net = Net(lambda net, x: net.cell(x, x.new_zeros(1, len(x), HIDDEN))[0], cell=Around())
    around = twin(net.cell)
    step = lambda x, t, h: (around(x[:, None], h[None])[1][0],)  # noqa: E731
    assert_spectrum(measured(net), reference(step))


class Bidirectional(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True, bidirectional=True)

    def forward(self, inputs, state=None):
        return self.gru(inputs, state)


class BothWays(nn.Module):
    """A loop forwards and one backwards."""

    def __init__(self):
        super().__init__()
        self.there, self.back = NoState(), NoState()

    def forward(self, inputs):
        return torch.cat((self.there(inputs), self.back(inputs.flip(1)).flip(1)), -1)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, HIDDEN, 3, padding=1)

    def forward(self, inputs, state=None):
        return self.conv(inputs.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(FEATURES, 1, 8, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs)


@pytest.mark.parametrize("module", [Bidirectional, BothWays, Convolution, Attention])
def test_a_module_that_sees_the_future_is_not_followed(module, recwarn):
    def run(net, inputs):
        returned = net.cell(inputs)
        return returned[0] if isinstance(returned, tuple) else returned

    assert "register_layer" in refusal(Net(run, cell=module()), recwarn)


# Members


def counted(lengths, net):
    """Return the mean spectrum of the first steps of each member."""
    cell = one(twin(net.cell))
    return average([growth(cell, x[:n], (torch.zeros(1, HIDDEN),)) for x, n in zip(INPUTS, lengths, strict=True)])


@pytest.mark.parametrize("make", [Tanh, lambda: nn.GRUCell(FEATURES, HIDDEN)], ids=["own", "torch"])
def test_episodes_may_end_at_different_times_in_each_member(make):
    ends = [[t for t in range(TIME) if (t + 5 * member) % 17 == 0] for member in range(BATCH)]

    def run(net, inputs):
        h = zeros(inputs)
        for t, x in enumerate(inputs.unbind(1)):
            done = torch.tensor([[float(t in of)] for of in ends])
            h = net.cell(x, (1 - done) * h)
        return h

    net = Net(run, cell=make())
    cell, pieces = one(twin(net.cell)), []
    for member, of in zip(INPUTS, ends, strict=True):
        edges = sorted({0, *of, TIME})
        pieces += [member[a:b] for a, b in itertools.pairwise(edges)]
    expected = average([growth(cell, piece, (torch.zeros(1, HIDDEN),)) for piece in pieces])
    assert_spectrum(measured(net, num_sequences=64), expected)


@pytest.mark.parametrize("make", [Tanh, lambda: nn.GRUCell(FEATURES, HIDDEN)], ids=["own", "torch"])
@pytest.mark.parametrize("where", ["end", "middle", "start"])
def test_a_mask_may_hold_the_state(make, where):
    masks = torch.ones(BATCH, TIME)
    for member in range(BATCH):
        masks[
            member, {"end": slice(30 + member, None), "middle": slice(10, 12 + member), "start": slice(member)}[where]
        ] = 0

    def run(net, inputs):
        h = zeros(inputs)
        for t, x in enumerate(inputs.unbind(1)):
            mask = masks[:, t : t + 1]
            h = mask * net.cell(x, h) + (1 - mask) * h
        return h

    net = Net(run, cell=make())
    cell = one(twin(net.cell))
    kept = [x[mask.bool()] for x, mask in zip(INPUTS, masks, strict=True)]
    assert_spectrum(measured(net), average([growth(cell, x, (torch.zeros(1, HIDDEN),)) for x in kept]))


@pytest.mark.parametrize("make", [Tanh, lambda: nn.GRUCell(FEATURES, HIDDEN)], ids=["own", "torch"])
def test_a_batch_may_shrink(make):
    lengths = [40, 37, 37, 33, 30, 25]

    def run(net, inputs):
        h, ended = zeros(inputs), []
        for t, x in enumerate(inputs.unbind(1)):
            running = sum(length > t for length in lengths)
            ended.append(h[running:])
            h = net.cell(x[:running], h[:running])
        return torch.cat((h, *ended))

    net = Net(run, cell=make())
    assert_spectrum(measured(net), counted(lengths, net))


@pytest.mark.parametrize("make", [Tanh, lambda: nn.GRUCell(FEATURES, HIDDEN)], ids=["own", "torch"])
def test_members_may_change_places(make):
    def run(net, inputs):
        h, generator, order = zeros(inputs), torch.Generator().manual_seed(0), torch.arange(BATCH)
        for t in range(TIME):
            turn = torch.randperm(BATCH, generator=generator)
            order = order[turn]
            h = net.cell(inputs[order, t], h[turn])
        return h

    net = Net(run, cell=make())
    assert_spectrum(measured(net), counted([TIME] * BATCH, net))


# A state that is changed between two calls


def zoneout(net, t, before, after):
    keep = torch.bernoulli(torch.full_like(after, 0.2)) if net.training else 0.2
    return keep * before + (1 - keep) * after


CHANGES = {
    "zoneout": zoneout,
    "layer norm": lambda net, t, before, after: F.layer_norm(after, (HIDDEN,)),
    "clamp": lambda net, t, before, after: after.clamp(-0.2, 0.2),
    "one number": lambda net, t, before, after: after.clamp(max=0.99 * float(after.max())),
    "decay": lambda net, t, before, after: 0.9 * after,
    "dropout": lambda net, t, before, after: F.dropout(after, 0.3, net.training),
    "dropout that seldom acts": lambda net, t, before, after: after * (torch.rand_like(after) > 0.02),
    "residual": lambda net, t, before, after: before + 0.1 * after,
    "every 7th call": lambda net, t, before, after: 0.5 * after if t % 7 == 6 else after,
    "noise": lambda net, t, before, after: after + 0.1 * torch.randn_like(after),
    "one member": lambda net, t, before, after: torch.cat((0.5 * after[:1], after[1:])),
}
MAKES = {
    "own": Tanh,
    "GRUCell": lambda: nn.GRUCell(FEATURES, HIDDEN),
    "own forward": lambda: BentGRUCell(FEATURES, HIDDEN),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_that_is_changed_between_two_calls_is_not_followed(make, change, recwarn):
    def run(net, inputs):
        h = zeros(inputs)
        for t, x in enumerate(inputs.unbind(1)):
            h = change(net, t, h, net.cell(x, h))
        return h

    message = refusal(Net(run, cell=make()), recwarn)
    assert "comes back changed" in message
    assert "register_layer" in message


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("every", [1, 7])
def test_a_state_that_is_changed_and_detached_is_not_followed(make, change, every, recwarn):
    def run(net, inputs):
        h = zeros(inputs)
        for t, x in enumerate(inputs.unbind(1)):
            after = net.cell(x, h)
            changed = change(net, t, h, after)
            h = changed.detach() if t % every == every - 1 else after
        return h

    assert "register_layer" in refusal(Net(run, cell=make()), recwarn)


def test_a_layer_whose_state_is_changed_and_detached_is_not_followed(recwarn):
    def run(net, inputs):
        state = inputs.new_zeros(1, len(inputs), HIDDEN)
        for part in inputs.split(8, 1):
            outputs, state = net.cell(part, state)
            state = 0.9 * state.detach()
        return outputs

    net = Net(run, cell=nn.GRU(FEATURES, HIDDEN, batch_first=True))
    assert "comes back changed" in refusal(net, recwarn)


@pytest.mark.parametrize("first", ["zeros", "noise", "of the inputs"])
@pytest.mark.parametrize("make", [Tanh, lambda: nn.GRUCell(FEATURES, HIDDEN)], ids=["own", "torch"])
def test_new_first_states_start_new_sequences(make, first):
    starts = {
        "zeros": [torch.zeros(BATCH, HIDDEN)] * 4,
        "noise": torch.randn(4, BATCH, HIDDEN, generator=torch.Generator().manual_seed(4)),
        # The same data with other dropout.
        "of the inputs": [
            torch.cat((x[:, 0], x[:, 1]), 1)[:, :HIDDEN] for x in [INPUTS * s for s in (1, 0.9, 1.1, 0.8)]
        ],
    }[first]
    parts = INPUTS.split(10, 1)

    def run(net, inputs):
        for part, h in zip(parts, starts, strict=True):
            for x in part.unbind(1):
                h = net.cell(x, h)
        return h

    net = Net(run, cell=make())
    cell = one(twin(net.cell))
    pieces = [
        growth(cell, part[i], (h[i : i + 1],)) for part, h in zip(parts, starts, strict=True) for i in range(BATCH)
    ]
    assert_spectrum(measured(net, num_sequences=64), average(pieces))


def test_a_state_of_two_parts_of_which_one_is_changed_is_not_followed(recwarn):
    def run(net, inputs):
        h, c = zeros(inputs), zeros(inputs)
        for x in inputs.unbind(1):
            h, c = net.cell(x, (h, c))
            c = 0.9 * c
        return h

    assert "comes back changed" in refusal(Net(run, cell=nn.LSTMCell(FEATURES, HIDDEN)), recwarn)


@pytest.mark.parametrize("form", [StateLast, Three, Spiking, DictOut])
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_the_state_of_an_own_cell_that_is_changed_is_not_followed(form, part, recwarn):
    def run(net, inputs):
        h, c = zeros(inputs), zeros(inputs)
        for t, x in enumerate(inputs.unbind(1)):
            h, c = net.cell.use(x, t, h, c)
            h, c = (0.9 * h, c) if part == 0 else (h, 0.9 * c)
        return h

    assert "register_layer" in refusal(Net(run, cell=form()), recwarn)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("kind", ["zoneout", "layer norm", "decay", "dropout", "residual"])
def test_the_module_that_holds_the_whole_step_is_followed(kind, make):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = make()

        def forward(self, x, h):
            return CHANGES[kind](self, 0, h, self.cell(x, h))

    net = Net(loop, cell=Step())
    assert_spectrum(measured(net), reference(one(twin(net.cell))))


# Registered classes


@pytest.fixture
def registry(monkeypatch):
    """Forget the classes that a test registers."""
    monkeypatch.setattr("lightning_lyapunov.layers.registry._registered", {})


READ_CALLS = {
    "two values": lambda module, x, syn, mem: (x[None], (syn, mem)),
    "three values": lambda module, x, syn, mem: (x[None], (syn, mem), module.step(x, syn, mem)),
}


@pytest.mark.parametrize("read_call", READ_CALLS.values(), ids=READ_CALLS)
def test_a_registered_cell_that_is_called_once_a_step_is_followed(read_call, registry):
    register_layer(Spiking, step=lambda module, x, state: module(x, *state)[1:], read_call=read_call)
    net, zero = Net(use, cell=Spiking()), torch.zeros(1, HIDDEN)
    assert_spectrum(measured(net), reference(twin(net.cell).use, zero, zero))


@pytest.mark.parametrize("read_call", READ_CALLS.values(), ids=READ_CALLS)
def test_a_registered_cell_whose_state_is_changed_is_not_followed(read_call, registry, recwarn):
    def run(net, inputs):
        syn, mem = zeros(inputs), zeros(inputs)
        for x in inputs.unbind(1):
            _, syn, mem = net.cell(x, 0.9 * syn, mem)
        return syn + mem

    register_layer(Spiking, step=lambda module, x, state: module(x, *state)[1:], read_call=read_call)
    refusal(Net(run, cell=Spiking()), recwarn)


def test_a_registered_step_that_is_another_is_not_followed(registry, recwarn):
    step = lambda module, x, state: module(x, 0.5 * state[0], state[1])[1:]  # noqa: E731
    register_layer(Spiking, step=step, read_call=READ_CALLS["two values"])
    assert "step" in refusal(Net(use, cell=Spiking()), recwarn)


def test_members_that_depend_on_one_another_are_refused_and_may_be_one_state(registry, recwarn):
    register_layer(Ring, step=lambda m, x, h: m(x, EDGES, None, h), read_call=lambda m, x, e, w, h: (x[None], h))
    net, monitor = Net(around, cell=Ring()), LyapunovMonitor("cell", num_exponents=COUNT)
    train(net, monitor, inputs=GRAPH)
    assert monitor.history["cell"]["spectrum"].isnan().all()
    (message,) = messages(recwarn, "`cell`")
    assert "depend on one another" in message
    assert "a batch of one" in message
    register_layer(
        Ring,
        step=lambda m, x, h: m(x[0], EDGES, None, h[0])[None],
        read_call=lambda m, x, e, w, h: (x[None, None], h[None]),
    )
    cell = twin(net.cell)
    expected = reference(lambda x, t, h: (cell(x[0], EDGES, None, h),), torch.zeros(NODES, 2), inputs=GRAPH)
    assert_spectrum(measured(net, inputs=GRAPH), expected)


# Several passes over one batch


def layer_pass(net, inputs):
    return net.cell(inputs)[0]


PASSES = {
    "layer": (lambda: nn.GRU(FEATURES, HIDDEN, batch_first=True), layer_pass),
    "GRUCell": (lambda: nn.GRUCell(FEATURES, HIDDEN), loop),
    "own cell": (Tanh, loop),
    "own layer": (StateOptional, layer_pass),
    "own layer without a state": (NoState, lambda net, inputs: net.cell(inputs)),
}


@pytest.mark.parametrize("case", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_data_count_once_however_often_they_are_passed(case, drop):
    make, one_pass = case
    cell, errors = make(), {}
    inputs = INPUTS * torch.linspace(0.3, 3, BATCH).view(-1, 1, 1)  # the members differ more than dropout changes them
    for count in (1, 2, 4):

        def run(net, inputs, count=count):
            return sum(one_pass(net, F.dropout(inputs, drop)) for _ in range(count))

        torch.manual_seed(5)
        errors[count] = float(measured(Net(run, cell=cell), inputs=inputs, key="stderr")[0])
    for count in (2, 4):
        assert errors[count] == pytest.approx(errors[1], rel=0.3 if drop else 1e-6)


@pytest.mark.parametrize("same_start", [False, True], ids=["", "one first input for all"])
@pytest.mark.parametrize("case", list(PASSES.values())[:-1], ids=list(PASSES)[:-1])  # the last: its largest call alone
def test_parts_of_a_batch_are_as_much_data_as_the_whole(case, same_start):
    make, one_pass = case
    cell, inputs = make(), INPUTS.clone()
    if same_start:
        inputs[:, 0] = 0

    def parts(net, inputs):
        return torch.cat([one_pass(net, part) for part in inputs.chunk(2)])

    whole, in_parts = (measured(Net(run, cell=cell), inputs=inputs, key="stderr") for run in (one_pass, parts))
    assert_spectrum(in_parts, whole, 1e-4)


# Without a graph


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("start", [torch.zeros(BATCH, HIDDEN), INPUTS[:, :2].flatten(1)[:, :HIDDEN]], ids=["zeros", ""])
def test_a_cell_is_followed_without_a_graph(make, start):
    def run(net, inputs):
        h = start
        with torch.no_grad():
            for x in inputs.unbind(1):
                h = net.cell(x, h)
        return h

    net = Net(run, cell=make())
    step = one(twin(net.cell))
    expected = average([growth(step, x, (h[None],)) for x, h in zip(INPUTS, start, strict=True)])
    assert_spectrum(measured(net), expected)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("change", ["decay", "layer norm", "noise"])
def test_a_state_that_is_changed_without_a_graph_is_not_followed(make, change, recwarn):
    def run(net, inputs):
        h = zeros(inputs)
        with torch.no_grad():
            for t, x in enumerate(inputs.unbind(1)):
                h = CHANGES[change](net, t, h, net.cell(x, h))
        return h

    assert "register_layer" in refusal(Net(run, cell=make()), recwarn)


@pytest.mark.parametrize("make", [Tanh, lambda: nn.GRUCell(FEATURES, HIDDEN)], ids=["own", "torch"])
def test_segments_of_a_loop_that_are_checkpointed_are_followed(make):
    def segment(net, inputs, h):
        for x in inputs.unbind(1):
            h = net.cell(x, h)
        return h

    def run(net, inputs):
        h = zeros(inputs).requires_grad_()
        for part in inputs.split(10, 1):
            h = checkpoint(segment, net, part, h, use_reentrant=True)
        return h

    net = Net(run, cell=make())
    assert_spectrum(measured(net), reference(one(twin(net.cell))))


# Weights that are made from others


class Dropped(nn.LSTM):
    """Drops weights in its own forward."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.raw = nn.Parameter(2 * self.weight_hh_l0.data)
        del self._parameters["weight_hh_l0"]
        self.weight_hh_l0 = self.raw.data

    def forward(self, *args, **options):
        self.weight_hh_l0 = F.dropout(self.raw, 0.5, self.training)
        return super().forward(*args, **options)


class Drops(nn.Module):
    """Drops weights of the layer that it holds."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.raw = nn.Parameter(2 * self.lstm.weight_hh_l0.data)
        del self.lstm._parameters["weight_hh_l0"]
        self.lstm.weight_hh_l0 = self.raw.data

    def forward(self, inputs):
        self.lstm.weight_hh_l0 = F.dropout(self.raw, 0.5, self.training)
        return self.lstm(inputs)


def lstm_step(lstm, weight_hh):
    """Return a step by torch's cell."""
    cell = nn.LSTMCell(FEATURES, HIDDEN).double()
    cell.weight_ih.data, cell.weight_hh.data = lstm.weight_ih_l0.detach().double(), weight_hh.detach().double()
    cell.bias_ih.data, cell.bias_hh.data = lstm.bias_ih_l0.detach().double(), lstm.bias_hh_l0.detach().double()
    return lambda x, t, h, c: cell(x, (h, c))


def assert_lstm(net, name, lstm, weight_hh):
    zero = torch.zeros(1, HIDDEN)
    assert_spectrum(measured(net, name), reference(lstm_step(lstm, weight_hh), zero, zero))


@pytest.mark.filterwarnings("ignore:.*RNN module weights.*")
def test_weights_that_a_layer_drops_are_whole():
    net = Net(layer_pass, cell=Dropped(FEATURES, HIDDEN, batch_first=True))
    assert_lstm(net, "cell", net.cell, net.cell.raw)


@pytest.mark.filterwarnings("ignore:.*RNN module weights.*")
def test_weights_that_the_module_around_a_layer_drops_are_whole():
    net = Net(layer_pass, cell=Drops())
    assert_lstm(net, "cell.lstm", net.cell.lstm, net.cell.raw)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.filterwarnings("ignore:.*RNN module weights.*")
def test_weights_that_are_normalised_are_followed():
    net = Net(layer_pass, cell=nn.utils.weight_norm(nn.LSTM(FEATURES, HIDDEN, batch_first=True), "weight_hh_l0"))
    net.cell.weight_hh_l0_g.data.mul_(2)
    direction = net.cell.weight_hh_l0_v
    weight = net.cell.weight_hh_l0_g * direction / direction.norm(dim=1, keepdim=True)
    assert_lstm(net, "cell", net.cell, weight)


@pytest.mark.parametrize("kind", ["cell", "layer"])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@pytest.mark.filterwarnings("ignore:.*RNN module weights.*")
def test_weights_with_the_older_spectral_norm_are_followed(kind):
    make, run, name = {
        "cell": (nn.GRUCell(FEATURES, HIDDEN), loop, "weight_hh"),
        "layer": (nn.GRU(FEATURES, HIDDEN, batch_first=True), layer_pass, "weight_hh_l0"),
    }[kind]
    net = Net(run, cell=nn.utils.spectral_norm(make, name))
    actual = measured(net)
    weights = {key.removesuffix("_l0"): value.double() for key, value in net.cell.state_dict().items()}
    weight, u, v = (getattr(net.cell, f"{name}_{part}").detach().double() for part in ("orig", "u", "v"))
    cell = nn.GRUCell(FEATURES, HIDDEN).double()
    cell.load_state_dict({**weights, "weight_hh": weight / (u @ weight @ v)}, strict=False)
    assert_spectrum(actual, reference(one(cell)))


def test_a_cell_with_the_older_spectral_norm_trains_as_without_the_monitor():
    trained = []
    for callbacks in ([], [LyapunovMonitor("cell", num_exponents=COUNT, strict=True, every_n_train_steps=1)]):
        torch.manual_seed(0)
        net = Net(loop, cell=nn.utils.spectral_norm(nn.GRUCell(FEATURES, HIDDEN), "weight_hh"))
        fit(net, *callbacks, data=DataLoader(INPUTS, 2), max_epochs=1)
        trained.append(net.state_dict())
    assert all(map(torch.equal, *(state.values() for state in trained)))


# What is no function of the arguments


class Random(Tanh):
    """Draws random numbers in evaluation mode, too."""

    def forward(self, x, h):
        return super().forward(x, h + 0.1 * torch.randn_like(h))


class CountsInClass(Tanh):
    calls: ClassVar[int] = 0

    def forward(self, x, h):
        type(self).calls += 1
        return super().forward(x, h) * (0.5 + 0.5 * (self.calls % 2))


class CountsGlobally(Tanh):
    def forward(self, x, h):
        COUNTER.append(1)
        return super().forward(x, h) * (0.5 + 0.5 * (len(COUNTER) % 3))


COUNTER = []


@pytest.mark.parametrize("cell", [Random, CountsInClass, CountsGlobally])
def test_a_cell_that_is_no_function_of_its_arguments_is_not_followed(cell, recwarn):
    refusal(Net(loop, cell=cell()), recwarn)


HOOKED = {
    "own cell": (Tanh, lambda *args: 0.5 * args[-1], loop),
    "GRUCell": (lambda: nn.GRUCell(FEATURES, HIDDEN), lambda *args: 0.5 * args[-1], loop),
    "layer": (
        lambda: nn.GRU(FEATURES, HIDDEN, batch_first=True),
        lambda *args: (0.5 * args[-1][0], args[-1][1]),
        layer_pass,
    ),
}


@pytest.mark.parametrize("case", HOOKED.values(), ids=HOOKED)
def test_a_layer_whose_output_a_hook_changes_is_not_followed(case, recwarn):
    make, hook, run = case
    net = Net(run, cell=make())
    net.cell.register_forward_hook(hook)
    refusal(net, recwarn)


# What a measurement leaves behind


class Noisy(Tanh):
    """Has dropout and a buffer that it changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, h):
        self.calls += 1
        return F.dropout(self.norm(super().forward(x, h)), 0.3, self.training)


def test_a_run_of_an_own_cell_is_bitwise_that_without():
    trained = []
    for callbacks in ([], [LyapunovMonitor("cell", num_exponents=COUNT, strict=True, every_n_train_steps=1)]):
        torch.manual_seed(0)
        net = Net(loop, cell=Noisy())
        net.configure_optimizers = lambda net=net: torch.optim.SGD(net.parameters(), 0.1)
        fit(net, *callbacks, data=DataLoader(INPUTS, 2), max_epochs=2)
        trained.append({**net.state_dict(), "random": torch.get_rng_state()})
    without, with_monitor = trained
    assert without["cell.calls"] == 6 * TIME
    assert all(torch.equal(value, with_monitor[name]) for name, value in without.items())


# Messages


def test_a_layer_whose_forward_is_called_is_said(recwarn):
    net = Net(lambda net, inputs: net.cell.forward(inputs)[0], cell=nn.GRU(FEATURES, HIDDEN, batch_first=True))
    assert "its `forward`" in refusal(net, recwarn)


def test_a_layer_that_is_not_called_is_said(recwarn):
    net = Net(lambda net, inputs: inputs, cell=nn.GRU(FEATURES, HIDDEN, batch_first=True))
    message = refusal(net, recwarn)
    assert "was not called in a training step" in message
    assert "`forward`" not in message


def test_a_warning_points_out_of_the_package(recwarn):
    refusal(Net(lambda net, inputs: inputs, cell=nn.GRU(FEATURES, HIDDEN, batch_first=True)), recwarn)
    (warning,) = [warning for warning in recwarn if "`cell`" in str(warning.message)]
    assert "lightning_lyapunov" not in warning.filename
