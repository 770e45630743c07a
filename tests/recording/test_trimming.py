"""Packed batches are cut before they are padded."""

import pytest
import torch
from helpers import FEATURES, assert_equal, make_recorder, sequences_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lyapunov.layers.trees import flatten
from lightning_lyapunov.recording.cells import NotFollowedError


def packed_batch(lengths, features=FEATURES, *, enforce_sorted=False, dtype=torch.float32):
    sequences = [torch.randn(length, features, dtype=dtype) for length in lengths]
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=enforce_sorted)


def recorded(module, *call, num_sequences=16, max_steps=100):
    """Return the one call of a layer as it is kept, and the sequences that are followed."""
    recorder = make_recorder(module, num_sequences, max_steps)
    recorder.start()
    module(*call)
    recorder.stop()
    (kept,) = recorder._watches["layer"].recorded.calls
    return kept, sequences_of(recorder)["layer"]


LAYOUTS = {
    "RNN": {},
    "GRU": {"num_layers": 2, "bidirectional": True},
    "LSTM": {"num_layers": 2, "proj_size": 3},
}


@pytest.mark.parametrize("limits", [(4, 7), (16, 100)], ids=str)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_packed_batch_that_is_cut_gives_the_sequences_of_the_whole(kind, state, enforce_sorted, limits, monkeypatch):
    module = getattr(nn, kind)(FEATURES, 5, **LAYOUTS[kind]).double()
    lengths = [3, 30, 9, 1, 9, 12, 9, 9, 40, 2]
    batch = packed_batch(
        sorted(lengths, reverse=True) if enforce_sorted else lengths, enforce_sorted=enforce_sorted, dtype=torch.float64
    )
    call = [batch]
    if state:
        zeros = module(batch)[1]
        call.append(tuple(map(torch.rand_like, zeros)) if isinstance(zeros, tuple) else torch.rand_like(zeros))
    _, whole = recorded(module, *call, num_sequences=limits[0], max_steps=limits[1])
    monkeypatch.setattr("lightning_lyapunov.recording.trimming._SMALL_CALL", 0)
    kept, cut = recorded(module, *call, num_sequences=limits[0], max_steps=limits[1])
    assert len(kept.call[0][0].batch_sizes) == min(limits[1], max(lengths))
    assert kept.call[0][0].batch_sizes[0] == min(limits[0], len(lengths))
    for before, after in zip(whole[:3], cut[:3], strict=True):
        assert_equal(after, before)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_packed_call_that_does_not_follow_from_its_arguments_is_seen_after_the_cut(kind, monkeypatch):
    monkeypatch.setattr("lightning_lyapunov.recording.trimming._SMALL_CALL", 0)
    module = getattr(nn, kind)(FEATURES, 5)
    recorder = make_recorder(module, 4, 100)
    module.register_forward_hook(lambda module, args, output: (output[0]._replace(data=output[0].data + 1), output[1]))
    recorder.start()
    module(packed_batch([3, 30, 9, 1, 9, 12]))
    recorder.stop()
    with pytest.raises(NotFollowedError, match="returned something else"):
        sequences_of(recorder)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_ragged_packed_batch_is_cut_before_it_is_padded(bidirectional, monkeypatch):
    """One member of 50,000 steps and four hundred of 20: padded it is three hundred times as large."""
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(leaf.numel() * leaf.element_size() for leaf in flatten(result)[0] if isinstance(leaf, Tensor))
            return result

    module, batch = nn.GRU(8, 4, bidirectional=bidirectional), packed_batch([20] * 200 + [50_000] + [20] * 200, 8)
    recorder = make_recorder(module)
    recorder.start()
    with torch.no_grad():
        module(batch)  # a copy of it is kept for a moment
        recorder.stop()
        with Sizes():
            sequences = sequences_of(recorder)["layer"]
    (kept,) = {int(length) for length in sequences.lengths if length > 20}
    assert kept == 100
    assert len(sequences.lengths) == 16
    assert max(made) < 2**20
