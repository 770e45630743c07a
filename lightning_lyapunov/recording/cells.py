"""Find out, from its recorded calls, how a module is stepped: which argument is the state, and where the batch is.

Between two calls of a cell the state is what the first returned and the second was given, wherever it stands.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.layers.copies import cast, frozen_copy, get_attribute, same
from lightning_lyapunov.layers.trees import flatten
from lightning_lyapunov.layers.watched import Place, StepCall, WatchedCell, flatten_places
from lightning_lyapunov.recording.calls import RecordedCall
from lightning_lyapunov.recording.chains import Segment, StateChangedError
from lightning_lyapunov.recording.replay import difference

__all__ = ["MIN_SHARE", "NoStateError", "NotFollowedError", "Results", "read_cell", "values_of", "with_batch"]

MIN_SHARE = 0.5
"""The share of the numbers of an argument that must come from earlier results for it to be a state."""


class NotFollowedError(ValueError):
    """What a layer does cannot be followed; the message says why, and what to write."""


class NoStateError(NotFollowedError):
    """No argument of a module comes back from an earlier call of it."""


def read_cell(module: nn.Module, calls: list[RecordedCall]) -> tuple[WatchedCell, list[Segment]]:
    """Return how a module is stepped, and its calls as stretches of one step.

    Args:
        module: the module.
        calls: its calls in one batch, in order.

    Raises:
        NoStateError: if no argument comes back.
        StateChangedError: if one is computed from earlier results and never comes back as it was returned.
        NotFollowedError: if a step is not a function of its arguments.
    """
    last = calls[-1]
    alike = [_is_like(call, last) for call in calls]
    pairs = _state_pairs(module, calls, alike)
    alike = [fits and set(pairs) <= set(_leaves(call)[0]) for call, fits in zip(calls, alike, strict=True)]
    template = _template(module, calls, alike, pairs)
    template = with_batch(module, template, [call for call, fits in zip(calls, alike, strict=True) if fits])
    segments = [_segment(template, call, fits) for call, fits in zip(calls, alike, strict=True)]
    return WatchedCell(module, template), segments


def _is_like(call: RecordedCall, last: RecordedCall) -> bool:
    """Return whether a call has the structure of the last one: a first state may come in another form."""
    if call.argument_structure != last.argument_structure or call.result_structure != last.result_structure:
        return False
    return all(map(_is_like_leaf, call.arguments, last.arguments))


def _is_like_leaf(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        same_kind = _kind(ours) == _kind(theirs) and ours.ndim == theirs.ndim
        # All but one axis, that of the batch, are the same.
        return same_kind and sum(map(int.__ne__, ours.shape, theirs.shape)) <= 1
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return False
    if _is_number(ours) and _is_number(theirs):
        return True
    return ours is theirs or (type(ours) is type(theirs) and bool(ours == theirs))


def _kind(tensor: Tensor) -> tuple[bool, torch.dtype | None]:
    """Return what must be the same of the dtypes of two calls: a first state may be of another precision."""
    return tensor.is_complex(), None if tensor.is_floating_point() or tensor.is_complex() else tensor.dtype


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Key = int | tuple[str, int]


def _leaves(call: RecordedCall) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """Return the tensors that could be a state before a call, and those after it, by their places."""
    before: dict[Key, Tensor] = {i: leaf for i, leaf in enumerate(call.arguments) if _may_be_state(leaf)}
    after: dict[Key, Tensor] = {i: leaf for i, leaf in enumerate(call.results) if _may_be_state(leaf)}
    for kept, leaves in ((call.kept_before, before), (call.kept_after, after)):
        for name, value in kept.items():
            leaves.update({(name, i): leaf for i, leaf in enumerate(flatten(value)[0]) if _may_be_state(leaf)})
    return before, after


def _may_be_state(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and (leaf.is_floating_point() or leaf.is_complex())


def _state_pairs(module: nn.Module, calls: list[RecordedCall], alike: list[bool]) -> dict[Key, Key]:
    """Return where the state stands before a call, and where after it."""
    shares: dict[tuple[Key, Key], list[float]] = {}
    earlier: dict[Key, Results] = {}
    for call, fits in zip(calls, alike, strict=True):
        before, after = _leaves(call)
        for place, results in earlier.items() if fits else ():
            possible = {key: leaf for key, leaf in before.items() if key == place or not _is_kept(key, place)}
            for key, share in results.shares_in(possible).items():
                shares.setdefault((key, place), []).append(share)
        for place, result in after.items():
            earlier.setdefault(place, Results()).add(result)
    means = {pair: sum(values) / len(values) for pair, values in shares.items()}
    best = max(means.values(), default=0.0)
    pairs: dict[Key, Key] = {}
    for (key, place), share in sorted(means.items(), key=lambda item: -item[1]):
        if share >= max(MIN_SHARE, 0.9 * best) and key not in pairs and place not in pairs.values():
            pairs[key] = place
    pairs = _without_statistics(module, calls, pairs)
    _refuse_changed(calls, alike, pairs)
    if not pairs:
        raise NoStateError
    return pairs


def _is_kept(key: Key, place: Key) -> bool:
    """Return whether one of two places is a tensor that the module keeps."""
    return isinstance(key, tuple) or isinstance(place, tuple)


class Results:
    """What a module returned in one place, call by call."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []
        self._rows: set[bytes] = set()
        self._num_known = 0

    def add(self, result: Tensor) -> None:
        """Add the result of the next call."""
        self._results.append(result)

    def shares_in(self, arguments: dict[Key, Tensor]) -> dict[Key, float]:
        """Return for each argument the share of its numbers that were returned before; none for one of zeros.

        Where one argument is the last result as it is, the others are not looked for in other places.
        """
        arguments = {key: argument for key, argument in arguments.items() if bool((argument != 0).any())}
        shares = {key: self._share_of_last(argument) for key, argument in arguments.items()}
        if max(shares.values(), default=1.0) < 1:
            for key, argument in arguments.items():
                shares[key] = max(shares[key], self._share_of_rows(argument))
        return shares

    def _share_of_last(self, argument: Tensor) -> float:
        last = self._results[-1]
        if argument.numel() != last.numel():
            return 0.0
        counts = argument != 0
        return float((counts.flatten() & (argument.flatten() == last.flatten())).sum() / counts.sum())

    def _share_of_rows(self, argument: Tensor) -> float:
        """Return the share of its rows that are in other places of the batch, or of a call before the last one."""
        for result in self._results[self._num_known :]:
            self._rows.update(row for axis in range(min(2, result.ndim)) for row in _rows(result, axis))
        self._num_known = len(self._results)
        share = 0.0
        for axis in range(min(2, argument.ndim)):
            rows = _rows(argument, axis)
            zero = bytes(len(rows[0]))
            hits = [row in self._rows for row in rows if row != zero]
            share = max(share, sum(hits) / max(1, len(hits)))
        return share


