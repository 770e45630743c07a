"""Modules that take whole sequences and keep their state to themselves: the state is found inside their forward.

A copy of the module is run, and every tensor that torch makes on the way is noted. A step hands to the next one the
tensors that depend on the inputs up to that step, and that a computation with a later input uses: these are the state.
It is complete if the derivative over two steps is the product of those over one.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.kernel.recurrence import NoGraphError, Recurrence
from lightning_lyapunov.layers.base import DrivenCell, RecurrentLayer, Sequences
from lightning_lyapunov.layers.copies import frozen_copy

__all__ = ["UnrolledLayer", "unroll"]

# Steps of the short runs that find the state, and the first step after which it is looked for.
_SHORT_STEPS, _FIRST_STEP = 6, 2
# The memory of the Jacobians of one measurement: it limits the sequences.
_MAX_BYTES = 2**29

Run = Callable[[nn.Module, Tensor], Any]
"""Calls a module with inputs ``(time, batch, ...)``, as the model did."""


Spot = tuple[int, int]
"""A tensor on a tape: the number of the operation that made it, and its place among the results."""


class _Operation(NamedTuple):
    function: Any
    reads: tuple[Spot | None, ...]  # None for a tensor from outside: a weight, a constant
    results: tuple[Tensor, ...]


class _Tape(TorchFunctionMode):
    """Notes every function of torch that is called, with the tensors that it reads and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []  # keeps the tensors alive, so that no other gets their identity
        self._spots: dict[int, Spot] = {}
        self.inputs = torch.empty(0)
        self.results: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        results = tuple(_tensors(result))
        if results:
            reads = tuple(self._spots.get(id(tensor)) for tensor in _tensors((args, kwargs)))
            self._spots.update({id(t): (len(self.operations), place) for place, t in enumerate(results)})
            self.operations.append(_Operation(function, reads, results))
        return result

    def __getitem__(self, spot: Spot) -> Tensor:
        number, place = spot
        return self.operations[number].results[place]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


class HandedOn(NamedTuple):
    """The tensors that a step hands to the next one.

    Attributes:
        spots: where they are on the tape of ``_SHORT_STEPS`` steps, after step ``_FIRST_STEP``.
        period: the operations of a step.
        shift: the operations that come before the first step for each step of the sequence.
        axes: the axis of the batch of each tensor.
    """

    spots: tuple[Spot, ...]
    period: int
    shift: int
    axes: tuple[int, ...]

    def states(self, tape: _Tape, step: int, num_steps: int) -> list[Tensor]:
        """Return the tensors after a step of a sequence."""
        further = (step - _FIRST_STEP) * self.period + (num_steps - _SHORT_STEPS) * self.shift
        return [tape[number + further, place] for number, place in self.spots]


def find_state(module: nn.Module, inputs: Tensor, run: Run) -> HandedOn | None:
    """Return the tensors that a module hands from one step to the next; None if they cannot be told.

    Args:
        module: the module.
        inputs: ``(time, batch, ...)``.
        run: calls it with inputs of any length.
    """
    if len(inputs) < _SHORT_STEPS + 2:
        return None
    frozen = frozen_copy(module, widest_dtype(inputs.device))
    time_axes = _time_axes(frozen, inputs, run)
    located = [_locate(frozen, inputs[:steps], run, time_axes) for steps in (_SHORT_STEPS, _SHORT_STEPS + 1)]
    short, longer = located
    if short is None or longer is None:
        return None
    (spots, period, tensors), (others, other_period, _) = short, longer
    shifts = {number - first for (number, _), (first, _) in zip(others, spots, strict=True)}
    if len(others) != len(spots) or period != other_period or len(shifts) != 1:
        return None
    batch = inputs.shape[1]
    axes = [next((axis for axis, size in enumerate(tensor.shape) if size == batch), None) for tensor in tensors]
    if None in axes or not all(tensor.is_floating_point() for tensor in tensors):
        return None
    found = HandedOn(tuple(spots), period, shifts.pop(), tuple(axis for axis in axes if axis is not None))
    return found if _is_complete(frozen, inputs[:_SHORT_STEPS], run, found, time_axes) else None


