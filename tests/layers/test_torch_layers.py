"""Recurrent layers of torch: all options, ways of calling them, subclasses and parametrisations."""

import pytest
import torch
from helpers import (
    FEATURES,
    Packed,
    Regressor,
    descending,
    fit,
    growth_of,
    make_recorder,
    members,
    randn,
    sequences_of,
    series,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import LyapunovMonitor, jacobians, lyapunov_spectrum

TIME, BATCH, HIDDEN = 7, 3, 4
LENGTHS = torch.tensor([4, 7, 2])

OPTIONS = {
    "plain": {},
    "three layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "two layers, bidirectional, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.9},
}
LAYERS = {
    f"{kind.__name__}, {name}": (kind, options)
    for kind in (nn.RNN, nn.GRU, nn.LSTM)
    for name, options in OPTIONS.items()
}
LAYERS["LSTM, projection"] = (nn.LSTM, {"proj_size": 2})
LAYERS["LSTM, two layers, bidirectional, projection"] = (
    nn.LSTM,
    {"proj_size": 2, "num_layers": 2, "bidirectional": True},
)
LAYERS["RNN, relu"] = (nn.RNN, {"nonlinearity": "relu"})
layers = pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)


def random_state(module, batch=BATCH):
    """Return a state as the module takes it, and the parts of it that its cells have, side by side."""
    cells = module.num_layers * (1 + module.bidirectional)
    parts = [randn(cells, batch, module.proj_size or HIDDEN), randn(cells, batch, HIDDEN)]
    parts = parts if module.mode == "LSTM" else parts[:1]
    return tuple(parts) if len(parts) == 2 else parts[0], torch.cat(parts, -1)


def recorded(module, call, **limits):
    """Return what a recorder has seen of a layer, as sequences, after ``call()``."""
    recorder = make_recorder(module, **limits)
    recorder.start()
    call()
    recorder.stop()
    for error in recorder.errors.values():
        raise error
    return sequences_of(recorder)["layer"]


def spectra(module, sequences):
    """Return the spectra of recorded sequences, ``(batch, num_exponents)``, of all cells side by side."""
    growths = growth_of(module, sequences)
    return torch.cat([(growth.total / growth.steps.unsqueeze(-1))[0] for growth in growths], -1)


def assert_recorded(sequences, inputs, states, lengths):
    """Assert that exactly these were recorded; what follows the end of a sequence does not matter."""
    assert sequences.lengths.tolist() == list(lengths)
    assert torch.equal(sequences.states, states)
    for member, length in enumerate(lengths):
        assert torch.equal(sequences.inputs[:length, member], inputs[:length, member])


# What is recorded


@layers
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_a_batch_is_recorded_as_it_is(kind, options, batch_first, given):
    module = kind(FEATURES, HIDDEN, batch_first=batch_first, **options).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    argument = inputs.transpose(0, 1) if batch_first else inputs
    sequences = recorded(module, lambda: module(argument, state) if given else module(argument))
    assert_recorded(sequences, inputs, states if given else torch.zeros_like(states), [TIME] * BATCH)


@layers
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_a_packed_batch_is_recorded_in_its_own_order_without_its_padding(kind, options, enforce_sorted, given):
    module = kind(FEATURES, HIDDEN, **options).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    lengths = descending(LENGTHS) if enforce_sorted else LENGTHS
    packed = pack_padded_sequence(inputs, lengths, enforce_sorted=enforce_sorted)
    sequences = recorded(module, lambda: module(packed, state) if given else module(packed))
    assert_recorded(sequences, inputs, states if given else torch.zeros_like(states), lengths.tolist())


@layers
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_an_unbatched_sequence_is_recorded_as_a_batch_of_one(kind, options, given):
    module = kind(FEATURES, HIDDEN, batch_first=True, **options).double()
    inputs, (state, states) = randn(TIME, FEATURES), random_state(module, 1)
    sequences = recorded(module, lambda: module(inputs, members(state, 0)) if given else module(inputs))
    assert_recorded(sequences, inputs.unsqueeze(1), states if given else torch.zeros_like(states), [TIME])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_keywords_in_any_order_are_the_arguments_they_name(kind):
    module = kind(FEATURES, HIDDEN).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    assert_recorded(recorded(module, lambda: module(hx=state, input=inputs)), inputs, states, [TIME] * BATCH)
    assert_recorded(recorded(module, lambda: module(inputs, hx=state)), inputs, states, [TIME] * BATCH)