def _rows(tensor: Tensor, axis: int) -> list[bytes]:
    """Return the slices of a tensor along an axis as bytes. Adding zero makes one of both zeros."""
    numbers = tensor.detach().movedim(axis, 0).reshape(tensor.shape[axis], -1)
    numbers = torch.view_as_real(numbers).flatten(1) if numbers.is_complex() else numbers
    return [row.tobytes() for row in numbers.double().add(0.0).cpu().contiguous().numpy()]


def _without_statistics(module: nn.Module, calls: list[RecordedCall], pairs: dict[Key, Key]) -> dict[Key, Key]:
    """Leave out what a module keeps and that is no state.

    Evaluation mode changes a state, and not the statistics of a normalisation; and a state changes what comes after it.
    """
    kept = [key for key in pairs if isinstance(key, tuple)]
    if not kept:
        return pairs
    call = max(reversed(calls), key=lambda call: _num_written(call, kept))
    dtype = _dtype_of(call)
    frozen = frozen_copy(module, dtype)
    plain = StepCall(call.arguments, call.argument_structure, call.kept_before)

    def outcome(values: dict[Key, Tensor]) -> tuple[list[Any], dict[str, Any]]:
        results, _ = plain.run(frozen, values, dtype)
        return results, {name: get_attribute(frozen, name) for name, _ in kept}

    def is_state(key: tuple[str, int]) -> bool:
        name, index = key
        before = cast(flatten(call.kept_before[name])[0][index], dtype)
        is_written = not same(before, flatten(after[name])[0][index])
        return is_written and not same(outcome({key: 1.5 * before + 0.5}), (results, after))

    results, after = outcome({})
    states = {key for key in kept if is_state(key)}
    return {key: place for key, place in pairs.items() if not isinstance(key, tuple) or key in states}


def _num_written(call: RecordedCall, kept: list[tuple[str, int]]) -> int:
    """Return in how many of some kept tensors a call changed something; -1 if it lacks one."""
    if any(name not in call.kept_before for name, _ in kept):
        return -1
    return sum(not same(call.kept_before[name], call.kept_after[name]) for name, _ in kept)


