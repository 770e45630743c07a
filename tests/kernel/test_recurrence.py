"""Steps and tangent maps of all recurrences, compared with torch's forward and its derivative."""

import pytest
import reference
import torch
from helpers import Cube, assert_near, descending, members, randn
from mpmath import mp
from reference import CELLS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lyapunov import jacobians, lyapunov_spectrum
from lightning_lyapunov.kernel import autodiff as autodiff_module
from lightning_lyapunov.kernel import closed_forms
from lightning_lyapunov.kernel.autodiff import AutodiffRecurrence
from lightning_lyapunov.layers.registry import as_layer

cells = pytest.mark.parametrize("cell", CELLS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def push_forward(recurrence, states, inputs, frame):
    return recurrence.push_forward(recurrence.linearise(states, inputs), frame)


def driven_cells(module, inputs, state=None):
    layer = as_layer(module)
    with torch.no_grad():
        return list(layer.drive(layer.read(inputs, state)))


# The tangent map


@cells
@biases
def test_closed_form_is_the_derivative_of_torchs_forward(cell, bias):
    module, inputs = reference.make(cell, bias=bias), randn(1, 2, 3)
    state = reference.initial_state(module, 2)
    (driven,) = driven_cells(module, inputs, state)
    size = driven.recurrence.state_size
    identity = torch.eye(size).double().expand(2, -1, -1)
    closed_form = push_forward(driven.recurrence, driven.state[None], inputs, identity)
    for i in range(2):
        assert_near(closed_form[i], reference.jacobians(module, inputs[:, i], reference.member(state, i))[0], 1e-14)


@cells
def test_jacobians_are_those_of_torchs_forward(cell):
    module, inputs = reference.make(cell, num_layers=2), randn(5, 2, 3)
    state = reference.initial_state(module, 2)
    expected = [reference.jacobians(module, inputs[:, i], reference.member(state, i)) for i in range(2)]
    assert_near(jacobians(module, inputs, state), torch.stack(expected, 1))


@cells
@pytest.mark.parametrize("limit", [1, 100, 10**9])
@pytest.mark.parametrize("large", [0, 10**9], ids=["not-formed", "formed"])
def test_pushing_through_several_steps_is_the_product_in_the_order_of_time(cell, limit, large, monkeypatch):
    monkeypatch.setattr(closed_forms, "_LARGE_JACOBIANS", large)
    monkeypatch.setattr(closed_forms, "MAX_JACOBIAN_ELEMENTS", limit)  # steps per block: one, a few, all
    module, inputs = reference.make(cell), randn(7, 1, 3)
    (driven,) = driven_cells(module, inputs)
    states = driven.recurrence.trajectory(driven.inputs, driven.state)
    frame = randn(1, driven.recurrence.state_size, 2)
    before = torch.cat((driven.state[None], states[:-1]))
    pushed = push_forward(driven.recurrence, before, driven.inputs, frame)
    expected = frame[0]
    for matrix in reference.jacobians(module, inputs[:, 0], driven.state[0]):
        expected = matrix @ expected
    assert_near(pushed[0], expected)


@cells
def test_a_trajectory_is_linearised_as_its_states_are(cell):
    module, inputs = reference.make(cell), randn(7, 3, 3)
    for driven in driven_cells(module, inputs):
        recurrence = driven.recurrence
        states, linearised = recurrence.linearised_trajectory(driven.inputs, driven.state)
        assert_near(states, recurrence.trajectory(driven.inputs, driven.state))
        expected = recurrence.linearise(torch.cat((driven.state[None], states[:-1])), driven.inputs)
        for part, other in zip(linearised, expected, strict=True):
            assert_near(part, other)


class Operations(TorchDispatchMode):
    """Counts the multiplications of matrix products, and the elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shapes = [leaf.shape for leaf in args if isinstance(leaf, torch.Tensor) and leaf.ndim > 1]
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if any(name in str(function) for name in ("mm", "bmm", "linear")):
                self.products += result.numel() * shapes[-2][-1]
        return result


# Of a stretch of 8 steps: the frame's own products, 16 vectors of 16 sequences with the recurrent weight.
@pytest.mark.parametrize(("module", "blocks"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)], ids=["rnn", "gru", "lstm"])
def test_a_large_layer_is_pushed_with_the_products_alone(module, blocks):
    hidden, batch, vectors, steps = 512, 16, 16, 8
    (driven,) = driven_cells(module(4, hidden), torch.randn(steps, batch, 4))
    recurrence = driven.recurrence
    with torch.no_grad():
        linearised = recurrence.linearise(driven.state.expand(steps, -1, -1), driven.inputs)
        frame = torch.randn(batch, recurrence.state_size, vectors)
        recurrence.push_forward(linearised, frame)
        with Operations() as counted:
            recurrence.push_forward(linearised, frame)
    assert counted.products == steps * batch * vectors * blocks * hidden**2
    # Nothing larger than the weight, where the Jacobians of all sequences would be.
    assert counted.largest <= blocks * hidden**2 < batch * hidden**2


@pytest.mark.parametrize(("vectors", "formed"), [(16, False), (64, True)])
def test_jacobians_are_formed_for_many_vectors_only(vectors, formed, monkeypatch):
    (driven,) = driven_cells(nn.LSTM(4, 512), torch.randn(1, 8, 4))
    called, push = [], type(driven.recurrence)._push_formed
    monkeypatch.setattr(type(driven.recurrence), "_push_formed", lambda *args: called.append(1) or push(*args))
    with torch.no_grad():
        push_forward(driven.recurrence, driven.state[None], driven.inputs, torch.randn(8, 1024, vectors))
    assert bool(called) == formed


@pytest.mark.parametrize("limit", [1, 100, 10**9])
@pytest.mark.parametrize("num_exponents", [1, 5])
def test_a_callable_is_pushed_through_several_steps_in_the_order_of_time(num_exponents, limit, monkeypatch):
    monkeypatch.setattr(autodiff_module, "MAX_JACOBIAN_ELEMENTS", limit)
    mix, states, x, frame = randn(5, 5), randn(7, 3, 5), randn(7, 3, 5), randn(3, 5, num_exponents)
    autodiff = AutodiffRecurrence(lambda s, x: torch.tanh(s @ mix.T + x), 5)
    expected = frame
    for state, step_inputs in zip(states, x, strict=True):
        expected = (1 - torch.tanh(state @ mix.T + step_inputs) ** 2)[..., None] * (mix @ expected)
    with torch.no_grad():
        assert_near(push_forward(autodiff, states, x, frame), expected, 1e-13)


class CubeOnce(Cube):
    """A function that has a first derivative only, by a backward pass."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return Cube.backward(ctx, gradient)


class DetachingCube(Cube):
    """A function that detaches what it gets: a second derivative would be wrong without an error."""

    @staticmethod
    def backward(ctx, gradient):
        return Cube.backward(ctx, gradient.detach())


class VmappedCube(torch.autograd.Function):
    """A function without a forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def cube_in_place(s):
    first, second = s.unbind(-1)
    first.pow_(3)
    second.pow_(3)
    return s


@pytest.mark.parametrize(
    ("num_exponents", "strategy"), [(1, "forward_mode"), (2, "forward_mode"), (3, "reverse_mode"), (5, "reverse_mode")]
)
def test_few_vectors_are_pushed_by_forward_mode_and_many_by_jacobians(num_exponents, strategy):
    autodiff = AutodiffRecurrence(lambda s, x: s**3, 5)
    push_forward(autodiff, randn(2, 3, 5), randn(2, 3, 1), randn(3, 5, num_exponents))
    assert strategy in autodiff._strategies[0].__name__


@pytest.mark.parametrize("num_exponents", [1, 2])
@pytest.mark.parametrize(
    ("cube", "strategy"),
    [
        (lambda s: s**3, "reverse_mode"),
        (cube_in_place, "forward_mode"),
        (VmappedCube.apply, "reverse_mode"),
        (Cube.apply, "backward_passes"),
        (CubeOnce.apply, "backward_passes"),
        (DetachingCube.apply, "backward_passes"),
        (lambda s: 2 * s**3 - DetachingCube.apply(s), "backward_passes"),
        (torch.compile(lambda s: s**3, backend="eager"), "mode"),
    ],
    ids=["plain", "in place", "reverse", "passes", "once", "detaching", "in part", "compiled"],
)
def test_a_callable_is_differentiated_however_it_can_be(cube, strategy, num_exponents):
    mix, state, x, frame = randn(2, 2), randn(3, 2), randn(1, 3, 2), randn(3, 2, num_exponents)
    autodiff = AutodiffRecurrence(lambda s, x: cube(s) @ mix.T + x, 2)
    with torch.no_grad():
        pushed = push_forward(autodiff, state[None], x, frame)
    assert_near(pushed, mix @ (3 * state[..., None] ** 2 * frame), 1e-14)
    assert strategy in autodiff._strategies[0].__name__


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("forgets", [0, 1])
@pytest.mark.parametrize("cube", [lambda s: s**3, VmappedCube.apply, Cube.apply])
def test_a_callable_may_forget_its_state_in_some_steps(cube, forgets, learnt):
    # What does not depend on its state has no graph, or one that does not reach it.
    first = randn(3, 2).requires_grad_(learnt)
    states, frame, x = randn(2, 3, 2), randn(3, 2, 2), torch.arange(2.0).double()[:, None, None].expand(-1, 3, 1)
    autodiff = AutodiffRecurrence(lambda s, x: first * 1 if x[0, 0] == forgets else cube(s), 2)
    with torch.no_grad():
        autodiff.push_forward((states[:1], x[:1]), frame)
        assert not autodiff.push_forward((states, x), frame).any()
        kept = autodiff.push_forward((states[:1], x[1 - forgets].unsqueeze(0)), frame)
    assert_near(kept, 3 * states[0][..., None] ** 2 * frame, 1e-14)


GRU_CELL = nn.GRUCell(1, 2).double()
LOST = {
    "detach": lambda s, x: s.detach() ** 3,
    "no_grad": torch.no_grad()(lambda s, x: s**3),
    "numpy": lambda s, x: torch.from_numpy(s.detach().numpy() ** 3),
    "detach, into weights": lambda s, x: GRU_CELL(x.new_ones(3, 1), s.detach()),
}


@pytest.mark.parametrize("step", LOST.values(), ids=LOST)
def test_a_callable_that_loses_its_graph_is_refused_by_name(step):
    # Its derivative is zero to PyTorch, and every exponent would be at the floor.
    for function in (lyapunov_spectrum, jacobians):
        with pytest.raises(ValueError, match="`dynamics` must be differentiable"):
            function(step, torch.zeros(5, 3, 0), randn(3, 2))


@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize("step", [lambda s, x: x.tanh(), lambda s, x: (s > 0) + x], ids=["input only", "threshold"])
def test_a_derivative_that_is_zero_is_not_a_lost_graph(step, start):
    assert not jacobians(step, randn(5, 3, 2), torch.full((3, 2), start).double()).any()


def test_a_callable_may_return_the_same_memory_at_every_step():
    memory, inputs, state = torch.empty(3, 2).double(), randn(9, 3, 2), randn(3, 2)
    expected = lyapunov_spectrum(lambda s, x: torch.tanh(2 * s + x), inputs, state)
    spectrum = lyapunov_spectrum(lambda s, x: memory.copy_(torch.tanh(2 * s + x)), inputs, state)
    assert_near(spectrum, expected, 1e-14)


def delay_line(s, x):
    new = torch.tanh(1.5 * s[:, 0] * s[:, 3] + x[:, 0])
    s[:, 1:] = s[:, :-1].clone()
    s[:, 0] = new
    return s


def halves(s, x):
    first, second = s.chunk(2, -1)
    first.mul_(0.5).add_(torch.tanh(x + second.sin()))
    second.add_(0.1 * first)
    return s


IN_PLACE = {
    "delay line": (delay_line, lambda s, x: torch.cat((torch.tanh(1.5 * s[:, :1] * s[:, 3:] + x), s[:, :-1]), -1)),
    "halves": (
        halves,
        lambda s, x: torch.cat((first := 0.5 * s[:, :2] + torch.tanh(x + s[:, 2:].sin()), s[:, 2:] + 0.1 * first), -1),
    ),
}


@pytest.mark.parametrize("num_exponents", [1, 4])
@pytest.mark.parametrize(("in_place", "plain"), IN_PLACE.values(), ids=IN_PLACE)
def test_a_callable_may_write_over_parts_of_its_state(in_place, plain, num_exponents):
    inputs, state = randn(40, 3, 1), randn(3, 4)
    expected = lyapunov_spectrum(plain, inputs, state, num_exponents=num_exponents)
    assert_near(lyapunov_spectrum(in_place, inputs, state, num_exponents=num_exponents), expected, 1e-10)


MASKED = {
    # Backward formulas that mask an infinity: a derivative of theirs would be NaN.
    "std": lambda s: (s - s.mean(-1, keepdim=True)) / (s.std(-1, keepdim=True) + 1),
    "norm": lambda s: s / (1 + torch.linalg.vector_norm(s, 3, -1, keepdim=True)),
    "sinc": torch.sinc,
    "logcumsumexp": lambda s: s.logcumsumexp(-1),
}


@pytest.mark.parametrize("num_exponents", [1, None])
@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
def test_a_callable_may_start_where_its_formulas_are_masked(function, num_exponents):
    mix, inputs, state = randn(4, 4), randn(20, 3, 4), torch.zeros(3, 4).double()
    step = lambda s, x: torch.tanh((s + function(s)) @ mix.T + x)  # noqa: E731
    expected = [reference.spectrum(matrices, num_exponents) for matrices in jacobians(step, inputs, state).unbind(1)]
    assert_near(lyapunov_spectrum(step, inputs, state, num_exponents=num_exponents), torch.stack(expected), 1e-9)


@pytest.mark.parametrize("num_exponents", [1, 4])
def test_what_is_pushed_is_never_the_frame_itself(num_exponents):
    # It is orthonormalised where it is, and the frame may be pushed again.
    frame, autodiff = randn(2, 4, num_exponents), AutodiffRecurrence(lambda s, x: s, 4)
    with torch.no_grad():
        pushed = push_forward(autodiff, randn(3, 2, 4), randn(3, 2, 1), frame)
    assert torch.equal(pushed, frame)
    pushed.zero_()
    assert frame.any()


@pytest.mark.parametrize("bias", [-30.0, 30.0])
@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm"])
def test_slopes_of_saturated_gates_keep_every_digit(cell, bias):
    # 1 - tanh(30)^2 is 0 in float64, and sech(30)^2 is 3.5e-26.
    module = reference.make(cell, hidden=1)
    nn.init.constant_(module.bias_ih_l0, bias)
    nn.init.zeros_(module.bias_hh_l0)
    inputs, size = torch.zeros(1, 1, 3).double(), 1 + (cell == "lstm")
    state = torch.full((1, size), 0.3, dtype=torch.float64)
    (driven,) = driven_cells(module, inputs)
    closed_form = push_forward(driven.recurrence, state[None], inputs, torch.eye(size).double()[None])
    with mp.workdps(reference.DIGITS):
        step, exact = reference.exact_step(module), reference.exact
        expected = reference.exact_jacobian(step, exact(state[0]), exact(inputs[0, 0])).astype(float)
    assert expected.all()
    # The argument of a gate is itself rounded, by 30 eps.
    torch.testing.assert_close(closed_form[0], torch.from_numpy(expected), rtol=1e-13, atol=0)


@pytest.mark.parametrize("x", [-30.0, 30.0])
def test_slope_of_tanh_keeps_every_digit(x):
    slope = closed_forms._tanh_slope(torch.tensor(x, dtype=torch.float64))
    assert float(slope) == pytest.approx(float(mp.sech(x) ** 2), rel=1e-15)


@pytest.mark.parametrize("x", [-30.0, 30.0])
def test_slope_of_the_sigmoid_keeps_every_digit(x):
    slope = closed_forms._sigmoid_slope(torch.tensor(x, dtype=torch.float64))
    assert float(slope) == pytest.approx(float(mp.sech(mp.mpf(x) / 2) ** 2 / 4), rel=1e-15)


# The trajectory


@cells
@biases
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_step_and_trajectory_are_torchs_forward(cell, bias, fused):
    module, inputs = reference.make(cell, bias=bias), randn(6, 2, 3)
    state = reference.initial_state(module, 2)
    (driven,) = driven_cells(module, inputs, state)
    if not fused:
        driven.recurrence.fused = None  # as on other devices
    trajectory = driven.recurrence.trajectory(driven.inputs, driven.state)
    after = driven.state
    for t in range(6):
        final = module(inputs[: t + 1], state)[1]
        expected = torch.stack([reference.member(final, i) for i in range(2)])
        after = driven.recurrence.step(after, driven.inputs[t])
        assert_near(after, expected)
        assert_near(trajectory[t], expected)
    assert_near(driven.recurrence.output(trajectory), module(inputs, state)[0])


@cells
@biases
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both-ways"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no-state"])
def test_every_cell_of_a_stack_ends_where_torchs_does(cell, bias, bidirectional, num_layers, given):
    module = reference.make(cell, bias=bias, num_layers=num_layers, bidirectional=bidirectional)
    inputs, state = randn(5, 2, 3), reference.initial_state(module, 2) if given else None
    final = module(inputs, state)[1]
    expected = torch.cat(final, -1) if isinstance(final, tuple) else final
    ends = [d.recurrence.trajectory(d.inputs, d.state)[-1] for d in driven_cells(module, inputs, state)]
    assert_near(torch.stack(ends), expected)


@cells
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both-ways"])
@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 3]], ids=["sorted", "unsorted"])
def test_every_cell_ends_where_torchs_does_on_packed_sequences(cell, bidirectional, lengths):
    module = reference.make(cell, num_layers=2, bidirectional=bidirectional)
    state = reference.initial_state(module, 3)
    packed = pack_padded_sequence(randn(6, 3, 3), torch.tensor(lengths), enforce_sorted=lengths == [6, 4, 1])
    final = module(packed, state)[1]
    expected = torch.cat(final, -1) if isinstance(final, tuple) else final
    for end, driven in zip(expected, driven_cells(module, packed, state), strict=True):
        trajectory = driven.recurrence.trajectory(driven.inputs, driven.state)
        assert_near(trajectory[torch.tensor(lengths) - 1, torch.arange(3)], end)


@pytest.mark.parametrize(
    ("bidirectional", "names"), [(False, ["l0", "l1"]), (True, ["l0", "l0_reverse", "l1", "l1_reverse"])]
)
def test_cells_have_the_names_of_torchs_parameters(bidirectional, names):
    module = nn.GRU(3, 4, 2, bidirectional=bidirectional)
    assert [driven.name for driven in driven_cells(module, torch.randn(2, 1, 3))] == names


# Layouts of the inputs


@cells
def test_batch_first_is_a_matter_of_layout(cell):
    module, inputs = reference.make(cell, num_layers=2), randn(9, 2, 3)
    expected = lyapunov_spectrum(module, inputs)
    module.batch_first = True
    assert_near(lyapunov_spectrum(module, inputs.transpose(0, 1)), expected)


@cells
@pytest.mark.parametrize("given", [True, False], ids=["state", "no-state"])
def test_an_unbatched_sequence_is_a_batch_of_one(cell, given):
    module, inputs = reference.make(cell, num_layers=2), randn(9, 1, 3)
    state = reference.initial_state(module, 1) if given else None
    expected = lyapunov_spectrum(module, inputs, state)
    alone = members(state, 0) if given else None
    assert_near(lyapunov_spectrum(module, inputs[:, 0], alone), expected)


@cells
def test_no_state_is_a_state_of_zeros(cell):
    module, inputs = reference.make(cell, num_layers=2), randn(9, 2, 3)
    state = reference.initial_state(module, 2)
    zeros = tuple(map(torch.zeros_like, state)) if isinstance(state, tuple) else torch.zeros_like(state)
    assert_near(lyapunov_spectrum(module, inputs), lyapunov_spectrum(module, inputs, zeros))


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packing_equal_lengths_changes_nothing(enforce_sorted):
    module, inputs = reference.make("gru"), randn(9, 2, 3)
    packed = pack_padded_sequence(inputs, torch.tensor([9, 9]), enforce_sorted=enforce_sorted)
    assert_near(lyapunov_spectrum(module, packed), lyapunov_spectrum(module, inputs))


@biases
@pytest.mark.parametrize("given", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize(
    ("cell", "cell_class", "options"),
    [
        ("rnn-tanh", nn.RNNCell, {}),
        ("rnn-relu", nn.RNNCell, {"nonlinearity": "relu"}),
        ("gru", nn.GRUCell, {}),
        ("lstm", nn.LSTMCell, {}),
    ],
)
def test_a_torch_cell_has_the_spectrum_of_the_layer_with_its_weights(cell, cell_class, options, bias, given):
    module, inputs = reference.make(cell, bias=bias), randn(9, 2, 3)
    alone = cell_class(3, 4, bias=bias, dtype=torch.float64, **options)
    alone.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    state = reference.initial_state(module, 2) if given else None
    cell_state = tuple(part[0] for part in state) if isinstance(state, tuple) else state[0] if given else None
    assert_near(lyapunov_spectrum(alone, inputs, cell_state), lyapunov_spectrum(module, inputs, state))


def single_cell(module, layer, suffix, input_size):
    """Return one cell of a module as a module of its own."""
    projection = {"proj_size": module.proj_size} if module.proj_size else {}
    alone = type(module)(input_size, module.hidden_size, dtype=torch.float64, **projection)
    names = {name: name.replace("_l0", f"_l{layer}{suffix}") for name in alone.state_dict()}
    alone.load_state_dict({name: module.state_dict()[theirs] for name, theirs in names.items()})
    return alone


@pytest.mark.parametrize("cell", ["gru", "lstm", "lstm-proj"])
def test_two_directions_are_one_layer_forwards_and_one_backwards(cell):
    module, inputs = reference.make(cell, num_layers=2, bidirectional=True), randn(9, 1, 3)
    seen, alone = inputs, []
    for layer in range(2):
        outputs = []
        for suffix in ("", "_reverse"):
            one = single_cell(module, layer, suffix, seen.shape[-1])
            turned = seen.flip(0) if suffix else seen
            alone.append(lyapunov_spectrum(one, turned))
            output = one(turned)[0].detach()
            outputs.append(output.flip(0) if suffix else output)
        seen = torch.cat(outputs, -1)
    assert_near(lyapunov_spectrum(module, inputs), descending(torch.cat(alone, -1)))


# Stacks


@cells
def test_no_layer_feels_the_one_above(cell):
    module = reference.make(cell, num_layers=3)
    matrices = jacobians(module, randn(4, 2, 3), reference.initial_state(module, 2))
    size = matrices.shape[-1] // 3
    for layer in range(2):
        rows, above = slice(layer * size, (layer + 1) * size), slice((layer + 1) * size, None)
        assert not matrices[..., rows, above].any()
        assert matrices[..., above, rows].any()


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["rnn-tanh", "gru", "lstm"])
def test_spectrum_of_the_joint_jacobians_is_the_union_of_the_layers_spectra(cell):
    module, inputs = reference.make(cell, hidden=2, num_layers=2, gain=1.0), randn(1200, 1, 3)
    state = reference.initial_state(module, 1)
    joint = reference.growth_rates(jacobians(module, inputs, state)[:, 0])[200:].mean(0)
    union = lyapunov_spectrum(module, inputs, state, warmup=200)[0]
    assert_near(union.sum(), joint.sum(), 1e-10)
    # Two frames in general position forget their difference as 1/T, where exponents of two layers lie close together.
    assert_near(union, descending(joint), 5e-3)
