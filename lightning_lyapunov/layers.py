"""What a recurrent layer is called with, as sequences, and the recurrences that those sequences drive."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lyapunov.recurrence import (
    CallableRecurrence,
    GRURecurrence,
    LSTMRecurrence,
    Recurrence,
    RNNRecurrence,
)

__all__ = ["Driven", "RecurrentLayer", "Sequences", "as_layer", "is_recurrent"]


class Sequences(NamedTuple):
    """Sequences that a layer was called with.

    Attributes:
        inputs: ``(time, batch, input)``; what follows the end of a sequence is never read.
        states: the state of each cell before the first step, ``(cells, batch, state)``.
        lengths: steps of each sequence, ``(batch,)``, on the CPU.
    """

    inputs: Tensor
    states: Tensor
    lengths: Tensor


class Driven(NamedTuple):
    """One cell of a layer, with the inputs ``(time, batch, input)`` and the state ``(batch, state)`` it starts from."""

    name: str
    recurrence: Recurrence
    inputs: Tensor
    state: Tensor


class RecurrentLayer(ABC):
    """A layer whose calls are sequences and whose cells are recurrences."""

    cell_names: tuple[str, ...]
    state_sizes: tuple[int, ...]

    @abstractmethod
    def read(self, inputs: Any, state: Any = None) -> Sequences:
        """Return what the layer was called with as sequences, in the order of the batch."""

    def read_call(self, *args: Any, **kwargs: Any) -> Sequences:
        """Return one call of the module as sequences, from the arguments of its ``forward``."""
        raise TypeError(f"The calls of a {type(self).__name__} cannot be recorded.")

    @abstractmethod
    def drive(self, sequences: Sequences) -> Iterator[Driven]:
        """Yield each cell with what drives it."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None where they are not known."""


def as_layer(dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor]) -> RecurrentLayer:
    """Return the layer that a module or a plain callable is.

    Raises:
        TypeError: if it is neither a recurrent layer nor a callable.
    """
    if isinstance(dynamics, nn.RNNBase):
        return StackedLayer(dynamics)
    if isinstance(dynamics, nn.RNNCellBase):
        return CellLayer(dynamics)
    if isinstance(dynamics, nn.Module):
        raise TypeError(
            f"`dynamics` is a {type(dynamics).__name__}, which is no recurrent layer of torch.nn. Pass one of its "
            "recurrent layers, or a callable `step(state, input) -> state`."
        )
    if not callable(dynamics):
        raise TypeError(
            f"`dynamics` must be a recurrent module or a callable `step(state, input) -> state`, "
            f"not {type(dynamics).__name__}."
        )
    return CallableLayer(dynamics)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a recurrent layer that is recognised without being named."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