def _refuse_changed(calls: list[RecordedCall], alike: list[bool], pairs: dict[Key, Key]) -> None:
    """Raise StateChangedError for an argument that was computed from results, looks like one, and is none."""
    single = {place for place in range(len(calls[-1].results)) if place not in pairs.values()}
    shapes = {calls[-1].results[place].shape for place in single if _may_be_state(calls[-1].results[place])}
    for index, leaf in enumerate(calls[-1].arguments):
        derived = [call.derived[index] for call, fits in zip(calls, alike, strict=True) if fits]
        if index not in pairs and _may_be_state(leaf) and leaf.shape in shapes and all(derived[1:]) and any(derived):
            raise StateChangedError


def _template(module: nn.Module, calls: list[RecordedCall], alike: list[bool], pairs: dict[Key, Key]) -> StepCall:
    """Return how the module is called for one step, without the axes of the batch."""
    last = calls[-1]
    before, _ = _leaves(last)
    states = tuple(Place(key, tuple(before[key].shape), before[key].dtype) for key in pairs)
    results = tuple(Place(place, tuple(before[key].shape), before[key].dtype) for key, place in pairs.items())
    fitting = [call for call, fits in zip(calls, alike, strict=True) if fits]
    inputs = tuple(
        Place(index, tuple(_as_tensor(leaf).shape), _as_tensor(leaf).dtype)
        for index, leaf in enumerate(last.arguments)
        if index not in pairs and (isinstance(leaf, Tensor) or _varies(fitting, index))
    )
    kept = {
        name: value
        for name, value in last.kept_before.items()
        if any(key[0] == name for key in pairs if isinstance(key, tuple))
    }
    return StepCall(last.arguments, last.argument_structure, kept, states, results, inputs)


def _varies(calls: list[RecordedCall], index: int) -> bool:
    values = {call.arguments[index] for call in calls if _is_number(call.arguments[index])}
    return len(values) > 1


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    return torch.tensor(leaf, dtype=torch.long if isinstance(leaf, int) else torch.float64, device="cpu")


def _dtype_of(call: RecordedCall) -> torch.dtype:
    device = next((leaf.device for leaf in call.arguments if isinstance(leaf, Tensor)), torch.device("cpu"))
    return widest_dtype(device)


def values_of(template: StepCall, call: RecordedCall) -> dict[Any, Tensor]:
    """Return the state and the inputs of a call by their places."""
    before, _ = _leaves(call)
    values: dict[Any, Tensor] = {place.index: before[place.index] for place in template.states}
    device = next(iter(values.values())).device
    for place in template.inputs:
        assert isinstance(place.index, int)
        values[place.index] = _as_tensor(call.arguments[place.index]).to(device)
    return values


def with_batch(module: nn.Module, template: StepCall, calls: list[RecordedCall]) -> StepCall:
    """Return a template with the axis of the batch of each state and input.

    The members of a batch are independent: two members alone give their rows of the whole. The axis along which they
    do is that of the batch. Where there is none, a call is one state, as that of the nodes of a graph.
    """
    values = values_of(template, calls[-1])
    run, whole = _runner(module, template, values)
    again = run(values)
    if difference(again, whole) is not None:
        raise NotFollowedError(
            "It gives two different states for the same input and state in evaluation mode: it draws random numbers or "
            "counts its calls."
        )
    if any(result.shape != values[place.index].shape for place, result in zip(template.states, whole, strict=True)):
        raise NotFollowedError("Its state changes its size in a step: a Lyapunov spectrum is not defined.")
    for axes in _possible_axes(template, values):
        if _is_independent(run, template, values, whole, axes):
            template = template.with_batch_axes(axes)
            break
    return _with_constants(template, calls)


def _runner(
    module: nn.Module, template: StepCall, values: dict[Any, Tensor]
) -> tuple[Callable[[dict[Any, Tensor]], list[Tensor]], list[Tensor]]:
    """Return a function from state and inputs to the next state, by a copy in evaluation mode, and its first result."""
    errors = []
    # Tensors that are no parameters or buffers keep their dtype: then only the module's own dtype works.
    for dtype in dict.fromkeys((widest_dtype(next(iter(values.values())).device), template.states[0].dtype.to_real())):
        frozen = frozen_copy(module, dtype)

        def run(values: dict[Any, Tensor], frozen: nn.Module = frozen, dtype: torch.dtype = dtype) -> list[Tensor]:
            return template.run(frozen, values, dtype)[1]

        try:
            return run, run(values)
        except Exception as error:
            errors.append(error)
    raise NotFollowedError(f"A copy of it in evaluation mode cannot be called: {errors[0]}") from errors[0]


