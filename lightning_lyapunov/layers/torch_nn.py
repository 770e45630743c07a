"""The recurrent layers and cells of :mod:`torch.nn`, in closed form."""

import copy
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_lyapunov.kernel.closed_forms import GRURecurrence, LSTMRecurrence, RNNRecurrence
from lightning_lyapunov.kernel.precision import widest_dtype
from lightning_lyapunov.kernel.recurrence import Recurrence
from lightning_lyapunov.layers.base import Call, DrivenCell, RecurrentLayer, Sequences, check_tensor

__all__ = ["CellLayer", "StackedLayer"]


class StackedLayer(RecurrentLayer):
    """:class:`torch.nn.RNN`, ``GRU`` or ``LSTM``: one cell for each layer and direction."""

    def __init__(self, module: nn.RNNBase) -> None:
        self.module = module
        self._names = _positional_names(module.forward)
        self.directions = ("", "_reverse") if module.bidirectional else ("",)
        self.cell_names = tuple(f"l{i}{direction}" for i in range(module.num_layers) for direction in self.directions)
        # The tensors of a state: h, or (h, c).
        self.part_sizes = (module.proj_size or module.hidden_size, module.hidden_size)[: 1 + (module.mode == "LSTM")]

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (sum(self.part_sizes),) * len(self.cell_names)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def read(self, inputs: Any, state: Any = None, lengths: Tensor | None = None) -> Sequences:
        batched = True
        if isinstance(inputs, PackedSequence):
            check_tensor("inputs", inputs.data, self.module.input_size)
            inputs, lengths = pad_packed_sequence(inputs)
        else:
            check_tensor("inputs", inputs, self.module.input_size)
            batched = inputs.ndim == 3
            if not 2 <= inputs.ndim <= 3:
                raise ValueError(
                    "`inputs` must be (time, batch, input), (batch, time, input) with `batch_first`, or (time, input), "
                    f"but its shape is {tuple(inputs.shape)}."
                )
            if not batched:
                inputs = inputs.unsqueeze(1)
            elif self.module.batch_first:
                inputs = inputs.transpose(0, 1)
        time, batch, _ = inputs.shape
        lengths = torch.full((batch,), time, device="cpu") if lengths is None else lengths.detach().cpu().long()
        return Sequences(inputs, self._read_state(state, batch if batched else None, inputs.device), lengths)

    def _read_state(self, state: Any, batch: int | None, device: torch.device) -> Tensor:
        """Return the states of all cells, ``(cells, batch, state)``; zeros where none are given."""
        cells = len(self.cell_names)
        if state is None:
            return torch.zeros(cells, batch or 1, self.state_sizes[0], dtype=self.dtype, device=device)
        leading = (cells,) if batch is None else (cells, batch)
        states = _joined_state(state, [(*leading, size) for size in self.part_sizes])
        return states.unsqueeze(1) if batch is None else states

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        # Subclasses may name the input differently, or take more: `lengths` tells how much of a padded batch is data.
        arguments = _by_name(self._names, args, kwargs)
        inputs = arguments["input"] if "input" in arguments else next(iter(arguments.values()))
        lengths = arguments.get("lengths")
        sequences = self.read(inputs, arguments.get("hx"), None if lengths is None else torch.as_tensor(lengths))
        # The two directions end at different steps: no call goes on from both.
        if self.module.bidirectional or not (isinstance(output, tuple) and len(output) == 2):
            return Call(sequences, None)
        unbatched = isinstance(inputs, Tensor) and inputs.ndim == 2
        batch = None if unbatched else sequences.inputs.shape[1]
        return Call(sequences, self._read_state(output[1], batch, sequences.inputs.device))

    def given_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call gave as the first state."""
        return _by_name(self._names, args, kwargs).get("hx")

    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        inputs = sequences.inputs.to(widest_dtype(sequences.inputs.device))
        for layer in range(self.module.num_layers):
            cells = self._cells(layer, inputs, sequences)
            yield from cells
            if layer + 1 < self.module.num_layers:
                inputs = self._outputs(cells, sequences.lengths)

    def outputs(self, sequences: Sequences) -> Tensor:
        """Return the outputs of the last layer, ``(time, batch, output)``; zeros after the end of a sequence."""
        inputs = sequences.inputs.to(widest_dtype(sequences.inputs.device))
        for layer in range(self.module.num_layers):
            inputs = self._outputs(self._cells(layer, inputs, sequences), sequences.lengths)
        return _without_padding(inputs, sequences.lengths)

    def read_output(self, output: Any, lengths: Tensor) -> Tensor:
        """Return what the module returned as :meth:`outputs` does."""
        outputs = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) else output
        if isinstance(outputs, PackedSequence):
            outputs, _ = pad_packed_sequence(outputs)
        elif outputs.ndim == 2:
            outputs = outputs.unsqueeze(1)
        elif self.module.batch_first:
            outputs = outputs.transpose(0, 1)
        return _without_padding(outputs, lengths)

    def _cells(self, layer: int, inputs: Tensor, sequences: Sequences) -> list[DrivenCell]:
        """Return the cells of a layer, one for each direction, driven by the layer below."""
        cells = []
        for direction, suffix in enumerate(self.directions):
            name = f"l{layer}{suffix}"
            state = sequences.states[layer * len(self.directions) + direction].to(inputs)
            driving = _reversed_in_time(inputs, sequences.lengths) if suffix else inputs
            cells.append(
                DrivenCell(name, _closed_form(self.module, self.module.mode, f"_{name}", inputs), driving, state)
            )
        return cells

    def _outputs(self, cells: list[DrivenCell], lengths: Tensor) -> Tensor:
        outputs = []
        for name, recurrence, inputs, state in cells:
            output = recurrence.output(recurrence.trajectory(inputs, state))
            outputs.append(_reversed_in_time(output, lengths) if name.endswith("_reverse") else output)
        return torch.cat(outputs, -1)


class CellLayer(RecurrentLayer):
    """:class:`torch.nn.RNNCell`, ``GRUCell`` or ``LSTMCell``, called once for each step.

    For the plain functions ``inputs`` is ``(time, batch, input)``.
    """

    cell_names = ("",)

    def __init__(self, module: nn.RNNCellBase) -> None:
        self.module = module
        self._names = _positional_names(module.forward)
        self.num_parts = 1 + isinstance(module, nn.LSTMCell)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.module.hidden_size * self.num_parts,)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def read(self, inputs: Any, state: Any = None) -> Sequences:
        check_tensor("inputs", inputs, self.module.input_size)
        if inputs.ndim != 3:
            raise ValueError(f"`inputs` must be (time, batch, input), but its shape is {tuple(inputs.shape)}.")
        time, batch, _ = inputs.shape
        if state is None:
            state = torch.zeros(batch, self.state_sizes[0], dtype=self.dtype, device=inputs.device)
        else:
            state = _joined_state(state, [(batch, self.module.hidden_size)] * self.num_parts)
        return Sequences(inputs, state.unsqueeze(0), torch.full((batch,), time, device="cpu"))

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        arguments = _by_name(self._names, args, kwargs)
        inputs, state = arguments["input"], arguments.get("hx")
        if inputs.ndim == 1:
            inputs = inputs.unsqueeze(0)
            state, output = (_map_state(value, lambda part: part.unsqueeze(0)) for value in (state, output))
        empty, step = inputs.new_zeros(0, *inputs.shape), inputs.unsqueeze(0)
        return Call(self.read(step, state), self.read(empty, output).states)

    def given_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call gave as the state."""
        return _by_name(self._names, args, kwargs).get("hx")

    def outputs(self, sequences: Sequences) -> Tensor:
        """Return the states after each step, ``(time, batch, state)``."""
        (cell,) = self.drive(sequences)
        return cell.recurrence.trajectory(cell.inputs, cell.state)

    def read_output(self, output: Any, lengths: Tensor) -> Tensor:
        """Return what the module returned as :meth:`outputs` does, of one step."""
        states = torch.cat(tuple(output), -1) if isinstance(output, tuple) else output
        return states.reshape(1, -1, states.shape[-1])

    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        inputs = sequences.inputs.to(widest_dtype(sequences.inputs.device))
        module = self.module
        kind = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
        mode = next((mode for cell, mode in kind.items() if isinstance(module, cell)), None)
        recurrence = _closed_form(module, mode or f"RNN_{module.nonlinearity}", "", inputs)
        yield DrivenCell("", recurrence, inputs, sequences.states[0].to(inputs))


