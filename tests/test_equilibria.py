"""Fixed points of networks whose fixed points are known: every one is found, and none is invented."""

import math

import pytest
import torch
from helpers import assert_near, full, randn, tensor
from torch import nn

from lightning_lyapunov import fixed_points, jacobians, register_layer

NO_INPUT = torch.zeros(0)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Forget the classes that a test registers."""
    monkeypatch.setattr("lightning_lyapunov.layers.registry._registered", {})


def fixed_of(function, start):
    for _ in range(10_000):
        start = function(start)
    return start


def assert_same_points(found, expected, tolerance=1e-8):
    """Assert that each of the points that are expected is found once, and nothing else."""
    assert found.shape == expected.shape
    distances = torch.cdist(found, expected)
    assert distances.amin(0).max() < tolerance
    assert distances.amin(1).max() < tolerance


def rnn_with(weight, **options):
    """Return a tanh or ReLU network without input and bias, of a recurrent weight."""
    module = nn.RNN(1, len(weight), bias=False, **options).double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(weight)
        module.weight_ih_l0.zero_()
    return module


def test_a_hopfield_network_has_its_patterns_their_mixtures_and_the_origin():
    torch.manual_seed(0)
    patterns, gain = tensor([1.0, 1, 1, 1, -1, -1, -1, -1], [1.0, 1, -1, -1, 1, 1, -1, -1]), 1.5
    module = rnn_with(gain / 8 * patterns.T @ patterns)
    found = fixed_points(module, torch.zeros(1), 2 * randn(1, 1000, 8))
    # With h = tanh(gain (a p1 + b p2) / ...), the sums and differences of the two overlaps are free of each other.
    overlap = fixed_of(lambda m: math.tanh(gain * m), 1.0)
    sums = torch.cartesian_prod(*[tensor(-overlap, 0.0, overlap)] * 2)
    expected = 0.5 * torch.stack((sums.sum(-1), sums.diff(dim=-1).squeeze(-1)), -1) @ patterns
    assert_same_points(found.points, expected)
    nearest = torch.cdist(found.points, expected).argmin(1)
    assert found.num_growing.tolist() == (sums == 0).sum(-1)[nearest].tolist()
    assert sorted(found.kinds) == ["saddle"] * 5 + ["stable"] * 4
    assert found.num_starts.sum() == 1000


def test_henon_map_has_two_saddles():
    def henon(s, _):
        x, y = s.unbind(-1)
        return torch.stack((1 - 1.4 * x.square() + y, 0.3 * x), -1)

    found = fixed_points(henon, NO_INPUT, 3 * randn(200, 2))
    x = (-0.7 + tensor(-1.0, 1.0) * math.sqrt(0.7**2 + 4 * 1.4)) / 2.8
    assert_same_points(found.points, torch.stack((x, 0.3 * x), -1).squeeze(0))
    assert found.kinds == ["saddle", "saddle"]
    at = 2 * -1.4 * found.points[:, 0]
    roots = torch.stack((at / 2 + (at**2 / 4 + 0.3).sqrt(), at / 2 - (at**2 / 4 + 0.3).sqrt()), -1)
    assert_near(found.eigenvalues.real.sort().values, roots.sort().values, 1e-9)


def test_a_ring_is_found_beside_the_unstable_point_within():
    embedding = torch.linalg.qr(randn(6, 2)).Q

    def step(h, _):
        plane = h @ embedding
        around = plane + 0.3 * plane * (1 - plane.square().sum(-1, keepdim=True))
        return 0.5 * (h - plane @ embedding.T) + around @ embedding.T

    found = fixed_points(step, NO_INPUT, randn(600, 6), unique_distance=0.05)
    radius = (found.points @ embedding).norm(dim=-1)
    ring = radius > 0.5
    assert_near(radius[ring], torch.ones_like(radius[ring]), 1e-5)
    assert_near((found.points - found.points @ embedding @ embedding.T), torch.zeros_like(found.points), 1e-5)
    angles = torch.atan2(*(found.points[ring] @ embedding).unbind(-1)).sort().values
    assert angles.diff().max() < 0.3  # no gap
    assert_near(found.eigenvalues[ring].abs()[:, :2], tensor(1.0, 0.5).expand(int(ring.sum()), 2), 1e-5)
    assert found.num_neutral[ring].tolist() == [1] * int(ring.sum())
    assert int((~ring).sum()) == 1
    assert int(found.num_growing[~ring]) == 2
    assert_near(found.points[~ring], torch.zeros(1, 6).double(), 1e-8)


def test_a_plane_attractor_is_found_next_to_where_it_started():
    basis = torch.linalg.qr(randn(5, 2)).Q
    plane = basis @ basis.T
    weight = plane + 0.6 * (torch.eye(5).double() - plane)
    starts = randn(50, 5)
    found = fixed_points(lambda h, x: h @ weight.T + 0 * x, torch.zeros(1), starts)
    assert_same_points(found.points, starts @ plane, 1e-6)
    assert found.kinds == ["stable"] * 50
    assert found.num_neutral.tolist() == [2] * 50
    assert_near(found.eigenvalues.abs()[:, 2:], full((50, 3), 0.6), 1e-9)


def test_a_line_attractor_is_found_along_its_line():
    line = randn(8).abs()
    line = line / line.norm()
    module = rnn_with(torch.outer(line, line), nonlinearity="relu")
    found = fixed_points(module, torch.zeros(1), 3 * torch.rand(1, 100, 8).double())
    along = found.points @ line
    assert len(found) > 50
    assert_near(found.points, torch.outer(along, line), 1e-6)
    assert found.kinds == ["stable"] * len(found)
    assert found.num_neutral.tolist() == [1] * len(found)
    values, vectors = torch.linalg.eig(found.jacobians[0])
    assert_near((vectors[:, values.abs().argmax()].real @ line).abs(), tensor(1.0)[0], 1e-9)


@pytest.mark.parametrize("shift", [0.05, 0.0])
def test_a_slow_point_is_no_fixed_point(shift):
    def step(h, _):  # a saddle-node: two fixed points for a negative shift, none for a positive one
        return h + 0.1 * (h.square() + shift)

    starts = torch.linspace(-1, 1, 50).double().unsqueeze(-1)
    found = fixed_points(step, NO_INPUT, starts, max_speed=1e-12)
    slow = fixed_points(step, NO_INPUT, starts, max_speed=1e-2, unique_distance=0.1)
    assert len(slow) == 1
    assert_near(slow.points, torch.zeros(1, 1).double(), 1e-4)
    assert_near(slow.speeds, tensor(0.1 * shift)[0].expand(1), 1e-7)
    assert (len(found) == 0) == (shift > 0)


@pytest.mark.parametrize(
    "make", [lambda: nn.GRU(3, 6), lambda: nn.LSTM(3, 4, num_layers=2), lambda: nn.GRUCell(3, 6), lambda: nn.RNN(3, 6)]
)
def test_the_points_of_a_module_are_left_where_they_are_by_its_own_forward(make):
    torch.manual_seed(0)
    module, x = make().double(), randn(3)
    cells = getattr(module, "num_layers", 1)
    shape = (64, 6) if isinstance(module, nn.GRUCell) else (cells, 64, module.hidden_size)
    starts = (randn(*shape), randn(*shape)) if isinstance(module, nn.LSTM) else randn(*shape)
    found = fixed_points(module, x, starts)
    assert len(found) >= 1
    for index, point in enumerate(found.points):
        if isinstance(module, nn.LSTM):
            h, c = point.view(2, 2, 4).unbind(1)  # (h, c) of each layer
            after = torch.stack(module(x[None], (h, c))[1], 1).flatten()
            state = h.unsqueeze(1).contiguous(), c.unsqueeze(1).contiguous()
        elif isinstance(module, nn.GRUCell):
            state, after = point[None], module(x[None], point[None])[0]
        else:
            state = point.view(1, 1, -1)
            after = module(x[None, None], state)[1].flatten()
        assert_near(after, point, 1e-6)
        assert_near(found.jacobians[index], jacobians(module, x[None, None], state)[0, 0], 1e-9)
    assert found.eigenvalues.abs().diff(dim=-1).max() <= 1e-12


def test_a_batch_first_module_and_one_step_of_its_own_input_are_taken():
    torch.manual_seed(0)
    module, x, starts = nn.GRU(3, 6, batch_first=True).double(), randn(3), randn(1, 20, 6)
    by_vector, by_step = fixed_points(module, x, starts), fixed_points(module, x.expand(20, 1, 3), starts)
    assert_near(by_step.points, by_vector.points)
    with pytest.raises(ValueError, match="the same for all starting states"):
        fixed_points(module, randn(20, 1, 3), starts)
    with pytest.raises(ValueError, match="one step of input"):
        fixed_points(module, x.expand(20, 2, 3), starts)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, xs, h):
        for x in xs:
            h = (self.linear(h) + x).tanh()
        return h


def test_a_registered_layer_is_taken():
    torch.manual_seed(0)
    register_layer(Loop, step=lambda m, x, h: (m.linear(h) + x).tanh(), read_call=lambda m, xs, h: (xs, h))
    found = fixed_points(Loop(), torch.zeros(5), torch.randn(30, 5))
    assert found.kinds == ["stable"]
    assert found.num_starts.tolist() == [30]


def test_outliers_and_what_is_not_finite_are_left_out():
    def step(h, _):  # fixed points at 0, 1 and 1000
        return h + 1e-4 * h * (h - 1) * (h - 1000) / 1000

    starts = tensor([-0.2], [0.1], [0.9], [1.2], [math.nan])
    starts = torch.cat((starts, tensor([900.0])))
    all_of_them = fixed_points(step, NO_INPUT, starts, outlier_distance=math.inf)
    assert_same_points(all_of_them.points, tensor([0.0], [1.0], [1000.0]), 1e-2)
    near = fixed_points(step, NO_INPUT, starts, outlier_distance=2.0)
    assert_same_points(near.points, tensor([0.0], [1.0]), 1e-2)
    assert near.num_starts.sum() == 4


def test_nothing_found_is_an_empty_result():
    found = fixed_points(lambda h, x: h + 1, NO_INPUT, randn(10, 3))
    assert len(found) == 0
    assert found.kinds == []
    assert found.points.shape == (0, 3)
    assert found.eigenvalues.shape == (0, 3)


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    module, starts = nn.GRU(3, 6).double(), randn(1, 33, 6)
    at_once = fixed_points(module, torch.zeros(3), starts)
    monkeypatch.setattr("lightning_lyapunov.equilibria._MAX_ELEMENTS", 36 * 5)
    in_chunks = fixed_points(module, torch.zeros(3), starts)
    assert_near(in_chunks.points, at_once.points, 1e-9)
    assert in_chunks.num_starts.tolist() == at_once.num_starts.tolist()


def test_bad_arguments_are_named():
    starts = randn(5, 2)
    for options in ({"max_speed": -1.0}, {"unique_distance": math.nan}, {"margin": "x"}, {"num_steps": 1.5}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}="):
            fixed_points(lambda h, x: h, NO_INPUT, starts, **options)
    with pytest.raises(ValueError, match="bidirectional"):
        fixed_points(nn.GRU(2, 3, bidirectional=True), torch.zeros(2), torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="`states`"):
        fixed_points(lambda h, x: h, NO_INPUT, randn(2))


def flip_flop(batch, time, generator):
    """Return pulses of three channels, and the sign of the last pulse in each."""
    pulses = torch.randint(-1, 2, (time, batch, 3), generator=generator).float()
    pulses *= torch.rand(time, batch, 3, generator=generator) < 0.3
    pulses[0] = torch.randint(0, 2, (batch, 3), generator=generator) * 2.0 - 1
    state, targets = torch.zeros(batch, 3), []
    for pulse in pulses:
        state = pulse.where(pulse != 0, state)
        targets.append(state)
    return pulses, torch.stack(targets)


@pytest.mark.slow
def test_a_network_that_holds_three_bits_has_eight_stable_points():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    gru, head = nn.GRU(3, 24), nn.Linear(24, 3)
    parameters = [*gru.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(400):
        pulses, targets = flip_flop(32, 30, generator)
        loss = (head(gru(pulses)[0]) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert loss < 0.02
    visited = gru(flip_flop(32, 30, generator)[0])[0].detach().flatten(0, 1)
    # Also from between two of them, where the saddles are.
    others = visited[torch.randperm(len(visited), generator=generator)]
    starts = torch.lerp(visited, others, torch.rand(len(visited), 1, generator=generator))
    found = fixed_points(gru, torch.zeros(3), starts.unsqueeze(0), unique_distance=0.1)
    stable = found.points[found.num_growing == 0]
    said = head.double()(stable).detach()
    assert_same_points(said.sign(), torch.cartesian_prod(*[tensor(-1.0, 1.0).squeeze()] * 3))
    assert (said.abs() - 1).abs().max() < 0.3
    assert (found.eigenvalues[found.num_growing == 0].abs() < 1).all()
    # Between two memories there is a saddle with one growing direction.
    assert (found.num_growing == 1).sum() >= 8
