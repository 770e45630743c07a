"""How the calls of a layer become sequences, and what a recording leaves behind."""

import itertools
import math
from functools import cached_property

import pytest
import torch
from helpers import (
    FEATURES,
    Halves,
    Loop,
    Regressor,
    descending,
    fit,
    growth_of,
    make_recorder,
    members,
    messages,
    sequences_of,
    series,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.layers.copies import private_copy
from lightning_lyapunov.layers.discovery import find_layers
from lightning_lyapunov.recording.cells import NotFollowedError
from lightning_lyapunov.recording.recorder import Recorder

TIME, BATCH, HIDDEN = 8, 3, 4
KINDS = {
    "RNN": lambda: nn.RNN(FEATURES, HIDDEN),
    "GRU, two layers": lambda: nn.GRU(FEATURES, HIDDEN, 2),
    "LSTM": lambda: nn.LSTM(FEATURES, HIDDEN),
    "LSTM, two layers, projection": lambda: nn.LSTM(FEATURES, HIDDEN, 2, proj_size=2),
}
CELLS = {
    "RNNCell": lambda: nn.RNNCell(FEATURES, HIDDEN),
    "GRUCell": lambda: nn.GRUCell(FEATURES, HIDDEN),
    "LSTMCell": lambda: nn.LSTMCell(FEATURES, HIDDEN),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
cells = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)


class Recording:
    """A recorder of one layer, as a context."""

    def __init__(self, module, num_sequences=16, max_steps=100):
        self.recorder = make_recorder(module, num_sequences, max_steps)

    def __enter__(self):
        self.recorder.start()
        return self

    def __exit__(self, *_):
        self.recorder.stop()

    @cached_property
    def sequences(self):
        assert not self.recorder.errors
        return sequences_of(self.recorder)["layer"]


def zeros(sequences):
    return torch.zeros_like(sequences.states)


def joined(state):
    """Return a state of a layer as it is recorded, ``(cells, batch, state)``."""
    state = torch.cat(state, -1) if isinstance(state, tuple) else state
    return state.detach()


def detached(state):
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


def assert_one_sequence(sequences, inputs, states):
    """Assert that one long call was recorded, bit for bit."""
    assert torch.equal(sequences.inputs, inputs)
    assert torch.equal(sequences.states, states)
    assert sequences.lengths.tolist() == [len(inputs)] * inputs.shape[1]


# Calls that continue one another are one sequence


@kinds
@pytest.mark.parametrize("pieces", [(8,), (4, 4), (1,) * 8, (1, 5, 2)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_calls_in_a_chain_are_one_long_call(make, pieces, given):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    first = detached(module(torch.randn(1, BATCH, FEATURES))[1]) if given else None
    with Recording(module) as recording:
        state = first
        for piece in inputs.split(pieces):
            _, state = module(piece, state)
    with Recording(module) as at_once:
        module(inputs, first)
    for sequences in (recording.sequences, at_once.sequences):
        assert_one_sequence(sequences, inputs, joined(first) if given else zeros(sequences))


@kinds
def test_truncated_backpropagation_that_hands_a_detached_state_on_is_one_sequence(make):
    module, inputs, state = make(), torch.randn(TIME, BATCH, FEATURES), None
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    with Recording(module) as recording:
        for piece in inputs.split(2):
            output, state = module(piece, state)
            output.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            state = detached(state)
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))


@cells
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_a_cell_in_a_loop_has_one_sequence(make, batched):
    module, inputs, state = make(), torch.randn(TIME, BATCH if batched else 1, FEATURES), None
    with Recording(module) as recording:
        for step_inputs in inputs if batched else inputs[:, 0]:
            state = module(step_inputs, state)
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))