def _closed_form(module: nn.Module, mode: str, suffix: str, like: Tensor) -> Recurrence:
    """Return the recurrence of the weights of ``module`` that end in ``suffix``, in the dtype of ``like``."""

    def weight(kind: str) -> Tensor | None:
        name = kind + suffix
        if parametrize.is_parametrized(module, name):
            # Reading it in training mode would change the module: the spectral norm then takes a power iteration.
            made = module.get_submodule(f"parametrizations.{name}")
            value = copy.deepcopy(made, {id(parameter): parameter for parameter in made.parameters()}).eval()()
        elif hasattr(module, f"{name}_mask"):
            # A pruned weight is refreshed at the next forward; until then only its two factors are up to date.
            value = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
        elif (value := _normalised(module, name)) is None and (value := getattr(module, name, None)) is None:
            return None
        value = value.to(like)
        # A saturated gate would hide an infinite bias: a network that is not finite has no spectrum.
        return value.where(value.isfinite().all(), torch.nan)

    weights = weight("weight_ih"), weight("weight_hh"), weight("bias_ih"), weight("bias_hh")
    if mode == "LSTM":
        return LSTMRecurrence(*weights, weight_hr=weight("weight_hr"))
    if mode == "GRU":
        return GRURecurrence(*weights)
    return RNNRecurrence(*weights, nonlinearity=mode.removeprefix("RNN_").lower())


