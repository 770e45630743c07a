"""Calls that are joined to sequences: the whole batch at once, or member by member, is the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lyapunov.recording import chains
from lightning_lyapunov.recording.chains import Segment, StateChangedError, join


def _calls(events: list[str], batch: int, seed: int) -> list[Segment]:
    """Return calls of one step of a batch, in which what ``events`` say happens to its first member."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(1, batch, 2, generator=generator)

    first = torch.zeros(1, batch, 2)
    segments, state, argument = [], first, first
    for event in events:
        given = state.clone()
        if event == "held":
            given[:, 0] = argument[:, 0]
        elif event == "reset":
            given[:, 0] = first[:, 0]
        elif event == "swapped":
            given = given.flip(1)
        elif event == "changed":
            given[:, 0] += 1
        elif event == "anew":
            given = first.clone()
        lengths = torch.ones(batch, dtype=torch.long)
        final = draw()
        segments.append(Segment(draw(), given, lengths, final, derived=event != "anew"))
        state, argument = final, given
    return segments


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["on", "on", "on", "held", "reset", "swapped", "changed", "anew"]), min_size=1, max_size=12
    ),
    st.integers(1, 3),
    st.integers(0, 100),
)
def test_calls_that_the_whole_batch_goes_on_in_are_joined_as_member_by_member(
    events: list[str], batch: int, seed: int
) -> None:
    segments = _calls(events, batch, seed)

    def outcome() -> object:
        try:
            sequences = join(segments, 8, 100)
        except StateChangedError:
            return "changed"
        return None if sequences is None else [tensor.tolist() for tensor in sequences if tensor is not None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "_merged", lambda segments: segments)
        expected = outcome()
    assert outcome() == expected


def test_a_long_run_of_calls_is_two_stretches() -> None:
    merged = chains._merged(_calls(["on"] * 50, 4, 0))
    assert [len(segment.inputs) for segment in merged if segment.inputs is not None] == [49, 1]