def _with_constants(template: StepCall, calls: list[RecordedCall]) -> StepCall:
    """Leave out of the inputs what has no batch and is the same in all calls."""

    def is_constant(place: Place) -> bool:
        assert isinstance(place.index, int)
        leaves = [call.arguments[place.index] for call in calls]
        return place.batch_axis is None and all(same(leaf, leaves[-1]) for leaf in leaves)

    return replace(template, inputs=tuple(place for place in template.inputs if not is_constant(place)))


def _possible_axes(template: StepCall, values: dict[Any, Tensor]) -> list[dict[Any, int | None]]:
    """Return the axes that could be the batch of each state and input: one of each state has the same size."""
    first = values[template.states[0].index]
    candidates: list[dict[Any, int | None]] = []
    for axis, size in sorted(enumerate(first.shape), key=lambda item: (item[1] == 1, item[0])):
        axes: dict[Any, int | None] = {template.states[0].index: axis}
        others = [place.index for place in (*template.states[1:], *template.inputs)]
        for key in others:
            shape = values[key].shape
            places = [a for a in (axis, *range(len(shape))) if a < len(shape) and shape[a] == size]
            axes[key] = places[0] if places else None
        if all(axes[place.index] is not None for place in template.states):
            candidates.append(axes)
            if len(template.inputs) and size > 1:
                # An input whose axis has that size by chance may be the same for all members.
                shared = [p.index for p in template.inputs if axes[p.index] is not None]
                for count in range(1, min(3, len(shared)) + 1):
                    for chosen in itertools.combinations(shared, count):
                        candidates.append({**axes, **dict.fromkeys(chosen)})
    return candidates


def _is_independent(
    run: Callable[[dict[Any, Tensor]], list[Tensor]],
    template: StepCall,
    values: dict[Any, Tensor],
    whole: list[Tensor],
    axes: dict[Any, int | None],
) -> bool:
    """Return whether the first and the last member alone give their rows of the whole."""
    first_axis = axes[template.states[0].index]
    assert first_axis is not None
    batch = values[template.states[0].index].shape[first_axis]
    if batch == 1:
        return True
    for member in (0, batch - 1):
        alone = {
            key: value if (axis := axes.get(key)) is None else value.narrow(axis, member, 1)
            for key, value in values.items()
        }
        try:
            after = run(alone)
        except Exception:
            return False
        for place, one, all_ in zip(template.states, after, whole, strict=True):
            axis = axes[place.index]
            assert axis is not None
            if difference([one], [all_.narrow(axis, member, 1)]) is not None:
                return False
    return True


def _segment(template: StepCall, call: RecordedCall, fits: bool) -> Segment:
    """Return a call as a stretch of one step; one of another structure tells only where others go on from."""
    states, axis = template.states, template.states[0].batch_axis
    final = None
    after = _leaves(call)[1]
    tensors = [after[place.index] for place in template.results if place.index in after]
    if len(tensors) == len(states) and all(t.ndim == len(p.shape) for t, p in zip(tensors, states, strict=True)):
        final = flatten_places(states, tensors, 1 if axis is None else tensors[0].shape[axis]).unsqueeze(0)
    if not fits or not _has_one_batch(template, values := values_of(template, call)):
        return Segment(None, None, None, final)
    arguments = [values[place.index] for place in states]
    batch = 1 if axis is None else arguments[0].shape[axis]
    numbers = _dtype_of(call)
    inputs = [place.flatten(values[place.index], batch).to(numbers) for place in template.inputs]
    empty = torch.empty(batch, 0, dtype=numbers, device=arguments[0].device)
    return Segment(
        torch.cat([empty, *inputs], 1).unsqueeze(0),
        flatten_places(states, arguments, batch).unsqueeze(0),
        torch.ones(batch, dtype=torch.long, device="cpu"),
        final,
        _is_derived(call, states),
    )


def _has_one_batch(template: StepCall, values: dict[Any, Tensor]) -> bool:
    """Return whether state and inputs have the same members: a first state may be one for all."""
    places = [place for place in (*template.states, *template.inputs) if place.batch_axis is not None]
    return len({values[place.index].shape[place.batch_axis] for place in places if place.batch_axis is not None}) <= 1


def _is_derived(call: RecordedCall, states: tuple[Place, ...]) -> bool | None:
    """Return whether the state was computed from earlier results; None if nobody can tell."""
    given = [call.derived[place.index] for place in states if isinstance(place.index, int)]
    if len(given) < len(states):  # what the module keeps may be set anew from outside, and is then a first state
        return False
    return any(given) if call.has_graph else None