def _normalised(module: nn.Module, name: str) -> Tensor | None:
    """Return a weight that a hook of torch's older norms makes at each forward, made anew; None for any other."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(module, do_power_iteration=False)
    return None


def _positional_names(forward: Callable[..., Any]) -> list[str]:
    """Return the names of positional arguments; those behind ``*args`` have the names that torch's own layers use."""
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in signature(forward).parameters.items() if parameter.kind in positional]
    return names + ["input", "hx"][len(names) :]


def _by_name(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: given[name] for name in [*names, *given] if name in given}


def _joined_state(state: Any, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the tensors of a state side by side, ``(..., state)``, after a check of their shapes."""
    wanted = f"a tensor of shape {shapes[0]}" if len(shapes) == 1 else f"a pair of shapes {shapes[0]} and {shapes[1]}"
    parts = [state] if len(shapes) == 1 else state
    if isinstance(parts, Tensor) or not isinstance(parts, Sequence) or len(parts) != len(shapes):
        raise ValueError(f"`state` must be {wanted}, not a {type(state).__name__}.")
    for part, shape in zip(parts, shapes, strict=True):
        check_tensor("state", part)
        if tuple(part.shape) != shape:
            raise ValueError(f"`state` must be {wanted}, got shape {tuple(part.shape)}.")
    return torch.cat(tuple(parts), -1)


def _map_state(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    return None if state is None else tuple(function(part) for part in state)


def _reversed_in_time(values: Tensor, lengths: Tensor) -> Tensor:
    """Return ``values``, ``(time, batch, ...)``, with the steps of each sequence in reverse order."""
    steps = torch.arange(len(values), device="cpu").unsqueeze(-1)
    backwards = torch.where(steps < lengths, lengths - 1 - steps, steps).to(values.device)
    return values.gather(0, backwards.unsqueeze(-1).expand_as(values))


def _without_padding(values: Tensor, lengths: Tensor) -> Tensor:
    """Return ``values``, ``(time, batch, ...)``, with zeros after the end of each sequence."""
    ended = torch.arange(len(values), device="cpu").unsqueeze(-1) >= lengths
    return values.masked_fill(ended.to(values.device).unsqueeze(-1), 0)
