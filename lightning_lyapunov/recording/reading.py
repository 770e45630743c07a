"""From recorded calls to sequences and to the map that is followed along them, checked against what the layer did."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lyapunov.kernel.precision import plain_arithmetic, widest_dtype
from lightning_lyapunov.layers.base import RecurrentLayer, Sequences
from lightning_lyapunov.layers.copies import cast, frozen_copy, has_made_weights
from lightning_lyapunov.layers.custom import CustomLayer
from lightning_lyapunov.layers.registry import as_closed_form, has_own_forward, registered
from lightning_lyapunov.layers.torch_nn import CellLayer, StackedLayer
from lightning_lyapunov.layers.trees import unflatten
from lightning_lyapunov.layers.watched import WatchedCell
from lightning_lyapunov.recording.calls import RecordedCall, RecordedCalls
from lightning_lyapunov.recording.cells import MIN_SHARE, NoStateError, NotFollowedError, Results, read_cell
from lightning_lyapunov.recording.chains import Segment, StateChangedError, join
from lightning_lyapunov.recording.replay import difference, nudged, slack
from lightning_lyapunov.recording.trimming import few_members
from lightning_lyapunov.recording.whole_layers import read_unrolled, read_whole_layer

__all__ = ["Followed", "check_closed_form", "follow"]

# Leaves of arguments that hold nothing else.
_NUMBERS = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device)

# Steps for which torch's own forward is compared with its formula, and members: it does the same in each. Another
# forward may not, and is compared over all steps, with as many members as are measured by default.
_CHECKED_STEPS, _CHECKED_MEMBERS, _MEMBERS_OF_OWN_FORWARD = 25, 2, 16


class Followed(NamedTuple):
    """A map, and the sequences to follow it along.

    Attributes:
        layer: the map, with the weights of now; or, where ``last_call`` is given, with those of its making.
        sequences: the sequences.
        last_call: a call to make the map anew by, when the weights have changed.
    """

    layer: RecurrentLayer
    sequences: Sequences
    last_call: RecordedCalls | None = None

    @property
    def holds_copies_only(self) -> bool:
        """Whether it holds no object of the model's, which came as an argument and may hold the batch or a graph."""
        calls: list[Any] = [] if self.last_call is None else self.last_call.calls
        if isinstance(self.layer, WatchedCell):
            calls = [*calls, self.layer.step_call]
        return all(isinstance(leaf, _NUMBERS) for call in calls for leaf in call.arguments)

    def again(self, module: nn.Module) -> "Followed":
        """Return the same with the weights of now."""
        if self.last_call is None:
            return self
        with plain_arithmetic():
            return self._replace(layer=_checked_closed_form(module, self.last_call)[0])


def follow(module: nn.Module, recorded: RecordedCalls, num_sequences: int, max_steps: int) -> Followed | None:
    """Return the map of a module, checked against what the module does, and the sequences of its calls; None if none.

    A class that was registered is read by its own functions. Torch's layers are followed in closed form, if that gives
    what the module itself gives in evaluation mode with its weights as they are now. Any other module, and one of torch
    whose forward does something else, is stepped by calling it.

    Args:
        module: the layer.
        recorded: its calls in one batch.
        num_sequences: the most sequences to return.
        max_steps: the most steps of each.

    Raises:
        NotFollowedError: if no map agrees with what the layer did; the message says why, and what to write.
    """
    if recorded.mismatch is not None:
        raise NotFollowedError(
            f"Called again with the same input, state and weights, {type(module).__name__} returned something else: "
            f"{recorded.mismatch}. Something beside its arguments changes its result, such as a hook or a counter. "
            "Name the module that holds it."
        )
    calls = [call for call in recorded.calls if not call.is_empty]
    if not calls:
        return None
    try:
        with plain_arithmetic():
            limits = num_sequences, max_steps
            layer, read = _read(module, replace(recorded, calls=calls), *limits)
            sequences = read if isinstance(read, Sequences) else join(read, *limits, recorded.num_missed)
            if sequences is None:
                return None
            if isinstance(layer, WatchedCell):
                _check_shared(layer, sequences)
            return Followed(layer, sequences, None if layer.module is module else replace(recorded, calls=calls[-1:]))
    except StateChangedError:
        raise NotFollowedError(
            f"The state of {type(module).__name__} comes back changed: between two of its calls the model does "
            "something to it, which is a part of the recurrence. Name the module whose forward holds the whole step, "
            '`LyapunovMonitor(modules="...")`, or register the one that holds the loop: '
            "`register_layer(cls, step=..., read_call=...)`."
        ) from None


