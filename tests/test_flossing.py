"""Flossing a module in place: the exponents reach the target, and nothing else changes."""

import math

import pytest
import torch
from helpers import TanhCell, assert_equal, assert_near
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_lyapunov import lyapunov_init_, lyapunov_spectrum

FEATURES, STEPS, QUICK = 3, 20, {"num_exponents": 4, "steps": 40, "lr": 0.03}


def sequences(batch=4, **options):
    return torch.randn(STEPS, batch, FEATURES, **options)


def with_gain(module, gain):
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("weight_hh"):
                weight.copy_(gain * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    return module


STARTS = {
    "rnn": lambda: nn.RNN(FEATURES, 16),
    "gru": lambda: nn.GRU(FEATURES, 16),
    "lstm": lambda: nn.LSTM(FEATURES, 16),
    "projected": lambda: nn.LSTM(FEATURES, 16, proj_size=6),
    "chaotic rnn": lambda: with_gain(nn.RNN(FEATURES, 32), 4.0),
    "chaotic gru": lambda: with_gain(nn.GRU(FEATURES, 16), 10.0),
    "chaotic lstm": lambda: with_gain(nn.LSTM(FEATURES, 16), 10.0),
    "stack": lambda: nn.GRU(FEATURES, 10, num_layers=2),
    "chaotic stack": lambda: with_gain(nn.RNN(FEATURES, 20, num_layers=2), 4.0),
    "bidirectional": lambda: nn.RNN(FEATURES, 10, bidirectional=True),
    "cell": lambda: nn.GRUCell(FEATURES, 16),
    "own cell": lambda: TanhCell(12),
}
STATES = {"own cell": lambda: torch.zeros(4, 12)}


def state_of(start):
    return STATES[start]() if start in STATES else None


@pytest.mark.parametrize(
    "start", [kind if kind in {"rnn", "chaotic rnn"} else pytest.param(kind, marks=pytest.mark.slow) for kind in STARTS]
)
def test_the_leading_exponents_reach_zero_from_both_sides(start):
    module, inputs, state = STARTS[start](), sequences(), state_of(start)
    result = lyapunov_init_(module, inputs, state, **QUICK)
    assert result.before.shape == result.after.shape == (len(result.cell_names), 4)
    assert result.after.abs().max() < 0.1
    assert result.after.square().mean() < 0.1 * result.before.square().mean()
    if start == "chaotic rnn":
        assert result.before.max() > 0.1
        assert result.scale < 0.5


@pytest.mark.parametrize("target", [-0.3, 0.05])
def test_the_target_may_be_another_one(target):
    result = lyapunov_init_(nn.RNN(FEATURES, 16), sequences(), target=target, **QUICK)
    assert (result.after - target).abs().max() < 0.1


@pytest.mark.parametrize("start", ["rnn", "stack", "own cell"])
def test_the_exponents_before_and_after_are_those_of_the_spectrum(start):
    module, inputs = STARTS[start]().double(), sequences(1, dtype=torch.float64)
    state = state_of(start)[:1].double() if start in STATES else None

    def leading():
        return lyapunov_spectrum(module, inputs, state, num_exponents=4).mean(0)

    before = leading()
    result = lyapunov_init_(module, inputs, state, num_exponents=4, steps=2)
    for spectrum, cells in ((before, result.before), (leading(), result.after)):
        assert_near(cells.flatten().sort(descending=True).values[:4], spectrum, 1e-9)


CHANGED = {
    "rnn": {"weight_hh_l0"},
    "gru": {"weight_hh_l0", "bias_hh_l0"},
    "projected": {"weight_hh_l0", "weight_hr_l0", "bias_hh_l0"},
    "bidirectional": {"weight_hh_l0", "weight_hh_l0_reverse"},
    "cell": {"weight_hh", "bias_hh"},
    "own cell": {"linear.weight", "linear.bias"},
}


@pytest.mark.parametrize("start", CHANGED)
def test_recurrent_weights_and_gate_biases_change_and_nothing_else(start):
    module = STARTS[start]()
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    pointers = [weight.data_ptr() for weight in module.parameters()]
    random, module.training = torch.get_rng_state(), start == "rnn"
    inputs = torch.ones(STEPS, 4, FEATURES)
    result = lyapunov_init_(module, inputs, state_of(start), num_exponents=2, steps=1)
    changed = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(result.parameter_names) == CHANGED[start]
    assert [weight.data_ptr() for weight in module.parameters()] == pointers
    assert all((weight.grad == 1).all() and weight.requires_grad for weight in module.parameters())
    assert all(weight.grad_fn is None for weight in module.parameters())
    assert_equal(torch.get_rng_state(), random)
    assert module.training == (start == "rnn")


def test_the_caller_chooses_the_parameters_and_those_that_are_frozen_stay():
    module = nn.GRU(FEATURES, 8)
    module.bias_ih_l0.requires_grad_(False)
    result = lyapunov_init_(module, sequences(), steps=1, parameters=lambda name: "ih" in name)
    assert result.parameter_names == ("weight_ih_l0",)
    with pytest.raises(ValueError, match=r"No parameter of GRU may change.*weight_hh_l0"):
        lyapunov_init_(module, sequences(), parameters=lambda name: name == "weight")


def test_no_mode_of_the_caller_is_in_the_way():
    inputs = sequences()
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        module = nn.RNN(FEATURES, 8)
        with mode():
            result = lyapunov_init_(module, inputs, **QUICK | {"num_exponents": 2})
        assert result.after.abs().max() < 0.1


def test_weights_of_low_precision_are_flossed_in_their_own():
    module = nn.RNN(FEATURES, 16).bfloat16()
    result = lyapunov_init_(module, sequences(dtype=torch.bfloat16), **QUICK)
    assert module.weight_hh_l0.dtype == torch.bfloat16
    assert result.after.abs().max() < 0.1


def test_weights_that_are_made_are_flossed_by_what_they_are_made_of():
    module = nn.RNN(FEATURES, 16)
    prune.random_unstructured(module, "weight_hh_l0", amount=0.3)
    result = lyapunov_init_(module, sequences(), **QUICK)
    assert result.parameter_names == ("weight_hh_l0_orig",)
    assert result.after.abs().max() < 0.1
    module = parametrizations.weight_norm(nn.RNN(FEATURES, 16), "weight_hh_l0")
    assert lyapunov_init_(module, sequences(), **QUICK).after.abs().max() < 0.1


def test_the_kept_weights_are_never_worse_than_the_first():
    module = nn.RNN(FEATURES, 16)
    result = lyapunov_init_(module, sequences(), steps=5, lr=100.0)
    assert result.after.square().mean() <= result.before.square().mean() + 1e-6
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_no_step_changes_nothing():
    module = nn.RNN(FEATURES, 8)
    before = module.weight_hh_l0.detach().clone()
    result = lyapunov_init_(module, sequences(), steps=0)
    assert_equal(result.after, result.before)
    assert_equal(module.weight_hh_l0.detach(), before)


def test_a_dead_network_keeps_finite_weights():
    module = nn.RNN(FEATURES, 8, nonlinearity="relu")
    with torch.no_grad():
        module.bias_hh_l0.fill_(-100)
    lyapunov_init_(module, sequences(), steps=3)
    assert all(weight.isfinite().all() for weight in module.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_module_as_it_was(error, monkeypatch):
    module, inputs, assigned = nn.RNN(FEATURES, 8), sequences(), []
    before = module.weight_hh_l0.detach().clone()
    step = torch.optim.Adam.step

    def fail(self, *arguments):
        assigned.append(not torch.equal(module.weight_hh_l0, before))
        if len(assigned) == 3:
            raise error
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(error):
        lyapunov_init_(module, inputs, steps=5)
    assert assigned == [False, True, True]
    assert_equal(module.weight_hh_l0.detach(), before)


def test_bad_arguments_get_an_error_that_names_them():
    module, inputs = nn.RNN(FEATURES, 8), sequences()
    for options in ({"steps": -1}, {"num_exponents": 0}, {"lr": 0.0}, {"target": math.nan}, {"warmup": STEPS}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}="):
            lyapunov_init_(module, inputs, **options)
    with pytest.raises(TypeError, match="`module` must be"):
        lyapunov_init_(lambda s, x: s, inputs)
    with torch.no_grad():
        module.weight_hh_l0.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite"):
        lyapunov_init_(module, inputs)