@kinds
def test_a_decoder_that_is_fed_one_step_at_a_time_goes_on_from_the_encoder(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    project, fed = nn.Linear(module.proj_size or HIDDEN, FEATURES), []
    with Recording(module) as recording, torch.no_grad():
        output, state = module(inputs)
        for _ in range(5):
            fed.append(project(output[-1:]))
            output, state = module(fed[-1], state)
    assert_one_sequence(recording.sequences, torch.cat((inputs, *fed)), zeros(recording.sequences))


@kinds
def test_unbatched_calls_go_on(make):
    module, inputs, state = make(), torch.randn(TIME, FEATURES), None
    with Recording(module) as recording:
        for piece in inputs.split(3):
            _, state = module(piece, state)
    assert_one_sequence(recording.sequences, inputs.unsqueeze(1), zeros(recording.sequences))


@kinds
def test_calls_in_another_precision_go_on(make):
    module, inputs, state = make().bfloat16(), torch.randn(TIME, BATCH, FEATURES).bfloat16(), None
    with Recording(module) as recording:
        for piece in inputs.split(3):
            _, state = module(piece, state)
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))


@kinds
def test_calls_under_autocast_go_on(make):
    module, inputs, state = make(), torch.randn(TIME, BATCH, FEATURES), None
    with Recording(module) as recording, torch.autocast("cpu", torch.bfloat16):
        for piece in inputs.split(3):
            _, state = module(piece, state)
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))


@kinds
def test_a_chain_has_the_spectrum_of_the_long_call(make):
    module, inputs, state = make().double(), torch.randn(TIME, BATCH, FEATURES).double(), None
    with Recording(module) as recording:
        for piece in inputs.split(1):
            _, state = module(piece, state)
    growths = growth_of(module, recording.sequences)
    spectrum = descending(torch.cat([growth.total[0] / TIME for growth in growths], -1))
    expected = lyapunov_spectrum(module, inputs)
    assert_close(spectrum.clamp(min=expected.min()), expected, rtol=0, atol=1e-8)


# Other calls start new sequences


@kinds
def test_calls_that_start_anew_are_sequences_side_by_side(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        for part in inputs.split(1, 1):
            module(part)
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))