def _read(
    module: nn.Module, recorded: RecordedCalls, num_sequences: int, max_steps: int
) -> tuple[RecurrentLayer, list[Segment] | Sequences]:
    """Return a map, and the calls as stretches of sequences, or the sequences themselves."""
    calls = recorded.calls
    if (known := registered(module)) is not None:
        return known, _registered_segments(known, calls)
    failure = ""
    if (closed := as_closed_form(module)) is not None:
        try:
            layer, segments = _checked_closed_form(module, recorded)
        except StateChangedError:
            raise
        except Exception as error:
            failure = f"Torch's formula does not give what its forward gives ({error}). "
            if len(closed.cell_names) > 1:
                raise NotFollowedError(
                    f"{failure}A layer of several cells with a forward of its own has to be registered: "
                    "`register_layer(cls, step=..., read_call=...)`."
                ) from error
        else:
            return layer, segments
    try:
        whole = read_whole_layer(module, calls)
        return read_cell(module, calls) if whole is None else whole
    except NoStateError:
        if (unrolled := read_unrolled(module, calls, num_sequences, max_steps)) is not None:
            return unrolled
        raise NotFollowedError(
            f"{failure}{type(module).__name__} was called, but no argument of it is a state that an earlier call "
            "returned, and it cannot be fed one step at a time. Name the module that is called with the state, or "
            "register this one: `register_layer(cls, step=..., read_call=...)`."
        ) from None


def _registered_segments(layer: CustomLayer, calls: list[RecordedCall]) -> list[Segment]:
    """Return the calls of a registered layer, and check its step by the states that the layer returns."""
    read = [layer.read_call(*call.call, call.result) for call in calls]
    sequences = [call.sequences for call in read]
    finals = [call.final_states for call in read]
    if all(final is None for final in finals):
        finals = _returned_states(layer, sequences, calls)
    check_members(layer, sequences[-1])
    segments = []
    for call, (inputs, states, lengths, *_), final in zip(calls, sequences, finals, strict=True):
        if call.stepped is not None and final is not None:
            message = difference([call.stepped], [final[0]])
            if message is not None:
                raise NotFollowedError(
                    f"The registered `step` of {type(layer.module).__name__} does not give the state that the layer "
                    f"returned: {message}."
                )
        if final is None and call.stepped is not None:
            final = call.stepped.unsqueeze(0)
        segments.append(Segment(inputs, states, lengths, final, _shares_memory(call, layer, states)))
    return segments


def _shares_memory(call: RecordedCall, layer: CustomLayer, states: Tensor) -> bool | None:
    """Return whether the state is among the arguments that were computed from earlier results."""
    if not call.has_graph:
        return None
    derived = [leaf for leaf, flag in zip(call.arguments, call.derived, strict=True) if flag]
    parts = layer.leaves(states[0])
    return any(
        part.numel() == leaf.numel() and torch.equal(part.flatten().to(leaf.dtype), leaf.flatten())
        for part in parts
        for leaf in derived
    )


