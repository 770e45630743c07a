"""Calls that go on from one another are one sequence, for each member of a batch by itself."""

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lyapunov.layers.base import Sequences

__all__ = ["Segment", "StateChangedError", "join", "longest"]


class StateChangedError(ValueError):
    """The state that a call is given was computed from what an earlier one returned, and is another."""


class Segment(NamedTuple):
    """One call as a stretch of sequences.

    Attributes:
        inputs: ``(time, batch, ...)``; None for a call that only tells where others go on from.
        states: the states before it, ``(cells, batch, state)``; None where they are not known.
        lengths: the steps of each member, ``(batch,)``, on the CPU.
        final: the states after it, as ``states``; None where they are not known.
        derived: whether its states were computed from the results of an earlier call; None if nobody can tell.
        parts: the calls that it is made of, if it is made of several.
        full_lengths: the steps of each member before the call was cut, as ``lengths``; None: it was not cut.
    """

    inputs: Tensor | None
    states: Tensor | None
    lengths: Tensor | None
    final: Tensor | None
    derived: bool | None = False
    parts: "tuple[Segment, ...]" = ()
    full_lengths: Tensor | None = None

    @property
    def passed(self) -> list[Tensor]:
        """The states between the calls that it is made of, each as ``states``."""
        return [part.final for part in self.parts[:-1] if part.final is not None]

    def steps(self) -> list[int]:
        """Return the steps that the layer took with each member; an empty list for a call that is no stretch."""
        lengths = self.lengths if self.full_lengths is None else self.full_lengths
        return [] if lengths is None else lengths.tolist()


@dataclass
class _Track:
    """A sequence of one member: the segments and rows that it passes through, and the states at its last one."""

    member: int
    first_state: Tensor
    first_key: bytes
    argument: bytes = b""
    end: bytes | None = None
    paused: bool = False
    pieces: list[tuple[int, int]] = field(default_factory=list)


def join(segments: list[Segment], num_sequences: int, max_steps: int, num_missed: int = 0) -> Sequences | None:
    """Return the sequences that calls in order are, the longest of them, evenly spread where they are equally long.

    None if there is no step.

    A member of a call goes on from the member of an earlier call whose final state it is given, in whatever place of
    the batch. One that is given the state before that call again was paused there: the call counts for nothing. One
    that is given a first state again starts anew. Steps with the same inputs and state count once, as those of a
    segment that is run again for the backward pass.

    Args:
        segments: the calls.
        num_sequences: the most sequences to return.
        max_steps: the most steps of each.
        num_missed: how many calls came after these: a sequence that went on up to the last one goes on through them.

    Raises:
        StateChangedError: if a member is given a state that was computed from an earlier result, and is none of these.
            Without a graph, it counts as computed from it where it is like it.
    """
    segments = _merged(segments)
    builder = _Builder(segments)
    for index in range(len(segments)):
        builder.add(index)
    for track in builder.tracks:
        if track.paused:  # it was held up to its last call, which shows no longer whether it was held there
            track.pieces.pop()
    tracks = [track for track in builder.tracks if track.pieces]
    if len({track.pieces[0][0] for track in tracks}) > 1:
        tracks = _without_repeated(tracks, segments)
    steps = [segment.steps() for segment in segments]
    sequences = [_sequence(track, segments, max_steps, _full_length(track, steps, num_missed)) for track in tracks]
    sequences = _of_same_data(_distinct([sequence for sequence in sequences if len(sequence.inputs)]))
    chosen = longest([len(sequence.inputs) for sequence in sequences], num_sequences)
    return _padded([sequences[index] for index in chosen]) if sequences else None


def _merged(segments: list[Segment]) -> list[Segment]:
    """Return the segments with those made one that go on from one another with the whole batch, row by row.

    The last of these stays by itself: where a later call shows that a member was held, its last call counts for
    nothing.
    """
    merged: list[Segment] = []
    run: list[Segment] = []
    for segment in segments:
        if run and not _goes_on(run[-1], segment):
            merged += _one_and_last(run)
            run = []
        run.append(segment)
    return merged + _one_and_last(run)