@kinds
def test_a_call_from_a_changed_state_is_not_followed(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        _, state = module(inputs)
        module(inputs, tuple(part + 1e-6 for part in state) if isinstance(state, tuple) else state + 1e-6)
    with pytest.raises(NotFollowedError, match=f"The state of {type(module).__name__} comes back changed"):
        _ = recording.sequences


@kinds
def test_a_call_from_a_changed_state_without_a_graph_is_not_followed(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        state = detached(module(inputs)[1])
        module(inputs, tuple(part + 1e-6 for part in state) if isinstance(state, tuple) else state + 1e-6)
    with pytest.raises(NotFollowedError, match=f"The state of {type(module).__name__} comes back changed"):
        _ = recording.sequences


@kinds
def test_a_call_from_a_state_without_a_graph_starts_a_new_sequence(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        _, state = module(inputs)
        other = tuple(map(torch.randn_like, state)) if isinstance(state, tuple) else torch.randn_like(state)
        module(inputs, other)
    sequences = recording.sequences
    assert sequences.lengths.tolist() == [TIME] * 2 * BATCH
    assert torch.equal(sequences.states, torch.cat((torch.zeros_like(joined(state)), joined(other)), 1))
    assert torch.equal(sequences.inputs, torch.cat((inputs, inputs), 1))


@kinds
def test_the_members_of_a_batch_are_followed_to_other_places(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    turn = [1, 2, 0]
    with Recording(module) as recording:
        _, state = module(inputs)
        turned = members(state, turn)
        module(inputs, turned)
    back = [turn.index(member) for member in range(BATCH)]
    assert_one_sequence(recording.sequences, torch.cat((inputs, inputs[:, back])), zeros(recording.sequences))


@kinds
def test_chains_may_alternate(make):
    module, inputs = make(), torch.randn(2, TIME, BATCH, FEATURES)
    states = [None, None]
    with Recording(module) as recording:
        for pieces in zip(inputs[0].split(2), inputs[1].split(2), strict=True):
            for i, piece in enumerate(pieces):
                _, states[i] = module(piece, states[i])
    assert_one_sequence(recording.sequences, torch.cat(tuple(inputs), 1), zeros(recording.sequences))


@kinds
def test_two_calls_may_go_on_from_one(make):
    # What the second branch goes on from has been continued: it starts in that state.
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        _, state = module(inputs)
        module(inputs[:2], state)
        module(inputs[:3], state)
    sequences = recording.sequences
    assert sequences.lengths.tolist() == [TIME + 2] * BATCH + [3] * BATCH
    assert torch.equal(sequences.states[:, BATCH:], joined(state))


def test_the_directions_of_a_bidirectional_layer_share_no_chain():
    # Backwards, the second call starts at its own last step, not at that of the first.
    module, inputs = nn.GRU(FEATURES, HIDDEN, bidirectional=True).double(), torch.randn(TIME, 1, FEATURES).double()
    with Recording(module) as recording:
        _, state = module(inputs[:5])
        module(inputs[5:], state)
    _, growth = growth_of(module, recording.sequences)
    backwards = nn.GRU(FEATURES, HIDDEN).double()
    backwards.load_state_dict(
        {
            f"{name}_l0": getattr(module, f"{name}_l0_reverse")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
    )
    seen = torch.cat((inputs[:5].flip(0), inputs[5:].flip(0)))
    expected = lyapunov_spectrum(backwards, seen).sum() * TIME  # the sum does not feel where a frame starts anew
    assert_close(growth.total.sum(), expected, rtol=0, atol=1e-8)


# Lengths


@kinds
def test_sequences_of_several_lengths_are_all_used(make):
    module, lengths = make(), [3, 8, 1]
    parts = [torch.randn(length, 2, FEATURES) for length in lengths]
    with Recording(module) as recording:
        for part in parts:
            module(part)
    sequences = recording.sequences
    assert sequences.lengths.tolist() == [3, 3, 8, 8, 1, 1]
    for part, member in zip(parts, (0, 2, 4), strict=True):
        assert torch.equal(sequences.inputs[: len(part), member : member + 2], part)


@kinds
@pytest.mark.parametrize("max_steps", [100, 6, 3])
def test_packed_calls_that_go_on_leave_their_padding_out(make, max_steps):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    first, second = [2, 4, 1], [3, 1, 4]
    beyond = inputs.clone()
    for member in range(BATCH):
        beyond[first[member] : 4, member] = math.nan
        beyond[4 + second[member] :, member] = math.nan
    with Recording(module, max_steps=max_steps) as recording:
        _, state = module(pack_padded_sequence(beyond[:4], torch.tensor(first), enforce_sorted=False))
        module(pack_padded_sequence(beyond[4:], torch.tensor(second), enforce_sorted=False), state)
    sequences = recording.sequences
    for member in range(BATCH):
        seen = torch.cat((inputs[: first[member], member], inputs[4 : 4 + second[member], member]))[:max_steps]
        length = int(sequences.lengths[member])
        assert torch.equal(sequences.inputs[:length, member], seen[:length])
        # The steps that are counted are those of the longest member: some of the shorter ones' may be left out.
        assert length == len(seen) or max_steps < 8


def test_packed_calls_that_go_on_have_the_spectrum_of_the_data_alone():
    module, inputs = nn.LSTM(FEATURES, HIDDEN).double(), torch.randn(TIME, BATCH, FEATURES).double()
    first, second = [2, 4, 1], [3, 1, 4]
    with Recording(module) as recording:
        _, state = module(pack_padded_sequence(inputs[:4], torch.tensor(first), enforce_sorted=False))
        module(pack_padded_sequence(inputs[4:], torch.tensor(second), enforce_sorted=False), state)
    (growth,) = growth_of(module, recording.sequences, num_exponents=1)
    for member in range(BATCH):
        data = torch.cat((inputs[: first[member], member], inputs[4 : 4 + second[member], member]))
        expected = lyapunov_spectrum(module, data, num_exponents=1)[0] * len(data)
        assert_close(growth.total[0, member], expected, rtol=0, atol=1e-9)


@kinds
@pytest.mark.parametrize("max_steps", [1, 5, 8, 9])
@pytest.mark.parametrize("pieces", [(8,), (3, 3, 2), (1,) * 8], ids=str)
def test_no_more_steps_than_asked_for_are_kept(make, pieces, max_steps):
    module, inputs, state = make(), torch.randn(TIME, BATCH, FEATURES), None
    with Recording(module, max_steps=max_steps) as recording:
        for piece in inputs.split(pieces):
            _, state = module(piece, state)
    assert_one_sequence(recording.sequences, inputs[:max_steps], zeros(recording.sequences))


@kinds
@pytest.mark.parametrize("batch", [1, 4, 5, 17, 1000])
def test_no_more_sequences_than_asked_for_are_kept_and_they_are_spread_evenly(make, batch):
    module, inputs = make(), torch.randn(2, batch, FEATURES)
    with Recording(module, num_sequences=4) as recording:
        _, state = module(inputs[:1])
        module(inputs[1:], state)
    sequences = recording.sequences
    kept = [(inputs == sequences.inputs[:, [i]]).all(-1).all(0).nonzero().item() for i in range(min(4, batch))]
    assert sequences.inputs.shape == (2, min(4, batch), FEATURES)
    assert sequences.states.shape[1] == len(sequences.lengths) == min(4, batch)
    assert kept == sorted(set(kept))
    gaps = [after - before for before, after in itertools.pairwise([*kept, batch])]
    assert max(gaps) - min(gaps) <= 1


@kinds
def test_sequences_are_spread_over_all_calls(make):
    module, inputs = make(), torch.randn(TIME, 10, 1, FEATURES)
    with Recording(module, num_sequences=5) as recording:
        for i in range(10):
            module(inputs[:, i])
    assert_one_sequence(recording.sequences, inputs[:, ::2, 0], zeros(recording.sequences))


def test_calls_without_end_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("lightning_lyapunov.recording.recorder._MAX_BYTES", 1000)
    module = nn.GRU(FEATURES, HIDDEN)
    with Recording(module, num_sequences=2) as recording:
        for _ in range(50):
            module(torch.randn(2, 1, FEATURES))
    (watch,) = recording.recorder._watches.values()
    calls = watch.recorded.calls
    assert 1000 < sum(call.num_bytes for call in calls) <= 1000 + calls[0].num_bytes
    assert len(recording.sequences.lengths) == 2


@kinds
def test_an_empty_batch_is_no_sequence(make):
    module = make()
    if module.proj_size:
        pytest.skip("torch's own LSTM with a projection fails on an empty batch")
    inputs = torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        module(inputs[:, :0])
        module(inputs)
        module(inputs[:, :0])
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))
    with Recording(module) as recording:
        module(inputs[:, :0])
    assert sequences_of(recording.recorder) == {}
    assert not recording.recorder.errors


def test_a_layer_that_is_not_called_is_not_recorded():
    called, silent = nn.GRU(FEATURES, HIDDEN), nn.GRU(FEATURES, HIDDEN)
    recorder = Recorder(find_layers(nn.ModuleDict({"called": called, "silent": silent})), 4, 10)
    recorder.start()
    called(torch.randn(2, 1, FEATURES))
    recorder.stop()
    assert list(sequences_of(recorder)) == ["called"]


# Copies


@kinds
@pytest.mark.parametrize("limits", [{}, {"num_sequences": 2}, {"max_steps": 3}], ids=str)
def test_what_happens_to_the_tensors_afterwards_does_not_matter(make, limits):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)
    state = detached(module(inputs)[1])
    parts = state if isinstance(state, tuple) else (state,)
    with Recording(module, **limits) as recording, torch.no_grad():
        _, final = module(inputs, state)
        before = recording.sequences
        before = [tensor.clone() for tensor in before]
        for tensor in (inputs, *parts, *(final if isinstance(final, tuple) else (final,))):
            tensor.fill_(math.nan)
    assert all(map(torch.equal, before, recording.sequences))
    assert all(tensor.isfinite().all() for tensor in before)


@kinds
def test_what_is_recorded_holds_no_graph(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES, requires_grad=True)
    with Recording(module) as recording:
        _, state = module(inputs)
        module(inputs, state)[0].sum().backward()
    (watch,) = recording.recorder._watches.values()
    leaves = [leaf for call in watch.recorded.calls for leaf in (*call.arguments, *call.results)]
    assert not any(leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor))
    assert not any(tensor.requires_grad for tensor in recording.sequences)


@kinds
def test_recording_changes_neither_outputs_nor_gradients(make):
    module, inputs = make(), torch.randn(TIME, BATCH, FEATURES)

    def results():
        module.zero_grad()
        output, state = module(inputs)
        output.sum().backward()
        return [output, *(state if isinstance(state, tuple) else (state,)), *(p.grad for p in module.parameters())]

    without = results()
    with Recording(module):
        recorded = results()
    assert all(map(torch.equal, without, recorded))


# Hooks and errors


def test_only_its_own_hook_is_on_the_layer_and_only_while_it_records():
    module = nn.GRU(FEATURES, HIDDEN)
    theirs = module.register_forward_hook(lambda *_: None)
    recorder = make_recorder(module, 4, 10)
    for _ in range(2):  # starting twice is starting anew
        recorder.start()
        assert recorder.recording
        assert len(module._forward_hooks) == 2
    recorder.stop()
    recorder.stop()
    assert not recorder.recording
    assert list(module._forward_hooks) == [theirs.id]
    assert not module._forward_hooks_with_kwargs
    assert not module._forward_pre_hooks


def test_a_second_start_forgets_the_first():
    module, inputs = nn.GRU(FEATURES, HIDDEN), torch.randn(TIME, BATCH, FEATURES)
    with Recording(module) as recording:
        module(torch.randn(3, 5, FEATURES))
        recording.recorder.start()
        module(inputs)
    assert_one_sequence(recording.sequences, inputs, zeros(recording.sequences))


class Unreadable(nn.Module):
    """Called in a way that cannot be read; its state is no tensor."""

    def forward(self, inputs, state):
        return inputs, "state"


def test_a_call_that_cannot_be_read_is_an_error_afterwards_and_the_forward_goes_on():
    module, inputs = Unreadable(), torch.randn(BATCH, FEATURES)
    with Recording(module) as recording:
        assert module(inputs, "state")[0] is inputs
    with pytest.raises(NotFollowedError, match="no argument of it is a state that an earlier call returned"):
        _ = recording.sequences


class Uncopyable(nn.GRU):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


def test_errors_of_one_step_are_forgotten_in_the_next():
    module = Uncopyable(FEATURES, HIDDEN)
    with Recording(module) as recording:
        module(torch.randn(2, BATCH, FEATURES))
        assert recording.recorder.errors
        recording.recorder.start()
        assert not recording.recorder.errors


# In a fit


class Decoder(Regressor):
    """One layer is encoder and decoder; the decoder is fed its own outputs, one step at a time."""

    horizon = 5

    def __init__(self, cell="LSTM", **options):
        super().__init__(cell, **options)
        self.feedback = nn.Linear(1, FEATURES)
        self.called_with = []

    def forward(self, inputs):
        outputs, state = self.rnn(inputs)
        last = self.head(outputs[:, -1:])
        fed = [inputs]
        for _ in range(self.horizon):
            fed.append(self.feedback(last))
            outputs, state = self.rnn(fed[-1], state)
            last = self.head(outputs)
        self.called_with.append(torch.cat(fed, 1).detach())
        return last.expand(-1, inputs.shape[1], -1)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_encoder_and_decoder_of_one_layer_are_measured_as_one_sequence(cell):
    model, monitor = Decoder(cell, lr=0.0), LyapunovMonitor(num_exponents=1, warmup=4, strict=True)
    fit(model, monitor, max_steps=1)
    (inputs,) = model.called_with
    assert inputs.shape[1] == 12 + Decoder.horizon
    expected = lyapunov_spectrum(model.rnn, inputs, num_exponents=1, warmup=4).mean(0)
    assert_close(monitor.history["rnn"]["spectrum"][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [Halves, Loop, Decoder])
def test_a_run_of_many_calls_with_the_monitor_is_bitwise_that_without(model):
    trained = []
    for callbacks in ([], [LyapunovMonitor(every_n_train_steps=1, strict=True)]):
        torch.manual_seed(0)
        trained.append(model())
        fit(trained[-1], *callbacks)
    without, with_monitor = (model.state_dict() for model in trained)
    assert all(torch.equal(value, with_monitor[name]) for name, value in without.items())


class Windows(Regressor):
    """Calls its layer on windows of several lengths in one forward."""

    def forward(self, inputs):
        windows = [inputs[:, :3], inputs[:, 3:], inputs]
        outputs = [self.rnn(window)[0] for window in windows]
        return self.head(outputs[-1] + outputs[0].mean() + outputs[1].mean())


def test_all_lengths_of_a_step_are_averaged_by_their_steps():
    model, monitor = Windows(lr=0.0), LyapunovMonitor(num_exponents=1, warmup=0, strict=True)
    fit(model, monitor, max_steps=1, data=series(1))
    inputs, _ = next(iter(series(1)))
    windows = [inputs[:, :3], inputs[:, 3:], inputs]
    growth = sum(lyapunov_spectrum(model.rnn, w, num_exponents=1).sum() * w.shape[1] for w in windows)
    assert_close(monitor.history["rnn"]["spectrum"][0, 0], growth / (4 * 24), rtol=1e-4, atol=1e-5)


class EachInItsTurn(Regressor):
    """Two layers; a batch is of one of them."""

    def __init__(self):
        super().__init__("GRU")
        self.other = nn.GRU(FEATURES, 5, 2, batch_first=True)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return self.head((self.other if self.calls % 2 else self.rnn)(inputs)[0])


def test_a_layer_that_a_step_does_not_call_is_said_once_and_its_keys_stay(recwarn):
    monitor = LyapunovMonitor(every_n_train_steps=1)
    trainer = fit(EachInItsTurn(), monitor, data=series(6), max_epochs=1)
    cells = ["rnn", "other.l0", "other.l1"]
    assert sorted(message.split("`")[1] for message in messages(recwarn, "was not called")) == ["other", "rnn"]
    assert list(monitor.history) == cells
    assert all(len(measurements["step"]) == 6 for measurements in monitor.history.values())
    assert {key.split("/")[1] for key in trainer.callback_metrics if key.count("/") == 2} == set(cells)
    assert monitor.history["rnn"]["spectrum"][0].isnan().all()  # not called yet
    assert monitor.history["rnn"]["spectrum"][1:].isfinite().all()


class Carried(Regressor):
    """Hands its state on from batch to batch, as truncated backpropagation does."""

    state = None

    def forward(self, inputs):
        before = self.state
        outputs, state = self.rnn(inputs, before)
        self.state = detached(state)
        return self.head(outputs)


def test_a_state_that_is_handed_on_from_batch_to_batch_is_where_a_sequence_starts():
    model, monitor = Carried(lr=0.0), LyapunovMonitor(num_exponents=1, warmup=0, every_n_train_steps=1, strict=True)
    data = series(2)
    fit(model, monitor, data=data, max_epochs=1)
    (first, _), (second, _) = data
    with torch.no_grad():
        _, state = model.rnn(first)
    expected = lyapunov_spectrum(model.rnn, second, state, num_exponents=1).mean(0)
    assert_close(monitor.history["rnn"]["spectrum"][1], expected, rtol=1e-4, atol=1e-5)


def test_a_large_call_with_more_steps_than_are_needed_is_followed():
    module = nn.GRU(64, 64, batch_first=True)
    with Recording(module, max_steps=100) as recording:
        module(torch.randn(64, 250, 64))
    assert recording.sequences.lengths.tolist() == [100] * 16


# Repeated calls


REPEATED = {
    **KINDS,
    "batch first": lambda: nn.LSTM(FEATURES, HIDDEN, batch_first=True),
    "bidirectional": lambda: nn.GRU(FEATURES, HIDDEN, bidirectional=True),
    "dropout between layers": lambda: nn.LSTM(FEATURES, HIDDEN, 2, dropout=0.5),
    "dropout, bidirectional": lambda: nn.GRU(FEATURES, HIDDEN, 2, dropout=0.5, bidirectional=True),
    **CELLS,
}
FORMS = ("batch", "one member", "packed", "large")


def call_in_form(module, form):
    """Call a layer with a batch, an unbatched sequence, packed sequences, or more than is kept of a call."""
    if isinstance(module, nn.RNNCellBase):
        module(torch.randn(FEATURES) if form == "one member" else torch.randn(BATCH, FEATURES))
        return
    if form == "one member":
        module(torch.randn(TIME, FEATURES))
    elif form == "packed":
        module(pack_padded_sequence(torch.randn(TIME, BATCH, FEATURES), torch.tensor([8, 5, 2])))
    else:
        module(torch.randn(600, 600, FEATURES) if form == "large" else torch.randn(TIME, BATCH, FEATURES))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", REPEATED.values(), ids=REPEATED)
def test_a_call_is_compared_with_a_second_one_of_a_few_members(make, form, monkeypatch):
    from lightning_lyapunov.recording import repeats

    def recorded():
        with Recording(module) as recording:
            call_in_form(module, form)
        calls = recording.recorder.take()["layer"]
        assert not recording.recorder.errors
        return calls.mismatch

    module = make()
    assert recorded() is None

    def with_other_weights(module):
        copied = private_copy(module)
        for parameter in copied.parameters():
            parameter.data.add_(0.1)
        return copied

    for name in ("aliased_copy", "private_copy"):
        monkeypatch.setattr(repeats, name, with_other_weights)
    cut_in_time = form == "large" and not getattr(module, "bidirectional", False)
    if cut_in_time and getattr(module, "dropout", 0):  # neither outputs nor last states are known
        assert recorded() is None
    else:
        assert "is off by up to" in recorded()


@cells
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_calls_of_a_cell_are_repeated_together_with_the_weights_of_each(make, autocast):
    module, state = make(), None
    with Recording(module) as recording:
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and step < 4):
                state = module(torch.randn(BATCH, FEATURES), None if step == 4 else state)
            if step % 2:
                with torch.no_grad():
                    module.weight_hh.mul_(-1.5)
    assert recording.recorder.take()["layer"].mismatch is None
    assert not recording.recorder.errors


@cells
@pytest.mark.parametrize("wrong", range(6))
def test_one_call_of_many_that_returned_something_else_is_found(make, wrong, monkeypatch):
    module, state = make(), None
    with Recording(module) as recording:
        for step in range(6):
            with monkeypatch.context() as patch:
                if step == wrong:
                    patch.setattr(torch._VF, VF_NAMES[type(module)], doubled(VF_NAMES[type(module)]))
                state = module(torch.randn(BATCH, FEATURES), state)
    assert "is off by up to" in recording.recorder.take()["layer"].mismatch


VF_NAMES = {nn.RNNCell: "rnn_tanh_cell", nn.GRUCell: "gru_cell", nn.LSTMCell: "lstm_cell"}


def doubled(name):
    function = getattr(torch._VF, name)

    def double(*arguments):
        result = function(*arguments)
        return tuple(2 * part for part in result) if isinstance(result, tuple) else 2 * result

    return double


def test_a_chaotic_layer_that_rounds_otherwise_with_fewer_members_is_followed():
    torch.manual_seed(0)
    module = nn.RNN(64, 64)
    nn.init.normal_(module.weight_hh_l0, std=4 / 8)
    with Recording(module) as recording:
        module(torch.randn(200, 64, 64))
    assert recording.recorder.take()["layer"].mismatch is None


def test_a_hook_of_all_modules_on_the_outputs_is_no_part_of_the_recurrence():
    def halve(module, args, output):
        return (0.5 * output[0], output[1]) if isinstance(module, nn.GRU) else output

    def mean():
        monitor = LyapunovMonitor(every_n_train_steps=1, metrics="all", strict=True)
        trainer = fit(Regressor("GRU", lr=0.0), monitor, max_steps=1)
        return trainer.callback_metrics["lyapunov/rnn/mean"]  # whatever the warm-up: it is the volume's

    expected = mean()
    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        assert_close(mean(), expected, atol=1e-5, rtol=0)
    finally:
        handle.remove()