def _locate(
    frozen: nn.Module, inputs: Tensor, run: Run, time_axes: list[int | None]
) -> tuple[list[Spot], int, list[Tensor]] | None:
    """Return where the tensors are that the first steps hand on, the operations of a step, and the tensors."""
    tape, last_inputs = _dependence(frozen, inputs, run, time_axes)
    handed = [_handed_on(tape, last_inputs, step) for step in range(_FIRST_STEP, len(inputs) - 1)] if tape else []
    if not tape or not handed or not handed[0] or len({len(spots) for spots in handed}) > 1:
        return None
    period = handed[1][0][0] - handed[0][0][0]
    regular = all(
        spots == [(number + later * period, place) for number, place in handed[0]] for later, spots in enumerate(handed)
    )
    return (handed[0], period, [tape[spot] for spot in handed[0]]) if regular and period > 0 else None


def _dependence(
    frozen: nn.Module, inputs: Tensor, run: Run, time_axes: list[int | None]
) -> tuple[_Tape | None, dict[Spot, int]]:
    """Return a tape, and for each of its tensors the number of steps whose inputs it depends on."""
    tape = _taped(frozen, inputs, run)
    last_inputs = {
        (n, place): 0 for n, operation in enumerate(tape.operations) for place in range(len(operation.results))
    }
    for step in range(len(inputs)):
        other = _taped(frozen, torch.cat((inputs[:step], 1.5 * inputs[step:] + 0.5)), run)
        if [operation.function for operation in other.operations] != [o.function for o in tape.operations]:
            return None, {}
        for spot in last_inputs:
            one, two = tape[spot], other[spot]
            if one.shape != two.shape or not torch.equal(one, two):
                last_inputs[spot] = step + 1
        for axis, one, two in zip(time_axes, tape.results, other.results, strict=True):
            if axis is not None and not torch.equal(one.narrow(axis, 0, step), two.narrow(axis, 0, step)):
                return None, {}  # an output depends on later inputs
    return tape, last_inputs


def _time_axes(frozen: nn.Module, inputs: Tensor, run: Run) -> list[int | None]:
    """Return the axis of each result that is as long as the sequence; None for one that has none."""
    shorter, longer = (_taped(frozen, inputs[:steps], run).results for steps in (_SHORT_STEPS, _SHORT_STEPS + 1))
    return [
        next((axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b), None)
        for one, two in zip(shorter, longer, strict=True)
    ]


def _taped(frozen: nn.Module, inputs: Tensor, run: Run, *, graph: bool = False) -> _Tape:
    tape, inputs = _Tape(), inputs.clone().requires_grad_(graph)
    with torch.set_grad_enabled(graph), tape:
        result = run(frozen, inputs * 1)
    tape.inputs, tape.results = inputs, [tensor for tensor in _tensors(result) if tensor.is_floating_point()]
    return tape


def _handed_on(tape: _Tape, last_inputs: dict[Spot, int], step: int) -> list[Spot]:
    """Return the fewest tensors that carry everything from a step to the next."""
    crossing = {
        read
        for number, operation in enumerate(tape.operations)
        if any(last_inputs[number, place] == step + 1 for place in range(len(operation.results)))
        for read in operation.reads
        if read is not None and last_inputs[read] == step
    }
    # A product with a weight is replaced by what it is a product of.
    while better := next(filter(None, (_smaller(tape, last_inputs, step, crossing, spot) for spot in crossing)), None):
        crossing = better
    return sorted(crossing)


