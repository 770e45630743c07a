"""Take from a training step, as it passes by, the sequences that recurrent layers are called with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_lyapunov.layers.base import Call, Sequences
from lightning_lyapunov.layers.discovery import FoundLayer

__all__ = ["Recorder", "join"]


class Recorder:
    """Records what layers are called with between :meth:`start` and :meth:`stop`.

    A hook on the layer sees what the user's ``forward`` passes on, after embeddings and encoders, without calling
    anything of theirs. It copies a few members of the batch and leaves no trace. A call whose initial state is the
    final state of another goes on with its sequences: so do cells in a loop, decoders and truncated backpropagation.

    Args:
        layers: the layers to record by name, as :func:`~lightning_lyapunov.layers.discovery.find_layers` returns them.
        num_sequences: how many sequences to keep of a step, spread evenly over what the layer was called with.
        max_steps: how many steps to keep of each, from its start.

    Attributes:
        recording: whether its hooks are on the layers.
        errors: what went wrong in recording, by the name of the layer.
    """

    def __init__(self, layers: Mapping[str, FoundLayer], num_sequences: int, max_steps: int) -> None:
        self._layers = layers
        self._num_sequences, self._max_steps = num_sequences, max_steps
        self._chains: dict[str, list[_Chain]] = {}
        self.errors: dict[str, Exception] = {}
        self.recording = False

    def start(self) -> None:
        """Forget what was recorded and record from now on."""
        self.stop()
        self._chains, self.errors = {name: [] for name in self._layers}, {}
        self.recording = True
        for name, (_, module) in self._layers.items():
            if module is not None:
                module.register_forward_hook(_Hook(self, name), with_kwargs=True)

    def stop(self) -> None:
        """Record no more; remove every hook."""
        # They are looked for: of one that Ctrl-C cut short in the making, or in the removal, there is no handle.
        for module in [module for _, module in self._layers.values() if module is not None]:
            for number, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _Hook) and hook.recorder is self:
                    module._forward_hooks_with_kwargs.pop(number, None)
                    module._forward_hooks.pop(number, None)
        self.recording = False

    def sequences(self) -> dict[str, Sequences]:
        """Return what each layer was called with; a layer that was not called is not in it."""
        recorded = {name: [chain.sequences() for chain in chains] for name, chains in self._chains.items()}
        return {
            name: _select(join(batches), self._num_sequences)
            for name, batches in recorded.items()
            if any(batch.lengths.sum() for batch in batches)
        }

    def record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record one call of a layer."""
        try:
            with torch.no_grad():
                call = self._layers[name].layer.read_call(args, kwargs, output)
                if call is not None:
                    self._record(self._chains[name], call)
        except Exception as error:  # the user's forward goes on; the callback says what happened
            self.errors[name] = error

    def _record(self, chains: "list[_Chain]", call: Call) -> None:
        sequences, final = call
        batch = sequences.inputs.shape[1]
        if batch == 0:
            return
        sequences = _select(sequences, self._num_sequences)
        if final is not None:
            final = final[:, _spread(batch, self._num_sequences)]
        chain = next((chain for chain in reversed(chains) if chain.goes_on_with(sequences)), None)
        if chain is not None:
            chain.extend(sequences, final, self._max_steps)
        # Calls without end that never go on from one another would fill the memory; what came first is enough.
        elif len(chains) < 2 * self._num_sequences:
            chains.append(_Chain(sequences, final, self._max_steps))


class _Hook:
    """Passes the calls of a layer on to a recorder. In a copy or a pickle of the layer it does nothing."""

    def __init__(self, recorder: Recorder | None = None, name: str = "") -> None:
        self.recorder, self._name = recorder, name

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.recorder is not None:
            self.recorder.record(self._name, args, kwargs, output)

    def __reduce__(self) -> Any:
        return _Hook, ()


class _Chain:
    """Calls that go on from one another: a sequence for each member of the batch."""

    def __init__(self, sequences: Sequences, final: Tensor | None, max_steps: int) -> None:
        self._states = sequences.states
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._steps = 0
        self.extend(sequences, final, max_steps)

    def goes_on_with(self, sequences: Sequences) -> bool:
        """Return whether these start in the states that the chain ended in."""
        return self._final is not None and torch.equal(self._final, sequences.states.to(self._final))

    def extend(self, sequences: Sequences, final: Tensor | None, max_steps: int) -> None:
        remaining = max_steps - self._steps
        if remaining > 0:
            inputs, lengths = sequences.inputs[:remaining], sequences.lengths.clamp(max=remaining)
            self._pieces.append((inputs.clone(), lengths))
            self._steps += len(inputs)
        self._final = final

    def sequences(self) -> Sequences:
        lengths = torch.stack([lengths for _, lengths in self._pieces]).sum(0)
        if all((piece_lengths == len(inputs)).all() for inputs, piece_lengths in self._pieces):
            return Sequences(torch.cat([inputs for inputs, _ in self._pieces]), self._states, lengths)
        members = [
            torch.cat([inputs[: piece_lengths[member], member] for inputs, piece_lengths in self._pieces])
            for member in range(len(lengths))
        ]
        return Sequences(pad_sequence(members), self._states, lengths)


def join(batches: list[Sequences]) -> Sequences:
    """Return the sequences of several batches as one, the shorter ones padded."""
    longest = max(len(batch.inputs) for batch in batches)

    def padded(inputs: Tensor) -> Tensor:
        return torch.cat((inputs, inputs.new_zeros(longest - len(inputs), *inputs.shape[1:])))

    return Sequences(
        torch.cat([padded(batch.inputs) for batch in batches], 1),
        torch.cat([batch.states for batch in batches], 1),
        torch.cat([batch.lengths for batch in batches]),
    )


def _select(sequences: Sequences, count: int) -> Sequences:
    """Return a copy of at most ``count`` members of a batch."""
    members = _spread(len(sequences.lengths), count)
    return Sequences(sequences.inputs[:, members], sequences.states[:, members], sequences.lengths[members])


def _spread(batch: int, count: int) -> list[int]:
    """Return up to ``count`` indices spread evenly over ``batch``."""
    count = min(batch, count)
    return [member * batch // count for member in range(count)]