class StackedLayer(RecurrentLayer):
    """:class:`torch.nn.RNN`, ``GRU`` or ``LSTM``: one cell for each layer and direction."""

    def __init__(self, module: nn.RNNBase) -> None:
        self.module = module
        directions = ("", "_reverse") if module.bidirectional else ("",)
        self.cell_names = tuple(f"l{i}{direction}" for i in range(module.num_layers) for direction in directions)
        self.has_cell_state = module.mode == "LSTM"
        self.output_size = module.proj_size or module.hidden_size
        state_size = self.output_size + module.hidden_size if self.has_cell_state else module.hidden_size
        self.state_sizes = (state_size,) * len(self.cell_names)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight_hh_l0.dtype

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        if isinstance(inputs, PackedSequence):
            return self._read_packed(inputs, state)
        _check_tensor("inputs", inputs, self.module.input_size)
        if inputs.ndim == 2:
            inputs, state = inputs.unsqueeze(1), _map_state(state, lambda part: part.unsqueeze(1))
        elif inputs.ndim == 3:
            inputs = inputs.transpose(0, 1) if self.module.batch_first else inputs
        else:
            raise ValueError(
                f"`inputs` must be (time, batch, input), (batch, time, input) with `batch_first`, or (time, input), "
                f"but its shape is {tuple(inputs.shape)}."
            )
        time, batch, _ = inputs.shape
        return Sequences(inputs, self._read_state(state, batch), torch.full((batch,), time))

    def read_call(self, *args: Any, **kwargs: Any) -> Sequences:
        arguments = signature(self.module.forward).bind(*args, **kwargs).arguments
        inputs, *_ = arguments.values()
        return self.read(inputs, arguments.get("hx"))

    def _read_packed(self, inputs: PackedSequence, state: Any) -> Sequences:
        _check_tensor("inputs", inputs.data, self.module.input_size)
        padded, lengths = nn.utils.rnn.pad_packed_sequence(inputs)
        return Sequences(padded, self._read_state(state, len(lengths)), lengths)

    def _read_state(self, state: Any, batch: int) -> Tensor:
        """Return the states of all cells, ``(cells, batch, state)``; zeros where none are given."""
        cells, weight = len(self.cell_names), self.module.weight_hh_l0
        if state is None:
            return weight.new_zeros(cells, batch, self.state_sizes[0])
        parts = state if self.has_cell_state else (state,)
        sizes = (self.output_size, self.module.hidden_size)[: len(parts)]
        wanted = " and ".join(str((cells, batch, size)) for size in sizes)
        if not isinstance(parts, Sequence) or len(parts) != 1 + self.has_cell_state:
            raise ValueError(f"`state` must be {'a pair (h, c)' if self.has_cell_state else 'one tensor'} of {wanted}.")
        for part, size in zip(parts, sizes, strict=True):
            _check_tensor("state", part)
            if part.shape != (cells, batch, size):
                raise ValueError(f"`state` must be of shape {wanted}, but its shape is {tuple(part.shape)}.")
        return torch.cat(tuple(parts), -1)

    def drive(self, sequences: Sequences) -> Iterator[Driven]:
        layer_inputs, states, lengths = sequences
        directions = 2 if self.module.bidirectional else 1
        layer_inputs = layer_inputs.to(_state_dtype(layer_inputs))
        for layer in range(self.module.num_layers):
            outputs = []
            for cell in range(layer * directions, (layer + 1) * directions):
                backwards = cell % directions == 1
                inputs = _reversed_in_time(layer_inputs, lengths) if backwards else layer_inputs
                state = states[cell].to(inputs.dtype)
                recurrence = self._recurrence(self.cell_names[cell], inputs.dtype)
                yield Driven(self.cell_names[cell], recurrence, inputs, state)
                if layer + 1 < self.module.num_layers:
                    output = recurrence.output(recurrence.trajectory(inputs, state))
                    outputs.append(_reversed_in_time(output, lengths) if backwards else output)
            layer_inputs = torch.cat(outputs, -1) if outputs else layer_inputs

    def _recurrence(self, name: str, dtype: torch.dtype) -> Recurrence:
        def weight(kind: str) -> Tensor | None:
            value = getattr(self.module, f"{kind}_{name}", None)
            return None if value is None else value.detach().to(dtype)

        weights = weight("weight_ih"), weight("weight_hh"), weight("bias_ih"), weight("bias_hh")
        if self.has_cell_state:
            return LSTMRecurrence(*weights, weight_hr=weight("weight_hr"))
        if self.module.mode == "GRU":
            return GRURecurrence(*weights)
        return RNNRecurrence(*weights, nonlinearity=self.module.mode.removeprefix("RNN_").lower())