def _smaller(
    tape: _Tape, last_inputs: dict[Spot, int], step: int, crossing: set[Spot], spot: Spot
) -> "set[Spot] | None":
    """Return the tensors with one replaced by what it was made of, if that is smaller; None if it is not."""
    reads = tape.operations[spot[0]].reads
    inside = {read for read in reads if read is not None and last_inputs[read] > 0}
    if not inside or any(last_inputs[read] != step for read in inside):
        return None
    size, others = tape[spot].numel(), sum(tape[read].numel() for read in inside - crossing)
    has_weight = len(inside) < len(reads)
    if others < size or (others == size and has_weight and len(inside) == 1):
        return (crossing - {spot}) | inside
    return None


def _is_complete(frozen: nn.Module, inputs: Tensor, run: Run, found: HandedOn, time_axes: list[int | None]) -> bool:
    """Return whether the derivative over two steps is the product of those over one, member by member."""
    tape = _taped(frozen, inputs, run, graph=True)
    one, two, three = (found.states(tape, step, len(inputs)) for step in range(_FIRST_STEP, _FIRST_STEP + 3))
    try:
        both, first, second = _jacobian(one, three, found), _jacobian(one, two, found), _jacobian(two, three, found)
        # A cotangent of the first member stays with it.
        cotangent = [torch.zeros_like(tensor) for tensor in two]
        for tensor, axis in zip(cotangent, found.axes, strict=True):
            tensor.narrow(axis, 0, 1).fill_(1.0)
        back = torch.autograd.grad(two, one, cotangent, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    others = [g.narrow(axis, 1, g.shape[axis] - 1) for g, axis in zip(back, found.axes, strict=True) if g is not None]
    alone = all(not other.any() for other in others)
    return (
        alone and torch.allclose(second @ first, both, rtol=1e-7, atol=1e-10) and _is_all(tape, two, found, time_axes)
    )


def _is_all(tape: _Tape, state: list[Tensor], found: HandedOn, time_axes: list[int | None]) -> bool:
    """Return whether results that do not follow the steps depend on the first input through the state alone."""
    pairs = zip(tape.results, time_axes, strict=True)
    last = [result for result, axis in pairs if axis is None and result.requires_grad]
    if not last:
        return True
    with torch.enable_grad():
        flat = _flat(state, found.axes)
        total = torch.cat([result.sin().flatten() for result in last]).sum()
    (direct,) = torch.autograd.grad(total, tape.inputs, retain_graph=True)
    grads = torch.autograd.grad(total, state, retain_graph=True, allow_unused=True, materialize_grads=True)
    partial = _partial(_flat(grads, found.axes).unsqueeze(1), state, found)
    (through,) = torch.autograd.grad(flat, tape.inputs, partial.squeeze(1), retain_graph=True)
    return torch.allclose(through[0], direct[0], rtol=1e-7, atol=1e-10)


def _flat(tensors: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    rows = [tensor.movedim(axis, 0) for tensor, axis in zip(tensors, axes, strict=True)]
    return torch.cat([row.reshape(len(row), -1) for row in rows], 1)


def _jacobian(before: list[Tensor], after: list[Tensor], found: HandedOn) -> Tensor:
    """Return the derivative of the flat state after by that before, ``(batch, state, state)``.

    Where a part of the state is computed from another one, as ``h`` from ``c``, autograd's derivative by the other
    counts the path through that part, too: ``G = J D``, with ``D`` the derivative of the state by itself.
    """
    return _partial(_total_derivative(before, after, found), before, found)


def _partial(total: Tensor, state: list[Tensor], found: HandedOn) -> Tensor:
    """Return ``G D^{-1}``: derivatives by each part of a state with the others held, from those that are not."""
    within = _total_derivative(state, state, found)
    chained = within - torch.eye(within.shape[-1], dtype=within.dtype, device=within.device)
    partial = term = total
    for _ in state[1:]:  # D - 1 is nilpotent: no part is computed from itself
        term = -term @ chained
        partial = partial + term
    return partial


def _total_derivative(before: list[Tensor], after: list[Tensor], found: HandedOn) -> Tensor:
    with torch.enable_grad():
        flat = _flat(after, found.axes)
    rows = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device).unsqueeze(1).expand(-1, len(flat), -1)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(flat, before, rows, is_grads_batched=True, **options)
    parts = [grad.movedim(axis + 1, 1) for grad, axis in zip(grads, found.axes, strict=True)]
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1).movedim(0, 1)