def _returned_states(layer: CustomLayer, sequences: list[Sequences], calls: list[RecordedCall]) -> list[Tensor | None]:
    """Return the state after each call, where later calls are given what earlier ones returned; None where not."""
    given = [layer.leaves(one.states[0]) for one in sequences]
    places: list[int] = []
    for part in range(len(given[0])):
        shares: dict[int, list[float]] = {}
        earlier: dict[int, Results] = {}
        for leaves, call in zip(given, calls, strict=True):
            for place, results in earlier.items():
                for share in results.shares_in({part: leaves[part]}).values():
                    shares.setdefault(place, []).append(share)
            for place, result in enumerate(call.results):
                if isinstance(result, Tensor) and result.numel() == leaves[part].numel():
                    earlier.setdefault(place, Results()).add(result)
        means = {place: sum(values) / len(values) for place, values in shares.items() if place not in places}
        if not means or max(means.values()) < MIN_SHARE:
            return [None] * len(calls)
        places.append(max(means, key=means.__getitem__))
    return [layer.join_leaves([call.results[place] for place in places]).unsqueeze(0) for call in calls]


def check_members(layer: CustomLayer, sequences: Sequences) -> None:
    """Raise unless the first and the last member of a batch alone have the states that they have in the whole."""
    batch = sequences.inputs.shape[1]
    if batch == 1 or len(sequences.inputs) == 0:
        return
    frozen = frozen_copy(layer.module, layer.dtype or sequences.states.dtype)
    first = Sequences(sequences.inputs[:1], sequences.states, sequences.lengths)
    whole = layer.after(frozen, first)
    for member in (0, batch - 1):
        one = slice(member, member + 1)
        try:
            alone = layer.after(frozen, Sequences(first.inputs[:, one], first.states[:, one], first.lengths[one]))
            message = difference([alone], [whole[one]])
        except Exception as error:
            message = str(error)
        if message is not None:
            raise NotFollowedError(
                f"The members of a batch of {type(layer.module).__name__} depend on one another: one alone has another "
                f"state than in the whole ({message}). Let all of them be one state, of a batch of one: "
                "`register_layer(cls, step=lambda m, x, s: m(x[0], s[0])[None], read_call=lambda m, x, s: "
                "(x[None, None], s[None]))`."
            )


def _check_shared(layer: WatchedCell, sequences: Sequences) -> None:
    """Raise if members of different calls are stepped together by an argument that belongs to the whole of a call."""
    start = 0
    for place in layer.step_call.inputs:
        numbers, start = sequences.inputs[:, :, start : start + place.size], start + place.size
        if place.batch_axis is None:
            runs = torch.arange(len(numbers), device="cpu").unsqueeze(-1) < sequences.lengths
            longest = numbers[:, [int(sequences.lengths.argmax())]]
            if ((numbers != longest).any(-1) & runs.to(numbers.device)).any():
                raise NotFollowedError(
                    f"An argument of {type(layer.module).__name__} is one for all members and another in each call, "
                    "and its members are not in step. Give it to each member, as a tensor with the batch."
                )


def _checked_closed_form(module: nn.Module, recorded: RecordedCalls) -> tuple[RecurrentLayer, list[Segment]]:
    """Return a closed form of the weights of the next evaluation forward, if that forward does the same."""
    calls, dtype = recorded.calls, widest_dtype(next(module.parameters()).device)
    if recorded.is_sharded and not has_own_forward(module):
        live = as_closed_form(module)
        assert live is not None
        return live, _closed_form_segments(live, calls)
    by_wrapper = _made_by_wrapper(recorded, dtype) if has_made_weights(module) else None
    frozen = frozen_copy(module, dtype) if by_wrapper is None else by_wrapper
    layer, live = as_closed_form(frozen), as_closed_form(module)
    assert layer is not None
    assert live is not None
    is_finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    # A saturated gate hides a weight that is not finite: the formulas, which it makes NaN, are the truth then.
    for call in [] if not is_finite else calls if has_own_forward(module) else calls[-1:]:
        args, kwargs = _cast_call(_of_few(module, call), dtype)
        before = _attributes(frozen)
        output = frozen(*args, **kwargs)  # a forward that makes weights makes them now
        if by_wrapper is None:
            _check_weights(module, before, frozen)
        check_closed_form(layer, args, kwargs, output)
    # Torch's own forward reads the weights where they are; another one may have made them in the copy.
    is_live = not has_own_forward(module) and not has_made_weights(module)
    return live if is_live else layer, _closed_form_segments(live, calls)