# Padding


@pytest.mark.slow
@layers
@pytest.mark.parametrize("lengths", [[7, 4, 2], [2, 7, 4], [1, 7, 7]], ids=str)
def test_a_packed_batch_gives_each_member_what_it_gets_alone(kind, options, lengths):
    module = kind(FEATURES, HIDDEN, **options).double()
    inputs, (state, _) = randn(TIME, BATCH, FEATURES), random_state(module)
    packed = pack_padded_sequence(inputs, torch.tensor(lengths), enforce_sorted=False)
    together = lyapunov_spectrum(module, packed, state)
    by_monitor = descending(spectra(module, recorded(module, lambda: module(packed, state))))
    for member, length in enumerate(lengths):
        expected = lyapunov_spectrum(module, inputs[:length, member], members(state, member))[0]
        assert_close(together[member], expected, rtol=0, atol=1e-7)
        assert_close(by_monitor[member].clamp(min=-87.3365), expected.clamp(min=-87.3365), rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_the_monitor_averages_over_the_steps_of_the_members_alone(kind, options):
    def measured(model, data):
        # One exponent: more would be sorted, after averaging here and before it there.
        monitor = LyapunovMonitor(num_exponents=1, warmup=0, dtype=torch.float64, strict=True)
        fit(model, monitor, data=data, max_steps=1)
        return {cell: measurements["spectrum"][0] for cell, measurements in monitor.history.items()}

    data = series(1)
    together = measured(Packed(kind, lr=0.0, **options), data)
    inputs, targets = next(iter(data))
    alone = []
    for member, length in enumerate(Packed.lengths):
        one = TensorDataset(inputs[[member], :length], targets[[member], :length])
        alone.append(measured(Regressor(kind, lr=0.0, **options), DataLoader(one)))
    for cell, spectrum in together.items():
        steps = zip(alone, Packed.lengths, strict=True)
        expected = sum(spectra[cell] * length for spectra, length in steps) / Packed.lengths.sum()
        assert_close(spectrum, expected, rtol=0, atol=1e-5)


# Subclasses


class Packing:
    """A layer that takes padded sequences with their lengths, which may be 0, and packs them inside."""

    def forward(self, x, hx=None, lengths=None, enforce_sorted=True):
        if lengths is None:
            return super().forward(x, hx)
        some = torch.as_tensor(lengths).clamp(min=1)
        packed = pack_padded_sequence(x, some, batch_first=self.batch_first, enforce_sorted=enforce_sorted)
        output, final = super().forward(packed, hx)
        return pad_packed_sequence(output, batch_first=self.batch_first)[0], final


class PackingGRU(Packing, nn.GRU):
    pass


class PackingLSTM(Packing, nn.LSTM):
    pass


packing = pytest.mark.parametrize("kind", [PackingGRU, PackingLSTM])


@packing
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("lengths", [[4, 7, 2], [3, 0, 5]], ids=str)
def test_a_subclass_is_recorded_by_the_lengths_it_is_called_with(kind, batch_first, lengths):
    module = kind(FEATURES, HIDDEN, num_layers=2, batch_first=batch_first).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    argument = inputs.transpose(0, 1) if batch_first else inputs
    options = {"lengths": torch.tensor(lengths), "enforce_sorted": False}
    steps = [member for member, length in enumerate(lengths) if length]
    expected = inputs[:, steps], states[:, steps], [lengths[member] for member in steps]
    assert_recorded(recorded(module, lambda: module(argument, state, **options)), *expected)
    assert_recorded(recorded(module, lambda: module(x=argument, hx=state, **options)), *expected)


@packing
def test_a_batch_of_sequences_without_steps_is_no_sequence(kind):
    module = kind(FEATURES, HIDDEN).double()
    recorder = make_recorder(module)
    recorder.start()
    module(randn(TIME, BATCH, FEATURES), lengths=torch.zeros(BATCH).long())
    recorder.stop()
    assert not recorder.errors
    assert sequences_of(recorder) == {}


@packing
def test_lengths_may_be_a_list(kind):
    module = kind(FEATURES, HIDDEN).double()
    inputs, states = randn(TIME, BATCH, FEATURES), random_state(module)[1]
    sequences = recorded(module, lambda: module(inputs, lengths=[7, 4, 2]))
    assert_recorded(sequences, inputs, torch.zeros_like(states), [7, 4, 2])


@packing
def test_a_subclass_without_lengths_is_its_parent(kind):
    module = kind(FEATURES, HIDDEN).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    assert_recorded(recorded(module, lambda: module(inputs, state)), inputs, states, [TIME] * BATCH)
    parent = kind.__mro__[2](FEATURES, HIDDEN).double()
    parent.load_state_dict(module.state_dict())
    assert torch.equal(lyapunov_spectrum(module, inputs, state), lyapunov_spectrum(parent, inputs, state))


class PassingOn(nn.GRU):
    """Passes all arguments on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("how", ["positional", "keyword", "both"])
def test_a_subclass_may_hide_its_arguments(how):
    module = PassingOn(FEATURES, HIDDEN).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    calls = {
        "positional": lambda: module(inputs, state),
        "keyword": lambda: module(input=inputs, hx=state),
        "both": lambda: module(inputs, hx=state),
    }
    assert_recorded(recorded(module, calls[how]), inputs, states, [TIME] * BATCH)


class OutputOnly(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


def test_a_subclass_may_keep_its_final_state_to_itself():
    module = OutputOnly(FEATURES, HIDDEN).double()
    inputs, (state, states) = randn(TIME, BATCH, FEATURES), random_state(module)
    assert_recorded(recorded(module, lambda: module(inputs, state)), inputs, states, [TIME] * BATCH)


# Cells in a loop

CELLS = {
    "RNNCell": (nn.RNNCell, nn.RNN, {}),
    "RNNCell, relu": (nn.RNNCell, nn.RNN, {"nonlinearity": "relu"}),
    "RNNCell, no bias": (nn.RNNCell, nn.RNN, {"bias": False}),
    "GRUCell": (nn.GRUCell, nn.GRU, {}),
    "GRUCell, no bias": (nn.GRUCell, nn.GRU, {"bias": False}),
    "LSTMCell": (nn.LSTMCell, nn.LSTM, {}),
    "LSTMCell, no bias": (nn.LSTMCell, nn.LSTM, {"bias": False}),
}
cells = pytest.mark.parametrize(("cell_class", "layer_class", "options"), CELLS.values(), ids=CELLS)


@cells
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_a_cell_in_a_loop_is_the_layer_with_its_weights(cell_class, layer_class, options, batched, given):
    cell, layer = cell_class(FEATURES, HIDDEN, **options).double(), layer_class(FEATURES, HIDDEN, **options).double()
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    inputs, (state, states) = (
        randn(TIME, BATCH if batched else 1, FEATURES),
        random_state(layer, BATCH if batched else 1),
    )
    first = members(state, slice(None))
    first = tuple(part[0] for part in first) if isinstance(first, tuple) else first[0]

    def loop():
        current = first if given else None
        if not batched:
            current = (
                None
                if current is None
                else (tuple(part[0] for part in current) if isinstance(current, tuple) else current[0])
            )
        for step_inputs in inputs if batched else inputs[:, 0]:
            current = cell(step_inputs, current)

    sequences = recorded(cell, loop)
    assert_recorded(sequences, inputs, states if given else torch.zeros_like(states), [TIME] * inputs.shape[1])
    expected = lyapunov_spectrum(layer, inputs, state if given else None)
    assert_close(lyapunov_spectrum(cell, inputs, first if given else None), expected, rtol=0, atol=1e-10)
    by_monitor = descending(spectra(cell, sequences)).clamp(min=expected.min())
    assert_close(by_monitor, expected, rtol=0, atol=1e-7)


# Parametrised and pruned weights


def halved(module, name):
    prune.l1_unstructured(module, name, 0.5)


def thinned(module, name):
    prune.ln_structured(module, name, 0.25, n=2, dim=0)
    prune.random_unstructured(module, name, 0.2)


MADE = {
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm": parametrizations.weight_norm,
    "pruned": halved,
    "pruned twice": thinned,
}
made = pytest.mark.parametrize("make", MADE.values(), ids=MADE)
modules = pytest.mark.parametrize(
    ("kind", "names"),
    [
        (nn.RNN, ["weight_hh_l0"]),
        (nn.GRU, ["weight_hh_l0", "weight_ih_l0", "weight_hh_l1"]),
        (nn.LSTM, ["weight_hh_l0", "weight_hh_l1"]),
        (nn.RNNCell, ["weight_hh"]),
        (nn.GRUCell, ["weight_hh", "weight_ih"]),
        (nn.LSTMCell, ["weight_hh"]),
    ],
)


def constrained(kind, names, make):
    """Return a module with such weights, whose parameters were changed a little."""
    options = {"num_layers": 2} if "weight_hh_l1" in names else {}
    module = kind(FEATURES, HIDDEN, **options).double()
    for name in names:
        make(module, name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def plain(module, names):
    """Make the weights of a module plain parameters, with torch's functions."""
    for name in names:
        if parametrize.is_parametrized(module, name):
            module.eval()  # in training, spectral norm would go on with its power iteration
            parametrize.remove_parametrizations(module, name)
        else:
            prune.remove(module, name)
    return module


@made
@modules
@pytest.mark.parametrize("trained", [False, True], ids=["before a forward", "after a forward"])
def test_spectrum_is_that_of_the_weights_that_come_out(kind, names, make, trained):
    module, inputs = constrained(kind, names, make), randn(TIME, BATCH, FEATURES)
    if trained:
        module(inputs[0] if "Cell" in kind.__name__ else inputs)  # its weights hang on a graph now
    spectrum, matrices = lyapunov_spectrum(module, inputs), jacobians(module, inputs)
    module = plain(module, names)
    # Pruning leaves directions close to dead, which rounding moves.
    assert_close(spectrum, lyapunov_spectrum(module, inputs), rtol=0, atol=1e-6)
    assert_close(matrices, jacobians(module, inputs), rtol=0, atol=1e-12)


def traces(module):
    """Return everything that reading the weights of a module could change."""
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    flags = {name: (part.training, len(part._forward_hooks)) for name, part in module.named_modules()}
    return tensors, flags, [parameter.requires_grad for parameter in module.parameters()], torch.get_rng_state()


@made
@modules
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_reading_the_weights_changes_nothing(kind, names, make, training):
    module = constrained(kind, names, make)
    module.train(training)
    module.bias_ih_l0.requires_grad_(False) if "Cell" not in kind.__name__ else module.bias_ih.requires_grad_(False)
    inputs = randn(TIME, BATCH, FEATURES)
    before = traces(module)
    lyapunov_spectrum(module, inputs)
    jacobians(module, inputs)
    after = traces(module)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


@pytest.mark.slow
@made
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_run_on_made_weights_with_the_monitor_is_bitwise_that_without(kind, make):
    def trained(*callbacks):
        model = Regressor(kind)
        make(model.rnn, "weight_hh_l0")
        fit(model, *callbacks)
        return model.state_dict()

    monitor = LyapunovMonitor(every_n_train_steps=1, strict=True)
    torch.manual_seed(3)
    without = trained()
    torch.manual_seed(3)
    with_monitor = trained(monitor)
    assert all(torch.equal(value, with_monitor[name]) for name, value in without.items())
    assert monitor.history["rnn"]["spectrum"].isfinite().all()


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_the_monitor_measures_pruned_weights_as_they_are_after_the_step(kind):
    # torch refreshes a pruned weight at the next forward; until then it is that of the step before.
    model, monitor = Regressor(kind), LyapunovMonitor(num_exponents=1, warmup=0, strict=True)
    prune.l1_unstructured(model.rnn, "weight_hh_l0", 0.5)
    fit(model, monitor, max_steps=1, data=series(1))
    inputs, _ = next(iter(series(1)))
    stale = model.rnn.weight_hh_l0.clone()
    prune.remove(model.rnn, "weight_hh_l0")
    assert not torch.equal(stale, model.rnn.weight_hh_l0)
    expected = lyapunov_spectrum(model.rnn, inputs, num_exponents=1, dtype=torch.float64).mean(0)
    assert_close(monitor.history["rnn"]["spectrum"][0].double(), expected, rtol=1e-4, atol=1e-4)


def test_orthogonal_recurrent_weights_have_every_exponent_at_zero():
    module = parametrizations.orthogonal(nn.RNN(FEATURES, HIDDEN, nonlinearity="relu").double(), "weight_hh_l0")
    nn.init.constant_(module.bias_hh_l0, 1e3)  # every rectifier is open
    spectrum = lyapunov_spectrum(module, randn(1, BATCH, FEATURES))
    assert_close(spectrum, torch.zeros_like(spectrum), rtol=0, atol=1e-12)