class UnrolledLayer(RecurrentLayer):
    """A module whose steps are found inside its forward.

    Args:
        module: the module.
        run: calls it with inputs ``(time, batch, ...)``.
        found: the tensors that a step hands to the next one.
        state_size: their numbers for one member of the batch.
    """

    cell_names = ("",)

    def __init__(self, module: nn.Module, run: Run, found: HandedOn, state_size: int) -> None:
        self.module, self._run, self._found, self._state_size = module, run, found, state_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self._state_size,)

    @property
    def dtype(self) -> torch.dtype | None:
        return next((parameter.dtype for parameter in self.module.parameters()), None)

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        raise NotImplementedError("It is read from recorded calls.")

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raise NotImplementedError("It is read from recorded calls.")

    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        inputs = sequences.inputs
        frozen = frozen_copy(self.module, widest_dtype(inputs.device))
        matrices, states = [], []
        with torch.inference_mode(False), torch.enable_grad():
            tape = _taped(frozen, inputs.to(widest_dtype(inputs.device)), self._run, graph=True)
            steps = [self._found.states(tape, step, len(inputs)) for step in range(_FIRST_STEP, len(inputs))]
            for before, after in pairwise(steps):
                matrices.append(_jacobian(before, after, self._found).detach())
                states.append(_flat(after, self._found.axes).detach())
        first = _flat(steps[0], self._found.axes).detach()
        yield DrivenCell("", _MatrixRecurrence(torch.stack(states)), torch.stack(matrices), first)


_NO_GRAPH = (
    "Its state stays inside of its forward, so its Jacobians hold no graph to its weights. Register it: "
    "`register_layer(cls, step=..., read_call=...)`, or let its forward call a cell once a step and name that."
)


class _MatrixRecurrence(Recurrence):
    """A trajectory whose Jacobians are known: they are its inputs, ``(time, batch, state, state)``."""

    def __init__(self, states: Tensor) -> None:
        self._states, self.state_size, self._done = states, states.shape[-1], 0

    def step(self, state: Tensor, inputs: Tensor) -> Tensor:
        raise NoGraphError(_NO_GRAPH)

    def trajectory(self, inputs: Tensor, state: Tensor) -> Tensor:
        start, self._done = self._done, self._done + len(inputs)
        return self._states[start : self._done, : inputs.shape[1]]

    def linearise(self, states: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs,)

    def push_forward(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        for matrices in linearised[0]:
            frame = matrices @ frame.to(matrices.dtype)
        return frame

    def push_with_graph(self, linearised: Sequence[Tensor], frame: Tensor) -> Tensor:
        raise NoGraphError(_NO_GRAPH)


def unroll(module: nn.Module, inputs: Tensor, run: Run, max_members: int) -> tuple[UnrolledLayer, Sequences] | None:
    """Return a module as a layer, with its sequences; None if its state cannot be found.

    Args:
        module: the module.
        inputs: ``(time, batch, ...)``.
        run: calls it with inputs of any length and any members of the batch.
        max_members: the most members of the batch to follow.
    """
    found = find_state(module, inputs, run)
    if found is None:
        return None
    tape = _taped(frozen_copy(module, inputs.dtype), inputs[:_SHORT_STEPS], run)
    size = _flat(found.states(tape, _FIRST_STEP, _SHORT_STEPS), found.axes).shape[1]
    batch = inputs.shape[1]
    count = min(batch, max_members, max(1, _MAX_BYTES // (8 * len(inputs) * size**2)))
    members = [member * batch // count for member in range(count)]
    lengths = torch.full((count,), len(inputs) - _FIRST_STEP - 1, device="cpu")
    return UnrolledLayer(module, run, found, size), Sequences(
        inputs[:, members], inputs.new_zeros(1, count, size), lengths
    )