def _closed_form_segments(layer: StackedLayer | CellLayer, calls: list[RecordedCall]) -> list[Segment]:
    segments = []
    for call in calls:
        sequences, final = layer.read_call(*call.call, call.result)
        # The two directions of a bidirectional layer end at different steps: no call goes on from both.
        derived = False if final is None else _is_derived(layer, call)
        stretch = Segment(sequences.inputs, sequences.states, sequences.lengths, final, derived)
        segments.append(stretch._replace(full_lengths=call.full_lengths))
    return segments


def _made_by_wrapper(recorded: RecordedCalls, dtype: torch.dtype) -> nn.Module | None:
    """Return a copy of a layer whose weights the module around it has made; None if that makes none."""
    if recorded.wrapper is None:
        return None
    wrapper, name, call = recorded.wrapper
    outer = frozen_copy(wrapper, dtype)
    layer = outer.get_submodule(name)
    before = _attributes(layer)
    args, kwargs = _cast_call(call, dtype)
    outer(*args, **kwargs)
    now = _attributes(layer)
    made = any(now[key] is not before.get(key) for key in now if key.startswith(("weight_", "bias_")))
    return layer if made else None


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **module._parameters}


def _cast_call(call: RecordedCall, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves = [cast(leaf, dtype).clone() if isinstance(leaf, Tensor) else leaf for leaf in call.arguments]
    args, kwargs = unflatten(call.argument_structure, leaves)
    return args, kwargs


def _of_few(module: nn.Module, call: RecordedCall) -> RecordedCall:
    """Return a call with a few members of its batch, where these can be told."""
    is_own = has_own_forward(module)
    few = few_members(module, call.arguments, call.results, _MEMBERS_OF_OWN_FORWARD if is_own else _CHECKED_MEMBERS)
    if few is None:
        return call
    (inputs, *others), results = few
    if isinstance(module, nn.RNNBase) and not is_own:
        time_axis = 1 if module.batch_first else 0
        inputs = inputs.narrow(time_axis, 0, min(_CHECKED_STEPS, inputs.shape[time_axis]))
    return replace(call, arguments=[inputs, *others], results=results)


def _check_weights(module: nn.Module, before: dict[str, Any], frozen: nn.Module) -> None:
    """Refuse weights that were computed from others by something else than the module's own forward."""
    now = _attributes(frozen)
    for name, weight in _attributes(module).items():
        made = isinstance(weight, Tensor) and weight.grad_fn is not None
        if made and name.startswith(("weight_", "bias_")) and now.get(name) is before.get(name):
            raise NotFollowedError(f"its `{name}` is computed outside of its forward")


def check_closed_form(
    layer: StackedLayer | CellLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Raise NotFollowedError unless the closed form gives what the module returned for some arguments."""
    sequences, _ = layer.read_call(args, kwargs, output)
    returned = layer.read_output(output, sequences.lengths)
    again = layer.outputs(sequences)
    steps = min(len(again), len(returned)) if int(sequences.lengths.max()) <= len(returned) else len(again)
    message = difference([again[:steps]], [returned[:steps]])
    if message is not None:  # a chaotic network forgets its digits: then a nudge grows as the difference does
        other = layer.outputs(sequences._replace(inputs=nudged(sequences.inputs, 1e3)))
        message = difference([again[:steps]], [returned[:steps]], [slack(other, again, time_axis=0)[:steps]])
    if message is not None:
        raise NotFollowedError(message)


def _is_derived(layer: StackedLayer | CellLayer, call: RecordedCall) -> bool | None:
    """Return whether the state of a call was computed from earlier results; None if nobody can tell."""
    return call.is_derived(layer.given_state(*call.call)) if call.has_graph else None
