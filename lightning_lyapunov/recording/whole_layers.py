"""Modules that are called with whole sequences: fed one step at a time, they must return the same."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.layers.base import Sequences
from lightning_lyapunov.layers.copies import assign, cast, frozen_copy
from lightning_lyapunov.layers.trees import flatten, unflatten
from lightning_lyapunov.layers.unrolled import UnrolledLayer, unroll
from lightning_lyapunov.layers.watched import Place, StepCall, WatchedCell, flatten_places
from lightning_lyapunov.recording.calls import RecordedCall
from lightning_lyapunov.recording.cells import values_of, with_batch
from lightning_lyapunov.recording.chains import Segment
from lightning_lyapunov.recording.replay import difference

__all__ = ["read_unrolled", "read_whole_layer"]

# Steps of a first, quick look; steps of the whole check.
_QUICK_STEPS, _MAX_STEPS = 3, 100


class _Form(NamedTuple):
    """How a module could be fed one step at a time.

    Attributes:
        axis: the axis of time of the arguments in ``sliced``.
        sliced: the arguments that follow the steps, by name.
        output: the element of the result that follows the steps, and its axis of time.
        state: the argument that the state is given as; None where the module keeps it.
        after: the element of the result that the state comes back as.
    """

    axis: int
    sliced: tuple[str, ...]
    output: tuple[Any, int]
    state: str | None
    after: Any


def read_whole_layer(module: nn.Module, calls: list[RecordedCall]) -> tuple[WatchedCell, list[Segment]] | None:
    """Return how a module is stepped that is called with whole sequences, and its calls; None if it is no such module.

    Its arguments are cut to one step along each axis that could be time, and the state that it returns is given back to
    it. The axis is that of time, and the state the state, if the outputs are those of the whole call.
    """
    try:
        feeders = [_Feeder(module, call) for call in calls]
    except TypeError:  # its arguments have no names
        return None
    longest = max(feeders, key=lambda feeder: feeder.num_numbers)
    form = next((form for form in longest.forms() if longest.agrees(form)), None)
    if form is None:
        return None
    step_call, example = longest.template(form)
    template = with_batch(module, step_call, [example])
    return WatchedCell(module, template), [feeder.segment(form, template) for feeder in feeders]


class _Example(NamedTuple):
    call: StepCall
    example: RecordedCall


class _Feeder:
    """One recorded call, and a copy of its module in evaluation mode to feed it step by step."""

    def __init__(self, module: nn.Module, call: RecordedCall) -> None:
        self._call, self._signature = call, inspect.signature(module.forward)
        args, kwargs = call.call
        self._given = dict(self._bind(args, kwargs).arguments)
        self._module, self._dtype = module, torch.float64
        self._frozen: nn.Module | None = None
        tensors = [value for value in self._given.values() if isinstance(value, Tensor)]
        self.num_numbers = max((value.numel() for value in tensors), default=0)

    def _bind(self, args: Any, kwargs: Any) -> inspect.BoundArguments:
        bound = self._signature.bind(*args, **kwargs)
        kinds = {self._signature.parameters[name].kind for name in bound.arguments}
        if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            raise TypeError
        return bound

    def forms(self) -> Iterator[_Form]:
        """Yield every form in which the call could be fed step by step."""
        tensors = {name: value for name, value in self._given.items() if isinstance(value, Tensor) and value.ndim > 1}
        if not tensors:
            return
        first, elements = next(iter(tensors)), _elements(self._call.result)
        optional = [
            name
            for name, parameter in self._signature.parameters.items()
            if self._given.get(name, parameter.default) is None or name in self._given
        ]
        for axis in range(min(3, tensors[first].ndim)):
            steps = tensors[first].shape[axis]
            along = tuple(name for name, value in tensors.items() if value.ndim > axis and value.shape[axis] == steps)
            outputs = [
                (key, place)
                for key, element in elements.items()
                if isinstance(element, Tensor)
                for place in (axis, *range(min(3, element.ndim)))
                if place < element.ndim and element.shape[place] == steps
            ]
            for sliced in dict.fromkeys((along, (first,))) if steps > 1 else ():
                for output in dict.fromkeys(outputs):
                    for after, element in elements.items():
                        if after != output[0] and _is_state(element):
                            states = [name for name in optional if name not in sliced]
                            yield from (_Form(axis, sliced, output, name, after) for name in states)
                    if self._call.kept_after:
                        yield _Form(axis, sliced, output, None, None)

    def agrees(self, form: _Form) -> bool:
        """Return whether the outputs of single steps are those of the whole, and depend on the state."""
        steps = self._given[form.sliced[0]].shape[form.axis]
        try:
            for count in dict.fromkeys((min(steps, _QUICK_STEPS), min(steps, _MAX_STEPS))):
                whole = _elements(self._run(self._cut(form, 0, count)))[form.output[0]]
                fed = self._fed(form, count)
                if fed.shape != whole.shape or difference([fed], [whole]) is not None:
                    return False
                if difference([self._fed(form, count, forget=True)], [whole]) is None:
                    return False
        except Exception:
            return False
        return True

    def _fed(self, form: _Form, count: int, *, forget: bool = False) -> Tensor:
        outputs, state = [], self._given.get(form.state) if form.state else None
        for step in range(count):
            anew = step == 0 or forget
            arguments = self._cut(form, step, 1)
            if form.state is not None and not anew:
                arguments[form.state] = state
            elements = _elements(self._run(arguments, anew=anew))
            outputs.append(elements[form.output[0]])
            state = elements.get(form.after)
        return torch.cat(outputs, form.output[1])

    def _cut(self, form: _Form, start: int, count: int) -> dict[str, Any]:
        """Return the arguments of some steps."""
        return {
            name: value.narrow(form.axis, start, count) if name in form.sliced else value
            for name, value in self._given.items()
        }

    def _run(self, arguments: dict[str, Any], *, anew: bool = True) -> Any:
        """Call the copy; ``anew`` with what the module kept before the call."""
        if self._frozen is None:
            device = next((v.device for v in self._given.values() if isinstance(v, Tensor)), torch.device("cpu"))
            self._dtype = widest_dtype(device)
            self._frozen = frozen_copy(self._module, self._dtype)
        if anew:
            for name, value in self._call.kept_before.items():
                assign(self._frozen, name, _cast_nested(value, self._dtype))
        bound = self._signature.bind_partial()
        bound.arguments = {
            name: _cast_nested(arguments[name], self._dtype) for name in self._signature.parameters if name in arguments
        }
        return self._frozen(*bound.args, **bound.kwargs)

    def template(self, form: _Form) -> _Example:
        """Return how the module is called for one step: its second one, because the first state may be missing."""
        self._run(self._cut(form, 0, 1))
        arguments, state = self._cut(form, 1, 1), self._state_after(form, self._run(self._cut(form, 0, 1)))
        bound = self._signature.bind_partial()
        if form.state is not None:
            arguments[form.state] = state
        bound.arguments = {name: arguments[name] for name in self._signature.parameters if name in arguments}
        leaves, structure = flatten((bound.args, bound.kwargs))
        kept = {name: self._kept(name) for name in self._call.kept_after} if form.state is None else {}
        call = StepCall(leaves, structure, kept)
        state_leaves = flatten(state)[0] if form.state is not None else []
        is_state = [any(leaf is other for other in state_leaves) for leaf in leaves]
        places = {index: _place(index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        states = [place for index, place in places.items() if is_state[index]]
        inputs = [place for index, place in places.items() if not is_state[index]]
        result = self._run(arguments, anew=False)
        after = flatten(_elements(result)[form.after])[0] if form.state is not None else []
        result_leaves = flatten(result)[0]
        results = [
            _place(next(i for i, other in enumerate(result_leaves) if other is leaf), given)
            for leaf, given in zip(after, state_leaves, strict=True)
        ]
        for name, value in kept.items():
            kept_places = [_place((name, i), leaf) for i, leaf in enumerate(flatten(value)[0]) if _is_state(leaf)]
            states, results = states + kept_places, results + kept_places
        call = StepCall(leaves, structure, kept, tuple(states), tuple(results), tuple(inputs))
        return _Example(call, RecordedCall(leaves, structure, kept_before=kept))

    def _state_after(self, form: _Form, result: Any) -> Any:
        """Return the state after a step, in the dtype of the recorded call."""
        if form.state is None:
            return None
        dtype = next(leaf.dtype.to_real() for leaf in flatten(self._call.results)[0] if _is_state(leaf))
        return _cast_nested(_elements(result)[form.after], dtype)

    def _kept(self, name: str) -> Any:
        assert self._frozen is not None
        path, _, attribute = name.rpartition(".")
        return _cast_nested(getattr(self._frozen.get_submodule(path), attribute), self._dtype)

    def segment(self, form: _Form, template: StepCall) -> Segment:
        """Return the call as a stretch of sequences. Without a first state they start after the first step."""
        sliced = [self._given.get(name) for name in form.sliced]
        if not all(isinstance(value, Tensor) for value in sliced):
            return Segment(None, None, None, None)
        steps, start = self._given[form.sliced[0]].shape[form.axis], 0
        state = self._given.get(form.state) if form.state is not None else None
        derived: bool | None = False
        if form.state is not None and _has_structure(state, template):
            derived = self._derived(form) if self._call.has_graph else None
        elif form.state is not None or template.kept:
            start, result = 1, self._run(self._cut(form, 0, 1))
            state = self._state_after(form, result)
        inputs = []
        for step in range(start, steps):
            call = self._example(form, template, step, state)
            values = values_of(template, call)
            first = values[template.states[0].index]
            axis = template.states[0].batch_axis
            batch = 1 if axis is None else first.shape[axis]
            flat = [place.flatten(values[place.index], batch).to(self._dtype) for place in template.inputs]
            inputs.append(torch.cat([torch.empty(batch, 0, dtype=self._dtype, device=first.device), *flat], 1))
        if not inputs:
            return Segment(None, None, None, None)
        states = flatten_places(template.states, [values[place.index] for place in template.states], batch)
        lengths = torch.full((batch,), len(inputs), device="cpu")
        stretch = Segment(
            torch.stack(inputs), states.unsqueeze(0), lengths, self._final(form, template, batch), derived
        )
        return stretch._replace(full_lengths=self._call.full_lengths)

    def _example(self, form: _Form, template: StepCall, step: int, state: Any) -> RecordedCall:
        arguments = self._cut(form, step, 1)
        if form.state is not None:
            arguments[form.state] = state
        bound = self._signature.bind_partial()
        bound.arguments = {name: arguments[name] for name in self._signature.parameters if name in arguments}
        leaves, structure = flatten((bound.args, bound.kwargs))
        return RecordedCall(leaves, structure, kept_before={name: self._kept(name) for name in template.kept})

    def unrolled(self, num_sequences: int, max_steps: int) -> tuple[UnrolledLayer, Sequences] | None:
        """Return the module as a layer whose state is found inside its forward."""
        tensors = [name for name, value in self._given.items() if isinstance(value, Tensor)]
        if len(tensors) != 1 or self._call.kept_after:
            return None
        (name,) = tensors
        for axis in (1, 0) if self._given[name].ndim > 2 else ():
            whole = cast(self._given[name], self._dtype).movedim(axis, 0)
            inputs = whole[:max_steps]

            def run(module: nn.Module, inputs: Tensor, axis: int = axis) -> Any:
                bound = self._signature.bind_partial()
                bound.arguments = {**self._given, name: inputs.movedim(0, axis)}
                return module(*bound.args, **bound.kwargs)

            try:
                if (found := unroll(self._module, inputs, run, num_sequences)) is not None:
                    layer, sequences = found
                    return layer, sequences._replace(full_lengths=sequences.lengths + len(whole) - len(inputs))
            except Exception:
                continue
        return None

    def _derived(self, form: _Form) -> bool:
        return form.state is not None and self._call.is_derived(self._given[form.state])

    def _final(self, form: _Form, template: StepCall, batch: int) -> Tensor | None:
        if form.state is None:
            return None
        leaves = flatten(_elements(self._call.result)[form.after])[0]
        if len(leaves) != len(template.states) or not all(_is_state(leaf) for leaf in leaves):
            return None
        return flatten_places(template.states, leaves, batch).unsqueeze(0)


def _elements(result: Any) -> dict[Any, Any]:
    """Return the parts of what a module returned, by index or name; of a single tensor, that one."""
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, tuple | list):
        return dict(enumerate(result))
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    return {None: result}


def _is_state(value: Any) -> bool:
    leaves = flatten(value)[0]
    return bool(leaves) and all(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and (leaf.is_floating_point() or leaf.is_complex())
        for leaf in leaves
    )


def _has_structure(state: Any, template: StepCall) -> bool:
    leaves = flatten(state)[0]
    return len(leaves) == len(template.states) and all(
        isinstance(leaf, Tensor) and leaf.ndim == len(place.shape)
        for leaf, place in zip(leaves, template.states, strict=True)
    )


def _place(index: Any, leaf: Tensor) -> Place:
    return Place(index, tuple(leaf.shape), leaf.dtype)


def _cast_nested(value: Any, dtype: torch.dtype) -> Any:
    leaves, structure = flatten(value)
    return unflatten(structure, [cast(leaf, dtype).clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def read_unrolled(
    module: nn.Module, calls: list[RecordedCall], num_sequences: int, max_steps: int
) -> tuple[UnrolledLayer, Sequences] | None:
    """Return a module whose state is found inside its forward, with the sequences of its largest call; None if not.

    It is called with one tensor, the sequences, and with nothing else that has a batch.
    """
    try:
        feeder = max((_Feeder(module, call) for call in calls), key=lambda feeder: feeder.num_numbers)
    except TypeError:
        return None
    return feeder.unrolled(num_sequences, max_steps)
