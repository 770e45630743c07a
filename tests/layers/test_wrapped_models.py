"""Layers inside compiled modules and lists, and layers that are shared or frozen."""

import warnings
from functools import cache

import pytest
import torch
from helpers import FEATURES, Regressor, fit, hooks_of, messages, series
from torch import nn
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum

pytestmark = pytest.mark.slow

HIDDEN = 5


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch.compiler.reset()


def eager(module):
    return torch.compile(module, backend="eager")


def in_place(module):
    module.compile(backend="eager")
    return module


def as_it_is(module):
    return module


class Layer(nn.Module):
    """A layer behind a projection."""

    def __init__(self, kind="GRU"):
        super().__init__()
        self.project = nn.Linear(FEATURES, FEATURES)
        self.rnn = getattr(nn, kind)(FEATURES, HIDDEN, batch_first=True)

    def forward(self, inputs):
        return self.rnn(self.project(inputs))[0]


class CellLoop(nn.Module):
    """A cell in a loop."""

    def __init__(self, kind="LSTMCell"):
        super().__init__()
        self.rnn = getattr(nn, kind)(FEATURES, HIDDEN)

    def forward(self, inputs):
        state, outputs = None, []
        for step_inputs in inputs.unbind(1):
            state = self.rnn(step_inputs, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class Gate(nn.Module):
    """A custom cell."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def forward(self, inputs, state):
        return torch.lerp(state, self.linear(torch.cat((inputs, state), -1)).tanh(), 0.7)


class CustomLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = Gate()

    def forward(self, inputs):
        states = [inputs.new_zeros(len(inputs), HIDDEN)]
        for step_inputs in inputs.unbind(1):
            states.append(self.rnn(step_inputs, states[-1]))
        return torch.stack(states[1:], 1)


class Wrapped(Regressor):
    """A model whose recurrent layer is in ``encoder``."""

    def __init__(self, make, wrap=as_it_is, wrap_layer=as_it_is, **options):
        super().__init__(**options)
        torch.manual_seed(0)
        del self.rnn
        encoder = make()
        encoder.rnn = wrap_layer(encoder.rnn)
        self.encoder = wrap(encoder)

    def forward(self, inputs):
        return self.head(self.encoder(inputs))


def measured(model, *modules, num_exponents=16):
    """Return the history of a strict monitor that measures at every step."""
    options = {"every_n_train_steps": 1, "warmup": 2, "num_exponents": num_exponents, "strict": True}
    monitor = LyapunovMonitor(*modules, **options)
    trainer = fit(model, monitor)
    assert trainer.global_step == 6
    return monitor.history


WRAPS = {
    "the container": {"wrap": eager},
    "the layer": {"wrap_layer": eager},
    "both": {"wrap": eager, "wrap_layer": eager},
    "the container, in place": {"wrap": in_place},
    "the layer, in place": {"wrap_layer": in_place},
}
MAKES = {"GRU": Layer, "LSTM": lambda: Layer("LSTM"), "LSTMCell": CellLoop, "custom cell": CustomLoop}
wraps = pytest.mark.parametrize("wrap", WRAPS)
makes = pytest.mark.parametrize("make", MAKES)


@cache
def run(make, wrap=None, watched=True):
    """Train a model; return it, its monitor, and the warnings about its layer."""
    torch.compiler.reset()
    model, monitor = Wrapped(MAKES[make], **WRAPS.get(wrap, {})), None
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if watched:
            monitor = LyapunovMonitor("encoder.rnn" if make == "custom cell" else None, warmup=2, strict=True)
        fit(model, *[monitor] * watched)
    return model, monitor, messages(record, "`encoder")


@wraps
@makes
def test_compiled_parts_have_the_names_and_values_of_the_model_as_it_was(make, wrap):
    (_, plain, _), (_, compiled, warned) = run(make), run(make, wrap)
    assert list(compiled.history) == ["encoder.rnn"]
    assert plain.history["encoder.rnn"]["step"].tolist() == [0, 2, 5]
    assert plain.history["encoder.rnn"]["spectrum"].isfinite().all()
    assert_close(compiled.history["encoder.rnn"], plain.history["encoder.rnn"], rtol=1e-4, atol=1e-4)
    assert not warned


@wraps
@makes
def test_a_compiled_run_with_the_monitor_is_bitwise_that_without(make, wrap):
    (without, _, _), (with_monitor, _, _) = run(make, wrap, watched=False), run(make, wrap)
    assert all(map(torch.equal, without.state_dict().values(), with_monitor.state_dict().values()))


@wraps
@makes
def test_no_hook_is_left_on_any_part(make, wrap):
    model, _, _ = run(make, wrap)
    assert not hooks_of(model)


@pytest.mark.parametrize("make", ["LSTMCell", "custom cell"])
def test_the_monitor_is_not_compiled_with_the_model(make):
    counts = []
    for watched in (False, True):
        torch._dynamo.utils.counters.clear()
        run.__wrapped__(make, "the container", watched=watched)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # The loop as a whole, and its pieces between the calls that are recorded: before the first, and after each.
    assert counts[1] <= counts[0] + 3


@pytest.mark.parametrize("make", ["LSTMCell", "custom cell"])
def test_a_part_that_is_compiled_as_one_graph_trains_on(make):
    model = Wrapped(MAKES[make], lambda module: torch.compile(module, backend="eager", fullgraph=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = next(name for name, module in model.named_modules() if name.endswith("rnn"))
        assert fit(model, LyapunovMonitor(raw)).global_step == 6


@wraps
@pytest.mark.parametrize("raw", [False, True], ids=["the name in the keys", "the name in named_modules"])
def test_a_compiled_layer_is_named_by_its_key_or_as_it_stands(wrap, raw):
    model = Wrapped(Layer, **WRAPS[wrap])
    names = [name for name, module in model.named_modules() if isinstance(module, nn.GRU)]
    assert list(measured(model, names[0] if raw else "encoder.rnn")) == ["encoder.rnn"]


@pytest.mark.parametrize("make", [lambda: nn.GRU(FEATURES, HIDDEN), lambda: nn.LSTMCell(FEATURES, HIDDEN), Gate])
@pytest.mark.parametrize("wrap", [eager, in_place])
def test_the_plain_function_sees_through_compilation(make, wrap):
    module, inputs = make(), torch.randn(8, 3, FEATURES)
    state = torch.randn(3, HIDDEN) if isinstance(module, Gate) else None
    expected = lyapunov_spectrum(module, inputs, state)
    assert_close(lyapunov_spectrum(wrap(module), inputs, state), expected, rtol=0, atol=1e-6)


# Lists


class Stack(Regressor):
    """Layers in a list, of which each sees the outputs of the one before."""

    def __init__(self, wrap=as_it_is, container=nn.ModuleList, **options):
        super().__init__(**options)
        torch.manual_seed(0)
        del self.rnn
        layers = [wrap(nn.GRU(FEATURES if i == 0 else HIDDEN, HIDDEN, batch_first=True)) for i in range(3)]
        named = dict(zip("abc", layers, strict=True))
        self.layers = container(named if container is nn.ModuleDict else layers)

    def forward(self, inputs):
        layers = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        for layer in layers:
            inputs, _ = layer(inputs)
        return self.head(inputs)


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
@pytest.mark.parametrize("wrap", [as_it_is, eager, in_place])
def test_layers_in_a_list_have_their_places_as_names(wrap, container):
    model, places = Stack(wrap, container, lr=0.0), "abc" if container is nn.ModuleDict else "012"
    history = measured(model, num_exponents=1)
    assert list(history) == [f"layers.{place}" for place in places]
    inputs = [*series()][-1][0]
    for place, measurements in history.items():
        layer = model.get_submodule(place)  # of the compiled, the wrapper
        layer = getattr(layer, "_orig_mod", layer)
        expected = lyapunov_spectrum(layer, inputs, num_exponents=1, warmup=2).mean()
        assert_close(measurements["spectrum"][-1, 0], expected, rtol=1e-4, atol=1e-5)
        inputs = layer(inputs)[0].detach()


def test_one_of_a_list_is_watched_by_its_name():
    assert list(measured(Stack(), "layers.1")) == ["layers.1"]


def test_layers_are_watched_in_the_order_they_are_named():
    assert list(measured(Stack(), ["layers.2", "layers.0"])) == ["layers.2", "layers.0"]


# Shared


class Shared(Regressor):
    """One layer under two names, called under both."""

    def __init__(self, **options):
        super().__init__("GRU", **options)
        self.decoder = self.rnn

    def forward(self, inputs):
        _, state = self.rnn(inputs)
        return self.head(self.decoder(inputs, state)[0])


def test_a_shared_layer_is_measured_once_with_all_of_its_calls():
    model = Shared(lr=0.0)
    history = measured(model, num_exponents=1)
    assert list(history) == ["rnn"]
    inputs = [*series()][-1][0]
    expected = lyapunov_spectrum(model.rnn, torch.cat((inputs, inputs), 1), num_exponents=1, warmup=2).mean()
    assert_close(history["rnn"]["spectrum"][-1, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_shared_layer_may_be_named_by_any_of_its_names():
    assert_close(measured(Shared(), "decoder")["decoder"], measured(Shared())["rnn"])


def test_a_shared_layer_that_is_named_twice_is_measured_once():
    assert len(measured(Shared(), ["rnn", "decoder"])) == 1


class CompiledBeside(Regressor):
    """Keeps a layer and its compiled form: one to save, one to call."""

    def __init__(self):
        super().__init__("GRU")
        self.fast = eager(self.rnn)

    def forward(self, inputs):
        return self.head(self.fast(inputs)[0])


def test_a_layer_and_its_compiled_form_are_one():
    history = measured(CompiledBeside())
    assert len(history) == 1
    (measurements,) = history.values()
    assert_close(measurements, measured(Regressor("GRU"))["rnn"], rtol=1e-4, atol=1e-4)


# Frozen


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_frozen_layer_is_measured_and_stays_frozen(cell):
    model = Regressor(cell)
    model.rnn.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.rnn.state_dict().items()}
    spectrum = measured(model)["rnn"]["spectrum"]
    # Its weights stay, and the batches of the second epoch are those of the first.
    assert torch.equal(spectrum[:3], spectrum[3:])
    assert not any(parameter.requires_grad for parameter in model.rnn.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.rnn.state_dict().items())


class UnderNoGrad(Regressor):
    """Its layer is a feature extractor, in evaluation mode and without gradients."""

    def on_train_start(self):
        self.rnn.eval()

    def forward(self, inputs):
        with torch.no_grad():
            features = self.rnn(inputs)[0]
        return self.head(features)


class UnderInferenceMode(UnderNoGrad):
    def forward(self, inputs):
        with torch.inference_mode():
            features = self.rnn(inputs)[0]
        return self.head(features.clone())


@pytest.mark.parametrize("model", [UnderNoGrad, UnderInferenceMode])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_layer_that_is_called_without_gradients_is_measured(model, cell):
    model = model(cell, num_layers=2, dropout=0.5)
    history = measured(model, num_exponents=1)
    assert not model.rnn.training
    below = nn.__dict__[cell](FEATURES, HIDDEN, batch_first=True)
    below.load_state_dict({name: value for name, value in model.rnn.state_dict().items() if name.endswith("l0")})
    expected = lyapunov_spectrum(below, [*series()][-1][0], num_exponents=1, warmup=2)
    assert_close(history["rnn.l0"]["spectrum"][-1], expected.mean(0), rtol=1e-4, atol=1e-5)
