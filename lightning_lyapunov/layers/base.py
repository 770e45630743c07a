"""A recurrent layer: its calls are sequences, and each of its cells is a recurrence that they drive."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lyapunov.kernel.recurrence import Recurrence

__all__ = ["Call", "DrivenCell", "RecurrentLayer", "Sequences", "check_tensor"]


class Sequences(NamedTuple):
    """Sequences that a layer was called with.

    Attributes:
        inputs: ``(time, batch, ...)``; what follows the end of a sequence is never read.
        states: the state of each cell before the first step, ``(cells, batch, state)``.
        lengths: steps of each sequence, ``(batch,)``, on the CPU.
        members: the member of the recorded batch that each sequence is of, ``(batch,)``, on the CPU; None: all differ.
        full_lengths: steps of each sequence as the layer was called with it, where only the first ``lengths`` of them
            are kept, ``(batch,)``, on the CPU; None: all are kept.
    """

    inputs: Tensor
    states: Tensor
    lengths: Tensor
    members: Tensor | None = None
    full_lengths: Tensor | None = None


class Call(NamedTuple):
    """One call of a layer, and the states that it ended in, as in :class:`Sequences`; None where they are not known."""

    sequences: Sequences
    final_states: Tensor | None


class DrivenCell(NamedTuple):
    """One cell of a layer, with the inputs ``(time, batch, ...)`` and the state ``(batch, state)`` it starts from."""

    name: str
    recurrence: Recurrence
    inputs: Tensor
    state: Tensor


class RecurrentLayer(ABC):
    """A layer whose calls are sequences and whose cells are recurrences.

    Attributes:
        module: the module, if it is one.
        cell_names: PyTorch's own suffixes: ``l0``, ``l0_reverse``, ``l1`` ...; one empty name for a single cell.
    """

    module: Any = None
    cell_names: tuple[str, ...]

    @property
    @abstractmethod
    def state_sizes(self) -> tuple[int, ...]:
        """The number of real directions of the state of each cell; 0 for a custom layer before its first call."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None where none are known."""

    @abstractmethod
    def read(self, inputs: Any, state: Any = None) -> Sequences:
        """Return the arguments of :func:`~lightning_lyapunov.lyapunov_spectrum` as sequences."""

    @abstractmethod
    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        """Return one call of the module's ``forward``."""

    @abstractmethod
    def drive(self, sequences: Sequences) -> Iterator[DrivenCell]:
        """Yield each cell with its inputs and its first state."""


_FLOATING = {
    "inputs": "The layer is fed with what is made of token ids: write `model_spectra(model, ids)` for the whole model, "
    "or pass `embedding(ids)`.",
    "state": "Write `state.float()`.",
}


def check_tensor(name: str, value: Any, size: int | None = None) -> None:
    """Raise an error that names the argument unless ``value`` is a real tensor whose last dimension is ``size``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, not {type(value).__name__}.")
    if value.layout is not torch.strided or value.is_meta:
        kind = "meta" if value.is_meta else str(value.layout)
        raise TypeError(f"`{name}` must be a dense tensor with values, not a {kind} tensor.")
    if value.is_complex():
        raise TypeError(f"`{name}` must be real, not {value.dtype}. Write `torch.view_as_real({name}).flatten(-2)`.")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be of a floating point dtype, not {value.dtype}. {_FLOATING[name]}")
    if size is not None and (value.ndim == 0 or value.shape[-1] != size):
        raise ValueError(
            f"`{name}` must have {size} features in its last dimension, but its shape is {tuple(value.shape)}."
        )