def _goes_on(first: Segment, second: Segment) -> bool:
    """Return whether every member of a call goes on in the next one, in its row."""
    if first.inputs is None or second.inputs is None or first.final is None or second.states is None:
        return False
    if first.final.dtype != second.states.dtype or not torch.equal(first.final, second.states):
        return False
    return first.inputs.shape[2:] == second.inputs.shape[2:] and _is_full(first) and _is_full(second)


def _is_full(segment: Segment) -> bool:
    """Return whether all members have all of its steps."""
    if segment.inputs is None or segment.lengths is None:
        return False
    return bool((segment.lengths == len(segment.inputs)).all())


def _one_and_last(run: list[Segment]) -> list[Segment]:
    if len(run) < 3:
        return run
    *parts, last = run
    inputs = torch.cat([part.inputs for part in parts if part.inputs is not None])
    lengths = torch.full((inputs.shape[1],), len(inputs), device="cpu")
    return [Segment(inputs, parts[0].states, lengths, parts[-1].final, parts[0].derived, tuple(parts)), last]


class _Builder:
    """Follows the members of a batch from call to call."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments
        self.tracks: list[_Track] = []
        # Open sequences by the state that they ended in, and by the one before their last call.
        self._by_end: dict[bytes, dict[int, _Track]] = {}
        self._by_argument: dict[bytes, dict[int, _Track]] = {}
        self._first_keys: set[bytes] = set()
        # States that calls ended in and that nothing open ends in: of calls that are no stretch, and of branches.
        self._closed_ends: set[bytes] = set()
        self._passed: list[Tensor] = []
        # Which member each row of a batch held last, by the size of the batch.
        self._holders: dict[int, dict[int, int]] = {}
        self._num_members = 0

    def add(self, index: int) -> None:
        """Add a call."""
        segment = self._segments[index]
        after = None if segment.final is None else _keys(segment.final)
        if segment.inputs is None or segment.states is None:
            self._closed_ends |= set(after or ())
            return
        self._passed += segment.passed
        before = _keys(segment.states)
        found = [self._continued(row, key) for row, key in enumerate(before)]
        anew, is_first = not any(found), not self.tracks
        self._refuse_detached(index, before, found)
        holders = self._holders.setdefault(len(before), {})
        if anew:
            holders.clear()
        for row, (key, track) in enumerate(zip(before, found, strict=True)):
            if track is None:
                if not is_first and not self._may_start(segment, key, anew):
                    raise StateChangedError
                track = _Track(holders.setdefault(row, self._num_members), segment.states[:, row], key)
                self._num_members = max(self._num_members, track.member + 1)
                self.tracks.append(track)
            holders[row] = track.member
            track.pieces.append((index, row))
            track.argument, track.end = key, None if after is None else after[row]
        for track in {id(track): track for track in self.tracks if track.pieces[-1][0] == index}.values():
            self._by_argument.setdefault(track.argument, {})[id(track)] = track
            if track.end is not None:
                self._by_end.setdefault(track.end, {})[id(track)] = track
        if anew:
            self._first_keys |= set(before)

    def _continued(self, row: int, key: bytes) -> "_Track | None":
        """Return the sequence that goes on with a state, and close it; None if there is none."""
        track = _latest(self._by_end.get(key, {}), row)
        if track is None:
            paused = {
                number: track for number, track in self._by_argument.get(key, {}).items() if self._is_one_step(track)
            }
            if (track := _latest(paused, row)) is not None:
                track.pieces.pop()
                track.paused = True
            else:
                return None
        else:
            track.paused = False
        if track is not None:
            self._by_argument[track.argument].pop(id(track), None)
            if track.end is not None:
                self._by_end[track.end].pop(id(track), None)
                self._closed_ends.add(track.end)
        return track

    def _refuse_detached(self, index: int, keys: list[bytes], found: "list[_Track | None]") -> None:
        """Raise StateChangedError if sequences would start in what the last call returned, changed and detached."""
        segment, last = self._segments[index], self._segments[index - 1] if index else None
        if last is None or last.final is None or last.states is None or last.inputs is None or segment.states is None:
            return
        known = self._first_keys | self._closed_ends
        rows = [row for row, key in enumerate(keys) if found[row] is None and key not in known]
        if segment.derived is not False or not rows or last.final.shape != segment.states.shape:
            return
        begun = {row: track for track in self.tracks for number, row in track.pieces[-1:] if number == index - 1}
        rows = [row for row in rows if row in begun]
        if not rows:
            return
        firsts = torch.stack([begun[row].first_state for row in rows], 1)
        state, end, argument = segment.states[:, rows], last.final[:, rows], last.states[:, rows]
        is_one_step = len(last.inputs) == 1
        likeness = max(_likeness(state, end), _likeness(state, argument) if is_one_step else -1.0)
        # A new pass over the same data starts as the last one started. A sequence of one step is none.
        is_long = not is_one_step or any(len(begun[row].pieces) > 1 for row in rows)
        others = _likeness(state, firsts) if is_long else -1.0
        is_part = bool(((state == end) & (end != 0) & (end.abs() != 1)).any())
        if is_part or likeness > max(others, min(0.999, max(0.5, 4 / state.numel() ** 0.5))):
            raise StateChangedError

    def _is_one_step(self, track: _Track) -> bool:
        inputs = self._segments[track.pieces[-1][0]].inputs
        return inputs is not None and len(inputs) == 1

    def _may_start(self, segment: Segment, key: bytes, anew: bool) -> bool:
        """Return whether a sequence may start in a state that no earlier one ended in."""
        if key in self._first_keys or key in self._closed_ends or segment.derived is False:
            return True
        self._closed_ends.update(*map(_keys, self._passed))
        self._passed = []
        if key in self._closed_ends:
            return True
        # Without a graph only a new call of many steps is taken for new sequences.
        return segment.derived is None and anew and segment.inputs is not None and len(segment.inputs) > 1


def _likeness(one: Tensor, other: Tensor) -> float:
    """Return the correlation of states ``(cells, batch, state)`` over the members of a batch; of one, the cosine."""
    if one.shape[1] > 1:
        one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    one, other = one.double().flatten(), other.double().flatten()
    return float(one @ other / (one.norm() * other.norm()).clamp(min=1e-300))


def _latest(tracks: dict[int, _Track], row: int) -> "_Track | None":
    """Return the sequence that was called last, preferably in the same row."""
    if not tracks:
        return None
    latest = max(track.pieces[-1][0] for track in tracks.values())
    last = [track for track in tracks.values() if track.pieces[-1][0] == latest]
    return next((track for track in last if track.pieces[-1][1] == row), last[0])


def _keys(states: Tensor) -> list[bytes]:
    """Return the states of each member as bytes."""
    return [row.tobytes() for row in _numbers(states.movedim(1, 0))]


def _numbers(values: Tensor) -> NDArray[np.float64]:
    """Return values of any precision in float64. Adding zero makes one of both zeros."""
    return values.detach().double().add(0.0).cpu().contiguous().numpy()


class _Sequence(NamedTuple):
    start: int
    row: int
    member: int
    inputs: Tensor
    states: Tensor
    key: bytes
    full_length: int


def _full_length(track: _Track, steps: list[list[int]], num_missed: int) -> int:
    """Return the steps of a sequence in all of its calls; those that were missed are as long as its last one."""
    length = sum(steps[index][row] for index, row in track.pieces)
    index, row = track.pieces[-1]
    goes_on = len(track.pieces) > 1 and index == len(steps) - 1
    return length + num_missed * steps[index][row] * goes_on


def _sequence(track: _Track, segments: list[Segment], max_steps: int, full_length: int) -> _Sequence:
    pieces, remaining = [], max_steps
    for index, row in track.pieces:
        segment = segments[index]
        assert segment.inputs is not None
        assert segment.lengths is not None
        steps = min(remaining, int(segment.lengths[row]))
        pieces.append(segment.inputs[:steps, row])
        remaining -= steps
        if remaining == 0:
            break
    return _Sequence(*track.pieces[0], track.member, torch.cat(pieces), track.first_state, track.first_key, full_length)


def _distinct(sequences: list[_Sequence]) -> list[_Sequence]:
    """Return the sequences without those whose inputs and first state have come before."""
    seen: dict[tuple[bytes, torch.Size, bytes], list[Tensor]] = {}
    distinct = []
    for sequence in sequences:
        inputs = sequence.inputs.detach()
        first = _numbers(inputs[0]).tobytes()
        alike = seen.setdefault((sequence.key, inputs.shape, first), [])
        if not any(torch.equal(inputs, other) for other in alike):
            alike.append(inputs)
            distinct.append(sequence)
    return distinct


def _without_repeated(tracks: list[_Track], segments: list[Segment]) -> list[_Track]:
    """Return the sequences without those of which each call is one of a longer or earlier sequence again."""
    digests = {index: _digests(segments[index]) for index in {index for track in tracks for index, _ in track.pieces}}
    calls = [set[bytes]().union(*(digests[index][row] for index, row in track.pieces)) for track in tracks]
    seen: set[bytes] = set()
    distinct = []
    for number in sorted(range(len(tracks)), key=lambda number: -len(calls[number])):
        if not calls[number] <= seen:
            distinct.append(number)
        seen |= calls[number]
    return [tracks[number] for number in sorted(distinct)]


def _digests(segment: Segment) -> list[set[bytes]]:
    """Return, for each member, digests of the state and the inputs of each call that a segment is made of."""
    if segment.parts:
        return [set[bytes]().union(*rows) for rows in zip(*map(_digests, segment.parts), strict=True)]
    assert segment.inputs is not None
    assert segment.states is not None
    assert segment.lengths is not None
    steps = max(1, len(segment.inputs))
    rows = zip(_keys(segment.states), _keys(segment.inputs), segment.lengths.tolist(), strict=True)
    return [{blake2b(state + inputs[: length * (len(inputs) // steps)]).digest()} for state, inputs, length in rows]


def _of_same_data(sequences: list[_Sequence]) -> list[_Sequence]:
    """Let sequences be of one member that have the same inputs, perhaps with other dropout or noise.

    Several passes over one batch (R-Drop, SAM, the closure of LBFGS) are no more data than one. Independent inputs,
    less their mean, are apart by 0.71 times the sum of their sizes; the same with dropout of a half on both, by 0.5.
    """
    by_row: dict[tuple[int, torch.Size], list[_Sequence]] = {}
    members: dict[int, int] = {}
    for sequence in sequences:
        others = by_row.setdefault((sequence.row, sequence.inputs.shape), [])
        for other in others:
            if other.start != sequence.start and _is_same(sequence.inputs, other.inputs):
                members.setdefault(sequence.member, members.get(other.member, other.member))
        others.append(sequence)
    return [sequence._replace(member=members.get(sequence.member, sequence.member)) for sequence in sequences]


def _is_same(one: Tensor, other: Tensor) -> bool:
    one, other = (inputs.double() - inputs.double().mean(0) for inputs in (one, other))
    return bool((one - other).norm() < 0.6 * (one.norm() + other.norm()))


def longest(lengths: list[int], count: int) -> list[int]:
    """Return the indices of the largest lengths, in order; of those as long as the shortest of them, evenly spread."""
    if len(lengths) <= count:
        return list(range(len(lengths)))
    shortest = sorted(lengths, reverse=True)[count - 1]
    longer = [index for index, length in enumerate(lengths) if length > shortest]
    equal = [index for index, length in enumerate(lengths) if length == shortest]
    rest = count - len(longer)
    return sorted(longer + [equal[index * len(equal) // rest] for index in range(rest)])


def _padded(sequences: list[_Sequence]) -> Sequences:
    return Sequences(
        pad_sequence([sequence.inputs for sequence in sequences]),
        torch.stack([sequence.states for sequence in sequences], 1),
        torch.tensor([len(sequence.inputs) for sequence in sequences], device="cpu"),
        torch.tensor([sequence.member for sequence in sequences], device="cpu"),
        torch.tensor([sequence.full_length for sequence in sequences], device="cpu"),
    )