class CellLayer(RecurrentLayer):
    """:class:`torch.nn.RNNCell`, ``GRUCell`` or ``LSTMCell``: ``inputs`` is ``(time, batch, input)``."""

    cell_names = ("",)

    def __init__(self, module: nn.RNNCellBase) -> None:
        self.module = module
        self.has_cell_state = isinstance(module, nn.LSTMCell)
        self.state_sizes = (module.hidden_size * (1 + self.has_cell_state),)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight_hh.dtype

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        _check_tensor("inputs", inputs, self.module.input_size)
        if inputs.ndim != 3:
            raise ValueError(f"`inputs` must be (time, batch, input), but its shape is {tuple(inputs.shape)}.")
        time, batch, _ = inputs.shape
        if state is None:
            states = self.module.weight_hh.new_zeros(batch, self.state_sizes[0])
        else:
            parts = state if self.has_cell_state else (state,)
            shape = (batch, self.module.hidden_size)
            if len(parts) != 1 + self.has_cell_state or any(part.shape != shape for part in parts):
                raise ValueError(
                    f"`state` must be {'a pair (h, c)' if self.has_cell_state else 'one tensor'} of {shape}."
                )
            states = torch.cat(tuple(parts), -1)
        return Sequences(inputs, states.unsqueeze(0), torch.full((batch,), time))

    def drive(self, sequences: Sequences) -> Iterator[Driven]:
        inputs = sequences.inputs.to(_state_dtype(sequences.inputs))
        module = self.module
        biases = (module.bias_ih, module.bias_hh) if module.bias else (None, None)
        weights = [
            None if weight is None else weight.detach().to(inputs.dtype)
            for weight in (module.weight_ih, module.weight_hh, *biases)
        ]
        recurrence: Recurrence
        if self.has_cell_state:
            recurrence = LSTMRecurrence(*weights)
        elif isinstance(module, nn.GRUCell):
            recurrence = GRURecurrence(*weights)
        else:
            recurrence = RNNRecurrence(*weights, nonlinearity=module.nonlinearity)
        yield Driven("", recurrence, inputs, sequences.states[0].to(inputs.dtype))


class CallableLayer(RecurrentLayer):
    """A plain callable ``step(state, input) -> state``."""

    cell_names = ("",)
    dtype = None

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step = step

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        if state is None:
            raise ValueError("`state` is required for a callable: pass the first state, (batch, state).")
        _check_tensor("inputs", inputs)
        _check_tensor("state", state)
        if inputs.ndim != 3 or state.ndim != 2 or inputs.shape[1] != state.shape[0]:
            raise ValueError(
                "`inputs` must be (time, batch, input) and `state` (batch, state) for a callable, but their shapes are "
                f"{tuple(inputs.shape)} and {tuple(state.shape)}. A map without input takes "
                f"`inputs=torch.zeros(time, {state.shape[0]}, 0)`."
            )
        self.state_sizes = (state.shape[1],)
        return Sequences(inputs, state.unsqueeze(0), torch.full((inputs.shape[1],), inputs.shape[0]))

    def drive(self, sequences: Sequences) -> Iterator[Driven]:
        state = sequences.states[0]
        returned = self._step(state, sequences.inputs[0])
        if not isinstance(returned, Tensor) or returned.shape != state.shape:
            what = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
            raise ValueError(f"`dynamics` must return a state of shape {tuple(state.shape)}, but it returned {what}.")
        yield Driven("", CallableRecurrence(self._step, state.shape[1]), sequences.inputs, state)


def _state_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to follow a trajectory in: float64, or float32 on a device that has no other.

    It costs little beside the tangent dynamics, and a rounding error made here would grow by exp(lambda_1 t).
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _map_state(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    return None if state is None else tuple(function(part) for part in state)


def _reversed_in_time(values: Tensor, lengths: Tensor) -> Tensor:
    """Return ``values``, ``(time, batch, ...)``, with the steps of each sequence in reverse order."""
    steps = torch.arange(len(values)).unsqueeze(-1)
    backwards = torch.where(steps < lengths, lengths - 1 - steps, steps).to(values.device)
    return values.gather(0, backwards.unsqueeze(-1).expand_as(values))


def _check_tensor(name: str, value: Any, size: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, not {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be of a floating point dtype, not {value.dtype}. Write `{name}.float()`.")
    if size is not None and value.shape[-1] != size:
        raise ValueError(
            f"`{name}` must have {size} features in its last dimension, but its shape is {tuple(value.shape)}."
        )
