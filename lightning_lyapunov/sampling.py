"""Take from a training step, as it passes by, the sequences that recurrent layers are called with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lyapunov.layers import RecurrentLayer, Sequences

__all__ = ["Recorder", "join"]


class Recorder:
    """Records what layers are called with between :meth:`start` and :meth:`stop`.

    A hook on the layer sees what the user's ``forward`` passes on, after embeddings and encoders, without calling
    anything of theirs. It copies a few members of the batch and leaves no trace.

    Args:
        layers: the layers and the modules they stand for, by name.
        num_sequences: how many sequences to keep of a step, spread evenly over what the layer was called with.
        max_steps: how many steps to keep of each, from its start.
    """

    def __init__(
        self, layers: Mapping[str, tuple[nn.Module, RecurrentLayer]], num_sequences: int, max_steps: int
    ) -> None:
        self._layers = layers
        self._num_sequences, self._max_steps = num_sequences, max_steps
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, list[Sequences]] = {}
        self.errors: dict[str, Exception] = {}

    def start(self) -> None:
        """Forget what was recorded and record from now on."""
        self.stop()
        self._calls, self.errors = {name: [] for name in self._layers}, {}
        for name, (module, layer) in self._layers.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name, layer), with_kwargs=True))

    @property
    def recording(self) -> bool:
        """Whether its hooks are on the layers."""
        return bool(self._handles)

    def stop(self) -> None:
        """Record no more; remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    def sequences(self) -> dict[str, Sequences]:
        """Return what each layer was called with; a layer that was not called is not in it."""
        return {name: self._few(join(calls)) for name, calls in self._calls.items() if calls}

    def _hook(self, name: str, layer: RecurrentLayer) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                with torch.no_grad():
                    sequences = layer.read_call(*args, **kwargs)
                    if sequences.inputs.numel():
                        self._calls[name].append(self._few(sequences))
            except Exception as error:  # the user's forward goes on; the callback says what happened
                self.errors[name] = error

        return record

    def _few(self, sequences: Sequences) -> Sequences:
        """Return a copy of some members of a batch, spread evenly over it, up to the longest stretch used."""
        inputs, states, lengths = sequences
        batch = inputs.shape[1]
        count = min(self._num_sequences, batch)
        members = [i * batch // count for i in range(count)]
        lengths = lengths[members].clamp(max=self._max_steps)
        return Sequences(inputs[: int(lengths.max()), members], states[:, members], lengths)


def join(calls: list[Sequences]) -> Sequences:
    """Return the sequences of several calls as one batch, the shorter ones padded."""
    longest = max(len(call.inputs) for call in calls)

    def padded(inputs: Tensor) -> Tensor:
        return torch.cat((inputs, inputs.new_zeros(longest - len(inputs), *inputs.shape[1:])))

    return Sequences(
        torch.cat([padded(call.inputs) for call in calls], 1),
        torch.cat([call.states for call in calls], 1),
        torch.cat([call.lengths for call in calls]),
    )
